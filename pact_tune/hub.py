"""Models and safety tokens on the Hugging Face Hub."""

import functools
import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download

from pact_tune.errors import UserError


def model_folder(name: str | Path, revision: str | None = None) -> Path:
    """A model's files on this machine, downloaded where need be.

    Args:
        name (str | Path): a folder, or a Hub name.
        revision (str | None): branch, tag or commit of a Hub name.

    Returns:
        Path: folder with config, tokenizer and safetensors weights.

    Raises:
        UserError: no such folder, or the Hub does not give it.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise UserError(f"The folder '{name}' holds no model (config.json is missing).")
        return Path(name)
    try:
        folder = snapshot_download(
            str(name),
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"],
            ignore_patterns=["*/*", "consolidated*"],
        )
    except Exception as error:  # the client's, httpx's and validation errors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"The model '{name}' is neither a folder nor could be had from the Hub ({reason}).") from error
    return Path(folder)


@functools.cache
def model_version(folder: Path) -> str:
    """The commit of a model from the Hub's cache, or a hash over the weight files of a folder."""
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"
