"""The training loop: steps, logs, validations and checkpoints of any task, continued to the byte after any
end."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .checkpoint import FORMAT, RunDirectory, cannot_write, load_tensors, save_tensors, write_atomic
from .config import Config, Optim
from .errors import RunError, TrainingError
from .optim import WARMUP, clip_gradients, learning_rate, load_optimizer, make_optimizer, optimizer_state
from .plots import draw_losses
from .progress import Reporter, Snapshot

__all__ = ["Outcome", "Progress", "Task", "Trainer"]

VALIDATIONS = 20
"""Validations in a budget when no interval is set."""

VALIDATING = 0.1
"""Largest share of a budget in minutes that is spent on validations, apart from the first and the last."""

DRAW_SECONDS = 60.0
"""Least time between two drawings of the loss curve."""

USUAL_LR = {"adam": (1e-4, 1e-2), "adamw": (1e-4, 1e-2), "sgd": (1e-2, 1.0)}
"""Learning rates that recurrent networks are usually trained with; advice, not a limit."""


class Task(Protocol):
    """What is trained: gives losses, and keeps everything it needs to continue in tensors and JSON facts."""

    steps_per_epoch: int

    @property
    def model(self) -> nn.Module: ...

    def next_loss(self) -> tuple[Tensor, int]:
        """Mean loss (nats per symbol) of the next window, and its symbols; moves the data position on."""

    def forget(self) -> None:
        """Start over from the initial state, after a loss that was not finite."""

    def validate(self, most: int) -> float:
        """Mean loss (nats per symbol) over at most so many held-out symbols."""

    def bits(self, loss: float, part: str) -> float:
        """A loss in nats per symbol of the part 'train' or 'valid', in bits per character."""

    def sample(self, length: int, step: int) -> str:
        """Text drawn from the model; the same for the same step."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...

    def load_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None: ...


@dataclass
class Progress:
    """Where a run stands; part of every checkpoint."""

    step: int = 0
    symbols: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_row: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    stale: int = 0
    loss_sum: float = 0.0
    norm_sum: float = 0.0
    counted: int = 0
    finished: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a training ended: ``reason`` is 'budget', 'patience' or 'interrupted'."""

    reason: str
    step: int
    seconds: float
    skipped: int
    best_loss: float | None
    best_step: int | None


class Trainer:
    """Trains ``task`` as ``config`` says, keeping everything in ``run``.

    A run that was ended by anything at all and continued with ``restore`` gives the same bytes as one that
    was not: weights, optimiser, data position, random numbers and the lines of metrics.jsonl apart from
    their times. (A budget in minutes depends on the clock and is exempt.)
    """

    def __init__(self, task: Task, run: RunDirectory, config: Config, reporter: Reporter) -> None:
        self.task = task
        self.run = run
        self.config = config
        self.reporter = reporter
        self.optimizer = make_optimizer(task.model, config.optim)
        self.progress = Progress()
        self._clock = time.monotonic()
        self._saved = self._drawn = self._clock
        self._log_mark = (0, self._clock)
        self._validations = 0
        self._validating = 0.0
        self._schedule = self._with_warmup()

    # -- saving and continuing

    def restore(self, which: str = "last", options: Sequence[str] = ()) -> None:
        """Continue from the checkpoint 'last' or 'best'.

        Raises RunError when it is missing, damaged or foreign; the command it suggests then has ``options`` too.
        """
        file = self.run.best_file if which == "best" else self.run.last_file
        tensors, facts = load_checkpoint(self.run, which, options)
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "task": {}, "random": {}}
        for name, tensor in tensors.items():
            group, _, rest = name.partition("/")
            groups[group][rest] = tensor
        try:
            self.task.model.load_state_dict(groups["model"])
            load_optimizer(self.optimizer, groups["optimizer"])
            self.task.load_state(groups["task"], facts["task"])
            self.progress = Progress(**facts["progress"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise RunError(f"{file} does not fit the settings of {self.run.path}: {error}.") from error
        _set_random_state(groups["random"])
        _truncate(self.run, facts["metrics_bytes"])
        if self.progress.best_step == self.progress.step and which == "last":
            # The end may have come after the last checkpoint was written and before its copies as the best
            # were.
            self._save_best()

    def save(self) -> None:
        """Write the checkpoint 'last'."""
        self.progress.seconds = self._elapsed()
        self._clock = self._saved = time.monotonic()
        tensors = {f"model/{name}": value for name, value in self.task.model.state_dict().items()}
        tensors |= {f"optimizer/{name}": value for name, value in optimizer_state(self.optimizer).items()}
        state, position = self.task.state()
        tensors |= {f"task/{name}": value for name, value in state.items()}
        tensors |= {f"random/{name}": value for name, value in _random_state().items()}
        facts = {
            "format": FORMAT,
            "progress": asdict(self.progress),
            "task": position,
            "metrics_bytes": _synced_size(self.run),
        }
        save_tensors(self.run.last_file, tensors, facts)

    def _save_best(self) -> None:
        """Make the checkpoint 'last' the best one too, and its weights the model of the run."""
        write_atomic(self.run.best_file, self.run.last_file.read_bytes())
        facts = {"format": FORMAT, "step": self.progress.best_step, "valid_loss": self.progress.best_loss}
        save_tensors(self.run.model_file, self.task.model.state_dict(), facts)

    # -- the loop

    def fit(self) -> Outcome:
        """Train until the budget is spent, patience is lost or a signal asks to stop.

        Raises TrainingError when the gradient has not been finite for ``optim.max_skipped`` steps in a
        row; the checkpoints from before stay.
        """
        progress = self.progress
        progress.finished = None
        self._clock = self._saved = self._drawn = time.monotonic()
        self._log_mark = (progress.symbols, self._clock)
        self._validations = math.floor(self.fraction() * VALIDATIONS)
        self.reporter.start(progress.step, self.fraction())
        if progress.step == 0:
            self.save()
        with stop_on_signal() as stop:
            while not stop and progress.finished is None:
                self._step()
                if self.fraction() >= 1.0:
                    progress.finished = "budget"
                if progress.finished is not None or self._validation_due():
                    self._validate()
                elif time.monotonic() - self._saved >= self.config.report.save_seconds:
                    self._save_if_sound()
            if stop:
                self._save_if_sound()
        self.draw()
        return self.outcome()

    def draw(self) -> None:
        """Draw the loss curve."""
        draw_losses(self.run.metrics_file, self.run.picture_file)
        self._drawn = time.monotonic()

    def outcome(self) -> Outcome:
        """How the run stands, as an end."""
        at = self.progress
        reason = at.finished or "interrupted"
        return Outcome(reason, at.step, at.seconds, at.skipped, at.best_loss, at.best_step)

    def _step(self) -> None:
        progress, settings = self.progress, self.config.optim
        rate = learning_rate(self._schedule, progress.step, self.fraction())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, symbols = self.task.next_loss()
        value, norm = float(loss.detach()), math.nan
        if math.isfinite(value):
            loss.backward()
            norm = clip_gradients(self.task.model.parameters(), settings.clip)
        progress.step += 1
        progress.symbols += symbols
        if math.isfinite(norm):
            self.optimizer.step()
            progress.skipped_in_row = 0
            progress.loss_sum += value
            progress.norm_sum += norm
            progress.counted += 1
        else:
            self._skip(value)
        self.optimizer.zero_grad(set_to_none=True)
        self.reporter.step(self._snapshot(value, norm, rate))
        if progress.step % self.config.report.log_every == 0:
            self._log(rate)

    def _skip(self, loss: float) -> None:
        progress, settings = self.progress, self.config.optim
        progress.skipped += 1
        progress.skipped_in_row += 1
        self.task.forget()
        if progress.skipped_in_row >= settings.max_skipped:
            what = "gradient" if math.isfinite(loss) else "loss"
            source = ("--from", "best") if self.run.best_file.exists() else ()
            low, high = USUAL_LR[settings.name]
            change = f"optim.lr={min(settings.lr / 10, high / 10):g}"
            raise TrainingError(
                f"the {what} was not finite in {progress.skipped_in_row} steps in a row, up to step "
                f"{progress.step}, so training stops. The checkpoints from before are intact. Lower the "
                f"learning rate (it is {settings.lr:g}; with {settings.name}, {low:g} to {high:g} is usual) or clip "
                f"more (at {settings.clip:g}), for example: {self.run.command('resume', *source, '--set', change)}"
            )

    def _log(self, rate: float) -> None:
        progress = self.progress
        symbols, clock = self._log_mark
        now = time.monotonic()
        loss = progress.loss_sum / progress.counted if progress.counted else None
        self._write(
            {
                "step": progress.step,
                "epoch": progress.step / self.task.steps_per_epoch,
                "loss": loss,
                "bits_per_character": None if loss is None else self.task.bits(loss, "train"),
                "gradient_norm": progress.norm_sum / progress.counted if progress.counted else None,
                "learning_rate": rate,
                "symbols": progress.symbols,
                "skipped": progress.skipped,
                "tokens_per_second": round((progress.symbols - symbols) / max(now - clock, 1e-9), 1),
                "seconds": round(self._elapsed(), 3),
            }
        )
        progress.loss_sum = progress.norm_sum = 0.0
        progress.counted = 0
        self._log_mark = (progress.symbols, now)

    def _validation_due(self) -> bool:
        every = self.config.report.validate_every
        if every is not None:
            return self.progress.step % every == 0
        due = math.floor(self.fraction() * VALIDATIONS)
        if due <= self._validations:
            return False
        if self.config.budget.minutes is not None and self._validating > VALIDATING * self._elapsed():
            return False
        self._validations = due
        return True

    def _validate(self) -> None:
        progress, report = self.progress, self.config.report
        begin = time.monotonic()
        loss = self.task.validate(report.validate_tokens)
        better = math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss)
        if better:
            progress.best_loss, progress.best_step, progress.stale = loss, progress.step, 0
        else:
            progress.stale += 1
        finite = math.isfinite(loss)
        bits = self.task.bits(loss, "valid") if finite else None
        line: dict[str, Any] = {
            "step": progress.step,
            "valid_loss": loss if finite else None,
            "valid_bits_per_character": bits,
        }
        text = self.task.sample(report.sample, progress.step) if self._sample_due() and finite else None
        if text is not None:
            line["sample"] = text
        self._validating += time.monotonic() - begin
        self._write(line | {"seconds": round(self._elapsed(), 3)})
        self.reporter.validation(progress.step, loss, bits, better, text)
        patience = self.config.budget.patience
        if patience is not None and progress.stale >= patience:
            progress.finished = "patience"
        if finite:
            self.save()
        if better:
            self._save_best()
        if time.monotonic() - self._drawn >= DRAW_SECONDS:
            self.draw()

    def _sample_due(self) -> bool:
        """With every fifth validation and the last one, if at all."""
        every = self.config.report.validate_every
        number = self._validations if every is None else self.progress.step // every
        return self.config.report.sample > 0 and (number % 5 == 0 or self.progress.finished is not None)

    def _save_if_sound(self) -> None:
        """Save, unless the last step was skipped: what is on disk is then the better place to continue
        from."""
        if self.progress.skipped_in_row == 0:
            self.save()

    def _write(self, line: dict[str, Any]) -> None:
        try:
            with open(self.run.metrics_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise cannot_write(self.run.metrics_file, error) from error

    # -- where the run stands

    def _elapsed(self) -> float:
        return self.progress.seconds + time.monotonic() - self._clock

    def fraction(self) -> float:
        """The share of the budget that is spent."""
        budget = self.config.budget
        if budget.minutes is not None:
            return self._elapsed() / (60.0 * budget.minutes)
        return self.progress.step / self.total_steps

    @property
    def total_steps(self) -> int:
        """Steps in a budget of steps or epochs."""
        budget = self.config.budget
        if budget.steps is not None:
            return budget.steps
        return max(1, math.ceil((budget.epochs or 0.0) * self.task.steps_per_epoch))

    def _with_warmup(self) -> Optim:
        """The optimiser's settings, with a warm-up that is short beside a short budget."""
        settings = self.config.optim
        if settings.warmup is not None or self.config.budget.minutes is not None:
            return settings
        return settings.model_copy(update={"warmup": min(WARMUP, self.total_steps // 20)})

    def _snapshot(self, loss: float, norm: float, rate: float) -> Snapshot:
        return Snapshot(
            step=self.progress.step,
            total=None if self.config.budget.minutes is not None else self.total_steps,
            fraction=min(1.0, self.fraction()),
            loss=loss,
            bits=self.task.bits(loss, "train"),
            norm=norm,
            rate=rate,
            symbols=self.progress.symbols,
            skipped=self.progress.skipped,
        )


def load_checkpoint(
    run: RunDirectory, which: str = "last", options: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint; RunError names the other one when that can be used instead."""
    file, other, name = run.last_file, run.best_file, "best"
    if which == "best":
        file, other, name = other, file, "last"
    try:
        tensors, facts = load_tensors(file)
    except RunError as error:
        way_out = (
            f" Continue from the other checkpoint with: {run.command('resume', '--from', name, *options)}"
            if other.exists()
            else " No other checkpoint was saved; train again with --overwrite."
        )
        raise RunError(f"{error}{way_out}") from error
    if facts.get("format") != FORMAT:
        raise RunError(f"{file} has format {facts.get('format')!r}; this version of elman reads format {FORMAT}.")
    return tensors, facts


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM adds itself to; a second signal acts as if nobody listened.

    Outside the main thread, where Python delivers no signals, the list stays empty.
    """
    received: list[int] = []
    handlers: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, handlers[number])

    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            handlers[number] = signal.getsignal(number)
            signal.signal(number, note)
    except ValueError:
        handlers.clear()
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda.{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    return state


def _set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in state:
                torch.cuda.set_rng_state(state[f"cuda.{index}"], index)


def _synced_size(run: RunDirectory) -> int:
    """Bytes of metrics.jsonl, all of them on the disk."""
    if not run.metrics_file.exists():
        return 0
    try:
        with open(run.metrics_file, "rb+") as file:
            os.fsync(file.fileno())
            return file.seek(0, os.SEEK_END)
    except OSError as error:
        raise cannot_write(run.metrics_file, error) from error


def _truncate(run: RunDirectory, size: int) -> None:
    """Take back the lines written after the checkpoint."""
    if run.metrics_file.exists() and run.metrics_file.stat().st_size > size:
        os.truncate(run.metrics_file, size)
