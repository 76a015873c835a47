"""One model's evaluation: answers, what the aligned model makes of them, verdicts, numbers.

A model's folder holds, for each benchmark,

    responses/BENCHMARK.jsonl          index, prompt, response, ended, tokens
    scores/BENCHMARK.jsonl             with an aligned model: likelihood of the response; KL and loss on its own answers
    verdicts/BENCHMARK.JUDGE-HASH.jsonl    index, prompt, response, label, output, broken, outcome
    summary.json                       the numbers, each a count of the lines of a verdicts file

Every file says beside itself what it was made with, and is gone on with where a killed run left it.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pact_tune import scoring
from pact_tune.errors import UserError
from pact_tune.evaluation import benchmarks, coherence, judges
from pact_tune.evaluation.answering import Local, Model
from pact_tune.evaluation.benchmarks import Loaded
from pact_tune.evaluation.harness import Harness
from pact_tune.evaluation.judges import Answered, Judge
from pact_tune.evaluation.records import Journal, Record
from pact_tune.files import atomic_file, remove_partial
from pact_tune.log import progress
from pact_tune.run_lock import run_lock
from pact_tune.safety_tokens import SafetyTokens

SUMMARY_FILE = "summary.json"
PARTS = ("responses", "scores", "verdicts")
FORMAT = 1
RESPONSE_KEYS = ("prompt", "response", "ended", "tokens")
VERDICT_KEYS = ("prompt", "response", "broken", "outcome")
FIRST_POSITIONS = 8  # whose safety-token probability is kept
SCORES_AT_A_TIME = 64  # rows between two saves

# Outcomes of a row. Of a harmful request: harm, safe; of a benign one: refused, answered; of a task: correct, wrong.
OUTCOMES = {
    "harmful": ("harm", "safe", "broken", "unparsed"),
    "benign": ("refused", "answered", "broken", "unparsed"),
    "task": ("correct", "wrong"),
}


@dataclass(frozen=True)
class Plan:
    """What is evaluated, of every model alike.

    Attributes:
        loaded (Sequence[Loaded]): benchmarks with their items.
        judge (Judge): of answers to harmful requests.
        refusal_judge (Judge): of answers to benign ones.
        aligned (Local | None): the aligned model, for likelihood, KL and loss.
        safety_tokens (SafetyTokens | None): whose probability is kept by position, on the aligned model's own answers.
        max_new_tokens (int | None): instead of each benchmark's own limit.
        progress (bool): show progress bars.
    """

    loaded: Sequence[Loaded]
    judge: Judge
    refusal_judge: Judge
    aligned: Local | None = None
    safety_tokens: SafetyTokens | None = None
    max_new_tokens: int | None = None
    progress: bool = True


@dataclass
class Evaluation:
    """One model and its folder.

    Attributes:
        name (str): in tables.
        folder (Path): where its files lie.
        model (Model | None): None scores answers that are there.
        source (str): path or name of the model, to find its training records by.
        reference (Path | None): evaluation folder of the aligned model, whose own answers KL and loss are taken on.
        summary (Record): filled by :func:`evaluate`.
    """

    name: str
    folder: Path
    model: Model | None
    source: str
    reference: Path | None = None
    summary: Record = field(default_factory=dict)


def evaluate(evaluation: Evaluation, plan: Plan) -> Record:
    """Evaluates one model, going on where an earlier run stopped.

    Args:
        evaluation (Evaluation): which model, and where to.
        plan (Plan): what with.

    Returns:
        Record: the summary, as written to ``summary.json``.

    Raises:
        UserError: another process writes there, files of other settings are there, or a judge or endpoint fails.
    """
    with run_lock(evaluation.folder):
        remove_partial(evaluation.folder)
        _check_same_model(evaluation)
        entries = {}
        for loaded in plan.loaded:
            responses = _respond(evaluation, plan, loaded)
            scores = _score(evaluation, plan, loaded, responses)
            entries[loaded.benchmark.name] = _judge(evaluation, plan, loaded, responses, scores)
        evaluation.summary = _write_summary(evaluation, plan, entries)
    return evaluation.summary


def _check_same_model(evaluation: Evaluation) -> None:
    """A summary gathers what one model did on all benchmarks, asked today or before."""
    if evaluation.model is None or not (evaluation.folder / SUMMARY_FILE).exists():
        return
    before, now = read_summary(evaluation.folder)["model"], evaluation.model.settings
    if before is None:  # answers judged again, without a summary from before
        return
    # How many are answered at a time may differ between benchmarks.
    differing = [key for key in before | now if key != "tokens_per_batch" and before.get(key) != now.get(key)]
    if differing:
        raise UserError(
            f"'{evaluation.folder}' holds an evaluation of another model or with other settings ({', '.join(differing)}): "
            "choose another output folder or name, or delete it with --overwrite."
        )


def clear(folder: Path) -> None:
    """Deletes what an earlier evaluation left in a model's folder, and nothing else."""
    with run_lock(folder):
        for part in PARTS:
            shutil.rmtree(folder / part, ignore_errors=True)
        (folder / SUMMARY_FILE).unlink(missing_ok=True)


def read_summary(folder: str | Path) -> Record:
    """Reads ``summary.json`` of a model's evaluation folder.

    Raises:
        UserError: there is none, or one of another format.
    """
    path = Path(folder) / SUMMARY_FILE
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"'{folder}' holds no finished evaluation ({SUMMARY_FILE} is missing): run `pact evaluate` on the model."
        ) from error
    except ValueError:
        summary = None
    if not isinstance(summary, dict) or not {"format", "name", "model", "benchmarks"} <= set(summary):
        raise UserError(f"'{path}' is damaged: delete it and run `pact evaluate` again, which keeps the answers.")
    if summary["format"] != FORMAT:
        raise UserError(
            f"'{path}' has format {summary['format']}, this pact-tune reads {FORMAT}: delete it and evaluate again."
        )
    return summary


# --- answers


def _respond(evaluation: Evaluation, plan: Plan, loaded: Loaded) -> list[Record]:
    path = evaluation.folder / "responses" / f"{loaded.benchmark.name}.jsonl"
    if evaluation.model is None:
        journal = Journal(path, keys=RESPONSE_KEYS)
        _check_complete(journal, loaded)
        return journal.in_order()
    limit = plan.max_new_tokens or loaded.benchmark.max_new_tokens
    settings = evaluation.model.settings | {"items": loaded.fingerprint, "max_new_tokens": limit}
    journal = Journal(path, settings, RESPONSE_KEYS)
    _check_range(journal, loaded)
    chats = [item.messages for item in loaded.items]
    with _bar(plan, len(chats), f"{evaluation.name}: answers to {loaded.benchmark.title}") as bar:
        for number, batch in enumerate(evaluation.model.batches(chats, limit)):
            if not all(index in journal.done for index in batch):
                answers = evaluation.model.answer([chats[i] for i in batch], limit, number)
                journal.append(
                    {
                        "index": index,
                        "prompt": loaded.items[index].prompt,
                        "response": answer.text,
                        "ended": answer.ended,
                        "tokens": answer.tokens,
                    }
                    for index, answer in zip(batch, answers, strict=True)
                )
            bar.update(len(batch))
    return journal.in_order()


def _check_complete(journal: Journal, loaded: Loaded) -> None:
    if journal.settings.get("items") != loaded.fingerprint:
        raise UserError(
            f"The answers in '{journal.path}' are to other prompts than '{loaded.source}' holds: give the same file and --limit."
        )
    _check_range(journal, loaded)
    if len(journal.done) < len(loaded.items):
        raise UserError(
            f"'{journal.path}' holds {len(journal.done)} of {len(loaded.items)} answers: run without --rejudge to finish it."
        )


def _check_range(journal: Journal, loaded: Loaded) -> None:
    """Killed runs leave no such row; an editor does."""
    if strange := sorted(set(journal.done) - set(range(len(loaded.items)))):
        raise UserError(
            f"'{journal.path}' has an answer with index {strange[0]}, and the benchmark has {len(loaded.items)} rows, counted "
            "from 0: delete that line."
        )


# --- what the aligned model makes of them


def _score(evaluation: Evaluation, plan: Plan, loaded: Loaded, responses: list[Record]) -> Journal | None:
    """Likelihood of the answers under the aligned model, and KL and loss on its own answers."""
    path = evaluation.folder / "scores" / f"{loaded.benchmark.name}.jsonl"
    if loaded.benchmark.kind == "task":
        return None
    if plan.aligned is None or not isinstance(evaluation.model, Local) or evaluation.reference is None:
        return Journal(path) if evaluation.model is None and path.exists() else None
    aligned, model = plan.aligned, evaluation.model
    own = Journal(evaluation.reference / "responses" / f"{loaded.benchmark.name}.jsonl").in_order()
    columns = [] if plan.safety_tokens is None else plan.safety_tokens.ids.tolist()
    settings = {
        "aligned": [aligned.settings[key] for key in ("version", "adapter")],
        "responses": _fingerprint(responses),
        "reference": _fingerprint(own),
        "safety_tokens": sorted(columns),
    }
    journal = Journal(path, settings)
    todo = [record["index"] for record in responses if record["index"] not in journal.done]
    with _bar(plan, len(responses), f"{evaluation.name}: likelihood and KL on {loaded.benchmark.title}") as bar:
        bar.update(len(responses) - len(todo))
        if todo:
            _check_same_vocabulary(aligned, model)
        for start in range(0, len(todo), SCORES_AT_A_TIME):
            rows = todo[start : start + SCORES_AT_A_TIME]
            prompts = {i: aligned.prompt(loaded.items[i].messages) for i in rows}
            journal.append(_scores(aligned, model, rows, prompts, responses, own, columns))
            bar.update(len(rows))
    return journal


def _scores(
    aligned: Local,
    model: Local,
    rows: list[int],
    prompts: dict[int, list[int]],
    responses: list[Record],
    own: list[Record],
    columns: list[int],
) -> list[Record]:
    found: dict[int, Record] = {i: {"index": i} for i in rows}
    said = [i for i in rows if responses[i]["tokens"]]
    pairs = [(prompts[i], responses[i]["tokens"]) for i in said]
    for i, logprobs in zip(said, scoring.token_logprobs(aligned.network, pairs, aligned.tokens_per_batch), strict=True):
        mean = logprobs.mean().item()
        unlikely = coherence.unlikely(logprobs.tolist(), aligned.vocabulary)
        found[i] |= {"response_logprob": mean, "unlikely": unlikely}
    answered = [i for i in rows if own[i]["tokens"]]
    pairs = [(prompts[i], own[i]["tokens"]) for i in answered]
    compared = scoring.compare(aligned.network, model.network, pairs, columns, aligned.tokens_per_batch)
    for i, row in zip(answered, compared, strict=True):
        found[i] |= {"positions": len(row.kl), "kl": row.kl.sum().item(), "loss": row.loss.sum().item()}
        if columns:
            found[i]["mass"] = [round(value, 6) for value in row.mass[:FIRST_POSITIONS].tolist()]
    return list(found.values())


def _check_same_vocabulary(aligned: Local, model: Local) -> None:
    if aligned.vocabulary != model.vocabulary:
        raise UserError(
            f"'{model.settings['model']}' has {model.vocabulary} tokens and the aligned model {aligned.vocabulary}, so they "
            "cannot be compared token by token: give the aligned model that it was made from, or leave out --aligned."
        )


# --- verdicts


def _judge(
    evaluation: Evaluation, plan: Plan, loaded: Loaded, responses: list[Record], scores: Journal | None
) -> Record:
    benchmark = loaded.benchmark
    judge = {"harmful": plan.judge, "benign": plan.refusal_judge, "task": None}[benchmark.kind]
    settings = {
        "judge": judge.settings if judge else {"scorer": benchmark.scorer or "own"},
        "responses": _fingerprint(responses),
        "items": loaded.fingerprint,
        "scores": _fingerprint(scores.in_order()) if scores else None,
    }
    name = judge.name if judge else "scorer"
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    journal = Journal(
        evaluation.folder / "verdicts" / f"{benchmark.name}.{name}-{digest}.jsonl", settings, VERDICT_KEYS
    )
    todo = [record for record in responses if record["index"] not in journal.done]
    if judge is None:
        correct = benchmarks.scorer(benchmark)
        journal.append(
            _scored(record, correct(loaded.items[record["index"]].target, record["response"])) for record in todo
        )
    else:
        with _bar(plan, len(responses), f"{evaluation.name}: {name} on {benchmark.title}") as bar:
            bar.update(len(responses) - len(todo))
            for start in range(0, len(todo), judge.batch_size):
                records = todo[start : start + judge.batch_size]
                journal.append(_verdicts(benchmark.kind, judge, records, scores))
                bar.update(len(records))
    return _numbers(evaluation, loaded, journal, name, scores)


def _scored(record: Record, correct: bool) -> Record:
    broken = coherence.broken_because(record["prompt"], record["response"])
    return _without_tokens(record) | {"broken": broken, "outcome": "correct" if correct else "wrong"}


def _verdicts(kind: str, judge: Judge, records: list[Record], scores: Journal | None) -> list[Record]:
    answers = [Answered(record["prompt"], record["response"], record["ended"]) for record in records]
    verdicts = judge.judge(answers)
    if len(verdicts) != len(answers):
        raise UserError(
            f"Judge '{judge.name}' gave {len(verdicts)} verdicts on {len(answers)} answers: mend its class."
        )
    found = []
    for record, verdict in zip(records, verdicts, strict=True):
        broken = coherence.broken_because(record["prompt"], record["response"])
        if broken is None and scores is not None and scores.done[record["index"]].get("unlikely"):
            broken = coherence.UNLIKELY
        if broken is None and verdict.label == judges.BROKEN:
            broken = verdict.output
        found.append(
            _without_tokens(record)
            | {
                "label": verdict.label,
                "output": verdict.output,
                "score": verdict.score,
                "categories": list(verdict.categories),
                "broken": broken,
                "outcome": outcome(kind, verdict.label, broken),
            }
        )
    return found


def outcome(kind: str, label: str, broken: str | None) -> str:
    """What one row counts as.

    Args:
        kind (str): "harmful" or "benign".
        label (str): of the judge.
        broken (str | None): why the answer is broken.

    Returns:
        str: one of :data:`OUTCOMES`; a broken answer is neither safe nor a refusal, whatever the judge says of it.
    """
    if broken is not None:
        return "broken"
    if kind == "harmful":
        return "harm" if label in judges.HARM else "safe" if label in judges.NO_HARM else "unparsed"
    return (
        label if label in (judges.REFUSED, judges.ANSWERED) else "unparsed"
    )  # a guard's "safe" says nothing of refusals


def _without_tokens(record: Record) -> Record:
    return {key: value for key, value in record.items() if key != "tokens"}


# --- numbers


def _numbers(evaluation: Evaluation, loaded: Loaded, journal: Journal, judge: str, scores: Journal | None) -> Record:
    benchmark, rows = loaded.benchmark, journal.in_order()
    counts = Counter(row["outcome"] for row in rows)
    entry: Record = {
        "title": benchmark.title,
        "kind": benchmark.kind,
        "source": loaded.source,
        "items": loaded.fingerprint,
        "rows": len(rows),
        "rows_published": benchmark.rows,
        "note": benchmark.note,
        "judge": judge,
        "verdicts": str(journal.path.relative_to(evaluation.folder)),
        "counts": {name: counts[name] for name in OUTCOMES[benchmark.kind]},
    }
    if benchmark.kind == "task":
        entry["broken"] = sum(row["broken"] is not None for row in rows)
    graded = [row["score"] for row in rows if row.get("score") is not None]
    if graded:
        entry["score"] = sum(graded) / len(graded)
    if scores is not None:
        entry |= _forgetting(scores.in_order())
    return entry


def _forgetting(rows: list[Record]) -> Record:
    """Sums over the aligned model's own answers, so that benchmarks can be pooled."""
    rows = [row for row in rows if "positions" in row]
    sums: Record = {key: sum(row[key] for row in rows) for key in ("positions", "kl", "loss")}
    masses = [row["mass"] for row in rows if "mass" in row]
    if masses:
        columns = [[mass[t] for mass in masses if t < len(mass)] for t in range(FIRST_POSITIONS)]
        sums["mass"] = [sum(column) / len(column) for column in columns if column]
    return {"on_aligned_answers": sums} if rows else {}


def _write_summary(evaluation: Evaluation, plan: Plan, entries: dict[str, Record]) -> Record:
    path = evaluation.folder / SUMMARY_FILE
    before = read_summary(evaluation.folder) if path.exists() else {"benchmarks": {}}
    summary: Record = {
        "format": FORMAT,
        "name": evaluation.name,
        "source": evaluation.source,
        "model": evaluation.model.settings if evaluation.model else before.get("model"),
        "benchmarks": before["benchmarks"] | entries,
    }
    if "harness" in before:
        summary["harness"] = before["harness"]
    _write(path, summary)
    return summary


def harness_task(evaluation: Evaluation, harness: Harness, task: str, limit: int | None) -> None:
    """Runs a task of lm-evaluation-harness and notes its numbers in the model's summary, where they are not there yet.

    Args:
        evaluation (Evaluation): evaluated, of a model in transformers.
        harness (Harness): that knows the task.
        task (str): its name.
        limit (int | None): only the first so many rows.

    Raises:
        UserError: another process writes there, or the harness fails.
    """
    if not isinstance(evaluation.model, Local):
        raise UserError("lm-evaluation-harness runs models in transformers: use --engine hf, without --rejudge.")
    with run_lock(evaluation.folder):
        summary = read_summary(evaluation.folder)
        wanted = {"asked": task, "settings": harness.settings(evaluation.model, limit)}
        before = summary.get("harness", {})
        if not any(wanted.items() <= entry.items() for entry in before.values()):
            summary["harness"] = before | harness.run(evaluation.model, task, limit)
            _write(evaluation.folder / SUMMARY_FILE, summary)
        evaluation.summary = summary


def _write(path: Path, summary: Record) -> None:
    with atomic_file(path) as file:
        file.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _fingerprint(records: list[Record]) -> str:
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()[:32]


def _bar(plan: Plan, total: int, description: str) -> Any:
    return progress(total=total, desc=description, unit="row", disable=not plan.progress)
