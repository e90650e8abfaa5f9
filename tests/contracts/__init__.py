"""The contract table: a row for every cell and combinator; ``tests/test_contract.py`` holds each to all promises."""

from . import composed, context, elementwise, feedback, gated, regularised
from .row import Row

__all__ = ["ROWS"]

ROWS: dict[str, Row] = {
    **composed.ROWS,
    **context.ROWS,
    **elementwise.ROWS,
    **feedback.ROWS,
    **gated.ROWS,
    **regularised.ROWS,
}
