"""Reading the head in chunks against the plain computation over all logits at once."""

import pytest
import torch
import torch.nn.functional as F

from pact_tune.head import read_columns, read_logits, reduce_in_chunks


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 23])
def test_chunks_equal_the_whole(tail, rows):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(31, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 31, (rows,), generator=generator)
    ids = torch.tensor([3, 0, 30])

    def loss(part, where):
        label_logprobs, read = read_logits(part @ weight.T, labels[where], ids)
        value = -label_logprobs.sum() + (torch.cat(read[: 1 + tail], dim=1) ** 2).sum()
        return value, torch.stack([value.detach(), torch.tensor(float(len(part)), dtype=torch.float64)])

    total, metrics = reduce_in_chunks(hidden, [weight], loss, chunk=4)
    got = torch.autograd.grad(2 * total, [hidden, weight])

    logits = hidden @ weight.T
    outside = torch.ones(31, dtype=torch.bool)
    outside[ids] = False
    values = logits[:, ids]
    if tail:
        values = torch.cat([values, logits[:, outside].exp().sum(-1, keepdim=True).log()], dim=1)
    expected = F.cross_entropy(logits, labels, reduction="sum") + (values**2).sum()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(metrics, torch.tensor([expected.item(), rows], dtype=torch.float64))
    for one, other in zip(got, torch.autograd.grad(2 * expected, [hidden, weight]), strict=True):
        torch.testing.assert_close(one, other)


def test_gradient_is_zero_outside_the_safety_tokens():
    logits = torch.randn(5, 20, requires_grad=True)
    ids = torch.tensor([2, 7])
    _, (safety, _) = read_logits(logits + 0, torch.zeros(5, dtype=torch.long), ids)
    (gradient,) = torch.autograd.grad(safety.sum(), logits)
    outside = torch.ones(20, dtype=torch.bool)
    outside[ids] = False
    assert (gradient[:, outside] == 0).all() and (gradient[:, ids] == 1).all()


def test_labels_inside_and_outside_s_have_the_same_logprob_with_and_without_tail():
    logits = torch.randn(4, 12) * 5
    labels = torch.tensor([1, 5, 11, 0])
    ids = torch.tensor([1, 5])
    plain = F.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    for read in (None, ids):
        torch.testing.assert_close(read_logits(logits.clone(), labels, read)[0], plain)


def test_columns_partition_the_vocabulary():
    logits = torch.randn(3, 15)
    values = torch.cat(read_columns(logits.clone(), torch.tensor([4, 9])), dim=1)
    torch.testing.assert_close(values.logsumexp(-1), logits.logsumexp(-1))


def test_frozen_parameters_get_no_gradient_and_cost_none():
    hidden = torch.randn(6, 3, requires_grad=True)
    weight = torch.randn(8, 3)
    total, _ = reduce_in_chunks(hidden, [], lambda h, _: ((h @ weight.T).sum(), torch.zeros(1)), chunk=2)
    total.backward()
    torch.testing.assert_close(hidden.grad, weight.sum(0).expand(6, 3))
