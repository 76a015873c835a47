"""`pact merge ADAPTER --base MODEL`: a LoRA adapter and its base model become one model."""

from pathlib import Path

import torch

from pact_tune.adapters import check_fits, merge_folder, read_adapter
from pact_tune.arguments import Parser
from pact_tune.errors import UserError
from pact_tune.files import atomic_folder, check_replaceable
from pact_tune.stamp import STAMP_FILE, check_files, read_stamp, result_names, write_stamp
from pact_tune.version import __version__
from pact_tune.weights import ModelFolder, through_nf4


def main(argv: list[str] | None = None) -> int:
    """Writes the merged model and says where.

    Args:
        argv (list[str] | None): the command line after `pact merge`.

    Returns:
        int: 0.

    Raises:
        UserError: no adapter there, one of another model, or an output that is no earlier merge.
    """
    parser = Parser(prog="pact merge", description=__doc__)
    parser.add_argument("adapter", type=Path, help="folder of a LoRA or DoRA adapter in PEFT's format")
    parser.add_argument(
        "--base", help="folder of the model that it was trained on; default: the one that pact.json names"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write; an earlier merge there is replaced"
    )
    args = parser.parse_args(argv)
    merge(args.adapter, args.base, args.output)
    print(f"Merged {args.adapter} into {args.output}")
    return 0


def merge(adapter_folder: Path, base: str | None, output: Path) -> None:
    """Writes a whole model: base weights with an adapter merged; one tensor is held at a time.

    Args:
        adapter_folder (Path): in PEFT's format, from this package or elsewhere.
        base (str | None): folder of the model that it was trained on; None is the one in the adapter's pact.json.
        output (Path): the folder to write; appears whole or not at all.

    Raises:
        UserError: no adapter there, one of another model, or an output that is no earlier merge.
    """
    _check_output(output)
    adapter, spec = read_adapter(adapter_folder)
    stamp = read_stamp(adapter_folder) if (adapter_folder / STAMP_FILE).is_file() else {}
    if stamp:
        check_files(adapter_folder, stamp)
    if base is None and not stamp:
        raise UserError(
            f"'{adapter_folder}' does not say what it was trained on (no {STAMP_FILE}): name it with --base."
        )
    folder = ModelFolder(base or stamp["base"], "--base")
    if stamp:
        folder.check_start(stamp)
    renamed = stamp.get("renamed", {})  # modules that the checkpoint's files call otherwise than the model does
    adapter = {renamed.get(module, module): update for module, update in adapter.items()}
    check_fits(adapter, folder, str(adapter_folder))

    def prepare(name: str, weight: torch.Tensor) -> torch.Tensor:
        """With QLoRA the adapter belongs on the base as NF4 has rounded it."""
        if name not in stamp.get("nf4", ()):
            return weight
        dtype = getattr(torch, stamp["reference"]["dtype"])
        return through_nf4(weight, name.removesuffix(".weight"), folder.network, dtype)

    with atomic_folder(output, STAMP_FILE, result_names(output)) as aside:
        merge_folder(aside, folder, adapter, spec, prepare)
        made = {"pact_tune": __version__, "merged_from": adapter_folder.resolve().name}
        write_stamp(aside, {**stamp, **made, "base": str(folder.directory.resolve())})


def _check_output(output: Path) -> None:
    """Raises UserError where something else than an earlier merge lies."""
    check_replaceable(output, STAMP_FILE, result_names(output))
    if (output / STAMP_FILE).is_file() and "merged_from" not in read_stamp(output):
        raise UserError(f"'{output}' is the result of a training run: choose another --output.")
