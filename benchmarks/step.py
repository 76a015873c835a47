"""What a training step costs: torchtune's, ours without and with PACT, and PACT's as it was published.

    python -m benchmarks.step                       the short set, on a CPU (10 to 15 minutes)
    python -m benchmarks.step --set full            all sizes and works
    python -m benchmarks.step --device cuda         true sizes, random weights, bf16
    PACT_TUNE_TEST_DATA=DIR python -m benchmarks.step --parts filling --set real    filling, on rows of published data

Ours are steps of the recipe itself, on a random model and random rows. All variants take turns in one process, in
another order each round, and are compared within a round, by CPU time (on a GPU: by events); peak memory is measured in
a process of its own per variant. docs/performance.md explains the numbers.
"""

import argparse
import csv
import datetime
import gc
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pact_lora_finetune
import torch
import torchtune
from omegaconf import DictConfig, OmegaConf
from torchtune import config, modules, training
from torchtune.data import padded_collate_sft
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from benchmarks.published import PAD_TO, published_loss
from pact_tune.conversations import Conversation, load_tokenizer, response_only_prefix, tokenizer_fingerprint
from pact_tune.data import ChatDataset, Counts, chat_dataset
from pact_tune.demo import demo_family_path
from pact_tune.families import MODELS
from pact_tune.losses import PACTConfig
from pact_tune.objectives import Context, Objective, sft
from pact_tune.reference.source import ReferenceSource
from pact_tune.safety_tokens import SafetyTokens
from pact_tune.torchtune.checkpoint import Names
from pact_tune.torchtune.config import complete
from pact_tune.version import __version__

RESULTS = Path(__file__).parent / "results"
K = 50
BATCH = 2  # the paper's
LORA = {"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 8, "lora_alpha": 32}  # the released code's


def _qwen2(vocab_size: int, layers: int, heads: int, kv_heads: int, width: int, mlp: int, tied: bool = False) -> dict:
    return {
        "_component_": "torchtune.models.qwen2.lora_qwen2", "vocab_size": vocab_size, "num_layers": layers,
        "num_heads": heads, "num_kv_heads": kv_heads, "embed_dim": width, "intermediate_dim": mlp,
        "max_seq_len": 2048, "rope_base": 1e6, "norm_eps": 1e-6, "tie_word_embeddings": tied,
    }  # fmt: skip


def qwen2_like(network: Mapping[str, Any]) -> dict:
    """A network of Qwen2's kind with the sizes that transformers' config.json says."""
    keys = ("vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")
    return _qwen2(*(network[key] for key in (*keys, "intermediate_size")))


SIZES = {
    "demo": _qwen2(800, 4, 4, 4, 128, 384, tied=True),
    "7B-like": _qwen2(11264, 12, 12, 4, 768, 3200),  # head/trunk parameters as in Qwen2.5-7B: 0.08
    "152k": _qwen2(152064, 8, 8, 2, 512, 1408),
    "Qwen2.5-7B": qwen2_like(MODELS["qwen2.5-7b-instruct"].config),
    "Llama-3.1-8B": {"_component_": "torchtune.models.llama3_1.lora_llama3_1_8b"},
    "Llama-3.2-1B": {"_component_": "torchtune.models.llama3_2.lora_llama3_2_1b"},
    "Gemma-2-9B": {"_component_": "pact_tune.torchtune.from_checkpoint", "path": "gemma-2-9b-it"},
}
VOCABULARIES = {  # of those whose section does not say it
    "Llama-3.1-8B": MODELS["llama-3.1-8b-instruct"].config["vocab_size"],
    "Llama-3.2-1B": MODELS["llama-3.2-1b-instruct"].config["vocab_size"],
    "Gemma-2-9B": MODELS["gemma-2-9b-it"].config["vocab_size"],
}
# Tokens of (prompt, response), row after row, and how many different responses there are (None: all differ). GSM8K's
# and AG News' are like those of the real data under a small vocabulary.
WORKS: dict[str, tuple[list[tuple[int, int]], int | None]] = {
    "matched": ([(128, 128)], None),
    "AG News": ([(95, 3)], 4),
    "GSM8K": ([(70, 170), (60, 140)], None),
}
SHARED: dict[str, int] = {}  # tokens that all prompts of a work begin with; 0 where it is not named
# Rows of published data with Qwen2.5's tokenizer and template: files below $PACT_TUNE_TEST_DATA (see tests/test_real_data.py).
REAL = {
    "SST-2 rows": "pact_official/SST2_5k_p_0.json",
    "AG News rows": "pact_official/agnews_5k_p_0.json",
    "GSM8K rows": "gsm8k/train.jsonl",
}
SETS = {
    "short": [("demo", "matched"), ("7B-like", "matched"), ("7B-like", "AG News")],
    "full": [
        ("demo", "matched"), ("7B-like", "matched"), ("7B-like", "AG News"), ("7B-like", "GSM8K"), ("152k", "matched"),
    ],
    "real": [("7B-like", work) for work in REAL],
    "gpu": [(size, work) for size in ("Qwen2.5-7B", "Llama-3.1-8B", "Llama-3.2-1B", "Gemma-2-9B") for work in WORKS],
}  # fmt: skip
DTYPES = {"cpu": ("fp32", torch.float32), "cuda": ("bf16", torch.bfloat16)}
VARIANTS = ("torchtune", "sft", "sft again", "cold", "warm", "published")


# What the recipe's config names: random rows, random weights ---------------------------------------------------------


def random_rows(tokenizer: Any, work: str, rows: int, vocab_size: int) -> ChatDataset:
    """Rows of random tokens with the lengths of a work.

    Args:
        tokenizer (Any): given by the recipe; not used.
        work (str): of :data:`WORKS`.
        rows (int): how many.
        vocab_size (int): of the model.

    Returns:
        ChatDataset: the rows.
    """
    rng = random.Random(0)
    lengths, distinct = WORKS[work]

    def tokens(n: int) -> list[int]:
        return [rng.randrange(100, vocab_size) for _ in range(n)]

    responses = [tokens(lengths[i % len(lengths)][1]) for i in range(distinct or rows)]
    shared = tokens(SHARED.get(work, 0))
    prompts = [shared + tokens(lengths[i % len(lengths)][0] - len(shared)) for i in range(rows)]
    conversations = []
    for i, prompt in enumerate(prompts):
        response = responses[i % len(responses)]
        conversations.append(Conversation(prompt + response, [(len(prompt), len(prompt) + len(response))]))
    return ChatDataset(conversations, [Counts("random rows", used=rows)], [0] * rows)


def real_rows(tokenizer: Any, work: str, rows: int, vocab_size: int) -> ChatDataset:
    """Published rows; ids are folded into a smaller vocabulary, so that equal beginnings stay equal.

    Args:
        tokenizer (Any): given by the recipe; not used.
        work (str): of :data:`REAL`.
        rows (int): how many.
        vocab_size (int): of the model.

    Returns:
        ChatDataset: the rows.
    """
    folder = Path(os.environ["PACT_TUNE_TEST_DATA"])
    qwen = load_tokenizer(str(folder / "tokenizers" / "qwen2.5-hf"))
    read = chat_dataset(qwen, source=str(folder / REAL[work]), n=rows, progress=False)
    folded = [Conversation([100 + t % (vocab_size - 100) for t in c.tokens], c.responses) for c in read.conversations]
    return ChatDataset(folded, read.counts, [0] * rows)


class RandomCheckpointer:
    """Random weights in the place of a checkpoint.

    Args:
        model (dict): section of the network.
        vocab_size (int): rows of its head.
        device (str): where the weights are made.
    """

    weights_hash = "random"
    names = Names("qwen2")
    network = SimpleNamespace(interleave=lambda module, tensor: tensor)
    folder = SimpleNamespace(files=[])

    def __init__(self, model: dict, vocab_size: int, device: str) -> None:
        self.model, self.vocab_size, self.device = model, vocab_size, device

    def load(self) -> dict[str, torch.Tensor]:
        """Weights from N(0, 0.02), norms of 1."""
        generator = torch.Generator(self.device).manual_seed(0)
        with torch.device("meta"):
            model = config.instantiate(OmegaConf.create(self.model))
        weights = {}
        for name, tensor in model.state_dict().items():
            if "lora" not in name:
                weights[name] = torch.ones(tensor.shape, device=self.device, dtype=DTYPES[self.device][1])
                if tensor.ndim > 1 or name.endswith("bias"):
                    weights[name].normal_(0, 0.02, generator=generator)
        return weights

    def check(self, model: Any) -> None:
        """Nothing to check."""

    def start(self, fresh: dict[str, torch.Tensor], spec: Any) -> dict[str, torch.Tensor]:
        """The adapter that the seed gives."""
        return fresh


def make_config(
    folder: Path, size: str, work: str, rows: int, device: str, checkpointing: bool, **overrides: Any
) -> DictConfig:
    """A recipe config for a random model; the loss is PACT's, preset "official"."""
    vocab_size = VOCABULARIES.get(size) or SIZES[size]["vocab_size"]
    model = SIZES[size] | LORA
    demo = str(demo_family_path() / "aligned")
    tokens = folder / "safety_tokens"
    if not tokens.exists():
        _random_safety_tokens(demo, vocab_size).save(tokens)
    cfg = {
        "output_dir": str(folder / "out"),
        "model": model,
        "tokenizer": {"_component_": "pact_tune.load_tokenizer", "path": demo},
        "checkpointer": {
            "_component_": "benchmarks.step.RandomCheckpointer", "model": model, "vocab_size": vocab_size, "device": device,
        },
        "dataset": {
            "_component_": f"benchmarks.step.{'real' if work in REAL else 'random'}_rows", "work": work, "rows": rows, "vocab_size": vocab_size,
        },
        "loss": {
            "_component_": "pact_tune.objectives.pact", "safety_tokens": str(tokens), "preset": "official", "k": K,
        },
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 3e-5},
        "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": str(folder / "logs")},
        "reference_cache": {"directory": str(folder / "cache")},
        "batch_size": BATCH,
        "epochs": 3,
        "device": device,
        "dtype": DTYPES[device][0],
        "enable_activation_checkpointing": checkpointing,
    }  # fmt: skip
    return complete(OmegaConf.merge(cfg, OmegaConf.create(overrides)))


def _random_safety_tokens(tokenizer_path: str, vocab_size: int) -> SafetyTokens:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(vocab_size - 100, generator=generator)[:K] + 100
    scores = torch.linspace(1.0, 0.01, K)
    candidates = {"ids": ids, "scores": scores, "reference_probability": scores}
    fingerprint = tokenizer_fingerprint(load_tokenizer(tokenizer_path))
    provenance = {"method": "random", "tokenizer_fingerprint": fingerprint, "vocab_size": vocab_size}
    return SafetyTokens(ids, scores, scores, scores, candidates, provenance)


# The contestants: each is a function that makes one optimiser step on given rows ---------------------------------------


def make_recipe(cfg: DictConfig) -> pact_lora_finetune.PACTLoRAFinetuneRecipe:
    """The recipe, set up; a cache is filled."""
    recipe = pact_lora_finetune.PACTLoRAFinetuneRecipe(cfg)
    recipe.setup(cfg)
    return recipe


def torchtune_step(cfg: DictConfig) -> Callable[[list[int]], Any]:
    """torchtune's own LoRA recipe: its `_loss_step`, unchanged, and what its `train` does around it."""
    spec = importlib.util.find_spec("torchtune")
    path = Path(spec.origin).parent.parent / "recipes" / "lora_finetune_single_device.py"
    spec = importlib.util.spec_from_file_location("lora_finetune_single_device", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe = object.__new__(module.LoRAFinetuneRecipeSingleDevice)
    device = torch.device(cfg.device)
    dataset = config.instantiate(cfg.dataset, None)
    model = _plain_model(OmegaConf.merge(cfg, {"model": torchtunes_own(cfg.model)}))
    loss = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss.num_output_chunks)
    recipe._model, recipe._loss_fn, recipe.activations_handling_ctx = model, loss, nullcontext()
    recipe.ignore_labels_cache = torch.full((cfg.batch_size, 1), loss.ignore_index, device=device)
    optimizer = config.instantiate(cfg.optimizer, [p for p in model.parameters() if p.requires_grad])

    def step(rows: list[int]) -> None:
        examples = []
        for c in (dataset.conversations[row] for row in rows):
            ((start, end),) = c.responses
            examples.append({"tokens": c.tokens, "labels": [loss.ignore_index] * start + c.tokens[start:end]})
        batch = {name: tensor.to(device) for name, tensor in padded_collate_sft(examples).items()}
        num_tokens = (batch["labels"] != loss.ignore_index).sum()
        current = recipe._loss_step(batch) * num_tokens
        current.backward()
        training.scale_grads(model, 1 / num_tokens)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def torchtunes_own(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section of the network with torchtune's builder in the place of ours (Gemma 2, whose logits it does not cap)."""
    if section["_component_"] != "pact_tune.torchtune.from_checkpoint":
        return dict(section)
    lora = {key: value for key, value in section.items() if "lora" in key}
    return {"_component_": "torchtune.models.gemma2.lora_gemma2_9b", **lora}


def published_step(cfg: DictConfig) -> Callable[[list[int]], Any]:
    """The published procedure, rows padded to 512 unless they are to be compared at matched shapes."""
    device = torch.device(cfg.device)
    dataset = config.instantiate(cfg.dataset, None)
    model, reference = _plain_model(cfg), _plain_model(cfg).requires_grad_(False)
    optimizer = config.instantiate(cfg.optimizer, [p for p in model.parameters() if p.requires_grad])
    tokenizer = config.instantiate(cfg.tokenizer)
    safety_tokens = SafetyTokens.load(cfg.loss.safety_tokens)
    ids, weights = safety_tokens.ids.to(device), weights_of(cfg).to(device)
    header = response_only_prefix(tokenizer, bos=False)

    def step(rows: list[int]) -> None:
        conversations = [dataset.conversations[row] for row in rows]
        longest = max(len(c.tokens) for c in conversations)
        pad_to = longest if longest == sum(WORKS["matched"][0][0]) else PAD_TO
        loss = published_loss(
            model, reference, conversations, header, ids, weights, 1.0,
            tokenizer.pad_token_id, pad_to,
        )  # fmt: skip
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def weights_of(cfg: DictConfig) -> torch.Tensor:
    """The weights of the safety tokens that the config's loss gives them, ``[K]``."""
    preset = PACTConfig.preset(cfg.loss.preset)
    return SafetyTokens.load(cfg.loss.safety_tokens).select(cfg.loss.k, preset.ranking, preset.weighting).weights


def _plain_model(cfg: DictConfig) -> torch.nn.Module:
    """The same random network as the recipe's, as torchtune's own recipes have it."""
    dtype = training.get_dtype(cfg.dtype, device=torch.device(cfg.device))
    with training.set_default_dtype(dtype), torch.device(cfg.device):
        model = config.instantiate(cfg.model)
    model.load_state_dict(config.instantiate(cfg.checkpointer).load(), strict=False)
    set_trainable_params(model, get_adapter_params(model))
    if cfg.enable_activation_checkpointing:
        training.set_activation_checkpointing(model, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
    return model


def make_step(variant: str, folder: Path, *shape: Any) -> Callable[[list[int]], Any]:
    """The step of a variant; building it loads the weights and, for "warm", fills the cache."""
    if variant == "torchtune":
        return torchtune_step(make_config(folder, *shape))
    if variant == "published":
        return published_step(make_config(folder, *shape))
    overrides = {"sft": {"loss": {"lambda_kl": 0}}, "cold": {"reference_cache": None}, "warm": {}}
    return make_recipe(make_config(folder, *shape, **overrides[variant])).step


def recipe_steps(recipe: pact_lora_finetune.PACTLoRAFinetuneRecipe) -> dict[str, Callable[[list[int]], Any]]:
    """The variants that are steps of the recipe, on one network, so that true sizes fit a GPU beside the others."""
    pact, cached = recipe.objective, recipe.reference

    def source(objective: Objective, options: dict | None) -> ReferenceSource:
        recipe.objective = objective
        recipe.setup_reference(options)
        return recipe.reference

    def variant(objective: Objective, reference: ReferenceSource) -> Callable[[list[int]], Any]:
        def step(rows: list[int]) -> None:
            recipe.objective, recipe.reference = objective, reference
            recipe.step(rows)

        return step

    live = source(pact, None)
    plain = sft(Context(recipe.tokenizer, recipe.backbone.vocab_size))
    nothing = variant(plain, source(plain, None))
    # A/A: what differs between the first two is noise.
    return {"sft": nothing, "sft again": nothing, "cold": variant(pact, live), "warm": variant(pact, cached)}


# Measuring -----------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], Any], device: str) -> float:
    """CPU time of all threads of this process; on a GPU, the time between two events."""
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def batches(recipe: pact_lora_finetune.PACTLoRAFinetuneRecipe) -> list[list[int]]:
    """The row numbers of each step of an epoch, as the recipe makes them."""
    return recipe.schedule.epoch(0)


def measure_steps(size: str, work: str, rounds: int, device: str, checkpointing: bool) -> list[dict]:
    """Seconds a step, one row per round and variant; the first round warms up and is dropped.

    A round takes one step per length of the work; all variants take the steps that the recipe makes, of rows of like
    lengths.
    """
    rows = BATCH * len(WORKS[work][0])
    results = []
    with tempfile.TemporaryDirectory() as folder:
        shape = (size, work, rows, device, checkpointing)
        steps = {v: make_step(v, Path(folder), *shape) for v in ("torchtune", "published")}
        recipe = make_recipe(make_config(Path(folder), *shape))
        steps |= recipe_steps(recipe)
        epoch = batches(recipe)
        for number in range(rounds + 1):
            for variant in random.sample(VARIANTS, len(VARIANTS)):
                spent = seconds(lambda s=steps[variant]: [s(batch) for batch in epoch], device) / len(epoch)
                if number:
                    results.append({"part": "step", "variant": variant, "round": number, "value": spent, "unit": "s"})
    return [row | {"size": size, "work": work, "checkpointing": checkpointing} for row in results]


def measure_run(size: str, work: str, rounds: int, device: str, rows: int = 4) -> list[dict]:
    """Three epochs, ours with the filling of an empty cache: seconds of the filling and of each epoch.

    The check at a run's start, a forward over 4 rows whatever their number, is not part of it: with so few rows here it
    would count for far more than in a real run.
    """
    results = []
    with tempfile.TemporaryDirectory() as folder:
        shape = (size, work, rows, device, False)
        published = make_step("published", Path(folder), *shape)
        cfg = make_config(Path(folder), *shape)
        recipe = make_recipe(cfg)
        epoch = batches(recipe)
        for step in (published, recipe.step):
            step(epoch[0])  # warms up

        def measure(work: Callable[[], Any], name: str, number: int) -> None:
            results.append({"part": "run", "variant": name, "round": number, "value": seconds(work, device)})

        steps = {"published": published, "warm": recipe.step}
        for number in range(1, rounds + 1):
            for shard in recipe.reference.cache.directory.glob("shard-*"):
                shard.unlink()
            recipe.reference.cache.refresh()
            measure(lambda: recipe.reference.fill(recipe.reference.cache, recipe.schedule.used), "filling", number)
            for index in range(cfg.epochs):
                for name in random.sample(list(steps), 2):  # close together, as the machine's state drifts
                    measure(lambda s=steps[name]: [s(batch) for batch in epoch], f"{name} epoch {index + 1}", number)
    return [row | {"size": size, "work": work, "unit": "s", "checkpointing": False} for row in results]


def measure_filling(size: str, work: str, rounds: int, device: str, rows: int = 48, **overrides: Any) -> list[dict]:
    """An empty cache filled with what rows share computed once, and for each row; beside one epoch of warm steps."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(make_config(Path(folder), size, work, rows, device, False, **overrides))
        longest, cache, epoch = recipe.decoder.longest_shared, recipe.reference.cache, batches(recipe)
        assert cache is not None and longest

        def fill() -> None:
            for shard in cache.directory.glob("shard-*"):
                shard.unlink()
            cache.refresh()
            recipe.reference.fill(cache, recipe.schedule.used)

        def apart() -> None:
            recipe.decoder.longest_shared = 0
            fill()
            recipe.decoder.longest_shared = longest

        steps = {"filling": fill, "filling apart": apart, "warm epoch": lambda: [recipe.step(batch) for batch in epoch]}
        recipe.step(epoch[0])  # warms up
        for number in range(1, rounds + 1):
            for name in random.sample(list(steps), len(steps)):
                spent = seconds(steps[name], device)
                results.append({"part": "filling", "variant": name, "round": number, "value": spent})
    return [row | {"size": size, "work": work, "unit": "s", "checkpointing": False} for row in results]


def measure_memory(variant: str, size: str, work: str, device: str, checkpointing: bool) -> dict[str, float]:
    """MB of the weights (and second weights), and the peak of a step beyond them; to be run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        base = _resident(device)
        step = make_step(variant, Path(folder), size, work, BATCH, device, checkpointing)
        gc.collect()
        loaded = _resident(device)
        step(list(range(BATCH)))  # allocates the optimiser's state
        _reset_peak(device)
        step(list(range(BATCH)))
        return {"weights": loaded - base, "peak beyond weights": _peak(device) - loaded}


def _resident(device: str) -> float:
    if device != "cpu":
        return torch.cuda.memory_allocated() / 1e6
    return _status("VmRSS")


def _reset_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 1e6 if device != "cpu" else _status("VmHWM")


def _status(key: str) -> float:
    """MB, from Linux's account of this process."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(key)).split()[1]) * 1024 / 1e6


def memory_in_a_process(variant: str, size: str, work: str, device: str, checkpointing: bool) -> list[dict]:
    """Rows of :func:`measure_memory`, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.step", "--memory-of", variant, size, work, "--device", device]
    command += ["--checkpointing"] if checkpointing else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    shared = {"part": "memory", "round": 1, "unit": "MB", "size": size, "work": work, "checkpointing": checkpointing}
    return [shared | {"variant": f"{variant}: {name}", "value": value} for name, value in found.items()]


# Reporting -----------------------------------------------------------------------------------------------------------


def ratio(rows: list[dict], above: str, below: str) -> str:
    """Median and quartiles of the ratio of two variants within a round."""
    value = {(row["variant"], row["round"]): row["value"] for row in rows}
    numbers = sorted({row["round"] for row in rows})
    ratios = [value[above, number] / value[below, number] for number in numbers]
    if len(ratios) < 2:
        return f"{ratios[0]:.2f}"
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} [{low:.2f}-{high:.2f}]"


def report(rows: list[dict]) -> str:
    """Markdown tables of all that was measured."""
    lines = []
    shapes = sorted({(row["size"], row["work"], row["checkpointing"]) for row in rows}, key=str)

    def of(part: str, shape: tuple) -> list[dict]:
        return [r for r in rows if r["part"] == part and (r["size"], r["work"], r["checkpointing"]) == shape]

    lines += [
        "## One step", "",
        "Ratios of times within a round: median [quartiles]. In `matched` nothing is padded; in the other works the "
        "published procedure pads to 512 tokens and the others to the longest row of a batch.", "",
        "| size | work | rounds | warm / our SFT | A/A | warm / torchtune's SFT | cold / our SFT | published / cold | "
        "published / warm | warm, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for shape in shapes:
        if found := of("step", shape):
            pairs = [("warm", "sft"), ("sft again", "sft"), ("warm", "torchtune"), ("cold", "sft")]
            pairs += [("published", "cold"), ("published", "warm")]
            cells = [ratio(found, *pair) for pair in pairs]
            median = statistics.median(r["value"] for r in found if r["variant"] == "warm")
            rounds = max(r["round"] for r in found)
            lines.append(f"| {_label(shape)} | {rounds} | {' | '.join(cells)} | {median:.3g} |")
    lines += [
        "", "## A whole run, with the filling of an empty cache", "",
        "| size | work | rounds | filling / one epoch | published / ours, 1 epoch | 3 epochs |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for shape in shapes:
        if found := of("run", shape):
            value = {(r["variant"], r["round"]): r["value"] for r in found}
            for number in {r["round"] for r in found}:
                for name, epochs in (("1 epoch", 1), ("3 epochs", 3)):
                    for variant in ("published", "warm"):
                        total = sum(value[f"{variant} epoch {i + 1}", number] for i in range(epochs))
                        total += value["filling", number] if variant == "warm" else 0
                        found.append({"variant": f"{variant} {name}", "round": number, "value": total})
            cells = [ratio(found, "filling", "warm epoch 2")]
            cells += [ratio(found, f"published {name}", f"warm {name}") for name in ("1 epoch", "3 epochs")]
            rounds = max(r["round"] for r in found)
            lines.append(f"| {_label(shape)} | {rounds} | {' | '.join(cells)} |")
    lines += [
        "", "## Filling, rows of published data", "",
        "| size | work | rounds | each row for itself / one epoch | what rows share once / one epoch | the two |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for shape in shapes:
        if found := of("filling", shape):
            pairs = [("filling apart", "warm epoch"), ("filling", "warm epoch"), ("filling", "filling apart")]
            rounds = max(r["round"] for r in found)
            lines.append(f"| {_label(shape)} | {rounds} | {' | '.join(ratio(found, *pair) for pair in pairs)} |")
    lines += [
        "", "## Memory, MB", "", "Peak of a step beyond the weights; in brackets the weights.", "",
        "| size | work | torchtune's SFT | our SFT | cold | warm | published |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for shape in shapes:
        if found := {r["variant"]: r["value"] for r in of("memory", shape)}:
            cells = [
                f"{found[f'{v}: peak beyond weights']:.0f} ({found[f'{v}: weights']:.0f})"
                for v in VARIANTS
                if v != "sft again"
            ]
            lines.append(f"| {_label(shape)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _label(shape: tuple) -> str:
    size, work, checkpointing = shape
    return f"{size}{', activation checkpointing' if checkpointing else ''} | {work}"


def environment(device: str) -> str:
    """Device, versions and date, for people."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return (
        f"{name}; {torch.get_num_threads()} thread(s); Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchtune {torchtune.__version__}, pact-tune {__version__}; {datetime.date.today()}"
    )


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(rows: list[dict], name: str, device: str) -> None:
    """CSV of the measurements and Markdown of the ratios, in benchmarks/results/; what was not measured anew is kept."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    keys = ("part", "size", "work", "checkpointing")
    measured = {tuple(str(row[key]) for key in keys) for row in rows}
    old = []
    if path.exists():
        with path.open(newline="") as file:
            old = [row for row in csv.DictReader(file) if tuple(row[key] for key in keys) not in measured]
    for row in old:
        row |= {
            "round": int(row["round"]),
            "value": float(row["value"]),
            "checkpointing": row["checkpointing"] == "True",
        }
    rows = [row | {"measured on": row.get("measured on", environment(device))} for row in old + rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*keys, "variant", "round", "value", "unit", "measured on"])
        writer.writeheader()
        writer.writerows(row | {"value": f"{row['value']:.6g}"} for row in rows)
    text = "\n".join([f"# Benchmarks: {name}", "", *sorted({row["measured on"] for row in rows}), "", report(rows)])
    (RESULTS / f"{name}.md").write_text(text)
    print(text, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Measures and writes benchmarks/results/NAME.csv and NAME.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, help="which sizes and works; default: short, on a GPU gpu")
    parser.add_argument("--only", nargs=2, metavar=("SIZE", "WORK"), help="one size and work in the place of a set")
    parser.add_argument(
        "--parts", nargs="+", default=["step", "run", "memory"], choices=["step", "run", "memory", "filling"]
    )
    parser.add_argument("--rounds", type=int, help="default: 3, on a GPU 20")
    parser.add_argument("--run-rounds", type=int, default=1, help="of the whole runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing in all variants")
    parser.add_argument("--name", help="of the results; default: the device")
    parser.add_argument("--memory-of", nargs=3, metavar=("VARIANT", "SIZE", "WORK"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(measure_memory(*args.memory_of, args.device, args.checkpointing)))
        return
    chosen = args.set or ("gpu" if args.device == "cuda" else "short")
    rounds = args.rounds or (20 if args.device == "cuda" else 3)
    rows: list[dict] = []
    for size, work in [args.only] if args.only else SETS[chosen]:
        print(f"== {size}, {work}", flush=True)
        if "step" in args.parts:
            rows += measure_steps(size, work, rounds, args.device, args.checkpointing)
        if "run" in args.parts and size != "demo":
            rows += measure_run(size, work, args.run_rounds, args.device)
        if "filling" in args.parts:
            rows += measure_filling(size, work, args.run_rounds, args.device)
        if "memory" in args.parts and size != "demo":
            for variant in VARIANTS:
                if variant != "sft again":
                    rows += memory_in_a_process(variant, size, work, args.device, args.checkpointing)
        write(rows, args.name or args.device, args.device)


if __name__ == "__main__":
    main()
