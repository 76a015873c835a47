"""Every kind of transformers model: loss and gradient as of a plain implementation with all logits."""

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from pact_tune.batching import collate
from pact_tune.conversations import Conversation
from pact_tune.errors import UserError
from pact_tune.hf.decoder import HFDecoder
from pact_tune.losses import PACTConfig, pact_loss
from pact_tune.objectives.base import Objective
from pact_tune.reference.readings import Columns

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"sliding_window": 8}
ARCHITECTURES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen3_moe": MOE,
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, **WINDOW},
    "gemma3_text": WINDOW,
    "mistral": WINDOW,
    "phi3": {},
    "olmo2": {},
    "cohere2": {"logit_scale": 0.25, **WINDOW},
    "granite": {"logits_scaling": 3.0},
    "smollm3": {},
    "llama4_text": {"intermediate_size_mlp": 32, "num_local_experts": 2, "attention_chunk_size": 8, "head_dim": 8},
}
IDS = torch.tensor([3, 5, 11, 20])
WEIGHTS = torch.ones(4)
CONFIGS = {"paper": PACTConfig.preset("paper", weighting="uniform"), "tail": PACTConfig.preset("tail")}


def tiny(architecture: str, **settings) -> tf.PreTrainedModel:
    config = tf.AutoConfig.for_model(architecture, **SIZES | ARCHITECTURES[architecture] | settings)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config)


def with_adapter(model: tf.PreTrainedModel, **settings):
    """LoRA on every projection of the attention, B not zero."""
    targets = [
        name
        for name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
        if any(name in n for n, _ in model.named_modules())
    ]
    peft = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **settings)
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return peft


def conversations() -> list[Conversation]:
    generator = torch.Generator().manual_seed(2)
    rows = []
    for length, spans in ((14, [(5, 9), (11, 14)]), (9, [(3, 9)]), (12, [(4, 12)])):
        rows.append(Conversation(torch.randint(1, 97, (length,), generator=generator).tolist(), spans))
    return rows


def objective(config: PACTConfig) -> Objective:
    def terms(chunk):
        kl = pact_loss(chunk.student, chunk.reference["full"], chunk.reference["full"], chunk.position, WEIGHTS, config)
        return {"ce": chunk.ce, "kl": (kl.per_token * chunk.weight).sum()}

    return Objective({}, terms, {"ce": 1.0, "kl": 3.0}, reading=Columns(IDS, config.tail), views=("full",))


def naive(model, rows, config: PACTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """CE and KL row by row, from all logits of the model's own forward."""
    ce, kl = torch.zeros(()), torch.zeros(())
    for row in rows:
        tokens = torch.tensor([row.tokens])
        logits = model(input_ids=tokens).logits[0].float()
        with torch.no_grad(), model.disable_adapter():
            reference = model(input_ids=tokens).logits[0].float()
        for start, end in row.responses:
            here = slice(start - 1, end - 1)
            ce = ce + torch.nn.functional.cross_entropy(logits[here], tokens[0, start:end], reduction="sum")
            columns = [columns_of(z[here], config.tail) for z in (logits, reference)]
            kl = kl + pact_loss(columns[0], columns[1], columns[1], torch.arange(end - start), WEIGHTS, config).sum
    return ce, kl


def columns_of(logits: torch.Tensor, tail: bool) -> torch.Tensor:
    safety = logits[:, IDS]
    if not tail:
        return safety
    others = torch.ones(logits.shape[1], dtype=torch.bool).index_fill(0, IDS, False)
    return torch.cat([safety, logits[:, others].logsumexp(-1, keepdim=True)], dim=1)


def loss_and_gradients(model, rows, config, packed=False):
    decoder = HFDecoder(model, 0, torch.device("cpu"))
    decoder.check_head()
    batch = collate(rows, 0, packed)
    reference = {"full": decoder.read_reference(rows, Columns(IDS, config.tail))}
    loss, terms = decoder.loss(batch, objective(config), reference, 0.1)
    return loss, terms, torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradient_are_those_of_all_logits(architecture, preset):
    config, rows = CONFIGS[preset], conversations()
    model = with_adapter(tiny(architecture))
    ce, kl = naive(model, rows, config)
    expected = torch.autograd.grad(0.1 * (ce + 3 * kl), [p for p in model.parameters() if p.requires_grad])
    for packed in (False, True):
        loss, terms, gradients = loss_and_gradients(model, rows, config, packed)
        assert terms.tolist() == pytest.approx([ce.item(), kl.item()], rel=1e-4)
        assert kl > 1e-3
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_itself_is_trained_in_full_fine_tuning(tied):
    model = tiny("llama", tie_word_embeddings=tied)
    rows = conversations()
    decoder = HFDecoder(model, 0, torch.device("cpu"))
    loss, _ = decoder.loss(collate(rows, 0), Objective({}, lambda c: {"ce": c.ce}, {"ce": 1.0}), {}, 1.0)
    expected = sum(
        torch.nn.functional.cross_entropy(
            model(input_ids=torch.tensor([row.tokens])).logits[0, start - 1 : end - 1],
            torch.tensor(row.tokens[start:end]),
            reduction="sum",
        )
        for row in rows
        for start, end in row.responses
    )
    head = model.get_output_embeddings().weight
    torch.testing.assert_close(
        torch.autograd.grad(loss, head), torch.autograd.grad(expected, head), rtol=1e-3, atol=1e-4
    )


def test_an_adapter_on_the_head_is_trained_and_the_reference_lacks_it():
    model = with_head_adapter(tiny("llama"))
    config, rows = CONFIGS["paper"], conversations()
    ce, kl = naive(model, rows, config)
    expected = torch.autograd.grad(0.1 * (ce + 3 * kl), [p for p in model.parameters() if p.requires_grad])
    _, terms, gradients = loss_and_gradients(model, rows, config)
    assert terms.tolist() == pytest.approx([ce.item(), kl.item()], rel=1e-4)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def with_head_adapter(model):
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return peft


def test_the_reference_is_the_same_whatever_is_stochastic_and_leaves_training_as_it_was():
    model = with_adapter(tiny("llama", attention_dropout=0.5), lora_dropout=0.5)
    model.train()
    decoder = HFDecoder(model, 0, torch.device("cpu"))
    rows, reading = conversations(), Columns(IDS, True)
    first = decoder.read_reference(rows, reading)
    assert torch.equal(first, decoder.read_reference(rows, reading))
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    with model.disable_adapter():
        model.eval()
        logits = model(input_ids=torch.tensor([rows[1].tokens])).logits[0, 2:8]
    torch.testing.assert_close(first[7:13], columns_of(logits, True), rtol=1e-4, atol=1e-4)


def test_a_reference_may_have_an_adapter_of_its_own():
    model = with_adapter(tiny("llama"))
    rows, reading = conversations()[1:2], Columns(IDS, False)
    start = model(input_ids=torch.tensor([rows[0].tokens])).logits[0, 2:8, IDS]
    model.add_adapter("start", model.peft_config["default"])
    parameters = dict(model.named_parameters())
    for name in (name for name in parameters if ".start." in name):
        trained = parameters[name.replace(".start.", ".default.")]
        parameters[name].data = trained.data.clone()
        trained.data += 0.1
    decoder = HFDecoder(model, 0, torch.device("cpu"), reference_adapter="start")
    torch.testing.assert_close(decoder.read_reference(rows, reading), start, rtol=1e-4, atol=1e-4)
    assert model.active_adapter == "default"


def test_a_head_that_is_not_reproduced_is_refused_by_name():
    model = tiny("granite")
    decoder = HFDecoder(model, 0, torch.device("cpu"))
    decoder.head.scale = 1.0
    with pytest.raises(UserError, match="GraniteForCausalLM"):
        decoder.check_head()


NOT_PACKED = {  # attention without a look at positions, ALiBi, recurrent layers
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **WINDOW},
    "bloom": {},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "falcon_mamba": {"state_size": 8},
}


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES | NOT_PACKED))
def test_an_architecture_that_does_not_keep_packed_rows_apart_is_refused(architecture):
    """The check agrees with the numbers: packed rows are read as they are alone, or refused."""
    settings = SIZES | ARCHITECTURES.get(architecture, NOT_PACKED.get(architecture))
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(architecture, **settings)).eval()
    decoder, rows = HFDecoder(model, 0, torch.device("cpu")), rows_that_begin_alike()
    decoder.check_rows(packed=False)

    def read(rows: list[Conversation], packed: bool) -> torch.Tensor:
        with torch.no_grad():
            return decoder.run(collate(rows, 0, packed), lambda hidden, head: hidden)

    alone = torch.cat([read([row], False) for row in rows])
    torch.testing.assert_close(read(rows, False), alone, rtol=1e-4, atol=1e-4)
    if architecture in NOT_PACKED:
        assert (read(rows, True) - alone).abs().max() > 1e-3
        with pytest.raises(
            UserError, match=f"{type(model).__name__} does not keep packed rows apart: train it without packing"
        ):
            decoder.check_rows(packed=True)
    else:
        torch.testing.assert_close(read(rows, True), alone, rtol=1e-4, atol=1e-4)
        decoder.check_rows(packed=True)


def test_a_model_that_looks_ahead_is_refused():
    model = tf.BertGenerationDecoder(tf.BertGenerationConfig(**SIZES))
    decoder = HFDecoder(model, 0, torch.device("cpu"))
    for packed in (False, True):
        with pytest.raises(UserError, match="In BertGenerationDecoder a token sees those behind it"):
            decoder.check_rows(packed)
    decoder = HFDecoder(
        tf.BertGenerationDecoder(tf.BertGenerationConfig(**SIZES, is_decoder=True)), 0, torch.device("cpu")
    )
    decoder.check_rows(packed=False)


BEGINNING = [11, 12, 13, 14]


def rows_that_begin_alike() -> list[Conversation]:
    """Seven to eight tokens each: as long as the windows of the architectures above."""
    rests = ([20, 21, 22, 23], [30, 31, 32], [20, 41, 42, 43])
    return [Conversation(BEGINNING + rest, [(5, 4 + len(rest))]) for rest in rests]


def computed(model, decoder, rows) -> tuple[torch.Tensor, int]:
    """A reading of one batch, and how many tokens went through the network for it."""
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel()))
    reading = decoder.read_reference(rows, Columns(IDS, True))
    hook.remove()
    return reading, sum(seen)


# ALiBi; an attention of its own that says it is "sdpa"; eager attention, which Gemma 2's caps need; recurrent layers beside attention
# that says it is "sdpa".
NOT_SHARED = {
    "bloom": {},
    "falcon": {"head_dim": None},
    "gemma2": ARCHITECTURES["gemma2"],
    "recurrent_gemma": {},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
}


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES | NOT_SHARED))
def test_rows_behind_a_shared_prefix_are_computed_as_if_alone(architecture):
    settings = SIZES | ARCHITECTURES.get(architecture, NOT_SHARED.get(architecture))
    settings = {key: value for key, value in settings.items() if value is not None}
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(architecture, **settings)).eval()
    decoder = HFDecoder(model, 0, torch.device("cpu"))
    decoder.find_longest_shared()
    rows = rows_that_begin_alike()
    alone = torch.cat([decoder.read_reference([row], Columns(IDS, True)) for row in rows])
    together, tokens = computed(model, decoder, rows)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert tokens == (21 if architecture in NOT_SHARED else 4 + 3 + 2 + 3)
    if architecture not in NOT_SHARED:
        longer = [Conversation(row.tokens[:4] + [9] * 60 + row.tokens[4:], [(66, 67)]) for row in rows]
        assert computed(model, decoder, longer)[1] == 3 * 67  # beyond the window or the longest position


def test_sharing_leaves_the_model_as_it_was():
    model = with_adapter(tiny("llama"))
    model.base_model.model.config._attn_implementation = "sdpa"
    rows = rows_that_begin_alike()
    before = model(input_ids=torch.tensor([rows[0].tokens])).logits
    decoder = HFDecoder(model, 0, torch.device("cpu"))
    decoder.find_longest_shared()
    _, tokens = computed(model, decoder, rows)
    assert tokens == 12
    assert torch.equal(model(input_ids=torch.tensor([rows[0].tokens])).logits, before)
    assert model.base_model.model.config._attn_implementation == "sdpa"
