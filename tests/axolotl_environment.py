"""Axolotl in its environment: `axolotl train` as users run it. It cannot share the tests' own environment (docs/axolotl.md)."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

# Made by `make test-axolotl`.
ENVIRONMENT = Path(os.environ.get("PACT_TUNE_AXOLOTL") or Path(__file__).parents[1] / ".venv-axolotl")
INSTALLED = (ENVIRONMENT / "bin" / "axolotl").exists()

# Of a run in fp32 on a CPU that computes what the recipe does.
SETTINGS: dict[str, Any] = {
    "plugins": ["pact_tune.axolotl.PACTPlugin"],
    "chat_template": "tokenizer_default",
    "sequence_len": 512,
    "curriculum_sampling": True,  # rows in the file's order
    "shuffle_merged_datasets": False,
    "optimizer": "adamw_torch",
    "weight_decay": 0.01,  # torch's AdamW
    "max_grad_norm": 0,
    "lr_scheduler": "constant",
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "flash_attention": False,
    "sdp_attention": True,
    "use_tensorboard": False,
}


def config(path: Path, model: Path, rows: Path, out: Path, objective: dict[str, Any], **more: Any) -> Path:
    """Writes a config of Axolotl."""
    data = {
        "path": str(rows),
        "type": "chat_template",
        "field_messages": "messages",
        "roles_to_train": ["assistant"],
        "train_on_eos": "turn",
    }
    sections = {"base_model": str(model), "datasets": [data], "output_dir": str(out), "pact": objective}
    sections["dataset_prepared_path"] = str(out.parent / "prepared")
    path.write_text(yaml.safe_dump({**SETTINGS, **sections, **more}))
    return path


def train(path: Path, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """`axolotl train CONFIG`."""
    return subprocess.run(
        [ENVIRONMENT / "bin" / "axolotl", "train", str(path), "--launcher", "python"],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=600,
    )  # fmt: skip


def write_messages(rows: Path, path: Path) -> Path:
    """Rows of instruction and output as the chats that Axolotl reads."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    chats = [
        [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        for row in lines
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path
