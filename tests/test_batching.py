"""Batches against naive loops over conversations, and the order of rows."""

import random

import pytest
import torch

from pact_tune.batching import collate, rank_rows, response_only_views
from pact_tune.conversations import Conversation
from pact_tune.schedule import epoch_order, group_by_length

PAD = 999


def random_conversation(rng: random.Random, turns: int) -> Conversation:
    """Turns of 1 to 6 prompt tokens and 1 to 6 response tokens, and the odd token between turns; all ids differ."""
    tokens, responses = [], []
    ids = iter(rng.sample(range(1, 900), 200))
    for turn in range(turns):
        tokens += [next(ids) for _ in range(rng.randint(1, 6))]
        start = len(tokens)
        tokens += [next(ids) for _ in range(rng.randint(1, 6))]
        responses.append((start, len(tokens)))
        if turn + 1 < turns and rng.random() < 0.5:
            tokens.append(next(ids))  # ChatML's newline after the end of turn
    return Conversation(tokens, responses)


BATCHES = {
    "one row": [[1]],
    "several turns": [[1, 3, 2]],
    "many rows": [[1, 1, 2, 5, 1], [4], [2, 2]],
}


@pytest.mark.parametrize("kind", BATCHES)
def test_collate_equals_a_naive_loop(kind):
    """Every response token once, in order, with the hidden state that predicts it and its place in its response."""
    rng = random.Random(0)
    for turns in BATCHES[kind] * 10:
        conversations = [random_conversation(rng, number) for number in turns]
        conversations = [
            Conversation(c.tokens, c.responses, ce_weight=rng.choice([0, 1, 0.5]), weight=rng.choice([0, 1, 2]))
            for c in conversations
        ]
        batch = collate(conversations, PAD)

        # A hidden state that says where it stands: [row, column]
        rows, width = batch.tokens.shape
        hidden = torch.cartesian_prod(torch.arange(rows), torch.arange(width))
        expected = []
        for row, conversation in enumerate(conversations):
            for start, end in conversation.responses:
                for t in range(end - start):
                    expected.append((row, start + t - 1, conversation.tokens[start + t], t))
        found = torch.cat([hidden[batch.index], batch.labels[:, None], batch.position[:, None]], dim=1)
        assert found.tolist() == [list(item) for item in expected]

        assert width == max(len(c.tokens) for c in conversations) - 1
        for row, conversation in enumerate(conversations):
            inputs = conversation.tokens[:-1]
            assert batch.tokens[row].tolist() == inputs + [PAD] * (width - len(inputs))
        assert [conversations[row].ce_weight for row in batch.row] == batch.ce_weight.tolist()
        assert [conversations[row].weight for row in batch.row] == batch.weight.tolist()
        assert [item[0] for item in expected] == batch.row.tolist()
        for name, tensor in vars(batch).items():
            assert tensor is None or tensor.dtype == (torch.float32 if "weight" in name else torch.int64)


def test_rows_do_not_depend_on_their_neighbours():
    """What is read of a conversation is the same in a batch of its own and beside longer ones."""
    rng = random.Random(1)
    conversations = [random_conversation(rng, 2) for _ in range(5)]
    batch = collate(conversations, PAD)
    alone = [collate([c], PAD) for c in conversations]
    for name in ("labels", "position"):
        assert torch.equal(getattr(batch, name), torch.cat([getattr(one, name) for one in alone]))
    predicting = batch.tokens.flatten()[batch.index]
    assert torch.equal(predicting, torch.cat([one.tokens.flatten()[one.index] for one in alone]))
    assert PAD not in predicting


def test_a_response_of_one_token():
    batch = collate([Conversation([5, 6, 7], [(2, 3)]), Conversation([8, 9], [(1, 2)])], PAD)
    assert batch.tokens.tolist() == [[5, 6], [8, PAD]]
    assert (batch.index.tolist(), batch.labels.tolist(), batch.position.tolist()) == ([1, 2], [7, 9], [0, 0])


def test_conversations_without_a_response_still_make_a_forward():
    """Also one of a single token, which cannot be shortened."""
    for conversations in (
        [Conversation([5], [])],
        [Conversation([5, 6], [])],
        [Conversation([5], []), Conversation([6, 7], [])],
    ):
        batch = collate(conversations, PAD)
        assert batch.tokens.shape == (len(conversations), 1) and batch.tokens[0].tolist() == [5]
        assert batch.index.numel() == batch.labels.numel() == batch.position.numel() == 0


def test_an_empty_batch_is_one_padding_token():
    """A rank without rows takes part in the forward, and reads nothing of it."""
    batch = collate([], PAD)
    assert batch.tokens.tolist() == [[PAD]]
    for tensor in (batch.index, batch.labels, batch.position):
        assert tensor.shape == (0,) and tensor.dtype == torch.int64


def test_a_batch_moves_as_a_whole():
    batch = collate([Conversation([5, 6, 7], [(1, 3)])], PAD).to(torch.device("meta"))
    assert {tensor.device.type for tensor in vars(batch).values() if tensor is not None} == {"meta"}


@pytest.mark.parametrize("kind", BATCHES)
def test_packing_reads_what_padding_reads(kind):
    """One row without padding; a token attends to the earlier ones of its own conversation, and to no others."""
    rng = random.Random(5)
    for turns in BATCHES[kind] * 5:
        conversations = [random_conversation(rng, number) for number in turns]
        padded, packed = collate(conversations, PAD), collate(conversations, PAD, packed=True)
        for name in ("labels", "position"):
            assert torch.equal(getattr(padded, name), getattr(packed, name))
        assert torch.equal(padded.tokens.flatten()[padded.index], packed.tokens.flatten()[packed.index])

        inputs = [(row, i, token) for row, c in enumerate(conversations) for i, token in enumerate(c.tokens[:-1])]
        assert packed.tokens.tolist() == [[token for _, _, token in inputs]]
        assert packed.input_pos.tolist() == [[i for _, i, _ in inputs]]
        attends = [[row == other and i >= j for other, j, _ in inputs] for row, i, _ in inputs]
        assert packed.mask.tolist() == [attends]
    assert collate([], PAD, packed=True).tokens.tolist() == [[PAD]]


# Response-only views -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [None, 1, 2, 100])
@pytest.mark.parametrize("prefix", [(901,), (901, 902, 903)])
def test_views_are_header_and_response(prefix, max_tokens):
    conversation = random_conversation(random.Random(2), 4)
    lengths = [end - start for start, end in conversation.responses]
    assert min(lengths) < 3 < max(lengths)
    views = response_only_views(conversation, prefix, max_tokens)
    assert len(views) == 4
    for view, (start, end) in zip(views, conversation.responses, strict=True):
        kept = min(end - start, max_tokens or 1000)
        assert view.tokens == [*prefix, *conversation.tokens[start : start + kept]]
        assert view.responses == [(len(prefix), len(prefix) + kept)]


def test_view_positions_line_up_with_the_whole_chats():
    """Uncut, the views of a conversation have its labels and positions, in its order."""
    rng = random.Random(3)
    conversations = [random_conversation(rng, turns) for turns in (1, 3, 2)]
    whole = collate(conversations, PAD)
    views = collate([view for c in conversations for view in response_only_views(c, (901, 902), None)], PAD)
    assert torch.equal(whole.labels, views.labels) and torch.equal(whole.position, views.position)
    first = views.tokens.flatten()[views.index[views.position == 0]]
    assert (first == 902).all()  # the header's last token predicts each first one


def test_equal_responses_have_equal_views():
    one, other = Conversation([1, 2, 7, 8], [(2, 4)]), Conversation([3, 7, 8], [(1, 3)])
    assert response_only_views(one, (901,), None) == response_only_views(other, (901,), None)


# Order ---------------------------------------------------------------------------------------------------------------


def test_an_epoch_is_a_permutation_that_seed_and_epoch_decide():
    orders = {(seed, epoch): epoch_order(100, seed, epoch, True) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    assert all(sorted(order) == list(range(100)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 9
    assert list(range(100)) not in orders.values()
    torch.manual_seed(5)  # nothing but the arguments counts
    assert epoch_order(100, 1, 2, True) == orders[1, 2]


def test_the_order_leaves_torchs_own_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    epoch_order(100, 1, 2, True)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_shuffling_the_data_sets_order_is_kept():
    assert epoch_order(7, 3, 2, False) == list(range(7))
    assert epoch_order(0, 0, 0, True) == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [0, 1, 5, 8, 16])
def test_ranks_share_the_rows_evenly(rows, world_size):
    """Each row on one rank, and no rank has two rows more than another."""
    numbers = [10 * i for i in range(rows)]
    parts = [rank_rows(numbers, rank, world_size) for rank in range(world_size)]
    assert sorted(row for part in parts for row in part) == numbers
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_neighbours_go_to_different_ranks():
    """Rows sorted by length are spread, so that no rank gets all the long ones."""
    assert [rank_rows([9, 8, 7, 6, 5], rank, 2) for rank in (0, 1)] == [[9, 7, 5], [8, 6]]


_rng = random.Random(4)
LENGTHS = [_rng.randint(5, 400) for _ in range(1003)]


def padding(order: list[int], rows_per_step: int) -> int:
    steps = [order[i : i + rows_per_step] for i in range(0, len(order), rows_per_step)]
    return sum(max(LENGTHS[row] for row in step) - LENGTHS[row] for step in steps for row in step)


@pytest.mark.parametrize("rows", [0, 3, 8, 9, 400, 401, 1003])
def test_grouping_by_length_only_permutes(rows):
    """Full steps come first, and a last one that is not full keeps its rows."""
    order = epoch_order(rows, 0, 0, True)
    grouped = group_by_length(order, LENGTHS, 8, 0, 0)
    assert sorted(grouped) == list(range(rows))
    rest = rows % 8
    assert grouped[rows - rest :] == order[rows - rest :]
    assert grouped == group_by_length(order, LENGTHS, 8, 0, 0)


def test_grouping_by_length_pads_little_and_shuffles_the_steps():
    order = epoch_order(1003, 0, 0, True)
    grouped = group_by_length(order, LENGTHS, 8, 0, 0)
    assert padding(grouped, 8) < 0.15 * padding(order, 8)
    longest = [max(LENGTHS[row] for row in grouped[i : i + 8]) for i in range(0, 1000, 8)]
    assert longest != sorted(longest) and longest[:50] != sorted(longest[:50])
    early, late = sum(longest[:50]) / 50, sum(longest[-50:]) / 50
    assert abs(early - late) < 60  # no drift from short to long over the epoch
    others = [group_by_length(epoch_order(1003, *at, True), LENGTHS, 8, *at) for at in ((0, 1), (1, 0))]
    assert grouped not in others and others[0] != others[1]
