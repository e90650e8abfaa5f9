"""The demonstration: train on the text that comes with Python, compare with n-grams, write samples."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

TEMPERATURES = (0.4, 0.7, 1.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line as a user would, echoing each command, and compare the model with baselines."""
    given = _options().parse_args(arguments)
    run = shlex.quote(str(given.out))
    budget = f"--steps {given.steps}" if given.steps else f"--minutes {given.minutes:g}"
    size = f"--cell lstm --layers 1 --hidden {given.hidden}"
    _elman(f"train lm --out {run} --overwrite {size} {budget} --seed {given.seed}")
    print(f"\n{_comparison(given.out)}\n")
    for temperature in TEMPERATURES:
        _elman(f"generate {run} --length 300 --temperature {temperature} --seed {given.seed}")
        print()
    print(f"loss curve: {given.out / 'loss.png'}")


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    options.add_argument("--out", type=Path, default=Path("demo-run"), help="run directory, made anew")
    options.add_argument("--minutes", type=float, default=3, help="training time (default: %(default)s)")
    options.add_argument("--steps", type=int, help="a number of steps instead")
    options.add_argument("--hidden", type=int, default=256, help="units of the LSTM (default: %(default)s)")
    options.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    return options


def _elman(command: str) -> None:
    """``elman`` with these arguments, in a process of its own; its failure ends the demonstration."""
    print(f"$ elman {command}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "elman", *shlex.split(command)])
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the child got the same signal: it saves, and says how to go on
        code = process.wait() or 130
    if code:
        raise SystemExit(code)


def _comparison(path: Path) -> str:
    """Bits per character of the held-out block: the model, and n-grams counted on its training block."""
    from .checkpoint import RunDirectory
    from .metrics import bits, n_gram, unigram
    from .runs import cache_directory
    from .tasks import load
    from .tasks.language_model import open_corpus

    run = RunDirectory.open(path)
    corpus = open_corpus(run.config().data, cache_directory(), run)
    size = corpus.tokenizer.vocab_size
    rows = {
        "unigram": bits(unigram(corpus.train, corpus.test, size)),
        "order-5 back-off n-gram": bits(n_gram(corpus.train, corpus.test, size, order=5)),
        "this model": load(path).evaluate(corpus.test).bits_per_character,
    }
    lines = [f"  {name:<26}{value:6.3f}" for name, value in rows.items()]
    return "\n".join([f"bits per character of {len(corpus.test):,} held-out characters", *lines])


if __name__ == "__main__":
    main()
