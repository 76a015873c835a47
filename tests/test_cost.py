"""What a step costs, counted: floating-point operations, forwards, tensors. No clocks; those are in benchmarks/."""

import dataclasses

import pytest
import torch
from omegaconf import OmegaConf
from recipe import count_reference_rows
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torchtune import config
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from benchmarks import step as benchmark
from benchmarks.published import published_loss
from pact_tune.batching import collate
from pact_tune.conversations import Conversation, response_only_prefix
from pact_tune.head import CHUNK
from pact_tune.objectives import Context, sft
from pact_tune.reference.readings import Columns
from pact_tune.torchtune.decoder import TorchtuneDecoder

# Head and trunk in the proportion of Qwen2.5-7B; and a vocabulary that outweighs everything else.
benchmark.SIZES["toy"] = benchmark._qwen2(1000, 6, 4, 2, 128, 512)
benchmark.SIZES["wide"] = benchmark._qwen2(4000, 1, 2, 2, 32, 64)
benchmark.WORKS["short"] = ([(20, 40), (30, 25)], None)
benchmark.WORKS["long"] = ([(20, 400)], None)
SHAPE = (8, "cpu", False)


class Flops(TorchDispatchMode):
    """Adds up floating-point operations; FlopCounterMode's hooks do not bear a gradient taken inside a forward."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in flop_registry:
            self.total += flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


class Operations(TorchDispatchMode):
    """Records the name of every operation, and the largest storage that one has made."""

    def __init__(self, model):
        super().__init__()
        self.names = []
        self.largest = 0
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        if function == torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.names.append("index with a mask")
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.weights:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def recipe_of(folder, size, work, **overrides):
    return benchmark.make_recipe(benchmark.make_config(folder, size, work, *SHAPE, **overrides))


def flops(step) -> int:
    with Flops() as counter:
        step([0, 1])
    return counter.total


def test_flops_of_a_step(tmp_path):
    counted = {
        variant: flops(benchmark.make_step(variant, tmp_path, "toy", "matched", *SHAPE))
        for variant in ("torchtune", "sft", "cold", "warm", "published")
    }
    assert counted["warm"] <= counted["sft"]
    assert counted["warm"] <= 0.90 * counted["torchtune"]
    assert counted["published"] >= 1.9 * counted["warm"]
    assert 1.3 * counted["warm"] <= counted["cold"] < counted["published"]


def test_padding_to_512_is_most_of_the_published_cost_on_short_rows(tmp_path):
    published, warm = (
        flops(benchmark.make_step(variant, tmp_path, "toy", "AG News", *SHAPE)) for variant in ("published", "warm")
    )
    assert published >= 9.5 * warm


def test_trunk_passes(tmp_path):
    """One forward of the network a step with a cache; without, two of the reference beside it; none more for SFT."""
    for overrides, expected in (({}, 1), ({"reference_cache": None}, 3), ({"loss": {"lambda_kl": 0}}, 1)):
        recipe = recipe_of(tmp_path, "toy", "short", **overrides)
        passes = []
        recipe.model.layers[0].register_forward_hook(lambda *_, passes=passes: passes.append(1))
        for epoch in range(2):
            recipe.step([0, 1])
            assert len(passes) == expected * (epoch + 1)


def test_no_reference_after_the_filling(tmp_path, monkeypatch):
    """Both epochs of a run, another lambda and another seed; a new run looks at a few rows, and that is all."""
    forwards = count_reference_rows(monkeypatch)
    recipe = recipe_of(tmp_path, "toy", "short")
    assert sum(forwards) == 16 + 8  # both views of 8 rows, and of the 4 that are checked
    forwards.clear()
    for _epoch in range(2):
        for row in range(0, 8, 2):
            recipe.step([row, row + 1])
    assert forwards == []
    recipe_of(tmp_path, "toy", "short", loss={"lambda_kl": 7.0}, seed=3)
    assert sum(forwards) == 8


@pytest.mark.parametrize("preset", ["paper", "tail"])
def test_largest_tensor_is_a_chunk_of_logits(tmp_path, preset):
    recipe = recipe_of(tmp_path, "wide", "long", loss={"preset": preset})
    for work in (
        lambda: recipe.step([0, 1]),
        lambda: recipe.decoder.read_reference(recipe.rows[:2], recipe.objective.reading),
    ):
        with Operations(recipe.model) as operations:
            work()
        assert operations.largest <= CHUNK * 4000 * 4
    assert sum(c.num_response_tokens for c in recipe.dataset.conversations[:2]) > 3 * CHUNK


def loss_and_gradients(recipe, rows):
    """Of the recipe's own loss, on given rows."""
    loss, _ = recipe.loss(rows, 1 / recipe.schedule.tokens(rows))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in recipe.model.named_parameters() if p.requires_grad}


def assert_close(one, other, tolerance):
    assert abs(one[0] - other[0]) <= tolerance * abs(other[0])
    for name, gradient in other[1].items():
        assert (one[1][name] - gradient).norm() <= tolerance * gradient.norm(), name


def trained(recipe):
    """As after some steps: the adapter does something."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in recipe.model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    return recipe


@pytest.mark.parametrize("preset", ["paper", "official", "tail"])
@pytest.mark.parametrize("work", ["short", "long"])
def test_cache_changes_loss_and_gradients_by_less_than_a_thousandth(tmp_path, preset, work):
    cached = trained(recipe_of(tmp_path, "toy", work, loss={"preset": preset}))
    live = trained(recipe_of(tmp_path, "toy", work, loss={"preset": preset}, reference_cache=None))
    assert_close(loss_and_gradients(cached, [0, 1]), loss_and_gradients(live, [0, 1]), 1e-3)


@pytest.mark.parametrize(("work", "tolerance"), [("short", 1e-5), ("long", 1e-3), ("GSM8K", 1e-3)])
def test_official_preset_is_the_published_procedure(tmp_path, work, tolerance):
    """On rows of up to 64 response tokens exactly; on longer ones but for the part of the view that is left out."""
    cfg = benchmark.make_config(tmp_path, "toy", work, *SHAPE, reference_cache={"dtype": "float32"})
    recipe = trained(benchmark.make_recipe(cfg))
    ours = loss_and_gradients(recipe, [0, 1])

    model, reference = benchmark._plain_model(cfg), benchmark._plain_model(cfg).requires_grad_(False)
    model.load_state_dict({n: p.detach() for n, p in recipe.model.named_parameters() if "lora" in n}, strict=False)
    loss = published_loss(
        model, reference, recipe.dataset.conversations[:2], response_only_prefix(recipe.tokenizer, bos=False),
        recipe.objective.reading.ids, benchmark.weights_of(cfg), 1.0, recipe.tokenizer.pad_token_id,
    )  # fmt: skip
    loss.backward()
    published = loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_close(ours, published, tolerance)


@pytest.mark.parametrize("preset", ["paper", "official", "tail"])
def test_the_step_never_waits_for_the_device_and_has_no_loop_over_rows(tmp_path, preset):
    recipe = trained(recipe_of(tmp_path, "toy", "short", loss={"preset": preset}))
    counts = []
    for rows in (2, 8):
        conversations = recipe.dataset.conversations[:rows]
        batch = collate(conversations, recipe.decoder.pad_id)
        places = (batch.index, batch.labels, batch.position, batch.row, batch.ce_weight, batch.weight)
        batch = type(batch)(batch.tokens, *(t[:80] for t in places))
        reference = {view: whole[:80] for view, whole in recipe.reference.read(list(range(rows))).items()}
        with Operations(recipe.model) as operations:
            loss, metrics = recipe.decoder.loss(batch, recipe.objective, reference, 1.0)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(recipe.model.parameters(), 1.0)
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default", "mask")
        found = [name for name in operations.names if any(word in name for word in waiting)]
        assert found == []
        counts.append(len(operations.names))
        recipe.optimizer.zero_grad(set_to_none=True)
    assert counts[0] == counts[1]


# TFLOP of the warm step: 2 rows of 128 + 128 tokens, no recomputation. Llama 3 has the shapes of Llama 3.1, whose
# rotary embeddings cannot be made without data.
TRUE_SIZES = {
    "Qwen2.5-7B": (benchmark.SIZES["Qwen2.5-7B"], 13.65),
    "Llama-3.1-8B": ({"_component_": "torchtune.models.llama3.lora_llama3_8b"}, 14.58),
    "Gemma-2-9B": ({"_component_": "pact_tune.torchtune.from_checkpoint", "path": "gemma-2-9b-it"}, 18.01),
}


@pytest.mark.parametrize("name", TRUE_SIZES)
def test_counts_at_true_sizes(tmp_path, name):
    """On tensors without data: nothing is computed, every operation is counted."""
    cfg = benchmark.make_config(tmp_path, "toy", "short", *SHAPE)
    pact_objective = config.instantiate(cfg.loss, Context(config.instantiate(cfg.tokenizer), 1000))
    section, expected = TRUE_SIZES[name]
    rows = [Conversation(list(range(100, 356)), [(128, 256)]), Conversation(list(range(400, 656)), [(128, 256)])]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):

        def network(section=section):
            torch.set_default_dtype(torch.bfloat16)
            model = config.instantiate(OmegaConf.create(section | benchmark.LORA))
            torch.set_default_dtype(torch.float32)
            set_trainable_params(model, get_adapter_params(model))
            return model

        ids, weights = torch.arange(200, 250), torch.ones(50)
        objective = dataclasses.replace(pact_objective, reading=Columns(ids, tail=False))
        reference = {"full": torch.zeros(256, 50), "response_only": torch.zeros(256, 50)}

        def count(work):
            with Flops() as counter:
                work().backward()
            return counter.total / 1e12

        def ours(objective, reference):
            decoder = TorchtuneDecoder(network(), 0, torch.device("cpu"))
            return lambda: decoder.loss(collate(rows, 0), objective, reference, 1.0)[0]

        def torchtune():
            model, loss = network(benchmark.torchtunes_own(section)), CEWithChunkedOutputLoss()
            model.set_num_output_chunks(loss.num_output_chunks)
            tokens = torch.zeros(2, 256, dtype=torch.long)
            return lambda: loss(model(tokens), torch.zeros(2, 256, dtype=torch.long))

        warm = count(ours(objective, reference))
        plain = count(ours(sft(Context(None, 0)), {}))
        theirs = count(torchtune())
        model, frozen = network(), network().requires_grad_(False)
        published = count(lambda: published_loss(model, frozen, rows, [1, 2, 3], ids, weights, 1.0, 0, pad_to=256))
    assert warm <= plain
    assert warm <= 0.95 * theirs
    assert published >= 1.84 * warm
    assert warm == pytest.approx(expected, rel=0.002)
