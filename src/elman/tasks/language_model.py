"""Language modelling on text files: the corpus, what a training step is, and the trained model in use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ..batch import Streams, evaluation_windows
from ..checkpoint import RunDirectory, load_tensors, read_json, write_json
from ..combinators import Attend, Conditioned, Stack
from ..config import Config, Data, Model
from ..decode import Sampler, generate
from ..errors import DataError, OptionError, RunError, counted
from ..machine import arithmetic, cache_directory
from ..metrics import Loss, bits
from ..networks import LanguageModel
from ..penalties import activation_penalty, temporal_penalty
from ..spec import Spec, parse_spec
from ..streaming import Stream
from ..text import StreamDecoder, Tokenizer, Tokens, split, tokenise, write_default_text
from ..types import State

__all__ = [
    "Corpus",
    "LanguageModelling",
    "TrainedLanguageModel",
    "build_model",
    "evaluate",
    "open_corpus",
]

SAMPLE_TEMPERATURE = 0.8


@dataclass(frozen=True, eq=False)
class Corpus:
    """Ids of the three parts of a text, and what is known about its files."""

    tokenizer: Tokenizer
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    facts: dict[str, Any]


def open_corpus(data: Data, cache: Path, run: RunDirectory | None = None) -> Corpus:
    """The text that ``data`` names, tokenised (once per content) under ``cache`` and cut in three parts.

    Without files of their own, validation and test are the last blocks of the training text. With a
    validation file but no test file, the test is the validation file too. A ``run`` that already has a
    tokenizer and the hash of its text keeps them: RunError when the text is no longer the same. DataError
    for unusable files.
    """
    files = [Path(file) for file in data.files] or [write_default_text(cache)]
    known = run is not None and run.tokenizer_file.exists()
    if known and run is not None:
        tokenizer = Tokenizer.from_json(read_json(run.tokenizer_file))
    else:
        tokenizer = Tokenizer.build(data.tokens, files)
    tokens = tokenise(files, tokenizer, cache)
    own = {name: _own(file, tokenizer, cache) for name, file in (("valid", data.valid), ("test", data.test))}
    valid, test = own["valid"], own["test"]
    parts = split(
        tokens,
        0.0 if valid is not None else data.valid_fraction,
        0.0 if valid is not None or test is not None else data.test_fraction,
    )
    facts = {"train": _facts(tokens)} | {name: _facts(part) for name, part in own.items() if part is not None}
    if known and run is not None and run.data_file.exists():
        _check_same(run, facts)
    valid_ids = parts.valid if valid is None else valid.ids
    test_ids = test.ids if test is not None else (parts.test if valid is None else valid_ids)
    for name, ids, needed in (("validation", valid_ids, 2), ("test", test_ids, 2)):
        if len(ids) < needed:
            has = counted(len(ids), "symbol")
            raise DataError(f"the {name} text has {has} and needs at least {needed}: give a longer one.")
    return Corpus(tokenizer, parts.train, valid_ids, test_ids, facts)


def store_corpus(corpus: Corpus, run: RunDirectory) -> None:
    """Keep tokenizer and hashes of the text in the run."""
    write_json(run.tokenizer_file, corpus.tokenizer.to_json())
    write_json(run.data_file, corpus.facts)


def build_model(settings: Model, vocab_size: int, cell: Spec | None = None) -> LanguageModel:
    """The network that ``settings`` describe, freshly drawn, with ``cell`` instead of theirs for each of its layers.

    Raises OptionError for an unknown cell or option of it and for a cell that reads constants, CellError for parts
    that do not fit.
    """
    width = settings.embedding or settings.hidden
    cell = cell or parse_spec(settings.cell)

    def make(reads: int) -> nn.Module:
        return cell.make(reads, settings.hidden, **settings.cell_options)

    stack = Stack.build(width, make, layers=settings.layers, dropout=settings.dropout_between)
    asking = [type(part).__name__ for part in stack.modules() if isinstance(part, Attend | Conditioned)]
    if asking:
        raise OptionError(
            f"{asking[0]} in {cell} reads constants beside the symbols, and a language model of a text has none. "
            f"Leave it away here; in Python, scan(cell, xs, constants=…) gives them to a network of your own."
        )
    return LanguageModel(
        vocab_size,
        width,
        stack,
        dropout_input=settings.dropout_input,
        dropout_output=settings.dropout_output,
        tie=settings.tie,
    )


class LanguageModelling:
    """The training task: predict each symbol of contiguous streams, state carried from window to window.

    ``loss = −(1/N) Σ log p(x(t+1) | x(1..t))`` in nats per symbol, gradients truncated at the windows. The gradient
    is that of ``loss + α·mean(d²) + β·mean((h(t+1) − h(t))²)``, with the output h of the cell, d the same after
    dropout, α ``optim.activation_penalty`` and β ``optim.temporal_penalty``; the loss itself is always the first term.
    """

    def __init__(self, config: Config, corpus: Corpus, model: LanguageModel, device: torch.device) -> None:
        self.config = config
        self.corpus = corpus
        self.model = model.to(device)
        self.device = device
        self.streams = Streams(corpus.train, config.data.batch, config.data.window, device=device)
        self.steps_per_epoch = self.streams.windows_per_epoch
        self._state: State = None
        self._bits = {
            part: _bits_per_nat(corpus.tokenizer, ids[1:])
            for part, ids in (("train", corpus.train), ("valid", corpus.valid))
        }

    def next_loss(self) -> tuple[Tensor, int]:
        self.model.train()
        window = self.streams.next()
        before = None if window.fresh else self._state
        with arithmetic(self.config.machine, self.device):
            h, after = self.model.activations(window.inputs, before, backend=self.config.machine.backend)
            dropped = self.model.dropout_output(h)
            logits = self.model.logits(dropped)
        self._state = pytree.tree_map_only(Tensor, Tensor.detach, after)
        loss = F.cross_entropy(_wide(logits.flatten(0, 1)), window.targets.flatten())
        for penalty in self._penalties(_wide(h), _wide(dropped)):
            loss = loss + (penalty - penalty.detach())  # its gradient, and nothing of its value
        return loss, window.targets.numel()

    def _penalties(self, h: Tensor, dropped: Tensor) -> Iterator[Tensor]:
        """Merity et al. 2017, section 4: AR on what dropout left of the output, TAR on the output itself."""
        alpha, beta = self.config.optim.activation_penalty, self.config.optim.temporal_penalty
        if alpha:
            yield alpha * activation_penalty(dropped)
        if beta:
            yield beta * temporal_penalty(h)

    def try_step(self) -> None:
        """Run the model once over one symbol, so that what is wrong with a cell is found before anything is written.

        Draws nothing from the random numbers of the training. Raises what ``scan`` raises.
        """
        self.model.eval()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), arithmetic(self.config.machine, self.device):
            symbol = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            self.model(symbol, backend=self.config.machine.backend)

    def forget(self) -> None:
        self._state = None

    def validate(self, most: int) -> float:
        ids = self.corpus.valid[: most + 1]
        nats, symbols = evaluate(self.model, ids, self.config, self.device)
        return nats / symbols

    def bits(self, loss: float, part: str) -> float:
        return loss * self._bits[part]

    def sample(self, length: int, step: int) -> str:
        self.model.eval()
        tokenizer = self.corpus.tokenizer
        generator = torch.Generator().manual_seed(self.config.machine.seed + step)
        ids = generate(
            closed_step(self.model, tokenizer),
            [start_id(tokenizer, self.corpus.train)],
            length,
            Sampler(temperature=SAMPLE_TEMPERATURE),
            generator=generator,
            device=self.device,
        )
        return tokenizer.decode([int(drawn) for drawn in ids])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        leaves = [] if self._state is None else pytree.tree_leaves(self._state)
        tensors = {f"state.{index}": leaf for index, leaf in enumerate(leaves)}
        return tensors, {"streams": self.streams.state_dict(), "carried": self._state is not None}

    def load_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.streams.load_state_dict(facts["streams"])
        self._state = None
        if facts["carried"]:
            _, spec = pytree.tree_flatten(self.model.initial_state(self.config.data.batch))
            leaves = [tensors[f"state.{index}"].to(self.device) for index in range(len(tensors))]
            self._state = pytree.tree_unflatten(leaves, spec)


@dataclass(frozen=True)
class TrainedLanguageModel:
    """A trained language model with its tokenizer, ready to use; ``step`` says after how much training."""

    run: RunDirectory
    model: LanguageModel
    tokenizer: Tokenizer
    config: Config
    step: int

    @classmethod
    def load(cls, run: RunDirectory, *, trust: bool = False, device: str = "cpu") -> TrainedLanguageModel:
        """The best weights of a run; those of its last checkpoint when it has not been validated yet.

        Raises RunError for a run that is damaged, without weights, or with its own cell and not trusted.
        """
        vocab_size = Tokenizer.from_json(read_json(run.tokenizer_file)).vocab_size
        return cls.of(run, build_model(run.config().model, vocab_size, run.trusted_cell(trust)).to(device))

    @classmethod
    def of(cls, run: RunDirectory, model: LanguageModel) -> TrainedLanguageModel:
        """``model``, built as the settings of the run say, with the weights of the run. Raises RunError as ``load``."""
        tensors, facts = load_weights(run)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise RunError(f"the weights in {run.path} do not fit its settings: {error}.") from error
        tokenizer = Tokenizer.from_json(read_json(run.tokenizer_file))
        return cls(run, model.eval(), tokenizer, run.config(), facts["step"])

    @property
    def device(self) -> torch.device:
        return self.model.embedding.weight.device

    def stream(
        self,
        prompt: str = "",
        length: int = 200,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        n: int = 1,
    ) -> Iterator[list[str]]:
        """Continuations of ``prompt`` as they are drawn: after each symbol the new text of each of the ``n``.

        The pieces of one continuation joined are its text, without the prompt. An empty prompt starts as
        after a line end. Raises OptionError for impossible options.
        """
        sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        drawn = generate(
            closed_step(self.model, self.tokenizer),
            self.tokenizer.encode(prompt).astype(np.int64),
            length,
            sampler,
            n=n,
            generator=generator,
            start=start_id(self.tokenizer),
            device=self.device,
        )
        decoders = [StreamDecoder(self.tokenizer) for _ in range(n)]

        def pieces() -> Iterator[list[str]]:
            for ids in drawn:
                yield [decoder.feed(int(id)) for decoder, id in zip(decoders, ids.tolist(), strict=True)]
            rest = [decoder.finish() for decoder in decoders]
            if any(rest):
                yield rest

        return pieces()

    def generate(self, prompt: str = "", length: int = 200, *, n: int = 1, **options: Any) -> list[str]:
        """``n`` continuations of ``prompt`` as whole texts; options as for ``stream``."""
        texts = [""] * n
        for pieces in self.stream(prompt, length, n=n, **options):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        return texts

    def corpus(self, cache: Path | None = None) -> Corpus:
        """The text that the model was trained on, with its held-out parts. RunError when it is no longer
        the same."""
        return open_corpus(self.config.data, cache or cache_directory(), self.run)

    def evaluate(self, ids: np.ndarray) -> Loss:
        """How well the model predicts a tokenised text (N,), all but its first symbol.

        An unknown symbol counts as one symbol, whatever character it stands for: figures of a text with
        many of them flatter.
        """
        nats, symbols = evaluate(self.model, ids, self.config, self.device)
        characters, size = self.tokenizer.counts(ids[1:])
        return Loss(nats, symbols, characters, size)

    def score(self, ids: np.ndarray) -> np.ndarray:
        """−log p in nats of each symbol of a tokenised text given all before it, (N − 1,)."""
        with arithmetic(self.config.machine, self.device):
            costs = [window.flatten() for window in _costs(self.model, ids, 1, self.config, self.device)]
        return torch.cat(costs).numpy()


def evaluate(model: LanguageModel, ids: np.ndarray, config: Config, device: torch.device) -> tuple[float, int]:
    """Nats and number of predicted symbols of ids (N,): N − 1 of them, in parallel streams with carried
    state."""
    nats, symbols = 0.0, 0
    with arithmetic(config.machine, device):
        for costs in _costs(model, ids, config.data.batch, config, device):
            nats += float(costs.sum(dtype=torch.float64))
            symbols += costs.numel()
    return nats, symbols


def load_weights(run: RunDirectory) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights to use, and facts with their ``step``: the best, or the last while there are no best ones."""
    if run.model_file.exists() or not run.last_file.exists():
        return load_tensors(run.model_file)
    tensors, facts = load_tensors(run.last_file)
    weights = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
    return weights, facts["progress"]


def closed_step(model: LanguageModel, tokenizer: Tokenizer) -> Any:
    """The model's step for decoding: begins with its own initial state and never draws the unknown symbol.

    The state that it hands on is a stream, so a state goes on once.
    """

    streamed = model.streamed()

    def step(ids: Tensor, stream: Stream | None) -> tuple[Tensor, Stream]:
        logits, stream = streamed(ids, stream)
        if tokenizer.kind == "char":
            logits[:, 0] = -math.inf
        return logits, stream

    return step


def start_id(tokenizer: Tokenizer, ids: np.ndarray | None = None) -> int:
    """The symbol that stands before a text of its own: a line end, or the most ordinary symbol there is."""
    newline = int(tokenizer.encode("\n")[0])
    if newline or tokenizer.kind == "byte":
        return newline
    space = int(tokenizer.encode(" ")[0])
    return space or (int(ids[0]) if ids is not None else 1)


def _costs(model: LanguageModel, ids: np.ndarray, batch: int, config: Config, device: torch.device) -> Iterator[Tensor]:
    """−log p of the targets of each window, (T, B)."""
    model.eval()
    state: State = None
    # A model may be evaluated elsewhere than where it was trained.
    backend = "auto" if device.type != "cpu" and config.machine.backend == "llvm" else config.machine.backend
    with torch.no_grad():
        for part in evaluation_windows(ids, batch, config.data.window, device=device):
            begun = None if part.fresh else state
            logits, state = model(part.inputs, begun, backend=backend)
            flat = F.cross_entropy(_wide(logits.flatten(0, 1)), part.targets.flatten(), reduction="none")
            yield flat.view(part.targets.shape)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: sums over many steps in bfloat16 would lose most of it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _bits_per_nat(tokenizer: Tokenizer, ids: np.ndarray) -> float:
    """What turns nats per symbol of this text into bits per character."""
    characters, _ = tokenizer.counts(ids)
    return bits(len(ids) / max(1, characters))


def _own(file: str | None, tokenizer: Tokenizer, cache: Path) -> Tokens | None:
    return None if file is None else tokenise([file], tokenizer, cache)


def _facts(tokens: Tokens) -> dict[str, Any]:
    return {
        "files": [str(file) for file in tokens.files],
        "sha256": tokens.sha256,
        "characters": tokens.characters,
        "bytes": tokens.bytes,
        "tokens": len(tokens.ids),
        "unknown": tokens.unknown,
    }


def _check_same(run: RunDirectory, facts: Mapping[str, Mapping[str, Any]]) -> None:
    stored = read_json(run.data_file)
    for part, described in facts.items():
        before = stored.get(part, {}).get("sha256")
        if before != described["sha256"]:
            names = ", ".join(described["files"])
            raise RunError(
                f"the {part} text of {run.path} has changed: {names} had SHA-256 {str(before)[:16]}… "
                f"when the run began and has {described['sha256'][:16]}… now. Restore the text, or start "
                f"a new run."
            )
