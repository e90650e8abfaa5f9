"""Everything that elman raises on purpose.

ElmanError
├── UsageError                  the call or command itself is wrong (exit code 2)
│   ├── CellError               the cell does not follow the protocol forward(x, state) -> (y, state)
│   │   └── StateError          a state differs in structure, shape, dtype or device from what the cell carries on
│   ├── InputError              xs, constants or lengths do not fit
│   └── OptionError             an unknown name or impossible value; suggests the nearest known one
├── UnfoldError                 the step cannot be unfolded by a fast backend (backend="auto" falls back)
│   ├── MixedRowsError          rows of the batch are mixed with one another
│   ├── DataDependentError      Python control flow depends on tensor values
│   ├── MutationError           the step changes a buffer or a Python attribute of the module
│   ├── CapturedTensorError     a tensor that requires gradients is captured from outside the module
│   └── UnsupportedError        an operation that this backend does not know
├── ForwardModeError            forward-mode differentiation through a fast backend
├── DataError                   a file that cannot be used: names file, place and fix (exit code 1)
├── RunError                    a run directory or checkpoint that cannot be used or continued (exit code 1)
└── TrainingError               training cannot go on, for example the loss is not finite (exit code 1)
"""

from __future__ import annotations

__all__ = [
    "CapturedTensorError",
    "CellError",
    "DataDependentError",
    "DataError",
    "ElmanError",
    "ForwardModeError",
    "InputError",
    "MixedRowsError",
    "MutationError",
    "OptionError",
    "RunError",
    "StateError",
    "TrainingError",
    "UnfoldError",
    "UnfoldWarning",
    "UnsupportedError",
    "UsageError",
]


class ElmanError(Exception):
    """Base of every error that elman raises on purpose; its message is one paragraph with the way out."""


class UsageError(ElmanError, ValueError):
    """The call or command itself is wrong."""


class CellError(UsageError):
    """The cell does not follow the protocol ``forward(x, state) -> (y, state)``."""


class StateError(CellError):
    """A state differs in structure, shape, dtype or device from the one the cell carries on."""


class InputError(UsageError):
    """``xs``, ``constants`` or ``lengths`` do not fit the cell or one another."""


class OptionError(UsageError):
    """An unknown name or an impossible value for an option."""

    @classmethod
    def unknown(cls, what: str, given: str, known: list[str] | tuple[str, ...]) -> OptionError:
        """``unknown cell 'lstmm': did you mean 'lstm'? Known: gru, lstm.``"""
        import difflib

        near = difflib.get_close_matches(given.lower(), known, n=1, cutoff=0.5)
        hint = f": did you mean {near[0]!r}?" if near else "."
        return cls(f"unknown {what} {given!r}{hint} Known: {', '.join(known)}.")


class UnfoldError(ElmanError):
    """The step cannot be unfolded by a fast backend; ``backend="auto"`` runs the plain loop instead."""


class MixedRowsError(UnfoldError):
    """Rows of the batch are mixed with one another, so sequences are not independent."""


class DataDependentError(UnfoldError):
    """Python control flow in the step depends on tensor values."""


class MutationError(UnfoldError):
    """The step changes a buffer or a Python attribute of its module."""


class CapturedTensorError(UnfoldError):
    """A tensor that requires gradients is captured from outside the module."""


class UnsupportedError(UnfoldError):
    """The step uses an operation that the backend does not know."""


class ForwardModeError(ElmanError, NotImplementedError):
    """Forward-mode differentiation was asked of a backend that has no such rule."""


class DataError(ElmanError):
    """A data file that cannot be used; the message names file, place and fix."""


class RunError(ElmanError):
    """A run directory or checkpoint that cannot be used or continued."""


class TrainingError(ElmanError):
    """Training cannot go on."""


class UnfoldWarning(UserWarning):
    """A step runs on the plain loop; names the operation, the user's line and the way out."""


def counted(number: int, noun: str = "token") -> str:
    """``1 token``, ``2 tokens``: how the messages count."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
