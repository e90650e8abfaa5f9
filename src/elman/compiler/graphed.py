"""Generated code recorded once and played back: on a GPU one launch for a piece of time, not one for each operation.

A loop of small operations on a GPU costs its launches. A CUDA graph is launched as one, but it is tied to the addresses
and sizes that it was recorded with. So what is recorded is the run of a program over a *piece*: a fixed number of steps
of full rows, from tensors that stay where they are to tensors that stay where they are. Playing it back is

    copy what is given in  →  launch the graph  →  copy the results out

The piece, not T, is what was recorded: sequences of any length are cut into pieces, with the state carried from one to
the next, and what a graph holds on to is bounded. Copying in what is given is what makes it sound that weights are new
tensors at every call (casts under autocast, parametrisations) and that inputs lie in memory in any way. Random numbers
are drawn before the program and are inputs as well.

Whatever does not fit runs as it would have: a piece whose number of rows changes, a few steps, the second derivative,
a stream that is being recorded already. What records is given (``Recorder``), so the rest needs no GPU.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Hashable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import UnfoldWarning
from ..packing import Rows
from .interpret import Runner

__all__ = ["SWITCH", "Cuda", "Graphs", "Recorder", "forget", "graphs_on", "run", "steps_of_piece"]

SWITCH = "ELMAN_CUDA_GRAPHS"  # the environment variable; "0" turns recording and playing off


class Recorder(Protocol):
    """What can record work on a device."""

    def order(self, device: torch.device) -> Hashable | None:
        """What puts work on the device in order now (its stream); None while nothing can be recorded there."""

    def record(self, work: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        """The results of the work, not computed yet, and what computes them anew in place, from the same tensors."""


class Cuda:
    """Records with ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.sides: dict[Hashable, torch.cuda.Stream] = {}

    def order(self, device: torch.device) -> Hashable | None:
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return None
            return device.index, torch.cuda.current_stream().cuda_stream

    def record(self, work: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
        with torch.cuda.device(device):
            current = torch.cuda.current_stream()
            # cuBLAS has one workspace for each stream it was called on, and graphs recorded on one stream share it:
            # so graphs that are played on different streams, perhaps at once, are recorded on different ones too.
            here = device.index, current.cuda_stream
            if here not in self.sides:
                self.sides[here] = torch.cuda.Stream()
            side = self.sides[here]
            side.wait_stream(current)
            with torch.cuda.stream(side):
                work()  # loads kernels and makes workspaces, which cannot be done while recording
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()  # with a memory pool of its own
            # Other threads (that of a data loader, for one) may go on using the device meanwhile.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                results = work()
        return results, graph.replay


class Recorded:
    """One recorded run of a program: its own inputs and results, and what computes these from those."""

    def __init__(
        self, recorder: Recorder, runner: Runner, rows: Rows, reverse: bool, parts: tuple[list[Tensor], ...]
    ) -> None:
        flat = [t for part in parts for t in part]
        if len({t.device for t in flat}) > 1:
            raise RuntimeError("its inputs are on several devices")  # a number read on the CPU would be recorded
        with torch.inference_mode(False), torch.no_grad():
            own = [[torch.empty_like(t) for t in part] for part in parts]
            self.given = [t for part in own for t in part]
            torch._foreach_copy_(self.given, flat)  # what is gathered by an index needs one that exists
            results, self.play = recorder.record(lambda: runner(rows, reverse, *own), self.given[0].device)
        leaves, self.spec = pytree.tree_flatten(results)
        self.results = [leaf for leaf in leaves if leaf is not None]
        self.present = [leaf is not None for leaf in leaves]

    def __call__(self, parts: tuple[list[Tensor], ...]) -> Any:
        torch._foreach_copy_(self.given, [t for part in parts for t in part])
        self.play()
        fresh = [torch.empty_like(t) for t in self.results]
        torch._foreach_copy_(fresh, self.results)
        found = iter(fresh)
        return pytree.tree_unflatten([next(found) if here else None for here in self.present], self.spec)


class Graphs:
    """Runs programs, and records those that come again.

    At most ``most`` recordings are kept, those played last. A piece is about ``rows`` rows, but no more than
    ``longest`` steps; fewer steps than ``fewest`` are not worth the copies.
    """

    def __init__(
        self, recorder: Recorder, most: int = 16, rows: int = 2048, longest: int = 128, fewest: int = 8
    ) -> None:
        self.recorder, self.most, self.rows, self.longest, self.fewest = recorder, most, rows, longest, fewest
        self.known: dict[Hashable, Recorded | Literal["once", "never"]] = {}  # the one used last comes last
        self.warned: set[str] = set()
        # From the copies in to the copies out a recording serves one thread; on the device its stream keeps the order.
        self.lock = threading.RLock()

    def steps(self, batch: int) -> int:
        """The steps of a piece of B full rows."""
        return min(max(self.rows // max(batch, 1), 16), self.longest)

    def run(self, runner: Runner, rows: Rows, reverse: bool, *parts: list[Tensor]) -> Any:
        """``runner(rows, reverse, *parts)``, played back where it was recorded, and recorded the second time."""
        if self._suits(runner, rows, parts):
            order = self.recorder.order(parts[1][0].device)  # a loop has a state
            if order is not None:
                with self.lock:
                    found = self._find(runner, rows, reverse, parts, order)
                    if found is not None:
                        return found(parts)
        return runner(rows, reverse, *parts)

    def _suits(self, runner: Runner, rows: Rows, parts: tuple[list[Tensor], ...]) -> bool:
        if not (runner.loops and rows.uniform and rows.batch and rows.steps >= self.fewest):
            return False
        if torch._C._len_torch_dispatch_stack():  # someone wants to see every operation
            return False
        return all(type(t) in (Tensor, nn.Parameter) for part in parts for t in part)

    def _find(
        self, runner: Runner, rows: Rows, reverse: bool, parts: tuple[list[Tensor], ...], order: Hashable
    ) -> Recorded | None:
        # Shapes, dtypes and devices of all inputs follow from the program, B and the steps.
        key = (runner, rows.steps, rows.batch, reverse, order, _settings())
        found = self.known.pop(key, None)
        self.known[key] = found or "once"
        while len(self.known) > self.most:
            del self.known[next(iter(self.known))]
        if found != "once":
            return found if isinstance(found, Recorded) else None
        self.known[key] = "never"
        try:
            made = self.known[key] = Recorded(self.recorder, runner, rows, reverse, parts)
        except RuntimeError as error:  # of CUDA, no memory among them; a mistake of the program shows when it runs
            self._warn(error)
            return None
        return made

    def _warn(self, error: BaseException) -> None:
        while isinstance(error.__context__, RuntimeError):  # ending a recording that failed raises once more
            error = error.__context__
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, torch.OutOfMemoryError):
            why = "there is no memory for it"
        if why not in self.warned:
            self.warned.add(why)
            warnings.warn(
                f"a program could not be recorded as a CUDA graph and runs operation by operation: {why}. The results "
                f"are the same. {SWITCH}=0 in the environment turns recording off.",
                UnfoldWarning,
                stacklevel=2,
            )

    def forget(self) -> None:
        """Drop all recordings."""
        with self.lock:
            self.known.clear()


def _settings() -> Hashable:
    """What of PyTorch's settings decides which kernels run: a recording keeps those it was made with."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        matmul.fp32_precision,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        cudnn.conv.fp32_precision,  # type: ignore[attr-defined]  # the module is replaced by an object when imported
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
    )


_graphs: dict[str, Graphs] = {"cuda": Graphs(Cuda())}  # by type of device


def graphs_on(device: torch.device) -> Graphs | None:
    """Who records and plays on a device, None where nobody does."""
    found = _graphs.get(device.type)
    return None if found is None or os.environ.get(SWITCH) == "0" else found


def steps_of_piece(runner: Runner, device: torch.device, batch: int) -> int | None:
    """The steps after which to cut a program's run, so that it can be played; None for no cut."""
    graphs = graphs_on(device)
    return graphs.steps(batch) if graphs is not None and runner.loops else None


def run(runner: Runner, device: torch.device, rows: Rows, reverse: bool, *parts: list[Tensor]) -> Any:
    """``runner(rows, reverse, *parts)``, the parts being xs, state, weights and draws, by the fastest way there is."""
    graphs = graphs_on(device)
    return runner(rows, reverse, *parts) if graphs is None else graphs.run(runner, rows, reverse, *parts)


def forget() -> None:
    """Drop all recordings, and the memory they hold."""
    for graphs in _graphs.values():
        graphs.forget()
