"""curves.py: the loss curve of a run as SVG, with that of its parent and labels on the lines."""

import html
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # the scripts are up there

from lab.web.runs import Result

WIDTH, HEIGHT = 640, 300  # pixels, also those below
LEFT, RIGHT, TOP, BOTTOM = 44, 170, 12, 42  # margins; the labels of the lines are on the right
LABEL_HEIGHT = 15  # from one label to the next, so that they don't overlap


@dataclass
class Axes:
    """The part of the picture inside the margins, and the losses and places that it shows."""

    lowest: float
    highest: float
    right: float

    def place(self, x: float, loss: float) -> tuple[float, float]:
        """Where a point of a curve is in the picture, in pixels from the left and from the top."""
        across = LEFT + x / self.right * (WIDTH - LEFT - RIGHT)
        down = TOP + (self.highest - loss) / (self.highest - self.lowest) * (HEIGHT - TOP - BOTTOM)
        return across, down


def loss_curve(run: Result, parent: Result | None) -> str:
    """The losses of a run and the validation loss of its parent's, as an SVG element.

    Losses are in nats per character. The horizontal axis shows steps, or, if a step of the parent
    reads more or less text, millions of characters.
    """
    runs = [run] if parent is None else [parent, run]
    by_steps = len({characters_per_step(r) for r in runs}) == 1
    scales = [1 if by_steps else characters_per_step(r) / 1e6 for r in runs]
    lowest, highest = loss_range(runs)
    right = max(r.steps * scale for r, scale in zip(runs, scales, strict=True))
    axes = Axes(lowest, highest, right)

    title = f"Loss of {run.script}.py"
    if parent is not None:
        title += f" and {parent.script}.py"
    inside = f'width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"'
    parts = [
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">',
        f'<clipPath id="clip-{run.name}"><rect x="{LEFT}" y="{TOP}" {inside}/></clipPath>',
        *grid(axes, by_steps),
        f'<g clip-path="url(#clip-{run.name})">',
    ]
    labels = []
    for r, scale in zip(runs, scales, strict=True):
        xs = [step * scale for step, _, _ in r.history]
        train_losses, val_losses = losses_of(r)
        kind = "own" if r is run else "parent"
        parts.append(polyline(axes, xs, val_losses, kind))
        _, height = axes.place(0, val_losses[-1])
        labels.append((height, kind, f"{r.script} {r.loss_per_character:.2f}"))
        if r is run:
            parts.append(polyline(axes, xs, train_losses, "own training"))
            _, height = axes.place(0, train_losses[-1])
            labels.append((height, kind, f"training {train_losses[-1]:.2f}"))
    parts.append("</g>")
    parts += label_lines(labels)
    return "\n".join([*parts, "</svg>"])


def characters_per_step(run: Result) -> float:
    """How many characters a training step reads."""
    return run.tokens_per_step * run.characters_per_token


def losses_of(run: Result) -> tuple[list[float], list[float]]:
    """The estimates of the training and the validation loss of a run, in nats per character."""
    train_losses = [loss / run.characters_per_token for _, loss, _ in run.history]
    val_losses = [loss / run.characters_per_token for _, _, loss in run.history]
    return train_losses, val_losses


def loss_range(runs: list[Result]) -> tuple[float, float]:
    """The lowest and the highest loss that a picture of the runs shows.

    All curves start near ln(V). To show where they differ, the axis starts after that.
    """
    shown = []
    for run in runs:
        for losses in losses_of(run):
            shown += losses[1:] if len(losses) > 1 else losses
    return min(shown) - 0.05, max(shown) + 0.05


def polyline(axes: Axes, xs: list[float], losses: list[float], kind: str) -> str:
    """A curve; kind: its classes in the style sheet."""
    points = []
    for x, loss in zip(xs, losses, strict=True):
        across, down = axes.place(x, loss)
        points.append(f"{across:.1f},{down:.1f}")
    return f'<polyline class="{kind}" points="{" ".join(points)}"/>'


def grid(axes: Axes, by_steps: bool) -> list[str]:
    """Horizontal lines with their losses, and numbers along the bottom."""
    parts = []
    end = WIDTH - RIGHT
    for loss in ticks(axes.lowest, axes.highest):
        _, y = axes.place(0, loss)
        parts.append(f'<line x1="{LEFT}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{loss:g}</text>')
    y = HEIGHT - BOTTOM + 16
    for x in ticks(0, axes.right):
        across, _ = axes.place(x, axes.lowest)
        label = f"{x:,.0f}" if by_steps else f"{x:g}"
        parts.append(f'<text x="{across:.1f}" y="{y}" text-anchor="middle">{label}</text>')
    unit = "training step" if by_steps else "millions of characters read"
    middle = (LEFT + end) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{unit}</text>')
    return parts


def ticks(lowest: float, highest: float) -> list[float]:
    """Round numbers between two numbers, at most eight."""
    power = 10.0 ** math.floor(math.log10((highest - lowest) / 8))
    for factor in (1, 2, 5, 10):
        spacing = factor * power
        if (highest - lowest) / spacing <= 8:
            break
    first, last = math.ceil(lowest / spacing), math.floor(highest / spacing)
    return [round(i * spacing, 6) for i in range(first, last + 1)]


def label_lines(labels: list[tuple[float, str, str]]) -> list[str]:
    """The labels to the right of the ends of the curves; labels: height in pixels, class, text."""
    parts = []
    lowest_free = TOP
    for i, (height, kind, text) in enumerate(sorted(labels)):
        n_below = len(labels) - 1 - i
        last_place = HEIGHT - BOTTOM - n_below * LABEL_HEIGHT
        y = max(lowest_free, min(height + 4, last_place))
        lowest_free = y + LABEL_HEIGHT
        x = WIDTH - RIGHT + 6
        parts.append(f'<text class="{kind}" x="{x}" y="{y:.1f}">{html.escape(text)}</text>')
    return parts
