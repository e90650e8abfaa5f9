"""``explain``: what ran, why, the program, and the generated code, as text that stays the same."""

from __future__ import annotations

import re

import pytest
import torch
from llvmlite import binding as llvm
from torch import Tensor, nn

import elman
from cellzoo import zoo
from comparing import inputs
from elman.compiler.llvm import kernel
from elman.compiler.llvm.isa import ISAS, chosen, host
from elman.errors import CellError, InputError, OptionError, UnfoldWarning
from elman.explaining import LEVELS


def explained(name: str, level: str = "plan") -> str:
    cell = zoo(name)
    given = inputs(cell, 3, 2)
    return elman.explain(cell, given["xs"], given["state"], constants=given["constants"], level=level)


def part_names(text: str) -> list[str]:
    """The first word of every part of the forward program."""
    forward = text.split("forward\n")[1].split("\n\n")[0]
    return [line.split()[0] for line in forward.splitlines() if line.startswith("  ") and line[2] != " "]


def test_an_elman_net_is_segment_loop_segment() -> None:
    text = explained("Elman")
    assert text.startswith("Elman: backend llvm (loops as machine code")
    assert part_names(text) == ["segment", "loop", "segment"]
    assert "products: addmm; pointwise: tanh" in text
    assert "carries s" in text


@pytest.mark.parametrize(
    ("name", "loops"), [("stack of gru", 3), ("Feedforward", 0), ("JordanTeacherForced", 0), ("lstm", 1)]
)
def test_the_loops_are_counted(name: str, loops: int) -> None:
    assert part_names(explained(name)).count("loop") == loops


def test_stages_of_a_loop() -> None:
    """LSTM one stage; GRU with the reset before the product two; layer-norm LSTM three."""
    for name, stages in (("lstm", "1 stage"), ("Gru", "2 stages"), ("lstm with layer norm", "3 stages")):
        forward = explained(name).split("backward")[0]
        assert stages in forward, forward


@pytest.mark.parametrize("level", LEVELS)
def test_the_text_does_not_depend_on_sizes_or_repetition(level: str) -> None:
    cell = zoo("lstm")
    first = elman.explain(cell, torch.randn(3, 2, 3).double(), level=level)
    assert elman.explain(cell, torch.randn(9, 5, 3).double(), level=level) == first
    assert not re.search(r"(?<![\w.])(1009|1013)\b", first)  # %.1009 is a name


def test_the_code_is_what_runs() -> None:
    text = explained("Elman", "code")
    assert "kernel(rows, reverse, [" in text
    assert "for t in times:" not in text
    body = text.split("forward\n")[1].split("\nbackward")[0]
    compile("\n".join(line[2:] for line in body.splitlines()), "forward", "exec")


def test_a_step_that_cannot_be_unfolded_says_why() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            return (x, s + x) if s.sum() > 0 else (x, s)

    text = elman.explain(Branches(), torch.randn(3, 2, 4), torch.zeros(2, 4))
    assert "backend reference" in text
    assert "DataDependentError" in text
    assert "test_explain.py:" in text


def test_mistakes() -> None:
    cell = zoo("Elman")
    with pytest.raises(OptionError, match=r"'plam'.*'plan'"):
        elman.explain(cell, torch.randn(3, 2, 3).double(), level="plam")
    with pytest.raises(InputError):
        elman.explain(cell, torch.randn(3))
    with pytest.raises(CellError):
        elman.explain(torch.tanh, torch.randn(3, 2, 3))


def test_a_shared_input_and_constants() -> None:
    for name in ("SharedInput", "Attends", "Nested"):
        assert "backend llvm" in explained(name)


class Gated(nn.Module):
    """(f, c) = U x + W h,   h ← h + σ(f) (tanh(c) − h)"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.U, self.W = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))

    def initial_state(self, batch: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch, self.W.in_features, device=device, dtype=dtype)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        f, c = (self.U(x) + self.W(h)).chunk(2, -1)
        h = h + torch.sigmoid(f) * (torch.tanh(c) - h)
        return h, h


def listings(level: str, width: int = 5, cell: type[nn.Module] = Gated) -> list[str]:
    """What is shown of every loop, forward and backward."""
    text = elman.explain(cell(width), torch.randn(3, 2, width), level=level)
    found: list[str] = []
    for line in text.splitlines():
        if line.startswith("  loop "):
            found.append("")
        elif found and line.startswith("    "):
            found[-1] += f"{line[4:]}\n"
    return found


FORWARD = """\
  spent mm: 10 × float32 for every step
  state s: 5 × float32 for every sequence
  input w_weight_t: 50 × float32 for all
  scratch addmm: 10 × float32 for every sequence
  output sigmoid: 5 × float32 for every step
  output tanh: 5 × float32 for every step
  output sub: 5 × float32 for every step
  output addcmul_default: 5 × float32 for every step
step:
  product addmm = mm + s · w_weight_t (5 × 10)
  map over 5
    r0 = sigmoid(addmm)
    r1 = tanh(addmm+5)
    r2 = sub(r1, s)
    r3 = addcmul(s, r0, r2)
    sigmoid = r0
    tanh = r1
    sub = r2
    addcmul_default = r3
    s = r3
"""


def test_the_items_of_a_kernel() -> None:
    """One product, one map; the cut in two is no item; the next state goes where the old one was."""
    forward, backward = listings("kernel")
    first, rest = forward.split("\n", 1)
    assert first.removeprefix("for ") in ISAS
    assert rest == FORWARD
    assert "    cat+5 = " in backward
    assert backward.rstrip().splitlines()[-1].startswith("  product d_add_2 = ")


def test_kernels_with_reductions_contractions_and_sums_over_rows() -> None:
    assert " = sum of r" in explained("lstm with layer norm", "kernel")
    assert "sum over " in explained("Attends", "kernel")
    assert " for every thread" in explained("Gru", "kernel")


def test_the_representation_is_one_that_llvm_accepts() -> None:
    forward, backward = listings("ir")
    for text in (forward, backward):
        module = llvm.parse_assembly(text)
        module.verify()
        defined = {f.name for f in module.functions if not f.is_declaration}
        assert {"loop", "steps", "barrier"} <= defined
    isa = chosen()
    assert isa is not None
    assert f"<{isa.lanes(32)} x float>" in forward


MULTIPLIES = {"avx512": "vfmadd231ps", "avx2": "vfmadd231ps", "x86-64": "mulps", "neon": "fmla"}


@pytest.mark.parametrize(("number", "name"), list(enumerate(MULTIPLIES)))
def test_the_assembly_is_of_the_instruction_set_that_was_asked_for(
    number: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = host()
    if best is None or ISAS[name].triple != best.triple or ISAS[name].bytes > best.bytes:
        pytest.skip("this machine has no such instructions")
    monkeypatch.setenv("ELMAN_ISA", name)
    width = 40 + number  # one of its own: what is compiled is used again, and the variable is none of its keys
    forward, _ = listings("asm", width)
    assert listings("kernel", width)[0].startswith(f"for {name}\n")
    assert MULTIPLIES[name] in forward
    assert ("zmm" in forward) == (name == "avx512")


class Sorted(Gated):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h = super().forward(x, torch.sort(h).values)
        return y, h


@pytest.mark.filterwarnings("ignore::elman.errors.UnfoldWarning")
def test_an_operation_without_machine_code_is_named() -> None:
    text = elman.explain(Sorted(5), torch.randn(3, 2, 5))
    assert text.startswith("Sorted: backend interpret (")
    assert "2 of 2 loops have no machine code: sort has no place in a compiled loop" in text
    assert "r0 = " not in elman.explain(Sorted(5), torch.randn(3, 2, 5), level="kernel")


@pytest.mark.filterwarnings("ignore::elman.errors.UnfoldWarning")
def test_other_loops_keep_theirs() -> None:
    both = elman.Stack([Gated(5), Sorted(5)])
    text = elman.explain(both, torch.randn(3, 2, 5), level="kernel")
    assert text.startswith("Stack: backend llvm (")
    assert "2 of 4 loops have no machine code: sort" in text
    assert text.count("step:") == 2


def test_a_processor_that_is_in_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "chosen", lambda: None)
    with pytest.warns(UnfoldWarning, match="there is no machine code for this processor"):
        text = elman.explain(Gated(7), torch.randn(3, 2, 7))
    assert text.startswith("Gated: backend interpret (")


def test_without_a_loop_there_is_nothing_to_compile() -> None:
    text = explained("Feedforward", "asm")
    assert text.startswith("Feedforward: backend interpret (")
    assert "no loop: all steps at once" in text
