"""How much of a gradient is left k steps back in time, and k layers back in depth: what gates and shortcuts are for.

    python runs/gradient_paths.py [--quick]

Networks as they are initialised, on white noise. In time: ‖∂L/∂s(T - k)‖, the total derivative along all of the state s
(for an LSTM both of its parts), of a random linear L of the last output. In depth: ‖∂L/∂x‖ of the output k layers below
the last, in a stack that is run for one step. Both relative to k = 0, as the geometric mean over seeds. An LSTM is to a
plain recurrent network what a residual stack is to a plain one: s(t) = f ⊙ s(t-1) + … keeps a way on which the gradient
is only multiplied by the gate. Takes ten seconds; draws docs/pictures/gradient_paths.png.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from kept import PICTURES, RESULTS, keep, options, significant
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import elman
from elman.cells import ElmanCell, GRUCell, IRNNCell, LSTMCell
from elman.combinators import Residual, Stack, step

WIDTH, BATCH = 64, 32

IN_TIME: dict[str, Callable[[], nn.Module]] = {
    "Elman": lambda: ElmanCell(WIDTH, WIDTH),
    "Elman, orthogonal": lambda: ElmanCell(WIDTH, WIDTH, init="orthogonal"),
    "IRNN": lambda: IRNNCell(WIDTH, WIDTH),
    "GRU": lambda: GRUCell(WIDTH, WIDTH),
    "LSTM, forget bias 0": lambda: LSTMCell(WIDTH, WIDTH, forget_bias=0.0),
    "LSTM, forget bias 1": lambda: LSTMCell(WIDTH, WIDTH, forget_bias=1.0),
    "LSTM, chrono:100": lambda: LSTMCell(WIDTH, WIDTH, init="chrono:100"),
    "LSTM, no forget gate": lambda: LSTMCell(WIDTH, WIDTH, forget_gate=False),
}
IN_DEPTH: dict[str, Callable[[], nn.Module]] = {
    "plain stack": lambda: ElmanCell(WIDTH, WIDTH),
    "plain stack, xavier": lambda: ElmanCell(WIDTH, WIDTH, init="xavier"),
    "residual stack": lambda: Residual(ElmanCell(WIDTH, WIDTH)),
    "residual stack, xavier": lambda: Residual(ElmanCell(WIDTH, WIDTH, init="xavier")),
}


def norms_in_time(cell: nn.Module, lags: int) -> Tensor:
    """(lags + 1) the norm of the gradient in the state k steps before the last, over the batch."""
    xs = torch.randn(2 * lags, BATCH, WIDTH)
    ys, _, recording = elman.scan(cell, xs, record=True)
    loss = (ys[-1] * torch.randn(BATCH, WIDTH)).sum()
    leaves = pytree.tree_leaves(recording.adjoint(loss))  # (T, B, H) each
    return sum(leaf.square().sum((1, 2)) for leaf in leaves).sqrt().flip(0)[: lags + 1]


def norms_in_depth(make: Callable[[], nn.Module], layers: int) -> Tensor:
    """(layers + 1) the norm of the gradient in what the k-th layer below the last gives."""
    stack = Stack([make() for _ in range(layers + 1)])
    state = stack.initial_state(BATCH, device=torch.device("cpu"), dtype=torch.float32)
    outputs, x = [], torch.randn(BATCH, WIDTH, requires_grad=True)
    for layer, start in zip(stack.cells, state, strict=True):
        x, _ = step(layer, x, start)
        outputs.append(x)
    gradients = torch.autograd.grad((x * torch.randn(BATCH, WIDTH)).sum(), outputs)
    return torch.stack([gradient.norm() for gradient in gradients]).flip(0)


def relative(norms: Callable[[], Tensor], seeds: int) -> list[float]:
    """The geometric mean over seeds of norms by their first."""
    logs = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        found = norms().double()
        logs.append((found / found[0]).clamp_min(1e-40).log())
    return torch.stack(logs).mean(0).exp().tolist()


def draw(tables: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for axis, (where, curves) in zip(axes, tables.items(), strict=True):
        for name, curve in curves.items():
            axis.semilogy(curve, label=name)
        axis.set(xlabel=where, ylim=(1e-12, 1e3))
        axis.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
    axes[0].set_ylabel("gradient, relative to that of the last")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = options(__doc__, RESULTS / "gradient_paths.json", quick="few steps and one seed")
    parser.add_argument("--picture", type=Path, default=PICTURES / "gradient_paths.png", help="where it is drawn")
    given = parser.parse_args()
    far, seeds = (10, 1) if given.quick else (100, 5)
    torch.set_num_threads(1)
    tables = {
        "steps back in time": {n: relative(lambda m=m: norms_in_time(m(), far), seeds) for n, m in IN_TIME.items()},
        "layers back in depth": {n: relative(lambda m=m: norms_in_depth(m, far), seeds) for n, m in IN_DEPTH.items()},
    }
    shown = [k for k in (1, 2, 5, 10, 20, 50, 100) if k <= far]
    for where, curves in tables.items():
        print(f"{where:24}" + "".join(f"{k:>10}" for k in shown))
        for name, curve in curves.items():
            print(f"{name:24}" + "".join(f"{curve[k]:10.1e}" for k in shown))
    if not given.quick:
        keep(
            given.out,
            {"seeds": list(range(seeds))}
            | {
                where: {name: {k: significant(curve[k]) for k in shown} for name, curve in curves.items()}
                for where, curves in tables.items()
            },
        )
        draw(tables, given.picture)


if __name__ == "__main__":
    main()
