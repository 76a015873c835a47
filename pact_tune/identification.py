"""Finds safety tokens: which tokens an aligned model prefers over its base model while it refuses (paper, section 2.1).

Eq. 1-2 are linear in the two models, d(v) = E[p_safe(v)] - E[p_base(v)], so each model's probabilities are summed on
their own: one model in memory at a time, and per model one fp64 vector of the vocabulary's size.
"""

import contextlib
import datetime
import gc
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pact_tune import hub, log
from pact_tune.conversations import (
    Message,
    encode,
    end_of_turn,
    load_tokenizer,
    render,
    render_prompt,
    tokenizer_fingerprint,
)
from pact_tune.errors import UserError, cannot_load, unknown_name
from pact_tune.files import PARTIAL, atomic_file, check_replaceable, remove_partial
from pact_tune.fingerprints import model_fingerprint
from pact_tune.generation import (
    compute_dtype,
    default_device,
    end_tokens,
    generate,
    generation_batches,
    generation_config,
    load_model,
)
from pact_tune.safety_tokens import (
    MAX_TOKENS,
    Ranking,
    SafetyTokens,
    Weighting,
    decode_tokens,
    is_style,
    token_weights,
    top_k,
    warn_of_ties,
)
from pact_tune.scoring import batches_of, response_logits

# What a work folder holds; the first says whose it is.
WORK_FILES = ("settings.json", "responses-*-[0-9]*.json", "sums-*-of-*.safetensors")
FORMAT = 2  # of a work folder: sums are kept of the first so many batches, in this order of batches
CANDIDATES = 2048  # kept by each ranking, so that another K or ranking needs no model
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "ranking": "score",
        "weighting": "raw",
        "average": "pooled",
        "base_prompting": "same_tokens",
        "max_response_tokens": 128,
        "include_eos": True,
        "num_prompts": None,
    },
    "official": {
        "ranking": "reference_probability",
        "weighting": "centred",
        "average": "macro",
        "base_prompting": "plain_text",
        "max_response_tokens": 64,
        "include_eos": False,
        "num_prompts": 512,
    },
}


@dataclass(frozen=True)
class _Run:
    """What one measurement needs beside the models; see :func:`identify_safety_tokens`."""

    tokenizer: PreTrainedTokenizerBase
    valid: torch.Tensor  # ids that the tokenizer has
    average: str
    base_prompting: str
    max_response_tokens: int
    include_eos: bool
    temperature: float
    seed: int
    tokens_per_batch: int
    device: torch.device
    device_map: str | None
    dtype: str
    work_dir: Path | None
    rank: int
    world_size: int
    progress: bool
    trust_remote_code: bool


@dataclass
class _Corpus:
    """Prompts with the aligned model's responses, as token ids; `benign` ones mark style."""

    name: str
    messages: list[list[Message]]
    prompts: list[list[int]]
    responses: list[list[int]] = field(default_factory=list)


def identify_safety_tokens(
    aligned: str | Path,
    base: str | Path,
    prompts: Sequence[str],
    *,
    responses: Sequence[str] | None = None,
    benign_prompts: Sequence[str] | None = None,
    leave_out_style: bool = False,
    aligned_revision: str | None = None,
    base_revision: str | None = None,
    k: int = 50,
    ranking: Ranking = "score",
    weighting: Weighting = "raw",
    average: Literal["pooled", "macro"] = "pooled",
    base_prompting: Literal["same_tokens", "plain_text"] = "same_tokens",
    max_response_tokens: int = 128,
    include_eos: bool = True,
    num_prompts: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    tokens_per_batch: int = 4096,
    device: str | None = None,
    device_map: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    work_dir: str | Path | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> SafetyTokens:
    """Measures d(v) (Eq. 1-2) and chooses the safety tokens.

    Under torchrun every process takes a share of the batches, and all return the same tokens.

    Args:
        aligned (str | Path): the aligned model, a folder or a Hub name; its tokenizer and chat template are used.
        base (str | Path): its pre-trained counterpart, with the same tokenizer.
        prompts (Sequence[str]): harmful requests.
        responses (Sequence[str] | None): one a prompt; None: the aligned model answers.
        benign_prompts (Sequence[str] | None): harmless requests; tokens that are at least as probable in the aligned
            model's answers to them are style.
        leave_out_style (bool): never choose style tokens.
        aligned_revision (str | None): branch, tag or commit of a Hub model.
        base_revision (str | None): the same of the base model.
        k (int): at most how many safety tokens.
        ranking (Ranking): top-K by d(v) (paper) or by mean reference probability (released code).
        weighting (Weighting): see :func:`pact_tune.safety_tokens.token_weights`.
        average (Literal["pooled", "macro"]): mean over all positions, or over prompts of the mean over positions.
        base_prompting (Literal["same_tokens", "plain_text"]): the base model sees the aligned model's own tokens, or
            "User: ...\\n\\nAssistant: " without BOS (released code).
        max_response_tokens (int): longer responses are cut.
        include_eos (bool): count the position of the end-of-turn token.
        num_prompts (int | None): only the first so many.
        temperature (float): of the responses; 0 is greedy.
        seed (int): of sampled responses.
        tokens_per_batch (int): padded tokens of a forward pass.
        device (str | None): default: a GPU where there is one.
        device_map (str | None): "auto" spreads a model over several GPUs (needs accelerate).
        dtype (Literal["auto", "float32", "bfloat16", "float16"]): "auto": float32 on CPU, else the checkpoint's.
        work_dir (str | Path | None): keeps finished work, so that the same call after a kill goes on from there.
        progress (bool): show progress bars.
        trust_remote_code (bool): let the model folders' own Python code run.

    Returns:
        SafetyTokens: method "measured".

    Raises:
        UserError: the tokenizers differ, nothing can be measured, or `work_dir` belongs to other inputs.
    """
    _check_choices(ranking=ranking, weighting=weighting, average=average, base_prompting=base_prompting)
    if k > MAX_TOKENS:
        raise UserError(f"k is {k}, and at most {MAX_TOKENS} safety tokens are taken: choose fewer.")
    if min(k, max_response_tokens, tokens_per_batch, 1 if num_prompts is None else num_prompts) < 1 or temperature < 0:
        raise UserError("k, max_response_tokens, tokens_per_batch and num_prompts must be at least 1, temperature 0.")
    if leave_out_style and not benign_prompts:
        raise UserError("Style tokens can only be left out when benign prompts are given.")
    if responses is not None and len(responses) != len(prompts):
        raise UserError(f"There are {len(prompts)} prompts but {len(responses)} responses: give one response a prompt.")
    rank, world_size, place = _world(device)
    folders = {
        "aligned": hub.model_folder(aligned, aligned_revision, trust_remote_code),
        "base": hub.model_folder(base, base_revision, trust_remote_code),
    }
    weights = {name: model_fingerprint(folder) for name, folder in folders.items()}
    if weights["aligned"] == weights["base"]:
        raise UserError(
            f"'{aligned}' and '{base}' are the same model, so no token is more probable in one of them: give the "
            "pre-trained model that the aligned one was made from as base."
        )
    tokenizer = load_tokenizer(str(folders["aligned"]), trust_remote_code)
    _check_same_tokenizer(tokenizer, folders["base"], aligned, base, trust_remote_code)
    run = _Run(
        tokenizer=tokenizer,
        valid=torch.tensor(sorted(set(tokenizer.get_vocab().values()))),
        average=average,
        base_prompting=base_prompting,
        max_response_tokens=max_response_tokens,
        include_eos=include_eos,
        temperature=temperature,
        seed=seed,
        tokens_per_batch=tokens_per_batch,
        device=place,
        device_map=device_map,
        dtype=dtype,
        work_dir=None if work_dir is None else Path(work_dir),
        rank=rank,
        world_size=world_size,
        progress=progress and rank == 0,
        trust_remote_code=trust_remote_code,
    )
    limit = min(_max_length(folder) for folder in folders.values())
    harmful, left_out = _corpus(run, "harmful", prompts[:num_prompts], responses, limit)
    benign, _ = _corpus(run, "benign", benign_prompts or [], None, limit)
    models = {
        "aligned_model": _name(aligned),
        "base_model": _name(base),
        "aligned_version": hub.commit_of(folders["aligned"]) or weights["aligned"],
        "base_version": hub.commit_of(folders["base"]) or weights["base"],
        "aligned_weights": weights["aligned"],
    }
    _claim_work_dir(run, models, harmful, benign)

    with _LazyModel(run, folders["aligned"]) as model:
        _respond(run, model, harmful)
        _respond(run, model, benign)
        safe, weight = _measure(run, model, harmful, "aligned")
        mild, mild_weight = _measure(run, model, benign, "aligned")
    with _LazyModel(run, folders["base"]) as model:
        unsafe, _ = _measure(run, model, harmful, "base")

    if float(weight.sum()) == 0:
        raise UserError("Every response is empty, so nothing can be measured: give other prompts, or responses.")
    score = ((safe - unsafe).sum(0) / weight.sum())[run.valid]
    reference = (safe.sum(0) / weight.sum())[run.valid]
    candidates = {"ids": run.valid, "scores": score, "reference_probability": reference}
    if benign.prompts:
        # Row 1 covers all positions of the benign answers, row 0 their first.
        candidates["benign_probability"] = (mild[1] / mild_weight[1])[run.valid]
    if leave_out_style:
        keep = ~is_style(candidates["benign_probability"], reference)
        candidates = {name: tensor[keep] for name, tensor in candidates.items()}
        if not len(candidates["ids"]):
            raise UserError("Every token is style by these benign prompts: give benign prompts that are not refused.")
    halves = {
        "score": ((safe - unsafe) / weight[:, None])[:, candidates["ids"]],
        "reference_probability": (safe / weight[:, None])[:, candidates["ids"]],
    }[ranking]
    ranked = candidates[{"score": "scores"}.get(ranking, ranking)]
    chosen = top_k(ranked, candidates["ids"], k)
    warn_of_ties(ranked, k)
    first = (mild[0] / mild_weight[0])[candidates["ids"][chosen]].sum().item() if benign.prompts else None
    provenance = {
        "method": "measured",
        **models,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "vocab_size": _head_rows(folders["aligned"], trust_remote_code),
        "num_prompts": sum(1 for response in harmful.responses if response),
        "num_positions": sum(map(len, harmful.responses)),
        "num_prompts_left_out": left_out + sum(1 for response in harmful.responses if not response),
        "num_benign_prompts": sum(1 for response in benign.responses if response),
        "benign_first_token_mass": first,
        "stability": _stability(halves, weight, candidates["ids"], k),
        "options": {
            "k": k,
            "ranking": ranking,
            "weighting": weighting,
            "average": average,
            "base_prompting": base_prompting,
            "max_response_tokens": max_response_tokens,
            "include_eos": include_eos,
            "temperature": temperature,
            "seed": seed,
            "leave_out_style": leave_out_style,
            "trust_remote_code": trust_remote_code,
            "responses": "generated" if responses is None else "given",
            "dtype": str(
                _DTYPES.get(run.dtype) or compute_dtype(folders["aligned"], run.device, trust_remote_code)
            ).removeprefix("torch."),
        },
    }
    return _tokens(run, candidates, chosen, weighting, provenance)


def _tokens(
    run: _Run,
    candidates: dict[str, torch.Tensor],
    chosen: torch.Tensor,
    weighting: Weighting,
    provenance: dict[str, Any],
) -> SafetyTokens:
    """Keeps the union of the best candidates by each ranking, and S = `chosen` of them."""
    ids = candidates["ids"]
    best = [top_k(candidates[name], ids, CANDIDATES) for name in ("scores", "reference_probability")]
    kept = torch.cat([*best, chosen]).unique() if len(ids) > 2 * CANDIDATES else torch.arange(len(ids))
    floats = {name: tensor if name == "ids" else tensor.float() for name, tensor in candidates.items()}
    return SafetyTokens(
        ids=ids[chosen],
        weights=token_weights(floats["scores"][chosen], weighting),
        scores=floats["scores"][chosen],
        reference_probability=floats["reference_probability"][chosen],
        candidates={name: tensor[kept] for name, tensor in floats.items()},
        provenance=provenance,
        tokens=decode_tokens(run.tokenizer, ids[chosen]),
        candidate_tokens=decode_tokens(run.tokenizer, ids[kept]),
    )


def _stability(halves: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, k: int) -> float | None:
    """Share of the top K that both halves of the prompts have in common; None with fewer than two prompts."""
    if (weight == 0).any():
        return None
    first, second = (set(ids[top_k(half, ids, k)].tolist()) for half in halves)
    return len(first & second) / len(first)


# --- prompts and responses


def _corpus(
    run: _Run, name: str, prompts: Sequence[str], responses: Sequence[str] | None, limit: float
) -> tuple[_Corpus, int]:
    """Renders prompts; those that leave no room for a response are left out, and counted."""
    corpus, left_out = _Corpus(name, [], []), 0
    for index, prompt in enumerate(prompts):
        messages: list[Message] = [{"role": "user", "content": prompt}]
        ids = render_prompt(run.tokenizer, messages)
        if len(ids) + run.max_response_tokens > limit:
            left_out += 1
            continue
        corpus.messages.append(messages)
        corpus.prompts.append(ids)
        if responses is not None:
            corpus.responses.append(_given_response(run, messages, responses[index]))
    if name == "harmful" and not corpus.prompts:
        reason = f"all {left_out} are too long for the model's {limit:.0f} positions" if left_out else "there are none"
        raise UserError(f"No prompt can be used: {reason}.")
    return corpus, left_out


def _given_response(run: _Run, messages: list[Message], text: str) -> list[int]:
    conversation = render(run.tokenizer, [*messages, {"role": "assistant", "content": text}])
    response = [token for start, end in conversation.responses for token in conversation.tokens[start:end]]
    if not run.include_eos:
        response = response[: len(response) - len(end_of_turn(run.tokenizer))]
    return response[: run.max_response_tokens]


def _cut(run: _Run, response: list[int], eos: Collection[int]) -> list[int]:
    """A response up to its first end-of-turn token, which stays where it counts, and to the longest that is allowed."""
    end = next((index for index, token in enumerate(response) if token in eos), len(response))
    return response[: end + run.include_eos][: run.max_response_tokens]


def _respond(run: _Run, model: "_LazyModel", corpus: _Corpus) -> None:
    """Fills in the aligned model's responses where none are given."""
    if corpus.responses or not corpus.prompts:
        return
    batches = generation_batches(corpus.prompts, run.max_response_tokens, run.tokens_per_batch)
    mine: dict[int, list[int]] = {}
    with _bar(run, len(corpus.prompts), f"{corpus.name} responses") as bar:
        for number, batch in list(enumerate(batches))[run.rank :: run.world_size]:
            file = run.work_dir and run.work_dir / f"responses-{corpus.name}-{number:05d}.json"
            if file and file.exists():
                answers = json.loads(file.read_text())
            else:
                answers = _generate(run, model.get(), [corpus.prompts[i] for i in batch], run.seed + number)
                if file:
                    with atomic_file(file) as path:
                        path.write_text(json.dumps(answers))
            mine |= zip(batch, answers, strict=True)
            bar.update(len(batch) * run.world_size)
    answers = _gather(run, mine)
    corpus.responses = [answers[i] for i in range(len(corpus.prompts))]


def _generate(run: _Run, model: PreTrainedModel, prompts: list[list[int]], seed: int) -> list[list[int]]:
    config = model.generation_config
    assert config is not None  # see _load
    return [_cut(run, r, config.eos_token_id) for r in generate(model, prompts, config, seed=seed)]


# --- sums of probabilities


def _measure(run: _Run, model: "_LazyModel", corpus: _Corpus, which: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums one model's next-token probabilities over the response positions (its half of Eq. 1-2).

    Returns:
        tuple[torch.Tensor, torch.Tensor]: sums ``[2, V]`` and weights ``[2]``, fp64. Rows are the halves of the harmful
        prompts; of the benign ones, the first positions and all positions.
    """
    rows = [
        (_prompt_for(run, corpus, i, which), response, _row_weights(run, corpus.name, i, len(response)))
        for i, response in enumerate(corpus.responses)
        if response
    ]
    columns = int(run.valid.max()) + 1
    sums, weight = torch.zeros(2, columns, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for _, _, weights in rows:
        weight += weights.sum(1)
    batches = batches_of([(p, r) for p, r, _ in rows], run.tokens_per_batch)[run.rank :: run.world_size]
    file = run.work_dir and run.work_dir / f"sums-{corpus.name}-{which}-{run.rank}-of-{run.world_size}.safetensors"
    done = 0
    if file and file.exists():
        saved = load_file(file)
        sums, done = saved["sums"], int(saved["done"])
    with _bar(run, len(rows), f"{corpus.name} probabilities, {which} model") as bar:
        bar.update(sum(map(len, batches[:done])) * run.world_size)
        for number, batch in enumerate(batches[done:], done + 1):
            sums += _probability_sums(run, model.get(), [rows[i] for i in batch], columns).cpu()
            if file:
                with atomic_file(file) as path:
                    save_file({"sums": sums, "done": torch.tensor(number)}, path)
            bar.update(len(batch) * run.world_size)
    return _all_reduce(run, sums), weight


def _prompt_for(run: _Run, corpus: _Corpus, index: int, which: str) -> list[int]:
    if which == "aligned" or run.base_prompting == "same_tokens":
        return corpus.prompts[index]
    return encode(run.tokenizer, f"User: {corpus.messages[index][-1]['content']}\n\nAssistant: ")


def _row_weights(run: _Run, corpus: str, index: int, length: int) -> torch.Tensor:
    """Weight of each response position in either sum, ``[2, length]`` fp64."""
    weights = torch.zeros(2, length, dtype=torch.float64)
    each = 1.0 if run.average == "pooled" else 1.0 / length
    if corpus == "harmful":
        weights[index % 2] = each
    else:
        weights[0, 0] = 1.0
        weights[1] = each
    return weights


@torch.inference_mode()
def _probability_sums(
    run: _Run, model: PreTrainedModel, rows: list[tuple[list[int], list[int], torch.Tensor]], columns: int
) -> torch.Tensor:
    """Weighted sums of softmax over the response positions of one batch, ``[2, columns]`` fp64."""
    weights = torch.cat([w for _, _, w in rows], dim=1).float()
    sums = torch.zeros(2, columns, dtype=torch.float64, device=model.device)
    start = 0
    for logits in response_logits(model, [(prompt, response) for prompt, response, _ in rows]):
        part = weights[:, start : start + len(logits)].to(logits.device)
        sums += (part @ logits.softmax(-1))[:, :columns].to(sums.device)
        start += len(logits)
    return sums


# --- models


class _LazyModel:
    """A model that is loaded when first asked for: a resumed run need not load it for work that is done."""

    def __init__(self, run: _Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.model: PreTrainedModel | None = None

    def __enter__(self) -> "_LazyModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.model = None
        if self.run.device.type == "cuda":
            gc.collect()  # the hooks of a device map refer to each other
            torch.cuda.empty_cache()

    def get(self) -> PreTrainedModel:
        if self.model is None:
            self.model = _load(self.run, self.folder)
        return self.model


def _load(run: _Run, folder: Path) -> PreTrainedModel:
    dtype = None if run.dtype == "auto" else _DTYPES[run.dtype]
    model = load_model(folder, run.device, dtype, run.device_map, run.trust_remote_code)
    rows = model.get_output_embeddings().weight.shape[0]
    if rows <= int(run.valid.max()):
        raise UserError(
            f"The model in '{folder}' has {rows} tokens but its tokenizer has ids up to {int(run.valid.max())}: "
            "they do not belong together."
        )
    model.generation_config = generation_config(
        end_tokens(model, run.tokenizer), run.tokenizer.pad_token_id, run.max_response_tokens, run.temperature
    )
    return model


def _max_length(folder: Path) -> float:
    # Not every architecture has a longest sequence.
    return json.loads((folder / "config.json").read_text()).get("max_position_embeddings", float("inf"))


def _head_rows(folder: Path, trust_remote_code: bool) -> int:
    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config().vocab_size


def _name(model: str | Path) -> str:
    """A Hub name, or a local folder's own name: where it lies on this machine is nobody else's business."""
    return Path(model).resolve().name if Path(model).is_dir() else str(model)


def _check_same_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, aligned: str | Path, base: str | Path, trust_remote_code: bool
) -> None:
    try:
        other = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged tokenizer.json raises whatever its parser stumbles over
        raise cannot_load("tokenizer", base, error, ": copy the aligned model's") from error
    mine, theirs = tokenizer_fingerprint(tokenizer), tokenizer_fingerprint(other)
    if mine != theirs:
        raise UserError(
            f"The aligned model '{aligned}' (tokenizer {mine[:8]}) and the base model '{base}' (tokenizer {theirs[:8]}) "
            "have different vocabularies, so their probabilities cannot be compared: give the base model of this family."
        )


def _check_choices(**given: str) -> None:
    choices = {
        "ranking": ("score", "reference_probability"),
        "weighting": ("raw", "centred", "uniform"),
        "average": ("pooled", "macro"),
        "base_prompting": ("same_tokens", "plain_text"),
    }
    for name, value in given.items():
        if value not in choices[name]:
            raise unknown_name(f"value of option '{name}'", value, choices[name])


# --- work folder and processes


def _claim_work_dir(run: _Run, models: dict[str, Any], harmful: _Corpus, benign: _Corpus) -> None:
    """Makes the work folder this run's own, or sees that it already is."""
    if run.work_dir is None:
        return
    texts = [harmful.prompts, harmful.responses, benign.prompts]
    settings = models | {
        "format": FORMAT,
        "average": run.average,
        "base_prompting": run.base_prompting,
        "max_response_tokens": run.max_response_tokens,
        "include_eos": run.include_eos,
        "temperature": run.temperature,
        "seed": run.seed,
        "tokens_per_batch": run.tokens_per_batch,
        "dtype": run.dtype,
        "device": run.device.type,
        "prompts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
    }
    file = run.work_dir / "settings.json"
    if file.exists():
        old = json.loads(file.read_text())
        if differing := [name for name in settings if old.get(name) != settings[name]]:
            raise UserError(
                f"The work folder '{run.work_dir}' belongs to a run with other settings ({', '.join(differing)}): "
                "delete it, or choose another."
            )
    elif run.rank == 0:
        with atomic_file(file) as path:
            path.write_text(json.dumps(settings, indent=1))


def check_work_dir(work_dir: str | Path) -> None:
    """Raises UserError where :func:`identify_safety_tokens` would keep its work among somebody else's files."""
    check_replaceable(work_dir, WORK_FILES[0], [*WORK_FILES, f".*{PARTIAL}"])


def remove_work_dir(work_dir: str | Path) -> None:
    """Deletes the files of a work folder of :func:`identify_safety_tokens`, and the folder when nothing else is in it."""
    remove_partial(work_dir, WORK_FILES)
    for pattern in reversed(
        WORK_FILES
    ):  # the one that says whose it is goes last, so that a kill leaves a folder of ours
        for file in Path(work_dir).glob(pattern):
            file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        Path(work_dir).rmdir()


def _world(device: str | None) -> tuple[int, int, torch.device]:
    """Rank, world size and device; joins the process group when torchrun started this process."""
    name = device or default_device()
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return 0, 1, torch.device(name)
    if name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(name)
    if not dist.is_initialized():
        # Ranks wait for the slowest one's responses, which may take long.
        backend = "nccl" if name.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=12))
    return dist.get_rank(), dist.get_world_size(), torch.device(name)


def _gather(run: _Run, mine: dict[int, list[int]]) -> dict[int, list[int]]:
    if run.world_size == 1:
        return mine
    parts: list[Any] = [None] * run.world_size
    dist.all_gather_object(parts, mine)
    return {index: answer for part in parts for index, answer in part.items()}


def _all_reduce(run: _Run, sums: torch.Tensor) -> torch.Tensor:
    if run.world_size == 1:
        return sums
    sums = sums.to(run.device)
    dist.all_reduce(sums)
    return sums.cpu()


@contextlib.contextmanager
def _bar(run: _Run, total: int, description: str) -> Iterator[log.Bar]:
    with log.progress(total=total, desc=description, unit="prompt", disable=not run.progress or not total) as bar:
        yield bar
