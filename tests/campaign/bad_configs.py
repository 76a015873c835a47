"""Bad configs: every key of shipped configs times every kind of fault, and the sentence that each yields.

    python -m tests.campaign.bad_configs [--runs N]

Each input goes through what the recipe does with its command line, and then through what `pact validate` builds; N of
the refused ones, evenly spread, also through `tune run`. Counted are

    right      refused with a sentence that names the key and the mend, or taken where that value means something
    traceback  any other exception, a sentence without the key or the mend, or a refusal without need
    silent     taken although no run can mean it

What a key may be is written down here by hand (MEANINGFUL), and not read from the schema: it is what the schema is
compared with.
"""

import argparse
import copy
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pact_tune.errors import UserError
from pact_tune.log import progress
from pact_tune.tools.configs import check
from pact_tune.torchtune.config import find_config, read_command_line

if TYPE_CHECKING:
    from tests.campaign.processes import Tally

TAKEN = "(taken)"
CONFIGS = ("demo/pact_lora", "qwen2_5/0.5B_pact_lora", "llama3_1/8B_pact_lora")
MENDS = (
    "correct ",
    "must both be given",
    "must be",
    "give ",
    "takes ",
    "did you mean",
    "valid keys:",
    "there are:",
    "lacks",
    "needs",
    "set ",
    "write ",
    "cannot be imported",
    "save it",
)
KINDS: dict[str, Any] = {
    "null": None,
    "negative": -3,
    "zero": 0,
    "nan": math.nan,
    "infinity": math.inf,
    "huge": 10**30,
    "text": "abc",
    "number": 2.5,
    "list": [1, "a"],
    "section": {"a": 1},
    "bool": True,
}
# Kinds that mean something, by key, or by key without its section.
NULLABLE = ("max_steps_per_epoch", "clip_grad_norm", "lr_scheduler", "reference_cache",
            "reference_cache.directory", "max_gb", "save_every_n_steps", "dataset.n", "dataset.max_seq_len", "loss.k", "fused",
            "dataset.mix", "base_dir", "model_type", "dataset.name", "columns", "system")  # fmt: skip
FLAGS = ("resume_from_checkpoint", "shuffle", "batch_by_length", "packed", "enable_activation_checkpointing", "compile",
         "lazy", "fsdp_reshard_after_forward", "log_peak_memory_stats", "save_adapter_weights_only",
         "apply_lora_to_mlp", "apply_lora_to_output", "tie_word_embeddings", "use_dora", "quantize_base", "fused",
         "template_fallback")  # fmt: skip
WORDS = ("output_dir", "checkpoint_dir", "base_dir", "tokenizer.path", "checkpointer.output_dir", "source", "split", "log_dir",
         "directory", "safety_tokens", "model.path")  # fmt: skip
ZERO = ("seed", "weight_decay", "lora_dropout", "num_warmup_steps", "lambda_kl", "fraction")
MEANINGFUL: dict[str, tuple[str, ...]] = {
    "null": NULLABLE,
    "zero": ZERO,
    "bool": FLAGS,
    "text": WORDS,
    "number": ("weight_decay", "lambda_kl", "clip_grad_norm", "lora_alpha", "max_gb", "rope_base"),
}


@dataclass(frozen=True)
class Input:
    """One fault: a config in which one thing is not right."""

    config: str
    key: str
    kind: str
    text: str  # what was written, for the table
    content: str  # of the YAML file
    overrides: tuple[str, ...] = ()
    meaningful: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of it: "right", "traceback" or "silent", and what was said."""

    verdict: str
    said: str


def leaves(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys, sections included."""
    for key, value in section.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")


def changed(content: dict[str, Any], key: str, value: Any = None, rename: str | None = None, drop: bool = False) -> str:
    """The YAML of a config in which one key has another value, another name, or is gone."""
    content = copy.deepcopy(content)
    *parents, last = key.split(".")
    section = content
    for parent in parents:
        section = section[parent]
    if drop:
        del section[last]
    elif rename is not None:
        section[rename] = section.pop(last)
    else:
        section[last] = value
    return yaml.safe_dump(content, sort_keys=False)


def listed(key: str, names: tuple[str, ...]) -> bool:
    """Whether a key is among names that are written with or without its section."""
    return key in names or key.rsplit(".", 1)[-1] in names


def of_key(config: str, content: dict[str, Any], key: str, seen: set[tuple[str, str]]) -> Iterator[Input]:
    """All faults of one key, those left out that another config has shown already."""
    last = key.rsplit(".", 1)[-1]
    for kind, value in KINDS.items():
        if (key, kind) in seen:
            continue
        seen.add((key, kind))
        meaningful = listed(key, MEANINGFUL.get(kind, ()))
        text = "null" if value is None else str(value)
        if kind == "section" and isinstance(_at(content, key), dict):
            continue  # a section of unknown keys is what "misspelt" shows
        yield Input(config, key, kind, f"{key}: {text}", changed(content, key, value), (), meaningful)
        if kind in ("null", "negative", "nan", "text", "huge"):
            word = f"{key}={'.nan' if kind == 'nan' else text}"
            plain = yaml.safe_dump(content, sort_keys=False)
            yield Input(config, key, f"{kind} (command line)", word, plain, (word,), meaningful)
    if (key, "misspelt") not in seen and last != "_component_":
        seen.add((key, "misspelt"))
        typo = last[:-2] + last[-1] + last[-2] if len(last) > 2 and last[-1] != last[-2] else last + "x"
        yield Input(config, key, "misspelt", f"{typo}: ...", changed(content, key, rename=typo))
        yield Input(config, key, "~misspelt", f"~{key}x", yaml.safe_dump(content, sort_keys=False), (f"~{key}x",))


def _at(content: dict[str, Any], key: str) -> Any:
    value: Any = content
    for part in key.split("."):
        value = value[part]
    return value


def inputs(configs: tuple[str, ...] = CONFIGS) -> list[Input]:
    """Every key times every kind, and words of the command line that are no overrides."""
    found: list[Input] = []
    seen: set[tuple[str, str]] = set()
    for config in configs:
        text = find_config(config).read_text()
        content = yaml.load(text, _Loader)
        for key in leaves(content):
            found += of_key(config, content, key, seen)
    for word in (
        "epochs",
        "=3",
        "epochs 3",
        "+epochs=3",
        "-epochs=3",
        "--epochs=3",
        "a..b=1",
        "~",
        "~=",
        ".=1",
        "x=[1",
    ):
        key = "epochs" if "epochs" in word else word
        found.append(Input(configs[0], key, "no override", word, find_config(configs[0]).read_text(), (word,)))
    return found


class _Loader(yaml.SafeLoader):
    """PyYAML, but 1e-3 is a number as it is for OmegaConf."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def judge(case: Input, folder: Path) -> Outcome:
    """Runs one input, in this process, as far as the recipe checks before anything is loaded."""
    path = folder / "config.yaml"
    path.write_text(case.content)
    try:
        cfg = read_command_line(["--config", str(path), *case.overrides])
        check(cfg)
    except UserError as error:
        said = str(error)
        names_key = case.key.rsplit(".", 1)[-1] in said or case.text in said or f"'{KINDS['text']}'" in said
        good = names_key and any(mend in said for mend in MENDS)
        if case.meaningful and case.kind.split()[0] != "text":  # the path of nothing is refused with reason
            return Outcome("traceback", f"refused without need: {said}")
        return Outcome("right" if good else "traceback", said)
    except BaseException as error:
        return Outcome("traceback", f"{type(error).__name__}: {error}")
    return Outcome("right" if case.meaningful else "silent", TAKEN)


def judge_run(case: Input, folder: Path) -> Outcome:
    """The same through `tune run`, in a process of its own; nothing may be left of it."""
    from tests.campaign.processes import run, train  # imports the recipe, which no test of the judge alone needs

    path, place = folder / "config.yaml", folder / "place"
    path.write_text(case.content)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    done = run(train(path, *case.overrides), folder / "said.txt", lambda: os.chdir(place))
    good = done.verdict == "refused" and not list(place.iterdir())
    return Outcome("right" if good else "silent" if done.verdict == "taken" else "traceback", done.message or done.said)


def campaign(folder: Path, each: int = 1, runs: int = 0) -> "Tally":
    """Tries the inputs.

    Args:
        folder (Path): empty; everything is written there.
        each (int): every which input: 1 for all.
        runs (int): of the refused ones, how many go through `tune run`, too.

    Returns:
        Tally: by kind of fault.
    """
    from tests.campaign.processes import Tally

    tally, refused = Tally("bad configs"), []
    for case in progress(inputs()[::each], desc="Bad configs", unit="input"):
        outcome = judge(case, folder)
        tally.add(case.kind, outcome.verdict, f"{case.config}, {case.text[:80]}", outcome.said[:400])
        if outcome.said != TAKEN:
            refused.append(case)
    sample = refused[:: max(1, len(refused) // runs)][:runs] if runs else []
    for case in progress(sample, desc="Bad configs, through `tune run`", unit="input"):
        outcome = judge_run(case, folder)
        tally.add("through `tune run`", outcome.verdict, f"{case.config}, {case.text[:80]}", outcome.said[-400:])
    return tally


def main(argv: list[str] | None = None) -> int:
    """Runs the campaign; exit code 1 when anything was not right."""
    from tests.campaign.processes import carry_out

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60, help="of the refused ones, how many go through `tune run` too")
    return carry_out(parser, argv, lambda folder, args: campaign(folder, runs=args.runs))


if __name__ == "__main__":
    sys.exit(main())
