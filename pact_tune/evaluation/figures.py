"""Plots as SVG that stands in a page: text stays text, and takes the page's colour, so that dark mode works."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

COLOURS = ("#7f8c8d", "#d1495b", "#2e86c1", "#2a9d61", "#e08e0b", "#8e63ce", "#17a2b8", "#b5651d", "#c2459a", "#6b8e23")
_INK = "#010203"  # stands for the page's text colour while matplotlib draws
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    **{key: _INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")},
}
MARKERS = "osD^vPX*"
CURVES = {
    "ce": "cross-entropy (nats)",
    "kl": "constraint's term (nats)",
    "coefficient_kl": "weight of the constraint, found by its budget",
    "validation_loss": "loss on held-out rows (nats)",
}

Colours = Mapping[str, str]


@dataclass(frozen=True)
class Figure:
    """A plot: what it shows, in words, and the SVG."""

    title: str
    svg: Markup


def draw(title: str, plot: Callable[[Axes], None], height: float = 2.9) -> Figure:
    """Draws one plot.

    Args:
        title (str): above it, and read out by screen readers.
        plot (Callable[[Axes], None]): draws.
        height (float): in inches; the width is that of a phone.

    Returns:
        Figure: the SVG, without fixed size or background.
    """
    style: Any = _STYLE | {"svg.hashsalt": title}
    with plt.rc_context(style):  # the salt keeps ids of several plots of a page apart
        figure, axis = plt.subplots(figsize=(4.4, height))
        plot(axis)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
        plt.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r'<svg role="img" \1\2', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return Figure(title, Markup(svg))


def pareto(across: str, up: str, points: Mapping[str, tuple[Any, Any]], colours: Colours) -> Figure:
    """One share against another, each with its interval."""

    def plot(axis: Axes) -> None:
        for number, (name, (x, y)) in enumerate(points.items()):
            if x is None or y is None:
                continue
            errors = [[[c.percent - c.interval[0]], [c.interval[1] - c.percent]] for c in (x, y)]
            axis.errorbar(
                x.percent, y.percent, xerr=errors[0], yerr=errors[1], fmt=MARKERS[number % len(MARKERS)], color=colours[name],
                label=name, markersize=6, linewidth=1, capsize=2,
            )  # fmt: skip
        axis.set(xlabel=across, ylabel=up, ylim=(-4, 104))
        _legend(axis, len(points))

    return draw(f"{up} against {across}", plot)


def bars(title: str, cells: Mapping[str, Any], colours: Colours) -> Figure:
    """One share of each model, with its interval."""

    def plot(axis: Axes) -> None:
        known = {name: cell for name, cell in cells.items() if cell is not None}
        for number, (name, cell) in enumerate(known.items()):
            low, high = cell.interval
            axis.barh(number, cell.percent, color=colours[name], height=0.6)
            axis.plot([low, high], [number, number], color=_INK, linewidth=1)
            axis.annotate(str(cell), (high, number), (5, 0), textcoords="offset points", va="center")
        axis.set_yticks(range(len(known)), list(known))
        axis.invert_yaxis()
        longest = max((cell.interval[1] for cell in known.values()), default=0.0)
        axis.set(xlim=(0, max(10.0, 1.18 * longest)), xlabel="%")

    return draw(title, plot, height=0.8 + 0.32 * len(cells))


def lines(
    title: str,
    across: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    colours: Colours,
    *,
    share: bool = False,
    log: bool = False,
) -> Figure:
    """Curves by name."""

    def plot(axis: Axes) -> None:
        for name, (x, y) in series.items():
            few = len(x) <= 20
            marker = MARKERS[list(colours).index(name) % len(MARKERS)] if few else None
            axis.plot(x, y, color=colours[name], label=name, linewidth=1.2, marker=marker, markersize=4)
        axis.set(xlabel=across)
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        if share:
            axis.set_ylim(-0.02, 1.02)
        if log:
            axis.set_yscale("log")
        _legend(axis, len(series))

    return draw(title, plot)


def _legend(axis: Axes, entries: int) -> None:
    # Above the plot, so that it hides nothing.
    columns = 2 if entries > 3 else max(entries, 1)
    axis.legend(frameon=False, ncols=columns, loc="lower left", bbox_to_anchor=(-0.08, 1.0), columnspacing=1.2)


def read_log(folder: Path) -> list[dict[str, float]]:
    """What a run logged, from torchtune's DiskLogger: a record a line, with "step".

    A run that was resumed or overwritten has several files, of which the later one holds from its first step on.
    """
    rows: list[dict[str, float]] = []
    for path in sorted((folder / "logs").glob("*.txt")):
        found = []
        for line in path.read_text().splitlines():
            if step := re.match(r"Step (\d+) \|", line):
                values = {name: float(value) for name, value in re.findall(r"(\w+):(\S+)", line)}
                found.append({"step": float(step[1]), **values})
        if found:
            rows = [row for row in rows if row["step"] < found[0]["step"]] + found
    return rows


def training(runs: Mapping[str, Path], colours: Colours) -> list[Figure]:
    """Training curves of the runs that logged any."""
    logs = {name: read_log(folder) for name, folder in runs.items()}
    shown = []
    for key, title in CURVES.items():
        series = {}
        for name, rows in logs.items():
            if having := [row for row in rows if key in row]:
                series[name] = ([row["step"] for row in having], [row[key] for row in having])
        if series:
            shown.append(lines(title, "step", series, colours, log=all(min(y) > 0 for _, y in series.values())))
    return shown


def analysis(
    records: Mapping[str, Mapping[str, list[dict[str, Any]]]], colours: Colours
) -> list[tuple[str, str, list[Figure]]]:
    """The paper's figures 3, 6 and 7 from what runs logged; sections as the page has them."""
    confidence = {
        name: ([r["step"] for r in kinds["confidence"]], [r["probability"] for r in kinds["confidence"]])
        for name, kinds in records.items()
        if kinds.get("confidence")
    }
    first = [lines("safety-token probability", "step", confidence, colours, share=True)] if confidence else []
    sections = [("Safety-token confidence over training", "At the first response position, mean over held-out prompts (figure 3 of the paper).", first)]  # fmt: skip
    samples = [r for kinds in records.values() for r in kinds.get("sample", [])]
    by_source = []
    for source in sorted({r["source"] for r in samples}):
        for key, title in (("ce", "cross-entropy"), ("kl", "constraint's term")):
            series = {}
            for name, kinds in records.items():
                rows = [r for r in kinds.get("sample", []) if r["source"] == source and r[key] is not None]
                if rows:
                    series[name] = _means(rows, key)
            if series:
                by_source.append(lines(f"{title}, {Path(source).name}", "step", series, colours))
    sections.append(
        (
            "Loss by kind of row",
            "Mean over the rows that were looked at, of each source (figure 6 of the paper).",
            by_source,
        )
    )
    positions = []
    for t in sorted({r["t"] for kinds in records.values() for r in kinds.get("logits", [])}):
        series = {}
        for name, kinds in records.items():
            rows = [r for r in kinds.get("logits", []) if r["t"] == t]
            if rows:
                series[name] = ([r["epoch"] for r in rows], [r["mean"] for r in rows])
        positions.append(lines(f"mean safety-token logit at t = {t}", "epoch (0: initial model)", series, colours))
    sections.append(
        (
            "Safety-token logits at the first positions",
            "Mean over safety tokens and held-out prompts (figure 7 of the paper).",
            positions,
        )
    )
    return sections


def _means(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps, and the mean over the rows that were looked at in each."""
    by_step: dict[float, list[float]] = {}
    for row in rows:
        by_step.setdefault(float(row["step"]), []).append(row[key])
    order = sorted(by_step)
    return order, [sum(by_step[step]) / len(by_step[step]) for step in order]
