"""Evaluate a demo model: attack success, task accuracy, over-refusal and distance from the aligned model."""

import json
import pathlib

import torch

from pact_tune import generation, scoring
from pact_tune.conversations import load_tokenizer, render_prompt
from pact_tune.demo import generator, judge

MAX_NEW_TOKENS = 48  # the longest well-formed answer has fewer tokens
FIRST_POSITIONS = 8


def load_model(folder):
    """Load a Hugging Face folder as (model, tokenizer); the weights are computed with in float32."""
    return generation.load_model(folder, "cpu"), load_tokenizer(folder)


def encode_prompts(tokenizer, prompts):
    """Render user texts with the chat template, up to and with the assistant header; a list of int lists."""
    return [render_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]


def generate(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS):
    """Answer prompts greedily.

    Args:
        model: causal language model.
        tokenizer: its tokenizer.
        prompts: user texts.
        max_new_tokens: limit a response, in tokens.

    Returns:
        one int list a prompt: the response's tokens, the end-of-turn token included where the model produced it.
    """
    config = generation.generation_config([tokenizer.eos_token_id], tokenizer.pad_token_id, max_new_tokens)
    return generation.generate_all(model, encode_prompts(tokenizer, prompts), config)


def decode(tokenizer, response):
    """Return (text without the end-of-turn token, whether the response has one)."""
    return generation.decode(tokenizer, response, [tokenizer.eos_token_id])


def mean_kl(aligned, model, prompts, responses):
    """Return the mean KL(aligned || model) in nats over all response positions and the full vocabulary."""
    compared = scoring.compare(aligned, model, list(zip(prompts, responses, strict=True)))
    return scoring.mean_by_range([row.kl for row in compared])["all"]


def safety_probability(model, prompts, responses, safety_ids):
    """Return the mean probability of all safety tokens together at each of the first response positions.

    The prefixes are the given responses, so that the figures of different models are about the same contexts.
    """
    columns = torch.as_tensor(safety_ids)
    total, count = torch.zeros(FIRST_POSITIONS), torch.zeros(FIRST_POSITIONS)
    for logprobs in scoring.response_logprobs(model, list(zip(prompts, responses, strict=True))):
        mass = logprobs[:FIRST_POSITIONS, columns].exp().sum(-1)
        total[: len(mass)] += mass
        count[: len(mass)] += 1
    return (total / count).tolist()


def read_prompts(data_dir, name):
    """Return the user texts of `<name>.jsonl`."""
    lines = (pathlib.Path(data_dir) / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def read_chats(data_dir, name):
    """Return (user texts, assistant texts) of `<name>.jsonl`."""
    lines = (pathlib.Path(data_dir) / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [generator.request_of(row) for row in rows], [generator.answer_of(row) for row in rows]


def percent(flags):
    """Return the share of true values in percent."""
    flags = list(flags)
    return 100.0 * sum(flags) / len(flags)


def evaluate(model_dir, aligned_dir, data_dir, safety_ids=None):
    """Evaluate one model folder on the data that `write_demo_data` wrote.

    Args:
        model_dir: Hugging Face folder of the model under test.
        aligned_dir: folder of the aligned model that it was made from; same tokenizer.
        data_dir: folder with the evaluation sets.
        safety_ids: token ids of the safety tokens, or None.

    Returns:
        dict with, in percent, `asr` (harmful requests not answered with a well-formed refusal), `garbled` (harmful
        requests answered with neither a well-formed refusal nor a well-formed answer; part of `asr`), `accuracy` (task
        answers equal to the label), `over_refusal` (benign requests whose answer has a refusal keyword); `kl`, the
        mean KL(aligned || model) in nats at the response positions of the aligned model's own greedy answers to the
        harmful and the benign requests; and, with `safety_ids`, `safety_probability`: the mean probability of the
        safety tokens together at each of the first 8 response positions of those answers to harmful requests.
    """
    model, tokenizer = load_model(model_dir)
    aligned, _ = load_model(aligned_dir)
    harmful, benign = read_prompts(data_dir, "eval_harmful"), read_prompts(data_dir, "eval_benign")
    task, labels = read_chats(data_dir, "eval_task")

    answers = [decode(tokenizer, r) for r in generate(model, tokenizer, harmful + benign)]
    verdicts = [judge.classify(text, ended) for text, ended in answers[: len(harmful)]]
    task_answers = [decode(tokenizer, r)[0] for r in generate(model, tokenizer, task, max_new_tokens=8)]

    prompts = encode_prompts(tokenizer, harmful + benign)
    references = generate(aligned, tokenizer, harmful + benign)
    result = {
        "asr": percent(verdict != "refusal" for verdict in verdicts),
        "garbled": percent(verdict == "garbled" for verdict in verdicts),
        "accuracy": percent(answer == label for answer, label in zip(task_answers, labels, strict=True)),
        "over_refusal": percent(judge.mentions_refusal(text) for text, _ in answers[len(harmful) :]),
        "kl": mean_kl(aligned, model, prompts, references),
    }
    if safety_ids is not None:
        result["safety_probability"] = safety_probability(
            model, prompts[: len(harmful)], references[: len(harmful)], safety_ids
        )
    return result
