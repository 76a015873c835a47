"""Rows that share a prefix: how they are grouped, and that each is computed as if it stood alone."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from pact_tune import prefixes
from pact_tune.batching import collate, shareable
from pact_tune.conversations import Conversation
from pact_tune.prefixes import SharedPrefix, common_length, group_by_prefix, shared_length
from pact_tune.reference import cache


def saved(groups: list[list[int]], prompts: list[list[int]]) -> int:
    """Tokens that a grouping saves, less what its forwards cost; the rows that share nothing take none more."""
    total = 0
    for group in groups:
        columns = zip(*(prompts[i] for i in group), strict=False)
        prefix = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns)))
        total += max(0, prefix * (len(group) - 1) - prefixes.FORWARD_TOKENS)
    return total


def partitions(rows: list[int]):
    """All ways to group some rows."""
    if not rows:
        yield []
        return
    first, *rest = rows
    for groups in partitions(rest):
        yield [[first], *groups]
        for i, group in enumerate(groups):
            yield [*groups[:i], [first, *group], *groups[i + 1 :]]


@pytest.mark.parametrize("forward", [0, 5])
def test_groups_save_nearly_what_the_best_of_all_partitions_does(monkeypatch, forward):
    monkeypatch.setattr(prefixes, "FORWARD_TOKENS", forward)
    rng = random.Random(forward)
    found = best = 0
    for _ in range(60):
        prompts = [[token for _ in range(rng.randrange(9)) for token in [rng.randrange(2)] * 8] for _ in range(6)]
        groups = group_by_prefix(prompts)
        assert sorted(itertools.chain(*groups)) == list(range(6))
        found += saved(groups, prompts)
        best += max(saved(groups, prompts) for groups in partitions(list(range(6))))
    assert 0.95 * best <= found <= best


def test_rows_of_several_kinds_are_told_apart():
    """Two tasks below one system message, one of them twice nested, and rows that share nothing."""
    rng = random.Random(0)

    def tail() -> list[int]:
        return [rng.randrange(1000, 10**9) for _ in range(5)]

    system = list(range(20))
    one, two = system + list(range(100, 160)), system + list(range(200, 240))
    kinds = [one + tail() for _ in range(40)] + [two + tail() for _ in range(30)] + [system + tail() for _ in range(50)]
    kinds += [tail() for _ in range(3)]
    order = rng.sample(range(123), 123)
    groups = group_by_prefix([kinds[i] for i in order])
    found = sorted(sorted(order[i] for i in group) for group in groups)
    assert found == [list(range(40)), list(range(40, 70)), list(range(70, 120)), list(range(120, 123))]
    assert group_by_prefix([]) == [] and group_by_prefix([[], []]) == [[0, 1]]


def test_a_prefix_is_shared_where_it_pays():
    long, short = list(range(50)), [1]
    assert shared_length([long + [1], long + [2], long + [2, 3]], 170) == 50
    assert shared_length([short + [1], short + [2]], 200) == 0
    assert shared_length([long], 51) == 0 == shared_length([], 0)
    assert common_length([1, 2, 3], [1, 2]) == 2 == common_length([1, 2, 3], [1, 2, 4, 5])


@pytest.mark.parametrize("rests", [[3, 1, 2], [4, 4], [1]])
def test_attention_is_that_of_each_row_alone(rests):
    generator = torch.Generator().manual_seed(0)
    prefix, size = 5, sum(rests) + 5
    states = [torch.randn(1, 2, size, 4, generator=generator) for _ in range(3)]

    def attend(query, key, value, mask):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)

    found = SharedPrefix.of(prefix, rests).attention(attend, *states)
    start = prefix
    for rest in rests:
        places = [*range(prefix), *range(start, start + rest)]
        alone = attend(*(state[:, :, places] for state in states), None)
        torch.testing.assert_close(found[:, :, places], alone)
        start += rest


def test_packed_rows_are_those_of_a_padded_batch():
    """Tokens, positions, and which hidden state predicts which token, behind a prefix as side by side."""
    rng = random.Random(1)
    beginning = [7, 8, 9]
    rows = []
    for length in (4, 2, 7):
        tokens = beginning + [rng.randrange(10, 99) for _ in range(length)]
        rows.append(Conversation(tokens, [(4, 5), (len(tokens) - 1, len(tokens))] if length > 2 else [(4, 5)]))
    prefix = shared_length([shareable(row) for row in rows], 22)
    assert prefix == 3
    behind, beside = collate(rows, 0, prefix=prefix), collate(rows, 0)
    assert behind.tokens.shape == (1, 3 + sum(len(row.tokens) - 4 for row in rows))
    assert behind.tokens.flatten()[behind.index].tolist() == beside.tokens.flatten()[beside.index].tolist()
    positions = torch.arange(beside.tokens.shape[1]).repeat(3)[beside.index]
    assert behind.input_pos.flatten()[behind.index].tolist() == positions.tolist()
    for name in ("labels", "position", "row", "ce_weight", "weight"):
        assert torch.equal(getattr(behind, name), getattr(beside, name))


def test_batches_hold_every_row_once_and_stay_small():
    rng = random.Random(2)
    instruction = list(range(40))
    rows = []
    for number in range(400):
        prompt = (instruction if number % 4 else []) + [rng.randrange(100, 10**6) for _ in range(rng.randrange(5, 60))]
        rows.append(Conversation([*prompt, number], [(len(prompt), len(prompt) + 1)]))
    batches = cache.batches_of(rows)
    assert sorted(c.tokens for batch in batches for c in batch) == sorted(c.tokens for c in rows)
    lengths = [[len(c.tokens) for c in batch] for batch in batches]
    assert all(max(batch) * len(batch) <= cache.BATCH_TOKENS and min(batch) >= 0.9 * max(batch) for batch in lengths)
    assert all(len({c.tokens[0] == 0 for c in batch}) == 1 for batch in batches)
