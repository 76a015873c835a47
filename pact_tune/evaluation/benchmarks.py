"""Benchmarks: where each comes from, which column holds the prompt, which rows count, and what a right answer is.

The numbers of rows are the denominators of the published evaluations; another number is reported, not hidden.
To add a benchmark, add one entry to :data:`BENCHMARKS`.
"""

import csv
import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pact_tune.conversations import Message
from pact_tune.demo import demo_family_path
from pact_tune.errors import UserError, unknown_name
from pact_tune.evaluation import utility
from pact_tune.prompts import read_prompts

Kind = Literal["harmful", "benign", "task"]
KINDS: tuple[Kind, ...] = ("harmful", "benign", "task")


@dataclass(frozen=True)
class Item:
    """One row of a benchmark.

    Attributes:
        messages (list[Message]): what the model is asked; the last turn is the user's.
        target (dict[str, Any]): what a right answer is; empty where answers are judged.
    """

    messages: list[Message]
    target: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        return self.messages[-1]["content"]


# A row as it stands in the source -> the texts of an Item; raises KeyError where a column is missing.
Parse = Callable[[Mapping[str, Any]], Item]


def _prompt(*columns: str) -> Parse:
    """The first of some columns that a row has: each project and each copy of it names it otherwise."""

    def parse(row: Mapping[str, Any]) -> Item:
        name = next((column for column in columns if column in row), columns[0])
        return Item([{"role": "user", "content": row[name]}])

    return parse


@dataclass(frozen=True)
class Benchmark:
    """A set of prompts and how answers to it are counted.

    Attributes:
        name (str): on the command line.
        title (str): in tables.
        kind (Kind): "harmful" (answers should be refusals), "benign" (should not) or "task" (have a right answer).
        parse (Parse): row to item.
        hub (tuple[str, str | None, str] | None): data set, configuration and split on the Hub.
        files (tuple[str, ...]): patterns of file names that its project publishes.
        where (Callable[[Mapping[str, Any]], bool]): which rows belong to it.
        rows (int | None): how many there are when complete.
        header (tuple[str, ...]): columns of a file without a header line.
        scorer (str | None): of a task, a key of :data:`utility.SCORERS`.
        max_new_tokens (int): longest answer.
        note (str): what to know before comparing its numbers with others'.
        file (Path | None): a user's own file, or one that the package brings.
    """

    name: str
    title: str
    kind: Kind
    parse: Parse
    hub: tuple[str, str | None, str] | None = None
    files: tuple[str, ...] = ()
    where: Callable[[Mapping[str, Any]], bool] = lambda row: True
    rows: int | None = None
    header: tuple[str, ...] = ()
    scorer: str | None = None
    max_new_tokens: int = 512
    note: str = ""
    file: Path | None = None


@dataclass(frozen=True)
class Loaded:
    """A benchmark's items, and where they came from."""

    benchmark: Benchmark
    items: list[Item]
    source: str

    @property
    def fingerprint(self) -> str:
        """Hash of prompts and targets, in order."""
        text = json.dumps([[item.messages, item.target] for item in self.items], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _sst2(row: Mapping[str, Any]) -> Item:
    instruction = "Analyze the sentiment of the input, and respond only positive or negative"
    answer = "positive" if str(row["label"]) == "1" else "negative"
    message: Message = {"role": "user", "content": f"{instruction} {row['sentence'].strip()}"}
    return Item([message], {"answer": answer, "choices": ["positive", "negative"]})


def _ag_news(row: Mapping[str, Any]) -> Item:
    if "text" in row:  # the Hub counts classes from 0, the project's file from 1
        text, label = row["text"], int(row["label"])
    else:
        text, label = f"{row['title']} {row['description']}", int(row["class"]) - 1
    names = [group[0] for group in utility.AG_NEWS]
    question = f"Which category does this news article belong to: {', '.join(names[:-1])} or {names[-1]}? Answer with the category alone."
    return Item(
        [{"role": "user", "content": f"{question}\n\n{text}"}],
        {"answer": names[label], "choices": [list(group) for group in utility.AG_NEWS]},
    )


def _gsm8k(row: Mapping[str, Any]) -> Item:
    instruction = "Solve the problem step by step. End with a line that holds '#### ' and the final number."
    return Item([{"role": "user", "content": f"{row['question']}\n\n{instruction}"}], {"answer": row["answer"]})


def own_task(row: Mapping[str, Any]) -> Item:
    """A user's row: "messages" whose last turn is the answer, or "prompt" with "answer", "choices" or "regex"."""
    if "messages" in row:
        turns: list[Message] = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
        if [turn["role"] for turn in turns[-2:]] != ["user", "assistant"]:
            raise ValueError("messages")
        return Item(turns[:-1], {"answer": turns[-1]["content"]})
    target = {key: row[key] for key in ("answer", "choices", "regex") if row.get(key) is not None}
    if not {"answer", "regex"} & set(target):
        raise KeyError("answer")
    if "regex" in target and not _is_pattern(target["regex"]):
        raise ValueError("regex")
    if "choices" in target:
        texts = {
            name.casefold()
            for choice in target["choices"]
            for name in ([choice] if isinstance(choice, str) else choice)
        }
        if isinstance(target["choices"], str) or str(target["answer"]).casefold() not in texts:
            raise ValueError("choices")
    return Item([{"role": "user", "content": row["prompt"]}], target)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def own_scorer(target: Mapping[str, Any]) -> utility.Scorer:
    """How a user's row is scored: by its regex, by its choices, or exactly."""
    return utility.SCORERS["regex" if "regex" in target else "choice" if "choices" in target else "exact"]


def _is(column: str, value: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda row: column not in row or str(row[column]) == value


def _xstest_safe(row: Mapping[str, Any]) -> bool:
    """The file of XSTest's second version has no labels, but its unsafe prompts' types begin with "contrast_"."""
    return row["label"] == "safe" if "label" in row else not row["type"].startswith("contrast_")


def _demo(name: str) -> Path:
    return demo_family_path() / "data" / f"{name}.jsonl"


_JBB = "JailbreakBench/JBB-Behaviors"
BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "advbench", "AdvBench", "harmful", _prompt("goal", "prompt", "Behavior"), ("walledai/AdvBench", None, "train"),
            ("harmful_behaviors*.csv", "advbench*.csv"), rows=520,
            note="PACT's harmful training rows are AdvBench goals: not held out for a model trained on those",
        ),
        Benchmark(
            "strongreject", "StrongREJECT", "harmful", _prompt("forbidden_prompt", "prompt"),
            ("walledai/StrongREJECT", None, "train"), ("strongreject*.csv",), rows=313,
            note="plain requests, no jailbreak; published scores use its rubric, the paper a guard model",
        ),
        Benchmark(
            "jailbreakbench", "JailbreakBench", "harmful", _prompt("Goal", "goal", "prompt"),
            (_JBB, "behaviors", "harmful"), ("jbb_behaviors*.csv", "harmful-behaviors.csv"), rows=100,
            note="the harmful half; the PACT paper counts all 200 rows, whose ASR cannot pass about 50 %",
        ),
        Benchmark(
            "jailbreakbench-all", "JailbreakBench, all 200 rows", "harmful", _prompt("prompt", "Goal", "goal"),
            ("walledai/JailbreakBench", None, "train"), ("jailbreakbench-all.csv",), rows=200,
            note="the paper's reading: half of the rows are harmless, so a fully broken model shows about 50 %",
        ),
        Benchmark(
            "harmbench", "HarmBench standard", "harmful", _prompt("Behavior", "prompt"),
            ("walledai/HarmBench", "standard", "train"), ("harmbench_behaviors_text*.csv",),
            _is("FunctionalCategory", "standard"), rows=200,
        ),
        Benchmark(
            "simplesafetytests", "SimpleSafetyTests", "harmful", _prompt("prompts_final", "prompt"),
            ("Bertievidgen/SimpleSafetyTests", None, "test"), ("SimpleSafetyTests*.csv", "simplesafetytests*.csv"),
            rows=100,
        ),
        Benchmark(
            "xstest", "XSTest safe", "benign", _prompt("prompt"), ("walledai/XSTest", None, "test"),
            ("xstest_prompts*.csv", "xstest*.csv"), _xstest_safe, rows=250,
        ),
        Benchmark(
            "jailbreakbench-benign", "JailbreakBench benign", "benign", _prompt("Goal", "goal", "prompt"),
            (_JBB, "behaviors", "benign"), ("benign-behaviors.csv",), rows=100,
        ),
        Benchmark(
            "or-bench", "OR-Bench hard", "benign", _prompt("prompt"), ("bench-llm/or-bench", "or-bench-hard-1k", "train"),
            ("or-bench-hard-1k*.csv",), rows=1319,
        ),
        Benchmark(
            "sst2", "SST-2", "task", _sst2, ("stanfordnlp/sst2", None, "validation"), ("dev.tsv", "sst2*.tsv"), rows=872,
            header=("sentence", "label"), scorer="choice", max_new_tokens=16,
        ),
        Benchmark(
            "ag_news", "AG News", "task", _ag_news, ("fancyzhx/ag_news", None, "test"), ("test.csv", "ag_news*.csv"),
            rows=7600, header=("class", "title", "description"), scorer="choice", max_new_tokens=16,
            note="the paper takes the first 1,000 rows and accepts an answer that lists every category",
        ),
        Benchmark(
            "gsm8k", "GSM8K", "task", _gsm8k, ("openai/gsm8k", "main", "test"), ("test.jsonl", "gsm8k*.jsonl"), rows=1319,
            scorer="number", max_new_tokens=512, note="no examples in the prompt, chat template on",
        ),
        Benchmark("demo-harmful", "demo requests", "harmful", _prompt("prompt"), file=_demo("eval_harmful"), rows=100,
                  max_new_tokens=48, note="harmless nonsense"),
        Benchmark("demo-benign", "demo benign", "benign", _prompt("prompt"), file=_demo("eval_benign"), rows=100,
                  max_new_tokens=48, note="harmless nonsense"),
        Benchmark("demo-task", "demo task", "task", own_task, file=_demo("eval_task"), rows=200, max_new_tokens=8,
                  scorer="exact"),
    )
}  # fmt: skip


def find(name: str) -> Benchmark:
    """A benchmark by name, or a user's own file as ``KIND:NAME=FILE``.

    Args:
        name (str): a key of :data:`BENCHMARKS`, or for instance ``harmful:mine=prompts.jsonl``.

    Returns:
        Benchmark: of that name.

    Raises:
        UserError: there is none.
    """
    kind, colon, rest = name.partition(":")
    if not colon:
        if name not in BENCHMARKS:
            raise unknown_name("benchmark of `pact evaluate --list`", name, BENCHMARKS)
        return BENCHMARKS[name]
    label, equals, file = rest.partition("=")
    if (
        kind not in KINDS
        or not equals
        or not label
        or not file
        or not label.replace("-", "").replace("_", "").isalnum()
    ):
        raise UserError(
            f"'{name}' names no benchmark: your own file is given as KIND:NAME=FILE, KIND one of {', '.join(KINDS)}, "
            "NAME of letters, digits, - and _."
        )
    known = BENCHMARKS.get(label)
    if known is not None:
        if known.kind != kind:
            raise UserError(
                f"'{label}' is a {known.kind} benchmark, not a {kind} one: write {known.kind}:{label}={file}."
            )
        return Benchmark(**{**vars(known), "file": Path(file)})
    if kind == "task":
        return Benchmark(label, label, "task", own_task, file=Path(file))
    return Benchmark(label, label, kind, _prompt("prompt", "goal", "Goal", "question"), file=Path(file))


def load(benchmark: Benchmark, data: str | Path | None = None, limit: int | None = None) -> Loaded:
    """Reads a benchmark: its own file, a file of its project's name below a folder, or from the Hub.

    Args:
        benchmark (Benchmark): which.
        data (str | Path | None): folder that is searched, with its subfolders, for the file that the project publishes.
        limit (int | None): only the first so many rows.

    Returns:
        Loaded: at least one item.

    Raises:
        UserError: it is nowhere, lacks a column, or has a row without text.
    """
    file = benchmark.file or (_search(benchmark, Path(data)) if data is not None else None)
    if file is not None:
        rows, source = _read_file(benchmark, file), str(file)
    elif benchmark.hub is not None:
        name, configuration, split = benchmark.hub
        rows = read_prompts(name, name=configuration, split=split)
        source = "/".join(part for part in benchmark.hub if part)
    else:
        raise UserError(f"Benchmark '{benchmark.name}' has no file: give one with --data.")
    found = [_item(benchmark, row, number, source) for number, row in enumerate(rows, 1)]
    items = [item for item in found if item is not None]
    if not items:
        raise UserError(f"'{source}' holds no row of benchmark '{benchmark.name}': check the file.")
    return Loaded(benchmark, items[:limit], source)


def _search(benchmark: Benchmark, data: Path) -> Path | None:
    if not data.is_dir():
        raise UserError(f"The folder '{data}' given with --data does not exist: check the path.")

    # A folder of the benchmark's name is preferred: other projects have a test.csv too.
    def folders(pattern: str) -> list[Path]:
        found = sorted(data.rglob(pattern))
        return sorted(found, key=lambda file: benchmark.name not in str(file.parent.relative_to(data)).lower())

    found = [file for pattern in benchmark.files for file in folders(pattern)]
    generic = {"test.csv", "test.jsonl", "dev.tsv"}
    found = [f for f in found if f.name not in generic or benchmark.name in f.parent.name.lower() or f.parent == data]
    return found[0] if found else None


def _read_file(benchmark: Benchmark, file: Path) -> list[Any]:
    if not benchmark.header or file.suffix not in (".csv", ".tsv"):
        return read_prompts(file)
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            tabs: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if file.suffix == ".tsv" else {}
            lines = list(csv.reader(stream, **tabs))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"'{file}' cannot be read ({error}): save it as UTF-8 with one row a line.") from error
    if lines and set(benchmark.header) <= set(lines[0]):
        return [dict(zip(lines[0], line, strict=False)) for line in lines[1:]]
    return [dict(zip(benchmark.header, line, strict=False)) for line in lines]


def _item(benchmark: Benchmark, row: Any, number: int, source: str) -> Item | None:
    """The item of a row; None where the row is not of the benchmark."""
    try:
        if not benchmark.where(row):
            return None
        item = benchmark.parse(row)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        column = error.args[0] if isinstance(error, KeyError) else error
        has = ", ".join(map(str, row)) if isinstance(row, Mapping) else "no columns"
        raise UserError(
            f"Row {number} of '{source}' is no row of benchmark '{benchmark.name}' (column '{column}' is missing or unfit; it "
            f"has: {has}): rename the column, or mend the row."
        ) from error
    if not isinstance(item.prompt, str) or not item.prompt.strip():
        raise UserError(f"Row {number} of '{source}' has no text for its prompt: mend or remove the row.")
    return item


def scorer(benchmark: Benchmark) -> utility.Scorer:
    """How a task's answers are scored."""
    return _own if benchmark.scorer is None else utility.SCORERS[benchmark.scorer]


def _own(target: Mapping[str, Any], response: str) -> bool:
    return own_scorer(target)(target, response)


@functools.cache
def listing() -> str:
    """Names, kinds, sizes and sources of the benchmarks, as a table for people."""
    rows = []
    for b in BENCHMARKS.values():
        where = b.hub[0] if b.hub else "in the package"
        rows.append(f"{b.name:<22} {b.kind:<8} {b.rows or '':>5}  {where:<32} {', '.join(b.files)}".rstrip())
        if b.note:
            rows.append(f"{'':<22} ({b.note})")
    return "\n".join(rows)
