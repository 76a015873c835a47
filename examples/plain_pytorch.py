"""PACT in a plain PyTorch loop: transformers, an optimizer, and pact-tune's core; no trainer.

    python examples/plain_pytorch.py --lambda-kl 3            # and once with --lambda-kl 0, which is plain fine-tuning

It takes the demo model of the package, so nothing is downloaded, and half a minute on two CPU cores. What it does is all
that any trainer has to do:

1. safety tokens: which tokens carry the refusal, chosen once for a model;
2. conversations: rows rendered with the model's own chat template, and where their responses stand;
3. the reference: of the frozen model K + 1 numbers at every response position (the logits of K safety tokens, and the
   log-sum-exp of all others, the tail), read once, before the first step; the frozen model is then not needed any more;
4. the loss: cross-entropy + lambda * KL between those numbers and the same ones of the model in training.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pact_tune import PACTConfig, SafetyTokens, load_tokenizer, pact_loss
from pact_tune.batching import Batch, collate
from pact_tune.conversations import Conversation, Message, render, render_prompt
from pact_tune.demo import demo_data, demo_family_path
from pact_tune.demo.judge import classify
from pact_tune.generation import decode, end_tokens, generate_all, generation_config
from pact_tune.head import read_logits

K = 12  # safety tokens; 50 in the paper, few here, where the vocabulary has 800 tokens
CONFIG = PACTConfig.preset("tail", k=K)  # uniform weights, no response-only view: see docs/method.md


def response_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits at the positions that predict a response token, ``[T, V]`` float32."""
    logits = model(batch.tokens).logits  # padding stands on the right, so a causal model needs no mask
    return logits.flatten(0, 1).index_select(0, batch.index).float()


def read(model: PreTrainedModel, batch: Batch, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the labels ``[T]``, and the columns that PACT compares ``[T, K+1]``; differentiable."""
    label_logprobs, (safety, tail) = read_logits(response_logits(model, batch), batch.labels, ids)
    return label_logprobs, torch.cat([safety, tail], dim=1)


@torch.no_grad()
def read_reference(
    model: PreTrainedModel, rows: Sequence[Conversation], ids: torch.Tensor, pad_id: int
) -> list[torch.Tensor]:
    """The frozen model's columns of each row, ``[T_row, K+1]``: call it before the first step changes the model."""
    columns: list[torch.Tensor] = []
    for start in range(0, len(rows), 50):
        some = rows[start : start + 50]
        columns += read(model, collate(some, pad_id), ids)[1].split([row.num_response_tokens for row in some])
    return columns


def train(
    model: PreTrainedModel,
    rows: Sequence[Conversation],
    reference: Sequence[torch.Tensor],
    safety_tokens: SafetyTokens,
    pad_id: int,
    *,
    lambda_kl: float,
    steps: int,
    batch_size: int = 10,
    lr: float = 5e-4,
    seed: int = 0,
) -> dict[str, float]:
    """Full fine-tuning of ``model`` in place.

    Args:
        model (PreTrainedModel): the aligned model.
        rows (Sequence[Conversation]): to train on.
        reference (Sequence[torch.Tensor]): what :func:`read_reference` gave for each of them.
        safety_tokens (SafetyTokens): S.
        pad_id (int): id to pad with.
        lambda_kl (float): weight of the constraint.
        steps (int): optimiser steps.
        batch_size (int): rows a step.
        lr (float): of AdamW; falls to 0.
        seed (int): of the order.

    Returns:
        dict[str, float]: "ce" and "kl" of the last step, nats a response token.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    order = random.Random(seed)
    last = {}
    for step in range(1, steps + 1):
        numbers = order.sample(range(len(rows)), batch_size)
        batch = collate([rows[i] for i in numbers], pad_id)
        label_logprobs, student = read(model, batch, safety_tokens.ids)
        frozen = torch.cat([reference[i] for i in numbers])  # in the order in which collate lays positions
        kl = pact_loss(student, frozen, None, batch.position, safety_tokens.weights, CONFIG)
        loss = (lambda_kl * kl.sum - label_logprobs.sum()) / len(batch.labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        last = {"ce": -label_logprobs.mean().item(), "kl": kl.per_token.mean().item()}
        if step % 50 == 0 or step == steps:
            print(f"step {step:>4}: cross-entropy {last['ce']:.3f}, KL {last['kl']:.4f}")
    return last


def attack_success(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[str]) -> float:
    """Share of harmful requests that are answered with anything but a refusal."""
    chats: list[list[Message]] = [[{"role": "user", "content": request}] for request in requests]
    ends = end_tokens(model, tokenizer)
    prompts = [render_prompt(tokenizer, chat) for chat in chats]
    answers = generate_all(model, prompts, generation_config(ends, tokenizer.pad_token_id, max_new_tokens=48))
    texts = [decode(tokenizer, answer, ends) for answer in answers]
    return sum(classify(text, ended) != "refusal" for text, ended in texts) / len(texts)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains, and compares the refusals of before and after.

    Args:
        argv (list[str] | None): arguments; default: those of the process.

    Returns:
        dict[str, float]: what was measured.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lambda-kl", type=float, default=3.0, help="weight of the constraint; 0 is plain fine-tuning")
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps of 10 rows")
    parser.add_argument("--requests", type=int, default=50, help="held-out harmful requests to ask")
    parser.add_argument("--output", type=Path, help="folder for the trained model, in Hugging Face format")
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    family, data = demo_family_path(), demo_data(seed=0)
    tokenizer = load_tokenizer(str(family / "aligned"))
    model = AutoModelForCausalLM.from_pretrained(family / "aligned", dtype=torch.float32).eval()
    safety_tokens = SafetyTokens.load(str(family / "safety_tokens")).select(K, CONFIG.ranking, CONFIG.weighting)
    print("Safety tokens:", *map(repr, safety_tokens.tokens))

    rows = [render(tokenizer, row["messages"]) for row in data["task"] + data["harmful"]]
    reference = read_reference(model, rows, safety_tokens.ids, tokenizer.pad_token_id)
    requests = [row["prompt"] for row in data["eval_harmful"][: args.requests]]
    before = attack_success(model, tokenizer, requests)
    last = train(
        model, rows, reference, safety_tokens, tokenizer.pad_token_id, lambda_kl=args.lambda_kl, steps=args.steps
    )
    after = attack_success(model, tokenizer, requests)
    print(f"Harmful requests answered: {before:.0%} before, {after:.0%} after {args.steps} steps.")
    if args.output is not None:
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
        print(f"Saved {args.output}")
    return {"before": before, "after": after, **last}


if __name__ == "__main__":
    main()
