"""``elman evaluate``, ``generate`` and ``score``: a trained model in use."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError, counted

if TYPE_CHECKING:
    import numpy as np

    from ..tasks.language_model import TrainedLanguageModel

__all__ = ["evaluate", "generate", "score"]

Run = Annotated[Path, typer.Argument(help="Run directory.", show_default=False)]
Trust = Annotated[bool, typer.Option("--trust", help="Run the code of the run's own cell file.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str, typer.Option(help="cpu, cuda …")]


def evaluate(
    run: Run,
    file: Annotated[
        Path | None, typer.Argument(help="Text; without it, the run's own test text.", show_default=False)
    ] = None,
    as_json: Json = False,
    trust: Trust = False,
    device: Device = "cpu",
) -> None:
    """Measure how well a model predicts a text.

    Example: elman evaluate runs/book held_out.txt --json
    """
    model = load(run, trust, device)
    ids = model.corpus().test if file is None else read(model, file)
    loss = model.evaluate(ids)
    unknown = model.tokenizer.unknown(ids[1:])
    if as_json:
        text = str(file) if file else "test"
        print(json.dumps({"run": str(run), "text": text, **loss.to_json(), "unknown": unknown}))
        return
    note_unknown(unknown, str(file or "the test text"))
    print(f"bits per character  {loss.bits_per_character:.4f}")
    print(f"bits per byte       {loss.bits_per_byte:.4f}")
    print(f"nats per token      {loss.nats_per_token:.4f}")
    print(f"nats                {loss.nats:,.1f}")
    print(f"tokens              {loss.tokens:,}  ({loss.characters:,} characters, {loss.bytes:,} bytes)")


def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    length: Annotated[int, typer.Option(help="Symbols to draw.")] = 400,
    temperature: Annotated[float, typer.Option(help="Below 1 sharper; 0: the most probable.")] = 1.0,
    top_p: Annotated[float | None, typer.Option(help="Only the likeliest, up to this mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.", show_default="random")] = None,
    n: Annotated[int, typer.Option("-n", help="Number of samples.")] = 1,
    as_json: Json = False,
    trust: Trust = False,
    device: Device = "cpu",
) -> None:
    """Write text with a model, symbol by symbol, to stdout.

    Example: elman generate runs/book --prompt "Once" --temperature 0.8 -n 3
    """
    model = load(run, trust, device)
    note_unknown(model.tokenizer.unknown(model.tokenizer.encode(prompt)), "the prompt")
    seed = secrets.randbits(31) if seed is None else seed
    stream = model.stream(prompt, length, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, n=n)
    texts = [""] * n
    if not as_json:
        show(heading(1, n) + prompt)
    for pieces in stream:
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        if not as_json:
            show(pieces[0])
    if as_json:
        print(json.dumps({"run": str(run), "prompt": prompt, "seed": seed, "samples": texts}))
        return
    show("\n")
    for index, text in enumerate(texts[1:], start=2):
        show(f"\n{heading(index, n)}{prompt}{text}\n")


def score(
    run: Run,
    file: Annotated[Path | None, typer.Argument(help="Text; without it, standard input.", show_default=False)] = None,
    as_json: Json = False,
    trust: Trust = False,
    device: Device = "cpu",
) -> None:
    """Say how probable each line of a text is, given all before it.

    Prints −log p in nats, bits per symbol, and the line. The first symbol of the text is read, not scored.

    Example: elman score runs/book poem.txt
    """
    import math

    model = load(run, trust, device)
    if file is None:
        ids = model.tokenizer.encode(sys.stdin.read())
    else:
        ids = read(model, file)
    if len(ids) < 2:
        raise DataError(f"the text has {counted(len(ids), 'symbol')}, and the first is not scored: give at least 2.")
    costs = model.score(ids)
    newline = model.tokenizer.encode("\n")[0]
    rows: list[dict[str, Any]] = []
    begin = 0
    for end in [*(i + 1 for i, symbol in enumerate(ids) if symbol == newline), len(ids)]:
        if end > begin:
            part = costs[max(begin - 1, 0) : end - 1]
            text = model.tokenizer.decode(ids[begin:end]).rstrip("\n")
            rows.append({"nats": float(part.sum()), "tokens": len(part), "text": text})
        begin = end
    total = sum(row["nats"] for row in rows)
    if as_json:
        print(json.dumps({"run": str(run), "nats": total, "tokens": len(costs), "lines": rows}))
        return
    for row in rows:
        rate = row["nats"] / math.log(2) / row["tokens"] if row["tokens"] else 0.0
        print(f"{row['nats']:10.3f} {rate:7.3f}  {row['text']}")
    print(f"{total:10.3f} {total / math.log(2) / len(costs):7.3f}  in all, {counted(len(costs), 'symbol')}")


def load(run: Path, trust: bool, device: str) -> TrainedLanguageModel:
    from ..runs import load as load_run

    return load_run(run, trust=trust, device=device)


def read(model: TrainedLanguageModel, file: Path) -> np.ndarray:
    """The ids of a text file."""
    from ..machine import cache_directory
    from ..text import tokenise

    return tokenise([file], model.tokenizer, cache_directory()).ids


def note_unknown(count: int, where: str) -> None:
    if count:
        print(
            f"note: {where} has {counted(count, 'symbol')} that the training text has not, read as the unknown symbol.",
            file=sys.stderr,
        )


def heading(index: int, n: int) -> str:
    return f"[{index}/{n}] " if n > 1 else ""


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
