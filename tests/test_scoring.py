"""Answers and teacher-forced scores: equal to one prompt, and to one whole forward, at a time."""

import pytest
import tiny
import torch
import transformers as tf
from test_hf_decoder import ARCHITECTURES, SIZES

from pact_tune import generation, scoring
from pact_tune.conversations import load_tokenizer, render_prompt
from pact_tune.errors import UserError


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two tiny models, their tokenizer, and prompts with responses of unlike lengths."""
    folder = tmp_path_factory.mktemp("scoring")
    models = [generation.load_model(tiny.tiny_model(folder / str(seed), seed=seed), "cpu") for seed in (1, 2)]
    tokenizer = load_tokenizer(str(folder / "1"))
    texts = ["How do I paint the fence?", "What is 7?", "Is this review positive or negative? What a dull plot."]
    prompts = [render_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    responses = [
        tokenizer(text)["input_ids"] for text in ("Sure, here is how.", "16", "negative, and dull in all ways")
    ]
    return models, tokenizer, list(zip(prompts, responses, strict=True))


@torch.inference_mode()
def whole(model, prompt, response):
    logits = model(torch.tensor([prompt + response])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def test_batches_and_chunks_change_no_score(pair, monkeypatch):
    (model, other), _, pairs = pair
    monkeypatch.setitem(scoring.CHUNK_BYTES, "cpu", 4_000)  # two positions a chunk
    for tokens_per_batch in (8, 64, 4096):
        rows = list(scoring.response_logprobs(model, pairs, tokens_per_batch))
        labels = scoring.token_logprobs(model, pairs, tokens_per_batch)
        compared = scoring.compare(model, other, pairs, [5, 7], tokens_per_batch)
        for row, label, distance, (prompt, response) in zip(rows, labels, compared, pairs, strict=True):
            p, q = whole(model, prompt, response), whole(other, prompt, response)
            torch.testing.assert_close(row, p, rtol=0, atol=2e-5)
            torch.testing.assert_close(label, p[range(len(response)), response], rtol=0, atol=2e-5)
            torch.testing.assert_close(distance.loss, -q[range(len(response)), response], rtol=0, atol=2e-5)
            torch.testing.assert_close(distance.mass, q[:, [5, 7]].exp().sum(-1), rtol=0, atol=2e-5)
            torch.testing.assert_close(distance.kl, (p.exp() * (p - q)).sum(-1), rtol=0, atol=2e-4)


INSTRUCTIONS = [list(range(20, 40)), list(range(50, 75))]
# How many tokens the first instruction's rows take: less than 24 + 23 + 24 where a model may share. Gemma 2's caps need
# eager attention, and Mistral's window is shorter than these rows; OPT's head does not call what it calls its base model.
TOKENS = {"llama": 31, "qwen2": 31, "gemma3_text": 31, "llama4_text": 31, "opt": 31, "gemma2": 72, "mistral": 72}


@pytest.mark.parametrize("architecture", sorted(TOKENS))
def test_what_prompts_begin_with_is_computed_once_and_changes_no_score(architecture):
    settings = {**SIZES, **ARCHITECTURES.get(architecture, {"ffn_dim": 48, "word_embed_proj_dim": 32})}
    settings |= {"gemma3_text": {"sliding_window": 64}, "llama4_text": {"attention_chunk_size": 64}}.get(
        architecture, {}
    )
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(architecture, **settings)).eval()
    rests = [([3, 4], [5, 6, 7]), ([3], [5, 6, 7]), ([8, 9, 10], [11, 12])]
    pairs = [(instruction + prompt, response) for instruction in INSTRUCTIONS for prompt, response in rests]
    expected = [whole(model, *pair) for pair in pairs]
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel()))
    list(scoring.response_logprobs(model, pairs[:3]))
    seen.clear()  # of the few tokens that told whether this model may; they are computed once a model
    found = list(scoring.response_logprobs(model, pairs[:3]))
    assert seen == [TOKENS[architecture]]
    found += scoring.response_logprobs(model, pairs[3:])
    labels = scoring.token_logprobs(model, pairs, 80)
    for row, label, whole_row, (_, response) in zip(found, labels, expected, pairs, strict=True):
        torch.testing.assert_close(row, whole_row, rtol=0, atol=2e-5)
        torch.testing.assert_close(label, whole_row[range(len(response)), response], rtol=0, atol=2e-5)
    assert all(torch.equal(whole(model, *pair), logprobs) for pair, logprobs in zip(pairs, expected, strict=True))


def test_pairs_that_begin_alike_share_a_batch():
    pairs = [(instruction[:20] + [i], [1, 2]) for i in range(20) for instruction in INSTRUCTIONS]
    batches = scoring.batches_of(pairs, 400)
    assert sorted(sum(batches, [])) == list(range(40)) and len(batches) == 4
    assert all(len({i % 2 for i in batch}) == 1 for batch in batches)


def test_means_by_range():
    means = scoring.mean_by_range([torch.arange(10.0), torch.tensor([4.0, 1.0])])
    assert means == {"0": 2.0, "1-7": pytest.approx(29 / 8), "8+": 8.5, "all": pytest.approx(50 / 12)}
    assert scoring.mean_by_range([torch.tensor([3.0])]) == {"0": 3.0, "all": 3.0}


def test_answers_of_a_batch_equal_answers_alone_and_end_at_the_end_token(pair):
    (model, _), tokenizer, pairs = pair
    prompts = [prompt for prompt, _ in pairs]
    free = generation.generation_config([10**6], tokenizer.pad_token_id, 12)
    answers = generation.generate_all(model, prompts, free, tokens_per_batch=10_000)
    assert answers == [generation.generate(model, [prompt], free)[0] for prompt in prompts]
    assert all(len(answer) == 12 for answer in answers)
    end = answers[0][5]
    cut = generation.generate_all(model, prompts, generation.generation_config([end], tokenizer.pad_token_id, 12))
    assert cut == [generation.up_to_end(answer, {end}) for answer in answers] and len(cut[0]) <= 6
    assert generation.decode(tokenizer, cut[0], [end]) == (tokenizer.decode(cut[0][:-1]), True)
    assert generation.decode(tokenizer, [], [end]) == ("", False)


def test_a_seed_leaves_the_global_random_state_alone(pair):
    (model, _), tokenizer, pairs = pair
    config = generation.generation_config([10**6], tokenizer.pad_token_id, 8, temperature=1.0)
    state = torch.get_rng_state()
    first, again = (generation.generate(model, [pairs[0][0]], config, seed=3) for _ in range(2))
    assert first == again != generation.generate(model, [pairs[0][0]], config, seed=4)
    assert torch.equal(state, torch.get_rng_state())


def test_a_folder_without_a_model_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="could not be loaded"):
        generation.load_model(tmp_path, "cpu")
