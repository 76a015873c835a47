"""Several evaluations side by side: a table (text, Markdown, CSV) and one self-contained HTML page."""

import csv
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from pact_tune.errors import UserError
from pact_tune.evaluation import figures
from pact_tune.evaluation.records import Journal, Record, read_analysis
from pact_tune.evaluation.run import VERDICT_KEYS, read_summary
from pact_tune.evaluation.statistics import Rate, Seeds, mcnemar
from pact_tune.files import atomic_file

PAGE_FILE, MARKDOWN_FILE, CSV_FILE = "report.html", "report.md", "report.csv"
# What is counted of each kind of benchmark, and how the column is called.
COUNTED = {"task": ("correct", "accuracy"), "harmful": ("harm", "ASR"), "benign": ("refused", "refused")}
PROMPTS = 40  # shown of each benchmark


@dataclass(frozen=True)
class Cell:
    """One number of one row of the table: of one evaluation, or of several that differ in their seed alone."""

    rates: tuple[Rate, ...]

    @property
    def percent(self) -> float:
        return Seeds(tuple(rate.percent for rate in self.rates)).mean

    @property
    def deviation(self) -> float | None:
        return Seeds(tuple(rate.percent for rate in self.rates)).deviation

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of one evaluation; of several, from the lowest to the highest."""
        if len(self.rates) == 1:
            return self.rates[0].interval
        values = [rate.percent for rate in self.rates]
        return min(values), max(values)

    def __str__(self) -> str:
        return f"{self.percent:.1f}" if self.deviation is None else f"{self.percent:.1f}±{self.deviation:.1f}"


@dataclass(frozen=True)
class Column:
    """A column of percentages: one benchmark's main count, or its broken or unparsed answers."""

    benchmark: str
    counted: str
    title: str
    kind: str

    @property
    def main(self) -> bool:
        """Whether it counts what its benchmark is about; the others stand beside it."""
        return self.counted == COUNTED[self.kind][0]


@dataclass(frozen=True)
class Compared:
    """One row of the comparison: a name and its evaluations."""

    name: str
    folders: tuple[Path, ...]
    summaries: tuple[Record, ...]

    def cell(self, benchmark: str, counted: str) -> Cell | None:
        """A count as a share of all rows; None where the benchmark was not run."""
        rates = []
        for summary in self.summaries:
            entry = summary["benchmarks"].get(benchmark)
            if entry is None:
                return None
            count = entry["broken"] if counted == "broken" and entry["kind"] == "task" else entry["counts"][counted]
            rates.append(Rate(count, entry["rows"]))
        return Cell(tuple(rates))

    def on_aligned_answers(self, key: str) -> float | None:
        """KL or loss a token on the aligned model's own answers, all benchmarks and seeds together."""
        entries = [
            e["on_aligned_answers"]
            for s in self.summaries
            for e in s["benchmarks"].values()
            if "on_aligned_answers" in e
        ]
        return sum(e[key] for e in entries) / sum(e["positions"] for e in entries) if entries else None

    def verdicts(self, benchmark: str) -> list[Record]:
        """The rows of the first evaluation, in order.

        Raises:
            UserError: the file is not what the summary counted.
        """
        entry = self.summaries[0]["benchmarks"][benchmark]
        journal = Journal(self.folders[0] / entry["verdicts"], keys=VERDICT_KEYS)
        rows = journal.in_order()
        if len(rows) != entry["rows"]:
            raise UserError(
                f"'{journal.path}' has {len(rows)} of {entry['rows']} verdicts: evaluate again, which keeps the answers."
            )
        return rows


@dataclass(frozen=True)
class Comparison:
    """Evaluations side by side.

    Attributes:
        rows (list[Compared]): in the order given.
        baseline (str): whose answers the others are tested against.
    """

    rows: list[Compared]
    baseline: str

    @functools.cached_property
    def entries(self) -> dict[str, Record]:
        """Benchmarks that any row has, tasks first, then harmful, then benign requests."""
        found: dict[str, Record] = {}
        for row in self.rows:
            for summary in row.summaries:
                for name, entry in summary["benchmarks"].items():
                    found.setdefault(name, entry)
        return dict(sorted(found.items(), key=lambda item: list(COUNTED).index(item[1]["kind"])))

    @functools.cached_property
    def columns(self) -> list[Column]:
        columns = []
        for name, entry in self.entries.items():
            counted, what = COUNTED[entry["kind"]]
            columns.append(Column(name, counted, f"{entry['title']}: {what} %", entry["kind"]))
            # Broken answers stand beside every ASR; elsewhere only where there are any.
            for extra in ("broken", "unparsed"):
                cells = (
                    [row.cell(name, extra) for row in self.rows] if extra == "broken" or entry["kind"] != "task" else []
                )
                if any(cell and cell.percent for cell in cells) or (extra, entry["kind"]) == ("broken", "harmful"):
                    columns.append(Column(name, extra, f"{entry['title']}: {extra} %", entry["kind"]))
        return columns

    @functools.cached_property
    def extra(self) -> dict[str, list[str]]:
        """Numbers that are no shares: title -> text a row."""
        found: dict[str, list[str]] = {}
        for key, title in (("kl", "KL nats"), ("loss", "loss nats")):
            values = [row.on_aligned_answers(key) for row in self.rows]
            if any(value is not None for value in values):
                found[title] = ["" if value is None else f"{value:.3f}" for value in values]
        for name, entry in self.entries.items():
            scores = [row.summaries[0]["benchmarks"].get(name, {}).get("score") for row in self.rows]
            if any(score is not None for score in scores):
                found[f"{entry['title']}: rubric score"] = ["" if score is None else f"{score:.3f}" for score in scores]
        tasks = {task for row in self.rows for summary in row.summaries for task in summary.get("harness", {})}
        for task in sorted(tasks):
            found[f"{task} (lm-eval)"] = [_harness(row.summaries, task) for row in self.rows]
        return found

    def table(self, intervals: bool = False) -> list[list[str]]:
        """Header and rows as text.

        Args:
            intervals (bool): write the 95 % interval behind each share.

        Returns:
            list[list[str]]: the first is the header; cells that were not measured are empty.
        """
        header = ["", *(column.title for column in self.columns), *self.extra]
        lines = [header]
        for number, row in enumerate(self.rows):
            cells = [row.cell(column.benchmark, column.counted) for column in self.columns]
            texts = [
                "" if c is None else f"{c} [{c.interval[0]:.1f}, {c.interval[1]:.1f}]" if intervals else str(c)
                for c in cells
            ]
            lines.append([row.name, *texts, *(values[number] for values in self.extra.values())])
        return lines

    def text(self) -> str:
        """The table for a terminal, one line a row; with many columns, one line a number."""
        lines = self.table()
        if len(lines[0]) > 9:
            lines = [list(column) for column in zip(*lines, strict=True)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
            for line in lines
        )  # fmt: skip

    def markdown(self) -> str:
        """The table with intervals, and the tests against the baseline, as Markdown."""
        parts = [_markdown(self.table(intervals=True)), self.legend()]
        if tests := self.tests():
            parts += [f"Exact McNemar test against {self.baseline}, on the same rows (p):", _markdown(tests)]
        return "\n\n".join(parts) + "\n"

    def csv(self) -> str:
        """One line a number: model, benchmark, what is counted, percent, interval, counts of each seed, rows."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["model", "benchmark", "counted", "percent", "low", "high", "counts", "rows", "judge"])
        for row in self.rows:
            for column in self.columns:
                cell = row.cell(column.benchmark, column.counted)
                if cell is not None:
                    low, high = cell.interval
                    counts, total = " ".join(str(rate.count) for rate in cell.rates), cell.rates[0].total
                    numbers = [f"{cell.percent:.3f}", f"{low:.3f}", f"{high:.3f}", counts, total]
                    writer.writerow(
                        [row.name, column.benchmark, column.counted, *numbers, self.entries[column.benchmark]["judge"]]
                    )
            for title, values in self.extra.items():
                value = values[self.rows.index(row)]
                writer.writerow([row.name, title, "", value, "", "", "", "", ""])
        return stream.getvalue()

    def tests(self) -> list[list[str]]:
        """Header and rows of p-values of each row against the baseline; empty where rows have several seeds or are alone."""
        single = [row for row in self.rows if len(row.folders) == 1]
        base = next((row for row in single if row.name == self.baseline), None)
        others = [row for row in single if row is not base]
        if base is None or not others:
            return []
        lines = [["", *(f"{entry['title']}: {COUNTED[entry['kind']][1]}" for entry in self.entries.values())]]
        for row in others:
            cells = []
            for name, entry in self.entries.items():
                counted = COUNTED[entry["kind"]][0]
                both = [one for one in (base, row) if one.cell(name, counted) is not None]
                flags = [[record["outcome"] == counted for record in one.verdicts(name)] for one in both]
                cells.append(_p(mcnemar(*flags)) if len(flags) == 2 else "")
            lines.append([row.name, *cells])
        return lines

    def legend(self) -> str:
        """What the numbers are, in words."""
        seeds = any(len(row.folders) > 1 for row in self.rows)
        interval = "Wilson's 95 % interval" + (
            "; of several seeds mean±standard deviation [lowest, highest]" if seeds else ""
        )
        judges = sorted(
            {f"{entry['title']}: {entry['judge']}" for entry in self.entries.values() if entry["kind"] != "task"}
        )
        text = (
            f"In brackets: {interval}. ASR: share of all harmful requests that were answered. Broken: answers that are no text "
            "(empty, repeated, an echo, far from what the aligned model takes for text); they are never counted as safe, and "
            "ASR plus broken is the upper bound."
        )
        if "KL nats" in self.extra:
            text += " KL and loss: a token, on the aligned model's own answers; what was forgotten."
        return text + (f" Judges: {'; '.join(judges)}." if judges else "")

    def html(self, title: str = "Comparison", introduction: str = "", prompts: int = PROMPTS) -> str:
        """The page, with every plot in it."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("pact_tune.evaluation"), autoescape=True, undefined=jinja2.StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        table = self.table(intervals=True)
        return environment.get_template("compare.html.jinja").render(
            title=title,
            introduction=introduction,
            header=table[0],
            table=[[_split(cell) for cell in line] for line in table[1:]],
            legend=self.legend(),
            notes=[(e["title"], e["rows"], e["rows_published"], e["source"], e["note"]) for e in self.entries.values()],
            tests=self.tests(),
            baseline=self.baseline,
            figures=self.figures(),
            prompts=[(self.entries[name]["title"], *self.prompts(name, prompts)) for name in self.entries],
            names=[row.name for row in self.rows],
        )

    @property
    def colours(self) -> dict[str, str]:
        """Of each row, in every figure."""
        return {row.name: figures.COLOURS[i % len(figures.COLOURS)] for i, row in enumerate(self.rows)}

    def against_accuracy(self, *kinds: str) -> list[figures.Figure]:
        """The main percentage of each benchmark of these kinds against the accuracy of each task."""
        main = [column for column in self.columns if column.main]
        return [
            figures.pareto(
                task.title,
                other.title,
                {
                    r.name: (r.cell(task.benchmark, task.counted), r.cell(other.benchmark, other.counted))
                    for r in self.rows
                },
                self.colours,
            )
            for task in main
            if task.kind == "task"
            for other in main
            if other.kind in kinds
        ]

    def figures(self) -> list[tuple[str, str, list[figures.Figure]]]:
        """Sections of figures: heading, text, figures; sections without any are left out."""
        colours = self.colours
        beside = [
            figures.bars(c.title, {row.name: row.cell(c.benchmark, c.counted) for row in self.rows}, colours)
            for c in self.columns
            if c.kind == "benign" or c.counted == "broken"
        ]
        masses = {
            entry["title"]: {row.name: _mass(row.summaries[0]["benchmarks"].get(name, {})) for row in self.rows}
            for name, entry in self.entries.items()
        }
        by_position = [
            figures.lines(f"safety-token probability, {title}", "response position", {n: (list(range(len(m))), m) for n, m in values.items() if m}, colours, share=True)
            for title, values in masses.items() if any(values.values())
        ]  # fmt: skip
        runs = {row.name: run for row in self.rows if (run := _run_folder(row.summaries[0].get("source", "")))}
        first = " Of several seeds: the first." if any(len(row.folders) > 1 for row in self.rows) else ""
        sections = [
            ("Compliance against accuracy", "Lower right is better: the task learned, harmful requests still refused.", self.against_accuracy("harmful")),
            ("Over-refusal and broken answers", "Lower is better for both.", beside),
            ("Safety tokens", "Probability of all safety tokens together, with the aligned model's own answer as prefix." + first, by_position),
            ("Training", "Each method's own loss, as it was logged." + first, figures.training(runs, colours)),
            *figures.analysis({name: read_analysis(run) for name, run in runs.items()}, colours),
        ]  # fmt: skip
        return [section for section in sections if section[2]]

    def prompts(self, benchmark: str, limit: int) -> tuple[int, list[Record]]:
        """Rows with every model's answer and verdict, those on which models differ first.

        Args:
            benchmark (str): which.
            limit (int): at most how many.

        Returns:
            tuple[int, list[Record]]: how many there are, and the first of them: "prompt" and "answers", a list of "name",
            "response", "outcome" and "why".
        """
        verdicts = {
            row.name: row.verdicts(benchmark) for row in self.rows if benchmark in row.summaries[0]["benchmarks"]
        }
        together = list(zip(*verdicts.values(), strict=True))
        order = sorted(range(len(together)), key=lambda i: (-len({record["outcome"] for record in together[i]}), i))
        return len(together), [
            {
                "prompt": together[i][0]["prompt"],
                "answers": [
                    {
                        "name": name,
                        "response": record["response"],
                        "outcome": record["outcome"],
                        "why": record["broken"] or record.get("output") or "",
                    }
                    for name, record in zip(verdicts, together[i], strict=True)
                ],
            }
            for i in order[:limit]
        ]

    def write(self, folder: Path, title: str = "Comparison", introduction: str = "", prompts: int = PROMPTS) -> None:
        """Writes the page, Markdown and CSV into a folder, each whole or not at all."""
        texts = {
            PAGE_FILE: self.html(title, introduction, prompts),
            MARKDOWN_FILE: self.markdown(),
            CSV_FILE: self.csv(),
        }
        for name, text in texts.items():
            with atomic_file(folder / name) as file:
                file.write_text(text, encoding="utf-8")


def compare(folders: Mapping[str, Sequence[Path]], baseline: str | None = None) -> Comparison:
    """Reads evaluations and puts them side by side.

    Args:
        folders (Mapping[str, Sequence[Path]]): by name, one evaluation folder, or several of runs that differ in their
            seed alone.
        baseline (str | None): default: the first row that is not the aligned model itself.

    Returns:
        Comparison: of them all.

    Raises:
        UserError: an evaluation is missing, or two of them used other prompts or judges for one benchmark.
    """
    rows = [Compared(name, tuple(paths), tuple(map(read_summary, paths))) for name, paths in folders.items()]
    seen: dict[str, tuple[str, Record]] = {}
    for row in rows:
        for summary in row.summaries:
            for name, entry in summary["benchmarks"].items():
                first, other = seen.setdefault(name, (row.name, entry))
                for key, what in (("items", "prompts"), ("judge", "a judge")):
                    if entry[key] != other[key]:
                        raise UserError(
                            f"'{first}' and '{row.name}' were evaluated on {name} with other {what.removeprefix('a ')}"
                            f"{'s' if key == 'judge' else ''}, so they cannot be compared: evaluate both with the same "
                            "--data, --limit and --judge (--rejudge keeps the answers)."
                        )
    _check_harness(rows)
    names = [row.name for row in rows]
    if baseline is not None and baseline not in names:
        raise UserError(f"There is no model '{baseline}' to compare with; there are: {', '.join(names)}.")
    return Comparison(rows, baseline or next((name for name in names if name != "Initial"), names[0]))


def _check_harness(rows: Sequence[Compared]) -> None:
    seen: dict[str, Record] = {}
    for task, entry in (item for row in rows for s in row.summaries for item in s.get("harness", {}).items()):
        how = {key: entry["settings"][key] for key in ("limit", "lm_eval")}
        if seen.setdefault(task, how) != how:
            raise UserError(
                f"The evaluations ran {task} of lm-evaluation-harness with another --limit or version ({seen[task]}, {how}), "
                "so they cannot be compared: evaluate them alike."
            )


def _mass(entry: Record) -> list[float]:
    return entry.get("on_aligned_answers", {}).get("mass", [])


def _harness(summaries: Sequence[Record], task: str) -> str:
    values = [s["harness"][task] for s in summaries if task in s.get("harness", {})]
    if len(values) != 1:
        return f"{sum(v['value'] for v in values) / len(values):.3f}" if values else ""
    error = values[0]["error"]
    return f"{values[0]['value']:.3f}" + ("" if not isinstance(error, float) else f"±{error:.3f}")


def _run_folder(source: str) -> Path | None:
    """The output folder of the run that made a model: the nearest folder above it that holds training records."""
    path = Path(source)
    if not source or not path.exists():
        return None
    near = [path, *path.resolve().parents[:2]]
    return next((p for p in near if (p / "logs").is_dir() or (p / "analysis.jsonl").exists()), None)


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _split(cell: str) -> tuple[str, str]:
    """A number and its interval, which is set smaller."""
    value, bracket, rest = cell.partition(" [")
    return value, bracket.strip() + rest


def _markdown(lines: Sequence[Sequence[Any]]) -> str:
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    rule = ["---", *["---:"] * (len(cells[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [cells[0], rule, *cells[1:]])
