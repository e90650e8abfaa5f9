"""RNN, LSTM and GRU: torch.nn's layers, with the recurrence unfolded by elman.

A layer here is torch.nn's own class with another ``forward``: the same constructor, parameters, state_dict,
seeded initialisation and errors. What is unfolded is a ``Stack`` of cells of ``elman.cells`` that have no values of
their own: all layers at once, or, where directions meet after every layer, one layer and direction after the other.
The layer's weights stand in for the cells' parameters, by name.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from .cells import ElmanCell, GatedCell, GRUCell, LSTMCell
from .combinators import Stack
from .directions import side_by_side
from .errors import InputError
from .packing import Rows, rows_of
from .unfold import unfold

if TYPE_CHECKING:
    from .compiler.autograd import Run

__all__ = ["GRU", "LSTM", "RNN"]


class _Unfolded(nn.RNNBase):
    """The forward that the three layers share; ``_cell`` says which cell is unfolded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._build_cells()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._build_cells()

    def _build_cells(self) -> None:
        """Beforehand, as Dynamo can look a stack up in ``forward`` but not build one."""
        for training in (False, True):
            for depths in self._groups():
                self._stack(depths, training)

    def _groups(self) -> list[range]:
        """The layers that are unfolded at once: all, unless each has to wait for both directions of the one below."""
        count = self.num_layers
        return [range(depth, depth + 1) for depth in range(count)] if self.bidirectional else [range(count)]

    def _stack(self, depths: range, training: bool) -> nn.Module:
        """The layers of those depths as one cell: where it is but one, that itself."""
        width = (self.proj_size or self.hidden_size) * (2 if self.bidirectional else 1)
        cells = [self._cell(width if depth else self.input_size, depth) for depth in depths]
        if len(cells) == 1:
            return cells[0]
        dropout = self.dropout if training and len(cells) > 1 else 0.0
        key = (*map(id, cells), dropout)
        if key not in _skeletons.stacks:
            _skeletons.stacks[key] = Stack(cells, dropout=dropout)
        return _skeletons.stacks[key]

    def _cell(self, input_size: int, depth: int) -> GatedCell:
        raise NotImplementedError

    def forward(self, input: Any, hx: Any = None, *, lengths: Tensor | list[int] | None = None) -> Any:
        if torch.compiler.is_compiling() or "torch._dynamo" not in sys.modules:
            return _run(self, input, hx, lengths)
        return _undisturbed()(self, input, hx, lengths)


class RNN(_Unfolded, nn.RNN):
    """torch.nn.RNN on ``ElmanCell``: h(t) = φ(U x(t) + b + W h(t-1) + b'), φ tanh or relu.

    Constructor, parameters and results are those of torch.nn.RNN. Input (T, B, D), (B, T, D) with
    batch_first, (T, D) or a PackedSequence; ``hx`` (L·directions, B, H). Gives ys (T, B, directions·H) and
    the final state. ``lengths`` (B,) is an alternative to packing: each sequence ends at its own length, ys
    are zero from there on, the padding is never read. Raises what torch.nn.RNN raises, and InputError for
    lengths that do not fit.
    """

    def _cell(self, input_size: int, depth: int) -> GatedCell:
        return _skeleton(ElmanCell, depth, input_size, self.hidden_size, squash=self.nonlinearity, bias=self.bias)


class LSTM(_Unfolded, nn.LSTM):
    """torch.nn.LSTM on ``LSTMCell``, which has its equations; ``proj_size`` included.

    Constructor, parameters and results are those of torch.nn.LSTM. Input (T, B, D), (B, T, D) with
    batch_first, (T, D) or a PackedSequence; ``hx`` a pair of (L·directions, B, P) and (L·directions, B, H),
    P = proj_size or else H. Gives ys (T, B, directions·P) and the final pair. ``lengths`` as in ``RNN``.
    Raises what torch.nn.LSTM raises, and InputError for lengths that do not fit.
    """

    def _cell(self, input_size: int, depth: int) -> GatedCell:
        return _skeleton(LSTMCell, depth, input_size, self.hidden_size, proj_size=self.proj_size, bias=self.bias)


class GRU(_Unfolded, nn.GRU):
    """torch.nn.GRU on ``GRUCell`` with reset_after=True, which has its equations.

    Constructor, parameters and results are those of torch.nn.GRU. Input (T, B, D), (B, T, D) with
    batch_first, (T, D) or a PackedSequence; ``hx`` (L·directions, B, H). Gives ys (T, B, directions·H) and
    the final state. ``lengths`` as in ``RNN``. Raises what torch.nn.GRU raises, and InputError for lengths
    that do not fit.
    """

    def _cell(self, input_size: int, depth: int) -> GatedCell:
        return _skeleton(GRUCell, depth, input_size, self.hidden_size, bias=self.bias)


class _Skeletons(threading.local):
    """Cells without values, each thread its own: while weights stand in for parameters, a cell is changed."""

    def __init__(self) -> None:
        self.cells: dict[Any, GatedCell] = {}
        self.stacks: dict[Any, Stack] = {}


_skeletons = _Skeletons()


def _skeleton(kind: type[GatedCell], depth: int, input_size: int, hidden_size: int, **options: Any) -> GatedCell:
    key = (kind, depth, input_size, hidden_size, *options.values())
    if key not in _skeletons.cells:
        _skeletons.cells[key] = kind(input_size, hidden_size, device="meta", **options)
    return _skeletons.cells[key]


def _run(layer: _Unfolded, input: Any, hx: Any, lengths: Tensor | list[int] | None) -> tuple[Any, Any]:
    layer._update_flat_weights()
    kind = _packed if isinstance(input, PackedSequence) else _padded
    return kind(layer, input, hx, lengths)


@lru_cache(maxsize=1)
def _undisturbed() -> Callable[..., tuple[Any, Any]]:
    """``_run`` for a graph that breaks around the layer: Dynamo must not compile its helpers one by one."""
    return torch.compiler.disable(_run)


def _padded(layer: _Unfolded, input: Tensor, hx: Any, lengths: Tensor | list[int] | None) -> tuple[Any, Any]:
    batched = _check_dimensions(layer, input, hx)
    time, batch = (1, 0) if layer.batch_first else (0, 1)
    if not batched:
        input = input.unsqueeze(batch)
        hx = _each(lambda h: h.unsqueeze(1), hx)
    if hx is None:
        hx = _zeros(layer, input, input.size(batch))
    layer.check_forward_args(input, hx, None)
    if input.size(time) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    xs = input.transpose(0, 1) if layer.batch_first else input  # (T, B, D)
    rows = rows_of(xs.size(0), xs.size(1), lengths, xs.device)
    ys, final = _unfold_layers(layer, rows.pack(xs), rows, layer.permute_hidden(hx, rows.order))
    ys = rows.unpack(ys)
    if layer.batch_first:
        ys = ys.transpose(0, 1)
    if rows.order is not None:
        final = layer.permute_hidden(final, torch.argsort(rows.order))
    if batched:
        return ys, final
    return ys.squeeze(batch), _each(lambda h: h.squeeze(1), final)


def _packed(layer: _Unfolded, input: PackedSequence, hx: Any, lengths: object) -> tuple[PackedSequence, Any]:
    if lengths is not None:
        raise InputError("a PackedSequence already has its lengths: leave lengths out, or pass a padded tensor.")
    data, batch_sizes, order, restore = input
    sizes = tuple(batch_sizes.tolist())
    if isinstance(layer, nn.LSTM) and not torch.is_autocast_enabled(data.device.type):
        _multiply_none(data, _weights(layer)["weight_ih_l0"])  # torch.nn.LSTM alone does not check this beforehand
    hx = _zeros(layer, data, sizes[0]) if hx is None else layer.permute_hidden(hx, order)
    layer.check_forward_args(data, hx, batch_sizes)
    ys, final = _unfold_layers(layer, data, Rows.packed(sizes, sizes[0]), hx)
    return PackedSequence(ys, batch_sizes, order, restore), layer.permute_hidden(final, restore)


def _unfold_layers(layer: _Unfolded, xs: Tensor, rows: Rows, hx: Any) -> tuple[Tensor, Any]:
    """Packed xs (N, D) and the initial state, (L·directions, B, ·), through all layers and directions."""
    pair = isinstance(layer, nn.LSTM)
    weights = _weights(layer)
    states = _states(layer, xs, hx, weights["weight_hh_l0"])
    initial = list(zip(*(h.unbind(0) for h in states), strict=True))
    directions = 2 if layer.bidirectional else 1
    lower = _autocast_dtype(layer, xs)
    finals: list[Any] = [None] * len(initial)
    for depths in layer._groups():
        if depths.start and layer.dropout and layer.training:
            xs = F.dropout(xs, layer.dropout)
        ats = [[depth * directions + direction for depth in depths] for direction in range(directions)]
        runs = [_unfolding(layer, depths, at, rows, xs, initial, weights) for at in ats]
        found = [runs[0](None)] if directions == 1 else side_by_side(*runs)
        ys = [y.to(lower or xs.dtype) for y, _ in found]
        for at, (_, final) in zip(ats, found, strict=True):
            for index, leaves in zip(at, (final,) if len(depths) == 1 else final, strict=True):
                finals[index] = leaves if pair else (leaves,)
        xs = ys[0] if directions == 1 else torch.cat(ys, -1)
    last = tuple(torch.stack(leaves).to(lower or leaves[0].dtype) for leaves in zip(*finals, strict=True))
    return xs, last if pair else last[0]


def _unfolding(
    layer: _Unfolded, depths: range, at: list[int], rows: Rows, xs: Tensor, initial: list[Any], weights: dict[str, Any]
) -> Callable[[Run | None], Any]:
    """Unfolds the layers of some depths in one direction, which are ``at`` those places among all, by what is given."""
    stack, alone = layer._stack(depths, layer.training), len(depths) == 1
    own = {
        ("" if alone else f"cells.{place}.") + name.rpartition("_l")[0]: weights[name]
        for place, index in enumerate(at)
        for name in layer._all_weights[index]
    }
    states = tuple(initial[index] if isinstance(layer, nn.LSTM) else initial[index][0] for index in at)
    state, reverse = states[0] if alone else states, layer.bidirectional and at[0] % 2 == 1
    return lambda run: unfold(stack, rows, xs, state, reverse=reverse, parameters=own, _run=run)


def _weights(layer: _Unfolded) -> dict[str, Any]:
    """The weights by name, as torch.nn has just read them: masked by pruning, normalised, substituted."""
    return dict(zip(layer._flat_weights_names, layer._flat_weights, strict=True))


def _check_dimensions(layer: _Unfolded, input: Tensor, hx: Any) -> bool:
    """Whether the input is a batch. Raises, in torch.nn's words, for another number of dimensions."""
    kind = layer.mode.partition("_")[0]
    if input.dim() not in (2, 3):
        tensor = " tensor" if kind == "RNN" else ""
        raise ValueError(f"{kind}: Expected input to be 2D or 3D, got {input.dim()}D{tensor} instead")
    if hx is None:
        return input.dim() == 3
    if kind == "LSTM":
        given, names = f"({hx[0].dim()}-D, {hx[1].dim()}-D) tensors", "hx and cx"
        fits = hx[0].dim() == input.dim() == hx[1].dim()
    else:
        given, names, fits = f"{hx.dim()}-D tensor", "hx", hx.dim() == input.dim()
    if not fits:
        batched = "batched" if input.dim() == 3 else "unbatched"
        expected = f"For {batched} {input.dim()}-D input, {names} should also be {input.dim()}-D"
        raise RuntimeError(f"{expected} but got {given}")
    return input.dim() == 3


def _states(layer: _Unfolded, xs: Tensor, hx: Any, weight: Tensor) -> list[Tensor]:
    """The leaves of the initial state. Raises RuntimeError, as torch.nn does, for a dtype that cannot be."""
    states = list(hx) if isinstance(layer, nn.LSTM) else [hx]
    if torch.is_autocast_enabled(xs.device.type):
        return states
    _multiply_none(states[0][0], weight)
    for index, s in enumerate(states[1:], 1):  # the LSTM's s meets no weight, so it may be narrower, or float32
        wide = torch.promote_types(s.dtype, xs.dtype)
        if wide not in (xs.dtype, torch.float32):
            raise RuntimeError(f"the cell state must have the dtype of the input, {xs.dtype}; got {s.dtype}.")
        states[index] = s.to(wide)
    return states


def _multiply_none(rows: Tensor, weight: Tensor) -> None:
    """Multiply no rows with a weight: what does not fit raises torch's own error."""
    if rows.dtype != weight.dtype:
        F.linear(rows[:0], weight)


def _autocast_dtype(layer: _Unfolded, xs: Tensor) -> torch.dtype | None:
    """The dtype in which autocast has torch.nn's layer answer: the lower one, save for GRU on the CPU."""
    device = xs.device.type
    if not torch.is_autocast_enabled(device) or xs.dtype == torch.float64:
        return None
    if device == "cpu" and isinstance(layer, nn.GRU):
        return None
    return torch.get_autocast_dtype(device)


def _zeros(layer: _Unfolded, input: Tensor, batch: int) -> Any:
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h = input.new_zeros(count, batch, layer.proj_size or layer.hidden_size)
    return (h, input.new_zeros(count, batch, layer.hidden_size)) if isinstance(layer, nn.LSTM) else h


def _each(change: Callable[[Tensor], Tensor], hx: Any) -> Any:
    """``change`` of a state that is a tensor, a pair of tensors or None."""
    if hx is None or isinstance(hx, Tensor):
        return hx if hx is None else change(hx)
    return tuple(change(h) for h in hx)
