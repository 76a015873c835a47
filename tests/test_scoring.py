"""Answers and teacher-forced scores: equal to one prompt, and to one whole forward, at a time."""

import pytest
import tiny
import torch

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
