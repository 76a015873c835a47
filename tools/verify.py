"""`pact verify DIR`: was this result trained with the constraint, is it what its stamp says, how far did it move?"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from pact_tune.conversations import Conversation, load_tokenizer
from pact_tune.data import chat_dataset
from pact_tune.errors import UserError
from pact_tune.stamp import fingerprint, read_stamp
from pact_tune.torchtune import lora
from pact_tune.torchtune.checkpoint import HFCheckpointer, StateDict, merged_weight

ADAPTER_FILE = "adapter_model.safetensors"
RANGES = {"0": (0, 1), "1-7": (1, 8), "8+": (8, None)}
MAX_TOKENS = 64  # response tokens of a row that are looked at: log-probabilities of whole vocabularies are held


def main(argv: list[str] | None = None) -> int:
    """Checks a result folder and prints what was found.

    Args:
        argv (list[str] | None): the command line after `pact verify`.

    Returns:
        int: 0.

    Raises:
        UserError: trained without the constraint, or not what its stamp says.
    """
    parser = argparse.ArgumentParser(prog="pact verify", description=__doc__)
    parser.add_argument("directory", type=Path, help="a result (epoch_N) or its adapter folder")
    parser.add_argument("--base", help="folder of the base model; default: the one that it was trained from")
    parser.add_argument("--data", help="rows to measure on, as in dataset.source; default: the training data")
    parser.add_argument("--rows", type=int, default=16, help="how many")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(argv)
    report = verify(args.directory, args.base, args.data, args.rows)
    print(json.dumps(report, indent=2) if args.json else _text(args.directory, report))
    return 0


def verify(directory: Path, base: str | None = None, data: str | None = None, rows: int = 16) -> dict[str, Any]:
    """Checks a result: its stamp, its weights, and that transformers loads it; measures the KL to the reference.

    Args:
        directory (Path): a result folder, or the adapter folder in it.
        base (str | None): folder of the base model; None is the one in the stamp.
        data (str | None): rows to measure on; None is the training data.
        rows (int): how many.

    Returns:
        dict[str, Any]: method, loss settings, final losses, and KL(reference || result) over the whole vocabulary by
        response position, in nats.

    Raises:
        UserError: what is wrong.
    """
    stamp = read_stamp(directory)
    if not stamp["loss"]["constrained"]:
        raise UserError(
            f"The result in '{directory}' was trained without the constraint (method '{stamp['loss']['method']}'): train "
            "it with loss.lambda_kl above 0."
        )
    section = stamp["config"]["checkpointer"]
    checkpointer = HFCheckpointer(base or section["checkpoint_dir"], section["model_type"], str(directory))
    if checkpointer.weights_hash != stamp["reference"]["fingerprint"]:
        raise UserError(
            f"The weights in '{checkpointer.directory}' are not those that the result was trained from: name them with --base."
        )
    dtype = getattr(torch, stamp["reference"]["dtype"])
    # The reference under Hugging Face's names; with QLoRA through NF4 and back.
    weights = checkpointer.to_hf(lora.dequantized(checkpointer.load(), stamp["reference"]["quantized"], dtype))
    merged = _check_adapter(directory, stamp, weights) if stamp["adapter"] else _check_weights(directory, stamp)

    conversations = _sample(stamp, checkpointer.directory, data, rows)
    replaced = weights if stamp["reference"]["quantized"] else {}
    reference = _logprobs(_load(checkpointer.directory, dtype, replaced), conversations, "Reference")
    if (directory / "config.json").is_file():
        result = _load(directory, dtype, {})
    else:
        result = _load(checkpointer.directory, dtype, merged)
    kl = _kl(reference, _logprobs(result, conversations, "Result"))
    return {"loss": stamp["loss"], "final": stamp["final"], "rows": len(conversations), "kl": kl}


def _check_adapter(directory: Path, stamp: dict[str, Any], weights: StateDict) -> StateDict:
    """Reference weights with the adapter merged, after checking it and the merged checkpoint, if there is one."""
    folder = directory if (directory / ADAPTER_FILE).is_file() else directory / "adapter"
    adapter = load_file(folder / ADAPTER_FILE)
    if fingerprint(adapter) != stamp["adapter"]["fingerprint"]:
        raise UserError(f"The adapter in '{folder}' is not the one that its pact.json was written for.")
    merged = _merge(weights, adapter, lora.LoRASpec(*(stamp["adapter"][name] for name in lora.LoRASpec._fields)))
    if not (directory / "config.json").is_file():
        return merged
    found = _read(directory)
    for name, weight in merged.items():
        # A last bit may differ: the export merged in torchtune's order of rows.
        if name not in found or not torch.allclose(found[name].float(), weight.float(), rtol=2e-2, atol=1e-6):
            raise UserError(f"The merged checkpoint in '{directory}' is not its base with its adapter: {name} differs.")
    return merged


def _check_weights(directory: Path, stamp: dict[str, Any]) -> StateDict:
    """The weights of a full fine-tuning, after checking them."""
    found = _read(directory)
    if fingerprint(found) != stamp["weights"]:
        raise UserError(f"The weights in '{directory}' are not those that its pact.json was written for.")
    return found


def _read(directory: Path) -> StateDict:
    weights: StateDict = {}
    for file in sorted(directory.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def _merge(weights: StateDict, adapter: StateDict, spec: lora.LoRASpec) -> StateDict:
    """Reference weights with a PEFT adapter merged."""
    merged = dict(weights)
    for key, a in adapter.items():
        if key.endswith(".lora_A.weight"):
            prefix = key.removesuffix(".lora_A.weight")
            name = prefix.removeprefix("base_model.model.") + ".weight"
            b, magnitude = adapter[f"{prefix}.lora_B.weight"], adapter.get(f"{prefix}.lora_magnitude_vector")
            merged[name] = merged_weight(weights[name], a, b, magnitude, spec)
    return merged


def _load(folder: Path, dtype: torch.dtype, weights: StateDict) -> PreTrainedModel:
    """A model in transformers, some of its weights replaced."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Eager attention is the only one that computes Gemma 2's soft-cap everywhere.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    return model.to(device).eval()


def _sample(stamp: dict[str, Any], base: Path, data: str | None, rows: int) -> list[Conversation]:
    settings = {
        key: value for key, value in stamp["config"]["dataset"].items() if key not in ("_component_", "n", "mix")
    }
    if data is not None:
        settings = {"source": data}
    tokenizer = load_tokenizer(str(base))
    return chat_dataset(tokenizer, **settings, progress=False).conversations[:rows]


@torch.no_grad()
def _logprobs(model: PreTrainedModel, conversations: list[Conversation], name: str) -> list[torch.Tensor]:
    """Log-probabilities at the first response positions of each conversation, ``[n, V]`` float32 on the CPU."""
    parts = []
    for conversation in tqdm(conversations, desc=name, unit="row", leave=False):
        start, end = conversation.responses[0]
        end = min(end, start + MAX_TOKENS)
        logits = model(torch.tensor([conversation.tokens[:end]], device=model.device)).logits[0, start - 1 : end - 1]
        parts.append(logits.float().log_softmax(-1).cpu())
    return parts


def _kl(reference: list[torch.Tensor], result: list[torch.Tensor]) -> dict[str, float]:
    """Mean KL(reference || result) by response position, in nats."""
    per_token = [(p.exp() * (p - q)).sum(-1) for p, q in zip(reference, result, strict=True)]
    means = {name: torch.cat([row[start:end] for row in per_token]) for name, (start, end) in RANGES.items()}
    means["all"] = torch.cat(per_token)
    return {name: values.mean().item() for name, values in means.items() if len(values)}


def _text(directory: Path, report: dict[str, Any]) -> str:
    settings = ", ".join(
        f"{key} {value}" for key, value in report["loss"].items() if key not in ("method", "constrained")
    )
    final = ", ".join(f"{key} {value:.4f}" for key, value in report["final"].items())
    kl = ", ".join(f"{name}: {value:.4f}" for name, value in report["kl"].items())
    return (
        f"{directory} was trained with the constraint '{report['loss']['method']}' and is what its stamp says.\n"
        f"Loss: {settings}\n"
        f"Last logged step: {final}\n"
        f"KL(reference || result) on {report['rows']} rows, by response position (nats): {kl}"
    )
