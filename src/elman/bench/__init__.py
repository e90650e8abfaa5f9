"""What elman costs beside its rivals: ``elman bench``, in the order in which it happens.

cells     the cells, as elman has them and as loops by hand
rivals    the ways to unfold one, and the check that they compute the same
machine   what the figures are of
timing    calls that take turns; the machine's own peak
apart     what needs a fresh process: memory, the first call
beside    JAX in an environment of its own, ``jax_scan`` what runs there
extras    what is measured once: underflow, a single step, the unrolled loop
suite     all of it, into one dict
targets   what is aimed at and what was reached
"""
