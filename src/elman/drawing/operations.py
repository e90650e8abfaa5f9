"""What views do to the atoms of a tensor, and which operations are products or leave an atom the one it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .values import Atom, Value, joined, rows_kept

__all__ = ["AFFINE", "PRODUCTS", "SHAPE_ALONE", "after_view", "is_view"]

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear", "convolution", "embedding"}
"""Products of a value with a weight, or of two values."""

AFFINE = {"add", "sub", "rsub", "mul", "div", "neg", "where", "masked_fill", "native_dropout", "_to_copy"}
"""With one value among constants, biases and masks, the result is that value, shifted and scaled."""

SHAPE_ALONE = {
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like", "new_zeros",
    "new_ones", "new_full", "new_empty", "new_empty_strided", "bernoulli",
}  # fmt: skip
"""What is made like a tensor, but not of it."""

_SAME = {"clone", "detach", "alias", "_to_copy", "lift_fresh", "contiguous", "lift_fresh_copy", "view_as"}
_OTHERS = {
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "select",
    "slice", "split", "split_with_sizes", "unbind", "flip", "stack", "cat",
    "constant_pad_nd",
}  # fmt: skip

Join = Callable[..., Atom]


def is_view(name: str) -> bool:
    """Whether an operation only shows, or puts side by side, what is there."""
    return name in _SAME or name in _OTHERS


def after_view(name: str, args: Any, values: list[Value], outs: list[Tensor], join: Join) -> list[Value]:
    """The values of what a view gives."""
    if name in ("stack", "cat"):
        return [_side_by_side(name, args, values, outs[0], join)]
    value = values[0]
    if not value.several:
        return [value.whole(tuple(out.shape)) for out in outs]
    if name in _SAME:
        return [value] * len(outs)
    if name == "constant_pad_nd":
        return [_padded(args, value, outs[0])]
    parts = _taken(name, args, value, outs)
    if parts is not None:
        return parts
    dim = _new_place(name, args, value, outs[0])
    if dim is None:
        return [Value((join(value.atoms),), (outs[0].shape[0],), 0)]
    size = outs[0].shape[dim]
    sizes = value.sizes
    if size != sum(sizes):  # folded together with what lies beside it
        sizes = tuple(n * size // sum(sizes) for n in sizes)
    return [Value(value.atoms, sizes, dim)]


def _taken(name: str, args: Any, value: Value, outs: list[Tensor]) -> list[Value] | None:
    """Pieces of a value, where they are cut along its parts."""
    source: Tensor = args[0]
    if name == "flip":
        turned = value.dim in {d % source.dim() for d in args[1]}
        return [Value(value.atoms[::-1], value.sizes[::-1], value.dim) if turned else value]
    if name not in ("select", "slice", "split", "split_with_sizes", "unbind"):
        return None
    default = 2 if name.startswith("split") else 1
    dim = (args[default] if len(args) > default and name != "select" and name != "slice" else 0) % source.dim()
    if name in ("select", "slice"):
        dim = (args[1] if len(args) > 1 else 0) % source.dim()
    removes = name in ("select", "unbind")
    if dim != value.dim:
        return [value.moved(value.dim - (removes and dim < value.dim))] * len(outs)
    if name == "select":
        at = args[2] % source.shape[dim]
        return [_settled(value.cut(at, at + 1), outs[0])]
    if name == "slice":
        start, stop, step = _bounds(args, source.shape[dim])
        pieces = [value.cut(at, at + 1) for at in range(start, stop, step)] if step > 1 else [value.cut(start, stop)]
        atoms = tuple(a for piece in pieces for a in piece.atoms)
        return [_settled(Value(atoms, tuple(n for piece in pieces for n in piece.sizes), dim), outs[0])]
    found, at = [], 0
    for out in outs:
        size = 1 if removes else out.shape[dim]
        found.append(_settled(value.cut(at, at + size), out))
        at += size
    return found


def _padded(args: Any, value: Value, out: Tensor) -> Value:
    """Zeros before and after the parts."""
    at = 2 * (out.dim() - 1 - value.dim)
    before, after = args[1][at : at + 2] if at < len(args[1]) else (0, 0)
    if before < 0 or after < 0:
        value = value.cut(max(0, -before), sum(value.sizes) + min(0, after))
    left, right = ([Atom("nothing") for _ in range(n)] for n in (max(before, 0), max(after, 0)))
    atoms, sizes = (*left, *value.atoms, *right), (*[1] * len(left), *value.sizes, *[1] * len(right))
    return _settled(Value(atoms, sizes, value.dim), out)


def _settled(value: Value, out: Tensor) -> Value:
    return value if value.several else value.whole(tuple(out.shape))


def _bounds(args: Any, size: int) -> tuple[int, int, int]:
    given = [*args[2:5], None, None, None]
    start, stop = (0 if given[0] is None else given[0]), (size if given[1] is None else given[1])
    start, stop = (max(0, n + size) if n < 0 else min(n, size) for n in (start, stop))
    return start, stop, 1 if given[2] is None or len(args) < 5 else given[2]


def _new_place(name: str, args: Any, value: Value, out: Tensor) -> int | None:
    """The dimension of the result along which the parts lie."""
    source, dim = args[0], value.dim
    rank = source.dim()
    if name == "t":
        return rank - 1 - dim
    if name == "transpose":
        a, b = args[1] % rank, args[2] % rank
        return {a: b, b: a}.get(dim, dim)
    if name == "permute":
        return [d % rank for d in args[1]].index(dim)
    if name == "unsqueeze":
        return dim + (args[1] % (rank + 1) <= dim)
    if name == "expand":
        return dim + out.dim() - rank
    return rows_kept(tuple(source.shape), tuple(out.shape), dim, len(value.atoms))


def _side_by_side(name: str, args: Any, values: list[Value], out: Tensor, join: Join) -> Value:
    dim = (args[1] if len(args) > 1 else 0) % out.dim()
    if not any(v.varies for v in values):
        return Value(params=frozenset().union(*(v.params for v in values)))
    across = [v for v in values if v.several and (name == "stack" or v.dim != dim)]
    if across:
        places = {v.dim + (name == "stack" and dim <= v.dim) for v in across}
        same = len(places) == 1 and len({v.sizes for v in across}) == 1
        if not same:
            return Value((join(joined(values)),), (out.shape[0],), 0)
        parts = []
        for i in range(len(across[0].atoms)):
            mine = (v.atoms[i : i + 1] if v in across else v.atoms for v in values)
            parts.append(join(tuple(a for atoms in mine for a in atoms), i))
        return Value(tuple(parts), across[0].sizes, places.pop())
    atoms: list[Atom] = []
    sizes: list[int] = []
    for tensor, value in zip(args[0], values, strict=True):
        length = 1 if name == "stack" else tensor.shape[dim]
        atoms += value.atoms if value.varies else [Atom("nothing")]
        sizes += value.sizes if value.several else [length]
    return Value(tuple(atoms), tuple(sizes), dim)
