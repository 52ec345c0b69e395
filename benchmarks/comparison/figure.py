"""The picture of a comparison."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from comparison.aggregation import interpolate, spread
from comparison.record import RunRecord
from comparison.summary import Summary

# Okabe and Ito's colours, distinguishable with any colour vision, without black and yellow.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_MARKERS = "osD^vP"

Curve = tuple[list[float], list[float]]


def draw(summary: Summary) -> bytes:
    """Validation curves over iterations and over training time, entropy, and test success by arm.

    Args:
        summary: with at least one finished run.

    Returns:
        A PNG file. Lines are means over seeds, bands one standard deviation, points single seeds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(12, 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    (by_iteration, by_time), (entropy, tests) = figure.subplots(2, 2)
    styles = {name: _style(number) for number, name in enumerate(summary.runs)}

    _curves(by_iteration, summary.runs, styles, lambda run: _validation(run, "iteration"), markers=True)
    by_iteration.set_xlabel("iterations of training")
    _curves(by_time, summary.runs, styles, lambda run: _validation(run, "seconds"), markers=True)
    by_time.axvline(summary.horizon.seconds, color="0.4", linewidth=0.9, linestyle=":")
    by_time.text(
        summary.horizon.seconds,
        0.015,
        "equal wall-clock ",
        rotation=90,
        ha="right",
        va="bottom",
        fontsize=8,
        color="0.35",
        transform=by_time.get_xaxis_transform(),
    )
    by_time.set_xlabel("seconds of training (without evaluations)")
    games = max(run.after.episodes for run in summary.records)
    by_iteration.set_title(f"Validation success ({games} games)")
    by_time.set_title("Validation success over training time")
    heights = [point.success for run in summary.records for point in run.curve]
    for panel in (by_iteration, by_time):
        panel.set_ylim(max(0.0, min(heights) - 0.06), min(1.0, max(heights) + 0.06))
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))

    _curves(entropy, summary.runs, styles, _entropy)
    entropy.set_title("Policy entropy in training")
    entropy.set_xlabel("iteration")
    entropy.set_ylabel("nats per token")
    entropy.set_ylim(bottom=0)

    _bars(tests, summary, styles)
    tests.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))

    for panel in (by_iteration, entropy):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in (by_iteration, by_time, entropy, tests):
        panel.grid(alpha=0.25, axis="y" if panel is tests else "both")
        panel.set_axisbelow(True)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    handles, labels = by_iteration.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4), frameon=False)
    figure.supxlabel(
        "lines and bars: mean over seeds; bands: ± one standard deviation; points: single seeds",
        fontsize=9,
        color="0.35",
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _style(number: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _LINES[number // len(_COLOURS) % len(_LINES)],
        "marker": _MARKERS[number % len(_MARKERS)],
    }


def _validation(run: RunRecord, axis: str) -> Curve:
    return [getattr(point, axis) for point in run.curve], [point.success for point in run.curve]


def _entropy(run: RunRecord) -> Curve:
    known = [(float(i), value) for i, value in enumerate(run.training.get("entropy", [])) if value is not None]
    return [x for x, _ in known], [y for _, y in known]


def mean_curve(curves: Sequence[Curve]) -> tuple[list[float], list[float], list[float]]:
    """Mean and standard deviation of several curves on the stretch that all of them cover.

    Args:
        curves: ``(x, y)`` each, x ascending; they need not share their x. Empty ones are left out.

    Returns:
        ``(x, mean, sd)`` at every x of any curve within the common stretch; sd is 0 for a single curve.
    """
    curves = [curve for curve in curves if curve[0]]
    if not curves:
        return [], [], []
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = sorted({at for x, _ in curves for at in x if start <= at <= end} | {end})
    spreads = [spread([interpolate(x, y, at) for x, y in curves]) for at in grid]
    return grid, [one.mean for one in spreads], [one.sd or 0.0 for one in spreads]


def _curves(
    panel: Any,
    runs: Mapping[str, Sequence[RunRecord]],
    styles: Mapping[str, dict[str, Any]],
    curve: Callable[[RunRecord], Curve],
    markers: bool = False,
) -> None:
    for name, of_arm in runs.items():
        style = styles[name]
        curves = [curve(run) for run in of_arm]
        x, mean, sd = mean_curve(curves)
        if not x:
            continue
        count = len(of_arm)
        label = f"{name} ({count} seed{'s' if count > 1 else ''})"
        panel.plot(x, mean, color=style["color"], linestyle=style["linestyle"], linewidth=1.8, label=label)
        if markers:  # where it was measured: the mean over seeds of the time of each evaluation
            same = [values for values, _ in curves if len(values) == len(curves[0][0])]
            at = [statistics.fmean(column) for column in zip(*same, strict=True)]
            panel.plot(
                [a for a in at if x[0] <= a <= x[-1]],
                [interpolate(x, mean, a) for a in at if x[0] <= a <= x[-1]],
                color=style["color"],
                linestyle="",
                marker=style["marker"],
                markersize=4.5,
            )
        if count > 1:
            low, high = ([m + sign * s for m, s in zip(mean, sd, strict=True)] for sign in (-1, 1))
            panel.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)


def _bars(panel: Any, summary: Summary, styles: Mapping[str, dict[str, Any]]) -> None:
    groups, width = len(summary.temperatures), 0.8 / max(len(summary.runs), 1)
    tops = [0.0]
    for number, (name, runs) in enumerate(summary.runs.items()):
        for group, temperature in enumerate(summary.temperatures):
            values = [run.tests[temperature].success for run in runs if temperature in run.tests]
            if not values:
                continue
            at = group + (number - (len(summary.runs) - 1) / 2) * width
            style, over = styles[name], spread(values)
            panel.bar(
                at, over.mean, 0.88 * width, color=style["color"], alpha=0.35, edgecolor=style["color"], linewidth=1
            )
            if over.sd is not None:
                panel.errorbar(at, over.mean, over.sd, color="0.25", capsize=3, linewidth=1.1)
            offsets = [0.5 * width * ((seed + 0.5) / len(values) - 0.5) for seed in range(len(values))]
            panel.plot(
                [at + offset for offset in offsets],
                values,
                linestyle="",
                marker=style["marker"],
                markersize=4.2,
                color=style["color"],
                zorder=3,
                markeredgecolor="white",
                markeredgewidth=0.5,
            )
            top = max([over.mean + (over.sd or 0.0), *values])
            panel.annotate(
                f"{100 * over.mean:.0f}", (at, top), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9
            )
            tops.append(top)
    panel.set_xticks(range(groups), [f"temperature {temperature}" for temperature in summary.temperatures])
    panel.set_xlim(-0.5, groups - 0.5)
    panel.set_ylim(0, min(1.08, max(tops) + 0.09))
    games = sorted({test.episodes for run in summary.records for test in run.tests.values()})
    panel.set_title(f"Test success ({' or '.join(map(str, games))} fresh games)")
