"""Tables and figures of a finished experiment, as Markdown, CSV and one page."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.axes import Axes

from pact_tune.evaluation import figures, report
from pact_tune.evaluation.report import Cell, Comparison
from pact_tune.experiments import run
from pact_tune.experiments.plan import INITIAL, Case, Experiment
from pact_tune.files import atomic_file, slug

RESULTS, TUNING_FILE = "results", "tuning.json"


def write(experiment: Experiment, chosen: Mapping[str, Sequence[str]]) -> list[Path]:
    """Writes ``results.md``, ``results.csv`` and ``results.html``, a page a case, and the figures.

    Args:
        experiment (Experiment): all of its runs are done.
        chosen (Mapping[str, Sequence[str]]): what tuning has found.

    Returns:
        list[Path]: the three files.
    """
    title = experiment.settings["title"]
    tables = {case: compare(experiment, case, chosen) for case in experiment.cases}
    for case, table in tables.items():
        table.write(experiment.tables / case.place, f"{title}: {case.title}" if case.title else title)
    drawn = {case: table.against_accuracy("harmful", "benign") for case, table in tables.items()}
    drawn_once = [*sweeps(experiment, tables), *poison_shares(experiment, tables)]
    for name, figure in _named(drawn, drawn_once):
        with atomic_file(experiment.tables / "figures" / f"{name}.svg") as file:
            file.write_text(str(figure.svg), encoding="utf-8")
    sections = [
        (case.title or "Results", f"{case.place}/{report.PAGE_FILE}", table, drawn[case])
        for case, table in tables.items()
    ]
    choices = {name: " ".join(words) for name, words in chosen.items()}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pact_tune.experiments"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("results.html.jinja").render(
        title=title, seeds=experiment.settings["seeds"], sections=sections, figures=drawn_once, chosen=choices
    )
    with atomic_file(experiment.tables / TUNING_FILE) as file:
        file.write_text(json.dumps(_tuning(experiment, chosen), indent=1) + "\n", encoding="utf-8")
    texts = {".md": _markdown(experiment, tables, choices), ".csv": _csv(tables), ".html": page}
    paths = []
    for suffix, text in texts.items():
        paths.append(experiment.tables / f"{RESULTS}{suffix}")
        with atomic_file(paths[-1]) as file:
            file.write_text(text, encoding="utf-8")
    return paths


def compare(experiment: Experiment, case: Case, chosen: Mapping[str, Sequence[str]]) -> Comparison:
    """One table: the aligned model, and each method with all of its seeds."""
    rows = {INITIAL: [case.initial / INITIAL]}
    for method in experiment.methods:
        rows[method.name] = [one.evaluation for one in experiment.runs_of(case, method, chosen)]
    return report.compare(rows)


def _tuning(experiment: Experiment, chosen: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Every setting that was tried, with its numbers, and which was taken."""
    return {
        name: {"chosen": chosen[name], "runs": [{"settings": words, **vars(n)} for words, n in settings.items()]}
        for name, settings in run.tuned(experiment).items()
    }


def _markdown(experiment: Experiment, tables: Mapping[Case, Comparison], chosen: Mapping[str, str]) -> str:
    parts = [f"# {experiment.settings['title']}", f"Seeds: {', '.join(map(str, experiment.settings['seeds']))}."]
    for case, table in tables.items():
        parts += [f"## {case.title}"] if case.title else []
        parts.append(table.markdown().rstrip())
    if chosen:
        seed = experiment.settings["tuning"]["seed"]
        lines = [f"| {name} | `{words}` |" for name, words in chosen.items()]
        parts += [f"## Chosen on seed {seed}", "\n".join(["| | |", "|---|---|", *lines])]
    return "\n\n".join(parts) + "\n"


def _csv(tables: Mapping[Case, Comparison]) -> str:
    """The lines of each table's CSV, behind a column for the case."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    for number, (case, table) in enumerate(tables.items()):
        header, *lines = csv.reader(io.StringIO(table.csv()))
        if number == 0:
            writer.writerow(["case", *header])
        writer.writerows([case.title, *line] for line in lines)
    return stream.getvalue()


# Figures -----------------------------------------------------------------------------------------------------------------


def sweeps(experiment: Experiment, tables: Mapping[Case, Comparison]) -> list[figures.Figure]:
    """Each swept key of each method: every percentage against its values."""
    keys = dict.fromkeys((m.tuned_as, m.swept[0]) for m in experiment.methods if m.swept is not None)
    found = []
    for (name, key), (case, table) in ((key, item) for key in keys for item in tables.items()):
        swept = [m for m in experiment.methods if m.tuned_as == name and m.swept is not None and m.swept[0] == key]
        rows = {row.name: row for row in table.rows}
        series = {
            column.title: [rows[method.name].cell(column.benchmark, column.counted) for method in swept]
            for column in table.columns
            if column.main
        }
        title = f"{name}: {key}" + (f", {case.title}" if case.title else "")
        found.append(curves(title, key, [str(m.swept[1]) for m in swept if m.swept is not None], series))
    return found


def poison_shares(experiment: Experiment, tables: Mapping[Case, Comparison]) -> list[figures.Figure]:
    """Each percentage of each method against the poison share; nothing where there is one share."""
    shares = experiment.settings["poison"] or []
    if len(shares) < 2:
        return []
    found = []
    groups = [list(tables.items())[i : i + len(shares)] for i in range(0, len(tables), len(shares))]
    for group in groups:
        case, first = group[0]
        for column in first.columns:
            if column.main:
                series = {
                    row.name: [table.rows[number].cell(column.benchmark, column.counted) for _, table in group]
                    for number, row in enumerate(first.rows)
                }
                name = case.title.rpartition(", ")[0]
                title = column.title + (f", {name}" if name else "")
                found.append(curves(title, "share of harmful rows", [f"{share:g}" for share in shares], series))
    return found


def curves(
    title: str, across: str, ticks: Sequence[str], series: Mapping[str, Sequence[Cell | None]]
) -> figures.Figure:
    """Percentages with their intervals at some values, which stand at equal distances."""

    def plot(axis: Axes) -> None:
        for number, (name, cells) in enumerate(series.items()):
            known = [(x, cell) for x, cell in enumerate(cells) if cell is not None]
            shift = 0.03 * (number - len(series) / 2)  # so that intervals do not hide each other
            errors: Any = [
                [cell.percent - cell.interval[0] for _, cell in known],
                [cell.interval[1] - cell.percent for _, cell in known],
            ]
            axis.errorbar(
                [x + shift for x, _ in known], [cell.percent for _, cell in known], yerr=errors, label=name, linewidth=1.2,
                marker=figures.MARKERS[number % len(figures.MARKERS)], markersize=4, capsize=2,
                color=figures.COLOURS[number % len(figures.COLOURS)],
            )  # fmt: skip
        axis.set_xticks(range(len(ticks)), list(ticks))
        axis.set(xlabel=across, ylabel="%", ylim=(-4, 104))
        axis.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(-0.08, 1.0), columnspacing=1.2)

    return figures.draw(title, plot)


def _named(
    drawn: Mapping[Case, Sequence[figures.Figure]], more: Sequence[figures.Figure]
) -> list[tuple[str, figures.Figure]]:
    pairs = [
        (f"{case.title} {figure.title}" if case.title else figure.title, figure)
        for case, own in drawn.items()
        for figure in own
    ]
    return [(slug(title), figure) for title, figure in [*pairs, *((figure.title, figure) for figure in more)]]
