"""Tasks of lm-evaluation-harness, by name, when it is installed."""

from collections.abc import Sequence
from typing import Any

from pact_tune.conversations import one_line
from pact_tune.errors import UserError
from pact_tune.evaluation.answering import Local

# The metric of a task that is shown, the first that it has.
METRICS = ("exact_match,strict-match", "exact_match,flexible-extract", "acc_norm,none", "acc,none", "exact_match,none")


def run(model: Local, tasks: Sequence[str], limit: int | None = None, include: str | None = None) -> dict[str, Any]:
    """Runs tasks with the model's chat template.

    Args:
        model (Local): in transformers.
        tasks (Sequence[str]): names that the harness knows.
        limit (int | None): only the first so many rows of each.
        include (str | None): folder with tasks of one's own, as YAML.

    Returns:
        dict[str, Any]: by task: "metric", "value" and "error" (standard error) as shares, "rows", and "all", whatever the
        harness reports.

    Raises:
        UserError: the harness is not installed, knows no such task, or fails.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness is not usable here ({one_line(error)}): pip install lm-eval."
        ) from error
    manager = TaskManager(include_path=include)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(f"lm-evaluation-harness knows no task '{unknown[0]}': `lm-eval ls tasks` lists them.")
    try:
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model.network, tokenizer=model.tokenizer, batch_size=8),
            tasks=list(tasks),
            limit=limit,
            apply_chat_template=True,
            task_manager=manager,
        )
    except Exception as error:  # a data set that cannot be had, an out of memory, whatever a task runs into
        raise UserError(
            f"lm-evaluation-harness stopped ({one_line(error)}); the rest of the evaluation is kept."
        ) from error
    return {task: _entry(results["results"][task], results["n-samples"].get(task, {})) for task in tasks}


def _entry(values: dict[str, Any], samples: dict[str, Any]) -> dict[str, Any]:
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    metric = next((name for name in METRICS if name in numbers), next(iter(numbers)))
    name, _, variant = metric.partition(",")
    error = numbers.get(f"{name}_stderr,{variant}")
    return {
        "metric": metric,
        "value": numbers[metric],
        "error": error,
        "rows": samples.get("effective"),
        "all": numbers,
    }
