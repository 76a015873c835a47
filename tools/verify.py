"""`pact verify DIR`: was this result trained with the constraint, is it what its stamp says, how far did it move?"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from pact_tune.adapters import CONFIG, WEIGHTS, LoRASpec, check_fits, is_adapter, merged, read_adapter
from pact_tune.arguments import Parser
from pact_tune.conversations import Conversation, load_tokenizer
from pact_tune.data import chat_dataset
from pact_tune.errors import UserError
from pact_tune.fingerprints import fingerprint
from pact_tune.generation import default_device
from pact_tune.log import progress
from pact_tune.losses import token_kl
from pact_tune.scoring import mean_by_range, response_logprobs
from pact_tune.stamp import check_files, read_stamp
from pact_tune.weights import ModelFolder, through_nf4

MAX_TOKENS = 64  # response tokens of a row that are looked at: log-probabilities of whole vocabularies are held
# Of chat_dataset: how many rows, what is mixed in, and what an audit says, do not matter for a sample.
NOT_SAMPLED = ("_component_", "n", "mix", "audit")


def main(argv: list[str] | None = None) -> int:
    """Checks a result folder and prints what was found.

    Args:
        argv (list[str] | None): the command line after `pact verify`.

    Returns:
        int: 0.

    Raises:
        UserError: not what its stamp says; or, once the report is printed, trained without a constraint.
    """
    parser = Parser(prog="pact verify", description=__doc__)
    parser.add_argument("directory", type=Path, help="a result (epoch_N) or its adapter folder")
    parser.add_argument("--base", help="folder of the base model; default: the one that it was trained from")
    parser.add_argument("--data", help="rows to measure on, as in dataset.source; default: the training data")
    parser.add_argument(
        "--columns", nargs="*", default=[], metavar="ROLE=NAME", help="columns of --data, as in dataset"
    )
    parser.add_argument("--rows", type=int, default=16, help="how many")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(argv)
    report = verify(args.directory, args.base, args.data, args.rows, _columns(args.columns))
    print(json.dumps(report, indent=2) if args.json else _text(args.directory, report))
    if not report["loss"]["constrained"]:
        raise UserError(
            f"The result in '{args.directory}' is whole, and was trained without a constraint (method "
            f"'{report['loss']['method']}'), as its stamp says: no claim is made for its refusals."
        )
    return 0


def _columns(words: list[str]) -> dict[str, str] | None:
    if any("=" not in word for word in words):
        raise UserError("--columns takes ROLE=NAME, such as prompt=question response=answer.")
    return dict(word.split("=", 1) for word in words) or None


def verify(
    directory: Path,
    base: str | None = None,
    data: str | None = None,
    rows: int = 16,
    columns: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Checks a result: its stamp, its files, and that transformers loads it; measures the KL to the reference.

    Args:
        directory (Path): a result folder, or the adapter folder in it.
        base (str | None): folder of the base model; None is the one in the stamp.
        data (str | None): rows to measure on; None is the training data.
        rows (int): how many.
        columns (dict[str, str] | None): of ``data``, as in `dataset.columns`; None is the training data's.

    Returns:
        dict[str, Any]: method, loss settings, final losses, and KL(reference || result) over the whole vocabulary by
        response position, in nats.

    Raises:
        UserError: what is wrong.
    """
    if rows < 1:
        raise UserError("--rows must be at least 1.")
    stamp = read_stamp(directory)
    if "loss" not in stamp:
        raise UserError(
            f"'{directory}' holds an adapter merged that has no stamp of pact-tune: nothing is known of its training."
        )
    check_files(directory, stamp)
    folder = ModelFolder(base or stamp["base"], "--base")
    folder.check_start(stamp)
    dtype = getattr(torch, stamp["reference"]["dtype"])
    # What the reference has in the place of the base's weights: with QLoRA, these through NF4 and back.
    replaced = {
        name: through_nf4(folder[name], name.removesuffix(".weight"), folder.network, dtype)
        for name in stamp.get("nf4", ())
    }
    whole = (directory / "config.json").is_file() and not is_adapter(directory)
    changed: dict[str, torch.Tensor] = {}  # a merge has its adapter no more: hashes of its files are what is checked
    if "merged_from" not in stamp:
        check = _check_adapter if stamp["adapter"] else _check_weights
        changed = check(directory, stamp, folder, replaced)

    conversations = _sample(stamp, folder.directory, data, rows, columns)
    reference = _logprobs(_load(folder.directory, dtype, replaced), conversations, "Reference")
    result = _load(directory, dtype, {}) if whole else _load(folder.directory, dtype, replaced | changed)
    per_token = map(token_kl, reference, _logprobs(result, conversations, "Result"))
    kl = mean_by_range(list(per_token))
    return {"loss": stamp["loss"], "final": stamp["final"], "rows": len(conversations), "kl": kl}


def _check_adapter(
    directory: Path, stamp: dict[str, Any], folder: ModelFolder, replaced: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights that the adapter changes, merged, after checking it and the merged checkpoint, if there is one."""
    where = directory if (directory / CONFIG).is_file() else directory / "adapter"
    adapter, spec = read_adapter(where)
    if fingerprint(load_file(where / WEIGHTS)) != stamp["adapter"]["fingerprint"]:
        raise UserError(f"The adapter in '{where}' is not the one that its pact.json was written for.")
    if spec != LoRASpec(*(stamp["adapter"][name] for name in LoRASpec._fields)):
        raise UserError(f"'{where / CONFIG}' does not say the rank, alpha and kind that the adapter was trained with.")
    renamed = stamp.get("renamed", {})  # modules that the checkpoint's files call otherwise than the model does
    in_files = {renamed.get(module, module): update for module, update in adapter.items()}
    check_fits(in_files, folder, str(where))
    changed = merged(_Overlay(folder, replaced), in_files, spec)
    if is_adapter(directory) or not (directory / "config.json").is_file():
        return {f"{m}.weight": changed[f"{renamed.get(m, m)}.weight"] for m in adapter}
    found = ModelFolder(directory, "the result")
    for name, weight in changed.items():
        if name not in found or not torch.equal(found[name], weight):
            raise UserError(f"The merged checkpoint in '{directory}' is not its base with its adapter: {name} differs.")
    return changed


class _Overlay(dict[str, torch.Tensor]):
    """Weights of which some are replaced, the rest read from the folder."""

    def __init__(self, folder: ModelFolder, replaced: dict[str, torch.Tensor]) -> None:
        super().__init__(replaced)
        self._folder = folder

    def __missing__(self, name: str) -> torch.Tensor:
        return self._folder[name]


def _check_weights(directory: Path, stamp: dict[str, Any], *_: object) -> dict[str, torch.Tensor]:
    """The weights of a full fine-tuning, after checking them."""
    found = dict(ModelFolder(directory, "the result"))
    if broken := [name for name, weight in found.items() if not weight.isfinite().all()]:
        raise UserError(f"The weights in '{directory}' hold NaN or infinity ({broken[0]}): the training diverged.")
    if fingerprint(found) != stamp["weights"]:
        raise UserError(f"The weights in '{directory}' are not those that its pact.json was written for.")
    return found


def _load(folder: Path, dtype: torch.dtype, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A model in transformers, some of its weights replaced."""
    # Eager attention is the only one that computes Gemma 2's soft-cap everywhere.
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", trust_remote_code=False
    )
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    return model.to(default_device()).eval()


def _sample(
    stamp: dict[str, Any], base: Path, data: str | None, rows: int, columns: dict[str, str] | None
) -> list[Conversation]:
    section = stamp["config"]["dataset"]
    tokenizer = load_tokenizer(str(base))
    if data is None and section is None:
        raise UserError(
            "The result was trained from Python, on rows that its stamp cannot name: name some with --data."
        )
    if data is not None:
        settings: dict[str, Any] = {"source": data, "columns": columns or (section or {}).get("columns")}
    elif section["_component_"] != "pact_tune.chat_dataset":  # somebody's own
        settings = {key: value for key, value in section.items() if key != "_component_"}
        return _component(section["_component_"])(tokenizer, **settings).conversations[:rows]
    else:
        settings = {key: value for key, value in section.items() if key not in NOT_SAMPLED}
    return chat_dataset(tokenizer, **settings, progress=False).conversations[:rows]


def _component(path: str) -> Any:
    """What a dotted path names, also in the working directory."""
    module, _, name = path.rpartition(".")
    sys.path.append(str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"The training data's component '{path}' cannot be imported ({error}): name rows with --data."
        ) from error


def _logprobs(model: PreTrainedModel, conversations: list[Conversation], name: str) -> list[torch.Tensor]:
    """Log-probabilities at the first response positions of each conversation, ``[n, V]`` float32 on the CPU."""
    pairs = []
    for conversation in conversations:
        start, end = conversation.responses[0]
        pairs.append((conversation.tokens[:start], conversation.tokens[start : min(end, start + MAX_TOKENS)]))
    found = response_logprobs(model, pairs)
    return [part.cpu() for part in progress(found, total=len(pairs), desc=name, unit="row", leave=False)]


def _text(directory: Path, report: dict[str, Any]) -> str:
    settings = ", ".join(
        f"{key} {value}" for key, value in report["loss"].items() if key not in ("method", "constrained")
    )
    method = report["loss"]["method"]
    trained = (
        f"was trained with the constraint '{method}'"
        if report["loss"]["constrained"]
        else f"was trained without a constraint ('{method}')"
    )
    final = ", ".join(f"{key} {value:.4f}" for key, value in report["final"].items())
    kl = ", ".join(f"{name}: {value:.4f}" for name, value in report["kl"].items())
    return (
        f"{directory} {trained} and is what its stamp says.\n"
        f"Loss: {settings or 'cross-entropy'}\n"
        f"Last logged step: {final}\n"
        f"KL(reference || result) on {report['rows']} rows, by response position (nats): {kl}"
    )
