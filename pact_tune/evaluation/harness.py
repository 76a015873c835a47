"""Tasks of lm-evaluation-harness, by name, when it is installed."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from pact_tune.conversations import one_line
from pact_tune.errors import UserError
from pact_tune.evaluation.answering import Local
from pact_tune.evaluation.records import Record

# The metric of a task that is shown, the first that it has.
METRICS = ("exact_match,strict-match", "exact_match,flexible-extract", "acc_norm,none", "acc,none", "exact_match,none")


class Harness:
    """The harness and the tasks that it knows.

    Args:
        tasks (Sequence[str]): names of tasks, groups or tags.
        include (str | None): folder with tasks of one's own, as YAML.

    Raises:
        UserError: the harness is not installed, or knows no such task.
    """

    def __init__(self, tasks: Sequence[str], include: str | None = None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(
                f"lm-evaluation-harness is not usable here ({one_line(error)}): pip install lm-eval 'peft<0.19'."
            ) from error
        if include is not None and not Path(include).is_dir():
            raise UserError(f"The folder '{include}' given with --lm-eval-include does not exist: check the path.")
        self.tasks = tuple(dict.fromkeys(tasks))
        # One's own tasks alone first: the harness has 14,000 files to read.
        for defaults in (True,) if include is None else (False, True):
            self.manager = TaskManager(include_path=include, include_defaults=defaults)
            unknown = [task for task in self.tasks if task not in self.manager.all_tasks]
            if not unknown:
                break
        if unknown:
            raise UserError(f"lm-evaluation-harness knows no task '{unknown[0]}': `lm-eval ls tasks` lists them.")

    def settings(self, model: Local, limit: int | None) -> Record:
        """What a model's numbers depend on."""
        own = {key: model.settings[key] for key in ("version", "adapter")}
        return own | {"limit": limit, "lm_eval": version("lm_eval")}

    def run(self, model: Local, task: str, limit: int | None = None) -> dict[str, Record]:
        """Runs one task, group or tag with the model's chat template.

        Args:
            model (Local): in transformers.
            task (str): its name.
            limit (int | None): only the first so many rows of each task.

        Returns:
            dict[str, Record]: by name, of the task or group itself where it has numbers, else of its tasks: "metric",
            "value" and "error" (standard error) as shares, "rows", "all" (whatever the harness reports), "asked" (the
            name) and "settings".

        Raises:
            UserError: the harness fails.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        try:
            results = lm_eval.simple_evaluate(
                model=HFLM(pretrained=model.network, tokenizer=model.tokenizer, batch_size=8),
                tasks=[task],
                limit=limit,
                apply_chat_template=True,
                task_manager=self.manager,
                log_samples=False,
            )
        except Exception as error:  # a data set that cannot be had, an out of memory, whatever a task runs into
            raise UserError(
                f"lm-evaluation-harness stopped at '{task}' ({one_line(error)}); the rest of the evaluation is kept."
            ) from error
        asked = {"asked": task, "settings": self.settings(model, limit)}
        found = {
            name: _entry(numbers) | {"rows": results["n-samples"].get(name, {}).get("effective")} | asked
            for name, values in results["results"].items()
            if (numbers := _numbers(values))
        }
        if not found:
            raise UserError(f"The task '{task}' of lm-evaluation-harness gives no number: choose another.")
        return {task: found[task]} if task in found else found


def _numbers(values: Record) -> dict[str, float]:
    """What a task reports under names "metric,filter"; beside them stand its alias and how many rows it has."""
    return {key: value for key, value in values.items() if "," in key and isinstance(value, int | float)}


def _entry(numbers: dict[str, float]) -> Record:
    shown = [name for name in numbers if "_stderr," not in name]
    metric = next((name for name in METRICS if name in numbers), shown[0])
    name, _, variant = metric.partition(",")
    return {
        "metric": metric,
        "value": numbers[metric],
        "error": numbers.get(f"{name}_stderr,{variant}"),
        "all": numbers,
    }
