"""TRL's supervised fine-tuning with the constraint, on the demo family that comes with the package; nothing to download.

    python examples/trl_sft.py                    # about a minute on two CPU cores
    pact verify outputs/trl_sft --data outputs/trl_sft_rows.jsonl

Three lines differ from a script with SFTConfig and SFTTrainer: the import, the config with its objective, the trainer.
"""

import json
import shutil
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig

from pact_tune.demo import demo_family_path
from pact_tune.hf import PACTTrainer, PACTTrainingConfig

family = demo_family_path()
rows_file = family / "data" / "task.jsonl"
rows = Dataset.from_list([json.loads(line) for line in rows_file.read_text().splitlines()[:200]])

args = PACTTrainingConfig(
    output_dir="outputs/trl_sft",
    objective={"safety_tokens": str(family / "safety_tokens"), "preset": "tail", "k": 12},
    per_device_train_batch_size=10,
    num_train_epochs=2,
    learning_rate=2e-3,
    logging_steps=10,
    save_strategy="no",
    use_cpu=True,
    bf16=False,  # True on a GPU
    gradient_checkpointing=False,
    report_to="none",
)
trainer = PACTTrainer(
    str(family / "aligned"),
    args,
    train_dataset=rows,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
)
trainer.train()
trainer.save_model()
shutil.copy(rows_file, Path("outputs/trl_sft_rows.jsonl"))
print("The adapter and its stamp are in outputs/trl_sft; check them with:")
print("pact verify outputs/trl_sft --data outputs/trl_sft_rows.jsonl")
