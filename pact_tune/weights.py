"""Folders of Hugging Face weights, read and written one tensor at a time."""

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pact_tune.errors import UserError
from pact_tune.families import Network, model_type, network_of
from pact_tune.fingerprints import model_fingerprint

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# What is copied from a base model beside its weights, and nothing else: a folder may also hold what is nobody's business.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md", "README.md",
)  # fmt: skip
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class ModelFolder(Mapping[str, torch.Tensor]):
    """A model's weights by Hugging Face's names, read from its safetensors files when they are asked for.

    Args:
        directory (str | Path): folder with config.json and safetensors files.
        key (str): the config key or flag that names it, for error messages.

    Raises:
        UserError: no checkpoint there, an incomplete or a damaged one.
    """

    def __init__(self, directory: str | Path, key: str = "checkpointer.checkpoint_dir") -> None:
        self.directory = Path(directory)
        self.config = self._read_json("config.json", f"download one with `tune download`, or correct {key}")
        self.files = self._weight_files()
        self._file_of = {name: file for file in self.files for name in self._open(file).keys()}  # noqa: SIM118
        self._file_of = {name: file for name, file in self._file_of.items() if not name.endswith("rotary_emb.inv_freq")}

    @functools.cached_property
    def network(self) -> Network:
        """What the weights are weights of.

        Raises:
            UserError: a network that is not known, or a tied one that saves another head.
        """
        network = network_of(self.config, str(self.directory))
        self.drop_tied_head(network.tied)
        return network

    def drop_tied_head(self, tied: bool) -> None:
        """Leaves out a head that is saved beside the embedding that it is.

        Args:
            tied (bool): what the configuration says.

        Raises:
            UserError: the saved head is another, which transformers would use.
        """
        if not tied or HEAD not in self._file_of or EMBEDDING not in self._file_of:
            return
        if not torch.equal(self[HEAD], self[EMBEDDING]):
            raise UserError(
                f"The checkpoint in '{self.directory}' says tie_word_embeddings: true but holds a head of its own, "
                "which transformers would use: set tie_word_embeddings to false in its config.json."
            )
        del self._file_of[HEAD]

    @property
    def model_type(self) -> str:
        """Its family; the one that config.json names, or that its architecture has."""
        return model_type(self.config, str(self.directory))

    def _read_json(self, name: str, mend: str) -> dict[str, Any]:
        try:
            content = json.loads((self.directory / name).read_text())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"There is no Hugging Face checkpoint in '{self.directory}' (no {name}): {mend}."
            ) from error
        except (OSError, ValueError) as error:
            raise UserError(f"'{self.directory / name}' cannot be read ({error}): download it again.") from error
        if not isinstance(content, dict):
            raise UserError(f"'{self.directory / name}' is not a JSON object: download it again.")
        return content

    def _weight_files(self) -> list[Path]:
        names = ["model.safetensors"]
        if (self.directory / INDEX).is_file():
            names = sorted(set(self._read_json(INDEX, "download it again").get("weight_map", {}).values()))
        missing = [name for name in names if not (self.directory / name).is_file()]
        if missing and any(self.directory.glob("*.bin")):
            raise UserError(
                f"The checkpoint in '{self.directory}' has .bin files only: convert it with `python -c \"from transformers "
                f"import AutoModelForCausalLM as M; M.from_pretrained('{self.directory}', dtype='auto').save_pretrained("
                f"'{self.directory}')\"`."
            )
        if missing or not names:
            raise UserError(f"The checkpoint in '{self.directory}' lacks {(missing or [INDEX])[0]}: download it again.")
        return [self.directory / name for name in names]

    @functools.cached_property
    def _handles(self) -> dict[Path, Any]:
        return {}

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"'{file}' is damaged ({error}): download it again.") from error
        return self._handles[file]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __getitem__(self, name: str) -> torch.Tensor:
        """One whole tensor, on the CPU."""
        return self._open(self._file_of[name]).get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; nothing is read."""
        return tuple(self._open(self._file_of[name]).get_slice(name).get_shape())

    def item_type(self, name: str) -> str:
        """Type of a tensor, as safetensors calls it ("BF16"); nothing is read."""
        return self._open(self._file_of[name]).get_slice(name).get_dtype()

    @functools.cached_property
    def weights_hash(self) -> str:
        """Hash of the weight files' bytes and of config.json: which model this is, whatever its folder is called."""
        return model_fingerprint(self.directory)

    def check_start(self, stamp: Mapping[str, Any]) -> None:
        """Makes sure that this is the model from which a result was trained.

        Args:
            stamp (Mapping[str, Any]): of the result.

        Raises:
            UserError: it is another one.
        """
        if self.weights_hash != stamp["reference"]["fingerprint"]:
            raise UserError(
                f"The model in '{self.directory}' is not the one that the result was trained from (its weight files or its "
                "config.json are others): name that one with --base."
            )

    def copy_companions(self, folder: Path) -> None:
        """Copies configuration, tokenizer, licence and model card to another folder."""
        for name in COMPANIONS:
            if (self.directory / name).is_file():
                shutil.copyfile(self.directory / name, folder / name)

    def rewrite(self, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        """Writes all weights to another folder, changed, holding one tensor at a time.

        Args:
            folder (Path): where the safetensors files go.
            change (Callable): is given name and tensor; returns one of the same type and shape.
        """
        shards: list[list[str]] = [[]]
        size = 0
        for name in self:
            size += self._bytes(name)
            if size > SHARD_BYTES and shards[-1]:
                shards.append([])
                size = self._bytes(name)
            shards[-1].append(name)
        if len(shards) == 1:
            self._write_shard(folder / "model.safetensors", shards[0], change)
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(shards, start=1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            self._write_shard(folder / file, names, change)
            weight_map |= dict.fromkeys(names, file)
        metadata = {"total_size": sum(map(self._bytes, self))}
        (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n")

    def _bytes(self, name: str) -> int:
        return math.prod(self.shape(name)) * ITEM_BYTES[self.item_type(name)]

    def _write_shard(self, path: Path, names: list[str], change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        """One file in safetensors' format: length of the header, header in JSON, the tensors' bytes."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            end = offset + self._bytes(name)
            header[name] = {"dtype": self.item_type(name), "shape": self.shape(name), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                old = self[name]
                new = change(name, old).detach().cpu().contiguous()
                if (new.dtype, new.shape) != (old.dtype, old.shape):
                    raise RuntimeError(f"{name} was {old.dtype} {old.shape} and became {new.dtype} {new.shape}.")
                file.write(new.flatten().view(torch.uint8).numpy().data)


def through_nf4(weight: torch.Tensor, module: str, network: Network, dtype: torch.dtype) -> torch.Tensor:
    """A weight as a QLoRA model computes with it: rounded to NF4 and back.

    Args:
        weight (torch.Tensor): ``[out, in]`` in Hugging Face's order of rows.
        module (str): its module, under Hugging Face's name.
        network (Network): whose weight it is; blocks of NF4 follow torchtune's order of rows.
        dtype (torch.dtype): of the model in training.

    Returns:
        torch.Tensor: the same type and order.

    Raises:
        UserError: torchao is not installed.
    """
    try:
        from torchao.dtypes.nf4tensor import to_nf4
    except ImportError as error:
        raise UserError("NF4 weights (QLoRA) need torchao: install pact-tune[torchtune].") from error
    rows = network.interleave(module, weight.to(dtype)).contiguous()
    return network.deinterleave(module, to_nf4(rows).get_original_weight()).to(weight.dtype)
