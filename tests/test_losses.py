"""The losses against naive implementations written from the equations, in float64, one position at a time."""

import math

import pytest
import torch

from pact_tune.errors import UserError
from pact_tune.losses import PACTConfig, dispersion, pact_loss, str_loss


def softmax(z: list[float]) -> list[float]:
    top = max(z)
    total = sum(math.exp(v - top) for v in z)
    return [math.exp(v - top) / total for v in z]


def naive_dispersion(z: list[float], threshold: float) -> float:
    """Eq. 5."""
    covered = 0.0
    for k, p in enumerate(sorted(softmax(z), reverse=True), start=1):
        covered += p
        if covered >= threshold:
            return k / len(z)
    return 1.0


def naive_pact(student, full, response_only, position, weights, config) -> tuple[list[float], list[float]]:
    """Eq. 3-8, and sections 1.2's temperature, slope and bias: KL and gate at each position."""
    kls, gates = [], []
    for z, z_full, z_post, t in zip(student, full, response_only, position, strict=True):
        k = len(z) - config.tail
        gate = 0.0
        if config.response_only:
            gap = 0.0
            if config.gate:
                gap = naive_dispersion(z[:k], config.gate_threshold) - naive_dispersion(
                    z_post[:k], config.gate_threshold
                )
            gate = 1 / (1 + math.exp(-config.gate_slope * (gap - config.gate_bias)))
            if t >= config.decay_start:
                gate *= math.exp(-(t - config.decay_start) / config.tau)
        mixed = [(1 - gate) * a + gate * b for a, b in zip(z_full, z_post, strict=True)]
        reference = softmax([v / config.temperature for v in mixed])
        w = [1.0] * len(z) if config.tail else weights
        weighted = [p * v for p, v in zip(reference, w, strict=True)]
        q = [v / sum(weighted) for v in weighted]
        p = softmax([v / config.temperature for v in z])
        if config.direction == "reverse":
            p, q = q, p
        kl = sum(a * math.log(a / b) for a, b in zip(q, p, strict=True) if a > 0)
        kls.append(config.temperature**2 * kl)
        gates.append(gate)
    return kls, gates


def random_case(t: int, k: int, tail: bool, seed: int = 0, scale: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    student, full, post = (torch.randn(t, k + tail, generator=generator, dtype=torch.float64) * scale for _ in range(3))
    weights = torch.rand(k, generator=generator, dtype=torch.float64)
    # several responses in one batch: t starts again at 0
    position = torch.tensor([i % max(1, (2 * t) // 3) for i in range(t)])
    return student, full, post, position, weights


CONFIGS = {
    "paper": PACTConfig.preset("paper"),
    "official": PACTConfig.preset("official"),
    "tail": PACTConfig.preset("tail"),
    "tail, view on": PACTConfig.preset("tail", response_only=True),
    "tail, reverse": PACTConfig.preset("tail", direction="reverse", temperature=1.5),
    "reverse, view on": PACTConfig.preset("paper", weighting="uniform", direction="reverse"),
    "view off": PACTConfig.preset("paper", response_only=False),
    "gate off": PACTConfig.preset("paper", gate=False, gate_bias=-0.5),
    "no decay": PACTConfig.preset("paper", tau=math.inf),
    "short decay": PACTConfig.preset("paper", decay_start=1, tau=2.0, gate_bias=0.2, gate_threshold=0.5),
    "hot": PACTConfig.preset("official", temperature=5.0, gate_slope=7.0),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("t,k", [(1, 1), (1, 5), (7, 2), (30, 50), (3, 1)])
def test_value_and_gradient_equal_the_equations(config, t, k):
    student, full, post, position, weights = random_case(t, k, config.tail)
    student = student.float().requires_grad_()
    loss = pact_loss(student, full.float(), post.float(), position, weights.float(), config)
    kls, gates = naive_pact(
        student.double().tolist(), full.float().double().tolist(), post.float().double().tolist(),
        position.tolist(), weights.float().double().tolist(), config,
    )  # fmt: skip
    torch.testing.assert_close(loss.per_token.double(), torch.tensor(kls, dtype=torch.float64), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(loss.gate.double(), torch.tensor(gates, dtype=torch.float64), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(loss.sum, loss.per_token.sum())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_float64_value_and_gradient(config):
    """To 1e-9: the gradient of T^2 KL is T (p - q), reversed T p (log(p / q) - KL), with the gate held constant."""
    student, full, post, position, weights = random_case(12, 9, config.tail)
    student.requires_grad_()
    loss = pact_loss(student, full, post, position, weights, config)
    kls, gates = naive_pact(student.tolist(), full.tolist(), post.tolist(), position.tolist(), weights.tolist(), config)
    torch.testing.assert_close(loss.per_token, torch.tensor(kls, dtype=torch.float64), atol=1e-9, rtol=1e-9)
    (gradient,) = torch.autograd.grad(loss.sum, student)

    gate = torch.tensor(gates, dtype=torch.float64)[:, None]
    mixed = ((1 - gate) * full + gate * post) / config.temperature
    q = mixed.softmax(-1)
    if not config.tail:
        q = q * weights / (q * weights).sum(-1, keepdim=True)
    p = (student / config.temperature).softmax(-1)
    surprise = (p / q).log()
    reverse = p * (surprise - (p * surprise).sum(-1, keepdim=True))
    expected = config.temperature * (reverse if config.direction == "reverse" else p - q)
    torch.testing.assert_close(gradient, expected.detach(), atol=1e-9, rtol=1e-6)


def test_official_weights_are_scale_invariant():
    config = PACTConfig.preset("official")
    case = random_case(10, 6, False)
    once = pact_loss(*case[:4], case[4], config).per_token
    torch.testing.assert_close(once, pact_loss(*case[:4], case[4] * 1e-3, config).per_token)


def test_zero_weight_tokens_have_zero_target_and_are_pushed_down():
    config = PACTConfig.preset("official")
    student, full, post, position, weights = (
        t.float() if t.is_floating_point() else t for t in random_case(8, 6, False)
    )
    weights[2] = 0.0
    student.requires_grad_()
    loss = pact_loss(student, full, post, position, weights, config)
    (gradient,) = torch.autograd.grad(loss.sum, student)
    assert torch.isfinite(loss.per_token).all()
    assert (gradient[:, 2] > 0).all()


@pytest.mark.parametrize("preset", ["paper", "tail"])
def test_uniform_weights_give_zero_at_equality(preset):
    config = PACTConfig.preset(preset, weighting="uniform", response_only=False)
    student, full, _, position, weights = random_case(9, 5, config.tail)
    student = full.clone().float().requires_grad_()
    loss = pact_loss(student, full.float(), None, position, torch.ones(5), config)
    (gradient,) = torch.autograd.grad(loss.sum, student)
    assert loss.per_token.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6


def test_raw_weights_give_a_positive_loss_at_equality():
    """Paper Eq. 3 re-weights the reference alone, so equality is not the minimum."""
    config = PACTConfig.preset("paper", response_only=False)
    _, full, _, position, weights = random_case(9, 5, False)
    q = full.softmax(-1) * weights
    q = q / q.sum(-1, keepdim=True)
    loss = pact_loss(full, full, None, position, weights, config)
    expected = (q * (q / full.softmax(-1)).log()).sum(-1)
    torch.testing.assert_close(loss.per_token.double(), expected, atol=1e-6, rtol=1e-5)
    assert (loss.per_token > 1e-4).all()


def naive_bucket_kl(student_logits, reference_logits, ids):
    """KL over whole-vocabulary probabilities, grouped into the K safety tokens and everything else, in float64."""
    outside = torch.ones(student_logits.shape[-1], dtype=torch.bool)
    outside[ids] = False

    def grouped(logits):
        p = logits.softmax(-1)
        return torch.cat([p[:, ids], p[:, outside].sum(-1, keepdim=True)], -1)

    q, p = grouped(reference_logits), grouped(student_logits)
    return torch.special.xlogy(q, q / p).sum(-1)


def columns_of(logits, ids):
    from pact_tune.head import read_logits

    labels = torch.zeros(len(logits), dtype=torch.long)
    _, (safety, tail) = read_logits(logits + 0, labels, ids)  # + 0: what it is given is overwritten
    return torch.cat([safety, tail], dim=1)


@pytest.mark.parametrize("shift", [0.0, 30.0, -30.0], ids=["ordinary", "S holds all", "S holds nothing"])
def test_tail_equals_grouped_probabilities(shift):
    """Positions where S holds 1 - 1e-9 of the mass and where it holds 1e-9: finite, and the right gradient."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([1, 5, 17, 30])
    logits = torch.randn(2, 11, 40, generator=generator, dtype=torch.float64)
    logits[:, :, ids] += shift * 0.8
    student = logits[0].clone().requires_grad_()
    expected = naive_bucket_kl(student, logits[1], ids)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)

    single = logits[0].float().requires_grad_()
    config = PACTConfig.preset("tail")
    position = torch.arange(11)
    loss = pact_loss(columns_of(single, ids), columns_of(logits[1].float(), ids), None, position, torch.ones(4), config)
    (gradient,) = torch.autograd.grad(loss.sum, single)
    mass = logits[0].softmax(-1)[:, ids].sum(-1)
    if shift:
        assert (mass.min() > 1 - 1e-8) if shift > 0 else (mass.max() < 1e-8)
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(loss.per_token.double(), expected.detach(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=1e-6, rtol=1e-4)


def test_tail_gradient_keeps_its_digits_where_the_tail_is_tiny():
    """The gradient on the tail is p_tail - q_tail, near 1e-9 here: wrong by far if taken from 1 - sum(p_S)."""
    ids = torch.tensor([0, 1])
    student = torch.zeros(1, 5)
    student[:, :2] = 21.0
    reference = student.clone()
    reference[:, 2:] += 1.0
    student.requires_grad_()
    loss = pact_loss(
        columns_of(student, ids), columns_of(reference, ids), None, torch.zeros(1, dtype=torch.long), torch.ones(2), PACTConfig.preset("tail")
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss.sum, student)
    p, q = student.detach().double().softmax(-1), reference.double().softmax(-1)
    expected = (p - q)[0, 2:].sum()
    assert abs(expected) < 1e-8
    torch.testing.assert_close(gradient[0, 2:].double().sum(), expected, rtol=1e-3, atol=0.0)


def test_tail_with_all_but_one_token_is_the_full_vocabulary_kl():
    generator = torch.Generator().manual_seed(5)
    student, reference = torch.randn(2, 6, 9, generator=generator) * 3
    ids = torch.arange(8)
    loss = pact_loss(
        columns_of(student, ids), columns_of(reference, ids), None, torch.arange(6), torch.ones(8), PACTConfig.preset("tail")
    )  # fmt: skip
    full = (reference.softmax(-1) * (reference.log_softmax(-1) - student.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(loss.per_token, full)


def test_no_gradient_through_the_gate():
    config = PACTConfig.preset("paper", gate_slope=50.0)
    student, full, post, position, weights = random_case(6, 8, False)
    student.requires_grad_()
    loss = pact_loss(student, full, post, position, weights, config)
    assert not loss.gate.requires_grad
    frozen = PACTConfig.preset("paper", response_only=False)
    mixed = torch.lerp(full, post, loss.gate[:, None])
    same = pact_loss(student, mixed, None, position, weights, frozen)
    one, other = (torch.autograd.grad(x.sum, student)[0] for x in (loss, same))
    torch.testing.assert_close(one, other)


def test_gate_of_identical_views_and_its_decay():
    """c = 0.5 up to t = N, c / e at t = N + tau."""
    config = PACTConfig.preset("paper")
    z = torch.randn(20, 6)
    gate = pact_loss(z, z, z, torch.arange(20), torch.ones(6), config).gate
    torch.testing.assert_close(gate[:9], torch.full((9,), 0.5))
    torch.testing.assert_close(gate[16], torch.tensor(0.5 / math.e))


@pytest.mark.parametrize("k", [1, 2, 7])
def test_dispersion_is_between_one_token_and_all(k):
    even = dispersion(torch.zeros(3, k), 0.9)
    peaked = torch.zeros(3, k)
    peaked[:, 0] = 50.0
    assert even.tolist() == [math.ceil(0.9 * k - 1e-9) / k] * 3
    assert dispersion(peaked, 0.9).tolist() == pytest.approx([1 / k] * 3)
    assert dispersion(torch.zeros(3, k), 1.0).max() <= 1.0


def test_empty_response_is_a_zero_that_stays_in_the_graph():
    for config in (PACTConfig.preset("paper"), PACTConfig.preset("tail")):
        student = torch.zeros(0, 4 + config.tail, requires_grad=True)
        empty = torch.zeros(0, 4 + config.tail)
        loss = pact_loss(student, empty, empty, torch.zeros(0, dtype=torch.long), torch.ones(4), config)
        loss.sum.backward()
        assert loss.sum.item() == 0.0 and loss.per_token.shape == (0,)


@pytest.mark.parametrize("preset", ["paper", "official", "tail"])
def test_bfloat16_logits_are_taken_in_float32(preset):
    config = PACTConfig.preset(preset)
    student, full, post, position, weights = random_case(16, 12, config.tail)
    low = [x.bfloat16() for x in (student, full, post)]
    high = [x.float() for x in low]
    one = pact_loss(*low, position, weights.float(), config)
    assert one.per_token.dtype == torch.float32
    torch.testing.assert_close(one.per_token, pact_loss(*high, position, weights.float(), config).per_token)


def test_extreme_logits_stay_finite():
    for config in (PACTConfig.preset("paper"), PACTConfig.preset("official"), PACTConfig.preset("tail")):
        student = torch.full((2, 4 + config.tail), -300.0)
        student[:, 0] = 300.0
        student.requires_grad_()
        reference = -student.detach()
        loss = pact_loss(student, reference, reference, torch.arange(2), torch.tensor([1.0, 0, 1, 1]), config)
        loss.sum.backward()
        assert torch.isfinite(loss.sum) and torch.isfinite(student.grad).all()


def test_str_is_zero_at_equality_and_its_gradient_is_linear():
    """Gradient 2 (z - z0) / |S| a position."""
    student, reference = torch.randn(2, 5, 7)
    assert str_loss(reference, reference).sum() == 0
    student.requires_grad_()
    loss = str_loss(student, reference)
    assert loss.shape == (5,)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(gradient, 2 * (student.detach() - reference) / 7)


@pytest.mark.parametrize("space", ["logit", "logprob", "centered"])
def test_a_constant_added_to_all_logits_counts_for_str_in_raw_space_alone(space):
    student, reference = torch.randn(2, 5, 8, dtype=torch.float64)
    moved = (str_loss(student + 3, reference, space) - str_loss(student, reference, space)).abs()
    assert (moved.min() > 0.1) if space == "logit" else (moved.max() < 1e-12)


def test_presets_differ_as_the_paper_and_the_released_code_do():
    paper, official, tail = (PACTConfig.preset(name) for name in ("paper", "official", "tail"))
    assert (paper.k, paper.ranking, paper.weighting, paper.temperature, paper.lambda_kl) == (
        50,
        "score",
        "raw",
        1.0,
        3.0,
    )
    assert (official.ranking, official.weighting, official.temperature) == ("reference_probability", "centred", 2.0)
    assert (official.gate_slope, official.lambda_kl, official.response_only_bos) == (2.0, 1.0, False)
    assert (tail.tail, tail.weighting, tail.response_only) == (True, "uniform", False)


@pytest.mark.parametrize(
    "preset,overrides,words",
    [
        ("papr", {}, "did you mean 'paper'"),
        ("paper", {"lamda_kl": 1.0}, "did you mean 'lambda_kl'"),
        ("paper", {"weighting": "softmax"}, "must be one of"),
        ("paper", {"tail": True}, "uniform"),
        ("tail", {"weighting": "raw"}, "uniform"),
        ("paper", {"tau": 0.0}, "loss.tau"),
        ("paper", {"k": 0}, "loss.k"),
        ("tail", {"k": "vocabulary"}, "no tail"),
        ("paper", {"direction": "reverse"}, "direction: reverse goes with uniform weights"),
    ],
)
def test_bad_configs_say_what_to_mend(preset, overrides, words):
    with pytest.raises(UserError, match=words):
        PACTConfig.preset(preset, **overrides)


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="do not belong together"):
        pact_loss(torch.zeros(2, 4), torch.zeros(2, 4), None, torch.zeros(2), torch.ones(4), PACTConfig.preset("tail"))
