"""The picture of a learning curve."""

from __future__ import annotations

import io
from collections.abc import Sequence

_BLUE, _GREEN, _ORANGE = "#2563a8", "#4c9a52", "#c8641e"


def draw_curve(
    evaluations: Sequence[tuple[int, float, float, float]],
    training: Sequence[tuple[int, float, float | None]],
    episodes: int,
    confidence: float,
) -> bytes:
    """Draw held-out success on the left, policy entropy and success in training on the right.

    Args:
        evaluations: ``(iterations done, success, lower end, upper end)`` in order.
        training: ``(iteration, success, entropy in nats or None)`` in order; empty leaves the right side out.
        episodes: number of held-out episodes, for the title.
        confidence: coverage of the interval, for the legend.

    Returns:
        A PNG file.
    """
    # Imported here: matplotlib takes a second, and most runs of the command line draw nothing. Its object interface
    # keeps no global state and needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(11, 4.2) if training else (6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if training else 1, squeeze=False)[0]

    held_out = panels[0]
    iterations, successes, lows, highs = zip(*evaluations, strict=True)
    interval = f"{confidence:.0%} interval"
    held_out.fill_between(iterations, lows, highs, color=_BLUE, alpha=0.18, linewidth=0, label=interval)
    if len(evaluations) == 1:  # a band needs two points
        _, success, low, high = evaluations[0]
        held_out.errorbar(iterations, [success], [[success - low], [high - success]], color=_BLUE, capsize=3)
    held_out.plot(iterations, successes, color=_BLUE, marker="o", markersize=4, label="success")
    held_out.set_title(f"Held-out success ({episodes} episodes)")
    held_out.set_xlabel("iterations of training")
    held_out.legend(loc="best", frameon=False)

    if training:
        behaviour = panels[1]
        numbers, rates, _ = zip(*training, strict=True)
        lines = behaviour.plot(numbers, rates, color=_GREEN, linewidth=1.2, label="success in training")
        behaviour.set_ylabel("success in training", color=_GREEN)
        behaviour.set_xlabel("iteration")
        known = [(point[0], point[2]) for point in training if point[2] is not None]
        if known:
            right = behaviour.twinx()
            lines += right.plot(*zip(*known, strict=True), color=_ORANGE, linewidth=1.2, label="policy entropy")
            right.set_ylabel("policy entropy (nats per token)", color=_ORANGE)
            right.set_ylim(bottom=0)
            right.spines["top"].set_visible(False)
        behaviour.set_title("Training rollouts")
        behaviour.legend(handles=lines, loc="best", frameon=False)

    for panel in panels:
        panel.set_ylim(0, 1)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        panel.grid(alpha=0.25)
        panel.spines["top"].set_visible(False)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
