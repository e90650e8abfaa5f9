"""The ``interpret`` backend: a program as Python source that calls ATen, with preallocated buffers.

Runs every step that splits, on any device. One function is generated for the whole program; ``source`` shows it.
Inside a loop every result that is wanted later is written straight into its place in a buffer over all steps, and
what is not is written into one scratch buffer that all steps share.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from . import gemm
from .emit import Names, call
from .independence import is_varying, rows_of_node
from .loops import LoopWriter
from .program import Loop, Program, Segment
from .step import Step, arguments, batch_multiple

__all__ = ["compile_program", "compile_step"]


MakeKernel = Callable[[Step, Loop, list[fx.Node], list[fx.Node]], Any]
"""Gives the kernel of a loop that stores the values of some nodes, perhaps in place of others; or None."""


@dataclass(frozen=True, slots=True, eq=False)
class Runner:
    """A generated function, with its source, and whether it has a loop over the steps.

    ``known`` is what its runs left for those like them (see ``llvm.replay``).
    """

    function: Callable[..., Any]
    source: str
    loops: bool = False
    known: dict[Hashable, Any] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def compile_program(program: Program, name: str, ragged: bool, kernels: MakeKernel | None = None) -> Runner:
    """The program as a function ``(rows, reverse, xs, state, weights, draws) -> (ys, final, kept, sums)``.

    Packed leaves are (N, …), state leaves (B, …). With ``ragged`` it also serves sequences of unequal lengths.
    Loops for which ``kernels`` gives machine code are one call of that. ``source`` is the source of the function.
    """
    source, names = Writer(program, name, ragged, kernels).write()
    exec(compile(source, f"<elman {name}>", "exec"), names)
    return Runner(names[name], source, bool(program.loops))


class Writer:
    """Writes the source of one program. Values over all steps ("flat") keep the shape of the step with N for B."""

    def __init__(self, program: Program, name: str, ragged: bool, kernels: MakeKernel | None = None) -> None:
        self.program, self.step, self.name, self.ragged = program, program.step, name, ragged
        self.unit = program.step.unit
        self.names = Names()
        self.lines: list[str] = []
        self.flat: dict[fx.Node, str] = {}  # varying values over all steps
        self.fixed: dict[fx.Node, str] = {}  # invariant values
        self.finals: dict[int, str] = {}
        self.taken: set[str] = set()
        self.last_use = self._last_uses()
        self.kernels = kernels
        self.room: dict[fx.Node, str] = {}  # buffers over all steps, rows in front
        self.wide: dict[int, str] = {}  # loop states whose sequence has room for the first state in front

    # -- names and small pieces ---------------------------------------------------------------------------------

    def line(self, text: str, depth: int = 1) -> None:
        self.lines.append("    " * depth + text)

    def fresh(self, hint: str) -> str:
        name, n = hint, 1
        while name in self.taken or name in self.names.table:
            n += 1
            name = f"{hint}_{n}"
        self.taken.add(name)
        return name

    def front(self, node: fx.Node, text: str, rows: str) -> str:
        """The value with its rows in front, one for each sequence."""
        return self.moved(text, rows_of_node(node), rows)  # type: ignore[arg-type]

    def moved(self, text: str, place: tuple[int, int], rows: str) -> str:
        """A value whose k·rows stand at a dimension, with its rows in front."""
        dim, k = place
        if k > 1:
            text = f"{text}.unflatten({dim}, ({rows}, {k}))"
        return f"{text}.movedim({dim}, 0)" if dim else text

    def back(self, node: fx.Node, text: str) -> str:
        """Undo ``front``."""
        dim, k = rows_of_node(node)  # type: ignore[misc]
        if dim:
            text = f"{text}.movedim(0, {dim})"
        return f"{text}.flatten({dim}, {dim + 1})" if k > 1 else text

    def _last_uses(self) -> dict[fx.Node, int]:
        """The index of the last part that reads each value; outputs are never dropped."""
        last: dict[fx.Node, int] = {}
        for i, part in enumerate(self.program.parts):
            for node in part.nodes:
                for source in node.all_input_nodes:
                    last[source] = i
        return last

    # -- the whole function -------------------------------------------------------------------------------------

    def write(self) -> tuple[str, dict[str, Any]]:
        step = self.step
        self.line(f"def {self.name}(rows, reverse, xs, state, weights, draws):", 0)
        self.line("N, B, sizes = rows.total, rows.batch, rows.batch_sizes")
        self.taken |= {"rows", "reverse", "xs", "state", "weights", "draws", "N", "B", "sizes", "n", "t", "times"}
        for role, nodes in (("xs", step.xs), ("weights", step.weights), ("draws", step.draws), ("state", step.state)):
            for i, node in enumerate(nodes):
                if node.users or node in step.outputs() or role == "state":
                    name = self.fresh(node.name)
                    self.line(f"{name} = {role}[{i}]")
                    if role in ("xs", "draws"):
                        self.flat[node] = self.back(node, name)
                    else:
                        self.fixed[node] = name
        self.wanted_before = self._states_read_flat()
        for node in step.graph.nodes:
            if node.op == "get_attr":
                self.fixed[node] = self.names.of(getattr(step.root, str(node.target)), str(node.target).strip("_"))
        for node in self.program.invariant:
            self.fixed[node] = self.fresh(node.name)
            self.line(f"{self.fixed[node]} = {call(node, self.fixed, self.names, self.unit, 'B')}")
        for i, part in enumerate(self.program.parts):
            if isinstance(part, Segment):
                self._segment(part, i)
            else:
                self._loop(part)
        self._returns()
        return "\n".join(self.lines) + "\n", self.names.table

    def _states_read_flat(self) -> set[int]:
        """State leaves whose value before every step is read outside their own loop."""
        index = {n: i for i, n in enumerate(self.step.state)}
        found = {index[n] for n in self.step.outputs() if n in index}
        for part in self.program.parts:
            inside = set(part.carried) if isinstance(part, Loop) else set()
            for node in part.nodes:
                found |= {index[n] for n in node.all_input_nodes if n in index and index[n] not in inside}
        return found

    def over_steps(self, node: fx.Node) -> str:
        """The source of a value over all steps, made on first use."""
        if node in self.flat:
            return self.flat[node]
        name = self.fresh(f"{node.name}_all")
        if node in self.step.state:
            i = self.step.state.index(node)
            if self.step.next[i] is node:
                self.line(f"{name} = rows.repeat({self.fixed[node]}, 0, 1)")
            elif i in self.wide:
                self.line(f"{name} = {self.wide[i]}.narrow(0, B if reverse else 0, N)")
            else:
                after = self._result(self.step.next[i])
                self.line(f"{name} = rows.shift({after}, {self.fixed[node]}, reverse)")
        else:
            place = self.batch_dim(node)
            if place is None:
                return self.fixed[node]
            self.line(f"{name} = rows.repeat({self.fixed[node]}, {place[0]}, {place[1]})")
        self.flat[node] = name
        return name

    def batch_dim(self, node: fx.Node) -> tuple[int, int] | None:
        """The dimension where an invariant value has its k·B rows, and k; None where it has none."""
        shape = node.meta["val"].shape
        return next(((d, k) for d, n in enumerate(shape) if (k := batch_multiple(int(n), self.unit))), None)

    # -- segments -----------------------------------------------------------------------------------------------

    def _segment(self, segment: Segment, index: int) -> None:
        self.line(f"# segment: all {len(segment.nodes)} operations once, over the rows of all steps")
        keep = set(self.step.outputs())
        remaining: dict[fx.Node, int] = {}
        for at, node in enumerate(segment.nodes):
            for source in node.all_input_nodes:
                remaining[source] = at
        for at, node in enumerate(segment.nodes):
            summed = node.meta["rows"] == "sum"
            env = {n: self._flat_source(n, summed) for n in node.all_input_nodes}
            name = self.fresh(node.name)
            self.line(f"{name} = {self.product(node, env) or call(node, env, self.names, self.unit, 'N')}")
            self.flat[node] = name
            dead = [
                n
                for n in dict.fromkeys(node.all_input_nodes)
                if remaining[n] == at and self.last_use[n] == index and n not in keep and n.op == "call_function"
                and n in self.flat and self.flat[n].isidentifier() and is_varying(n)
            ]  # fmt: skip
            if dead:
                self.line(f"del {', '.join(self.flat.pop(n) for n in dead)}")

    def _flat_source(self, node: fx.Node, summed: bool) -> str:
        if not isinstance(node.meta["val"], Tensor) or node.meta["rows"] == "sum":
            return self.flat.get(node) or self.fixed[node]
        return self.over_steps(node)

    def product(self, node: fx.Node, env: dict[fx.Node, str], packed: str | None = None) -> str | None:
        """The call of a product that is not left to torch.mm, None for any other node."""
        function = gemm.function_of(node, self.kernels is not None and packed is None, self.step.precision)
        if function is None:
            return None
        *bias, left, right = (env[n] for n in arguments(node))
        name = self.names.of(function, "added" if bias else "product")
        return f"{name}({', '.join([*bias, left, packed or right])}{', True' if packed else ''})"

    # -- loops --------------------------------------------------------------------------------------------------

    def _loop(self, loop: Loop) -> None:
        LoopWriter(self, loop).write()

    def kernel_of(self, loop: Loop, stored: list[fx.Node], spent: list[fx.Node]) -> Any:
        """The machine code of a loop, None where there is none."""
        return None if self.kernels is None else self.kernels(self.step, loop, stored, spent)

    # -- results ------------------------------------------------------------------------------------------------

    def _returns(self) -> None:
        step = self.step
        ys = ["None" if y is None else self._result(y) for y in step.ys]
        finals = []
        for i, node in enumerate(step.next):
            if i in self.finals:
                finals.append(self.finals[i])
            elif node is step.state[i]:
                finals.append(f"{self.fixed[node]}.clone()")
            else:
                finals.append(f"rows.last({self._result(node)}, {self.fixed[step.state[i]]}, reverse)")
        kept = [f"{name!r}: {self._result(node)}" for name, node in step.kept.items()]
        sums = []
        for w, node in step.sums.items():
            if node.meta["rows"] == "sum" or (node.meta["rows"] is None and self.batch_dim(node) is None):
                value = self.flat.get(node) or self.fixed[node]
                sums.append(f"{w}: {value if node.meta['rows'] == 'sum' else f'{value} * rows.steps'}")
            else:
                summed = f"rows.sum_time({self._result(node)})"
                sums.append(f"{w}: {self.back(node, summed) if is_varying(node) else summed}")
        self.line(f"return [{', '.join(ys)}], [{', '.join(finals)}], {{{', '.join(kept)}}}, {{{', '.join(sums)}}}")

    def _result(self, node: fx.Node) -> str:
        text = self.over_steps(node)
        return self.front(node, text, "N") if is_varying(node) else text


def compile_step(step: Step, name: str) -> Runner:
    """One step as a function ``(B, xs, state, weights, draws) -> (ys, next, kept)``, differentiable by autograd."""
    names, env = Names(), {}
    lines = [f"def {name}(B, xs, state, weights, draws):"]
    for role in ("xs", "state", "weights", "draws"):
        for i, node in enumerate(getattr(step, role)):
            env[node] = f"{role}[{i}]"
    taken = {"B", "xs", "state", "weights", "draws"}
    for node in step.graph.nodes:
        if node.op == "get_attr":
            env[node] = names.of(getattr(step.root, str(node.target)), "constant")
        elif node.op == "call_function":
            env[node] = f"{node.name}_" if node.name in taken or node.name in names.table else node.name
            text = call(node, env, names, step.unit, "B")
            while env[node] in names.table:
                env[node] += "_"
            lines.append(f"    {env[node]} = {text}")
    ys = ", ".join("None" if y is None else env[y] for y in step.ys)
    kept = ", ".join(f"{k!r}: {env[n]}" for k, n in step.kept.items())
    lines.append(f"    return [{ys}], [{', '.join(env[n] for n in step.next)}], {{{kept}}}")
    source = "\n".join(lines) + "\n"
    exec(compile(source, f"<elman {name}>", "exec"), names.table)
    return Runner(names.table[name], source)
