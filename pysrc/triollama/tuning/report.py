"""A run in files: a page with its curves, and a table."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from os import PathLike

import msgspec
import numpy as np

from .._engine import Trainer
from ..writing import write_file
from .config import learning_rate_at
from .export import split_pairs
from .protocol import Comparison
from .records import TrainingSummary

__all__ = ["adapter_norms", "write_csv", "write_report"]


def adapter_norms(trainer: Trainer) -> dict[str, float]:
    """The Frobenius norm of what the adapter adds to each matrix, by the matrix's name."""
    scale = trainer.alpha / (math.sqrt(trainer.rank) if trainer.rslora else trainer.rank)
    norms = {}
    for name, (a, b) in split_pairs(trainer).items():
        # |B A|^2 is the sum of B'B times A A', element by element: rank by rank, not out by in.
        inner = (b.T.astype(np.float64) @ b) * (a.astype(np.float64) @ a.T)
        norms[name] = scale * math.sqrt(max(float(inner.sum()), 0.0))
    return norms


def write_csv(path: str | PathLike[str], summary: TrainingSummary) -> None:
    """A row for each step: its number, loss, learning rate, tokens a second, and the held-out loss
    and accuracy where there are any. Row 0 is the evaluation before the first step. OSError."""
    evaluated = dict(summary.validation)
    accuracies = dict(
        zip((step for step, _ in summary.validation), summary.accuracies, strict=False)
    )
    out = io.StringIO(newline="")
    table = csv.writer(out, lineterminator="\n")
    names = ("step", "loss", "learning_rate", "tokens_per_second")
    table.writerow([*names, "validation_loss", "validation_accuracy"])
    for step in range(len(summary.losses) + 1):
        held_out = [evaluated.get(step, ""), accuracies.get(step, "")]
        if step:
            rate = learning_rate_at(summary.config, step - 1, summary.total_steps)
            speed = summary.speeds[step - 1] if step <= len(summary.speeds) else ""
            table.writerow([step, summary.losses[step - 1], rate, speed, *held_out])
        elif step in evaluated:
            table.writerow([step, "", "", "", *held_out])
    write_file(path, out.getvalue().encode())


def write_report(
    path: str | PathLike[str],
    summary: TrainingSummary,
    *,
    norms: Mapping[str, float] | None = None,
    samples: Sequence[Comparison] = (),
    title: str = "Training run",
) -> None:
    """A page of HTML that needs no other file: curves of loss, learning rate and throughput,
    settings, the adapter's norms by layer (see :func:`adapter_norms`), and answers before and
    after. Raises OSError."""
    steps = range(1, len(summary.losses) + 1)
    rates = [learning_rate_at(summary.config, step - 1, summary.total_steps) for step in steps]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(summary.how_it_ended())}. Architecture"
        f" {html.escape(summary.architecture)}, base {summary.base_fingerprint[:16]}.</p>",
        _chart(
            "Loss",
            {
                "training": list(zip(steps, summary.losses, strict=True)),
                "held out": list(summary.validation),
            },
        ),
        _chart("Learning rate", {"": list(zip(steps, rates, strict=True))}),
        _chart("Tokens a second", {"": list(zip(steps, summary.speeds, strict=False))}),
    ]
    if norms:
        parts.append(_norms(norms))
    if samples:
        rows = [
            "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in texts) + "</tr>"
            for texts in ((one.prompt, one.base, one.tuned) for one in samples)
        ]
        head = "<tr><th>asked</th><th>before</th><th>after</th></tr>"
        parts.append(f"<h2>Answers</h2><table>{head}{''.join(rows)}</table>")
    settings = msgspec.to_builtins(summary.config)
    rows = [
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in settings.items()
    ]
    parts.append(f"<h2>Settings</h2><table>{''.join(rows)}</table>")
    page = _PAGE.format(title=html.escape(title), body="\n".join(parts))
    write_file(path, page.encode())


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }}
td, th {{ border: 1px solid #ccc; padding: .2em .5em; text-align: left; white-space: pre-wrap;
vertical-align: top }}
svg {{ width: 100%; height: auto; background: #fafafa }}
polyline {{ fill: none; stroke-width: 2 }}
text {{ font-size: 12px; fill: #444 }}
</style></head><body>
{body}
</body></html>
"""
_COLOURS = ("#2b6cb0", "#c05621")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 800, 240, 70, 24


def _chart(title: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    points = [point for curve in curves.values() for point in curve if math.isfinite(point[1])]
    if not points:
        return ""
    (x0, x1), (y0, y1) = ((min(values), max(values)) for values in zip(*points, strict=True))

    def place(x: float, y: float) -> str:
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        up = (y - y0) / (y1 - y0) if y1 > y0 else 0.5
        return (
            f"{_LEFT + across * (_WIDTH - _LEFT - 10):.1f},"
            f"{10 + (1 - up) * (_HEIGHT - _BOTTOM - 10):.1f}"
        )

    parts = [
        f'<text x="{_LEFT - 6}" y="16" text-anchor="end">{y1:.4g}</text>',
        f'<text x="{_LEFT - 6}" y="{_HEIGHT - _BOTTOM}" text-anchor="end">{y0:.4g}</text>',
        f'<text x="{_LEFT}" y="{_HEIGHT - 6}">step {x0:g}</text>',
        f'<text x="{_WIDTH - 10}" y="{_HEIGHT - 6}" text-anchor="end">step {x1:g}</text>',
    ]
    for i, (name, curve) in enumerate(curves.items()):
        line = " ".join(place(x, y) for x, y in curve if math.isfinite(y))
        parts.append(f'<polyline stroke="{_COLOURS[i]}" points="{line}"/>')
        if name and curve:
            parts.append(
                f'<text x="{_WIDTH - 10}" y="{20 + 16 * i}" text-anchor="end"'
                f' style="fill: {_COLOURS[i]}">{html.escape(name)}</text>'
            )
    return (
        f"<h2>{html.escape(title)}</h2>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'
    )


def _norms(norms: Mapping[str, float]) -> str:
    """Layers down, matrices across; the darker, the larger."""
    layers: dict[int, dict[str, float]] = {}
    for name, norm in norms.items():
        _, number, matrix = name.removesuffix(".weight").split(".", 2)
        layers.setdefault(int(number), {})[matrix] = norm
    matrices = list(dict.fromkeys(name for row in layers.values() for name in row))
    most = max(norms.values()) or 1.0
    head = "".join(f"<th>{html.escape(name)}</th>" for name in matrices)
    rows = []
    for layer, row in sorted(layers.items()):
        cells = "".join(
            f'<td style="background: rgb(43 108 176 / {row.get(name, 0.0) / most:.2f})">'
            f"{row.get(name, 0.0):.3g}</td>"
            for name in matrices
        )
        rows.append(f"<tr><th>{layer}</th>{cells}</tr>")
    return (
        "<h2>What the adapter adds, by layer (Frobenius norm)</h2>"
        f"<table><tr><th>layer</th>{head}</tr>{''.join(rows)}</table>"
    )
