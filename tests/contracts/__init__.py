"""The contract table: a row for every cell and combinator; ``tests/test_contract.py`` holds each to all promises."""

from . import composed, context, deep, elementwise, feedback, gated, regularised, time_scales
from .row import Row

__all__ = ["ROWS"]

ROWS: dict[str, Row] = {
    **composed.ROWS,
    **context.ROWS,
    **deep.ROWS,
    **elementwise.ROWS,
    **feedback.ROWS,
    **gated.ROWS,
    **regularised.ROWS,
    **time_scales.ROWS,
}
