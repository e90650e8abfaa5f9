"""Pictures of a run, drawn without a display."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from .checkpoint import write_atomic

__all__ = ["draw_losses", "read_metrics"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that was cut off is left out."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


def draw_losses(metrics: Path, picture: Path) -> None:
    """Draw bits per character over steps, training and validation, from a metrics.jsonl into a PNG."""
    lines = read_metrics(metrics)
    train = [(line["step"], line["bits_per_character"]) for line in lines if line.get("bits_per_character")]
    valid = [(line["step"], line["valid_bits_per_character"]) for line in lines if line.get("valid_bits_per_character")]
    if not train and not valid:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(
            *zip(*train, strict=True),
            color="#9ab8d6",
            linewidth=1.2,
            marker="." if len(train) < 3 else "",
            label="training",
        )
    if valid:
        label = f"validation, best {min(value for _, value in valid):.3f}"
        axes.plot(*zip(*valid, strict=True), color="#c2410c", linewidth=1.8, marker="o", markersize=3.5, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per character")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(picture, buffer.getvalue())
