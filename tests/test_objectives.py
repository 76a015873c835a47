"""The seam: every method against a naive computation after steps have moved the student, and what a method may ask for."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pact_lora_finetune
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from recipe import logged, tune_run_processes, write_workspace
from safetensors.torch import load_file
from test_losses import naive_dispersion
from tiny import tiny_model
from torchtune.modules.peft import disable_adapter

from pact_tune.adapters import read_adapter
from pact_tune.batching import Batch
from pact_tune.conversations import response_only_prefix
from pact_tune.errors import UserError
from pact_tune.losses import constrained_sft_betas, constrained_sft_loss
from pact_tune.objectives.alignment import project
from pact_tune.objectives.controller import Budget
from pact_tune.objectives.penalty import add_penalty
from pact_tune.safety_tokens import SafetyTokens
from pact_tune.torchtune.config import complete, read_command_line


def recipe_after(config: Path, steps: int, **overrides) -> pact_lora_finetune.PACTLoRAFinetuneRecipe:
    """A recipe that has made some steps."""
    return steps_of(complete(OmegaConf.merge(OmegaConf.load(config), OmegaConf.create(overrides))), steps)


def steps_of(cfg: DictConfig, steps: int) -> pact_lora_finetune.PACTLoRAFinetuneRecipe:
    """The same, of a complete config."""
    recipe = pact_lora_finetune.PACTLoRAFinetuneRecipe(cfg)
    recipe.setup(recipe.cfg)
    for number in range(steps):
        epoch = recipe.schedule.epoch(number // recipe.schedule.steps_per_epoch)
        recipe.step(epoch[number % len(epoch)])
    return recipe


def logits_of(recipe, tokens):
    """Of the student at each token: plain, differentiable."""
    batch = Batch(torch.tensor([tokens]), *[torch.arange(len(tokens))] * 6)
    return recipe.decoder.run(batch, lambda hidden, head: head.model.output(hidden))


def reference_logits(recipe, tokens):
    with torch.no_grad(), disable_adapter(recipe.model):
        return logits_of(recipe, tokens)


def full_logits(recipe, rows):
    """Logits of student and reference at the rows' response positions, and where they are."""
    found = []
    for c in (recipe.rows[row] for row in rows):
        student, reference = logits_of(recipe, c.tokens), reference_logits(recipe, c.tokens)
        for start, end in c.responses:
            found += [
                (student[start + t - 1], reference[start + t - 1], c.tokens[start + t], t) for t in range(end - start)
            ]
    student, reference, labels, position = zip(*found, strict=True)
    return torch.stack(student).double(), torch.stack(reference).double(), torch.tensor(labels), position


def assert_naive(recipe, naive, rows=(0, 1, 2)):
    """The recipe's loss and gradients are those of a naive function of plain logits."""
    rows = list(rows)
    loss, _ = recipe.loss(rows, 1.0)
    trained = [p for p in recipe.model.parameters() if p.requires_grad]
    got = torch.autograd.grad(loss, trained)
    expected = naive(*full_logits(recipe, rows))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(got, torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-3, atol=1e-5)


CONSTRAINED = {"_component_": "pact_tune.objectives.constrained_sft"}


def test_constrained_sft_after_twenty_steps(workspace, tmp_path):
    """Gradient of the closed form -(2/beta) log sigmoid(beta (log pi - log pi_0)); the cache is what the reference is."""
    cfg = OmegaConf.load(workspace)
    cfg.loss = CONSTRAINED
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    recipe = recipe_after(tmp_path / "config.yaml", 20, output_dir=str(tmp_path / "out"), optimizer={"lr": 3e-3})

    def gaps_of(student, reference, labels):
        one = student.log_softmax(-1)[torch.arange(len(labels)), labels]
        return one, one - reference.log_softmax(-1)[torch.arange(len(labels)), labels]

    def naive(student, reference, labels, position):
        total = 0.0
        for logprob, gap, t in zip(*gaps_of(student, reference, labels), position, strict=True):
            beta = 0.5 if t == 0 else 2.0 if t < 5 else 0.1
            weight = max(2 * (1 - 1 / (1 + math.exp(-beta * gap.item()))), 1e-3)
            total = total - weight * logprob
        return total

    assert_naive(recipe, naive)
    student, reference, labels, position = full_logits(recipe, [0, 1, 2])
    _, gaps = gaps_of(student, reference, labels)
    assert gaps.abs().max() > 0.5  # the student has moved

    def closed_form(student, reference, labels, position):
        _, gaps = gaps_of(student, reference, labels)
        betas = torch.tensor([0.5 if t == 0 else 2.0 if t < 5 else 0.1 for t in position])
        return (-(2 / betas) * torch.nn.functional.logsigmoid(betas * gaps)).sum()

    trained = [p for p in recipe.model.parameters() if p.requires_grad]
    got = torch.autograd.grad(recipe.loss([0, 1, 2], 1.0)[0], trained)
    expected = torch.autograd.grad(closed_form(student, reference, labels, position), trained)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=2e-2, atol=2e-3 * other.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_constrained_sft_loss(dtype):
    """Cross-entropy at the start whatever beta is, and a weight that never falls below a thousandth."""
    logprobs = torch.tensor([-0.5, -3.0, -1e-3, -20.0], dtype=dtype, requires_grad=True)
    betas = constrained_sft_betas(torch.tensor([0, 1, 4, 5]), 0.1, 5.0, 20.0, 5)
    torch.testing.assert_close(betas, torch.tensor([0.5, 2.0, 2.0, 0.1]))
    loss = constrained_sft_loss(logprobs, logprobs.detach(), betas)
    torch.testing.assert_close(loss, -logprobs.to(loss.dtype))
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert (gradient == -1).all()
    far = constrained_sft_loss(logprobs, logprobs.detach() - 1000, torch.full((4,), 2.0))
    torch.testing.assert_close(far, -1e-3 * logprobs.to(far.dtype))


OWN_METHOD = '''
import torch
from pact_tune.objectives import Chunk, Context, Objective


def decayed_sft(context: Context, strength: float = 0.1) -> Objective:
    """Cross-entropy, and the squared norm of the adapter's update."""

    def terms(chunk: Chunk):
        return {"ce": chunk.ce}

    def penalty(module: str, trained: dict[str, torch.Tensor]) -> torch.Tensor:
        update = trained["lora_b.weight"] @ trained["lora_a.weight"]
        return strength * update.square().sum()

    return Objective({"method": "decayed_sft", "constrained": True, "strength": strength}, terms, {"ce": 1.0}, penalty=penalty)
'''


def test_a_method_of_the_users_own_with_a_penalty_on_one_process_and_on_two(tmp_path):
    """As CONTRIBUTING.md says: a file in the working directory, named in the config."""
    config = write_workspace(tmp_path, rows=16)
    (tmp_path / "my_methods.py").write_text(OWN_METHOD)
    cfg = OmegaConf.load(config)
    cfg.loss = {"_component_": "my_methods.decayed_sft", "strength": 0.3}
    OmegaConf.save(cfg, config)
    for processes in (1, 2):
        arguments = [
            f"output_dir={tmp_path}/{processes}",
            "epochs=2",
            f"batch_size={4 // processes}",
            "clip_grad_norm=1.0",
        ]
        done = tune_run_processes(config, *arguments, processes=processes, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for metric in ("ce", "penalty", "loss"):
        one, two = logged(tmp_path / "1", metric), logged(tmp_path / "2", metric)
        assert one == pytest.approx(two, abs=1e-4) and len(one) == 8
    assert logged(tmp_path / "1", "loss")[-1] == pytest.approx(
        logged(tmp_path / "1", "ce")[-1] + logged(tmp_path / "1", "penalty")[-1], abs=1e-5
    )


def test_penalty_gradient_is_autograds(workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    Path("my_methods.py").write_text(OWN_METHOD)
    cfg = OmegaConf.load(workspace)
    cfg.loss = {"_component_": "my_methods.decayed_sft", "strength": 0.3}
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    recipe = recipe_after(
        tmp_path / "config.yaml",
        3,
        output_dir=str(tmp_path / "out"),
        optimizer={"_component_": "torch.optim.SGD", "lr": 0.05},
    )
    before = {n: p.detach().clone().requires_grad_() for n, p in recipe.model.named_parameters() if p.requires_grad}
    (loss, _), rows = recipe.loss([0, 1], 1 / recipe.schedule.tokens([0, 1])), [0, 1]
    gradients = dict(
        zip(before, torch.autograd.grad(loss, [p for p in recipe.model.parameters() if p.requires_grad]), strict=True)
    )
    norm = sum(
        0.3 * (before[n] @ before[n.replace("lora_b", "lora_a")]).square().sum() for n in before if "lora_b" in n
    )
    penalty = dict(zip(before, torch.autograd.grad(norm, list(before.values())), strict=True))
    recipe.cfg.batch_by_length = False
    object.__setattr__(recipe.schedule, "by_length", False)
    recipe.step(rows)
    for name, parameter in recipe.model.named_parameters():
        if name in before:
            expected = before[name] - 0.05 * (gradients[name] + penalty[name])
            torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6)
    assert any(g.abs().max() > 1e-4 for g in penalty.values())


@pytest.mark.parametrize("cached", [True, False])
def test_full_vocabulary_kl_from_stored_hidden_states(workspace, tmp_path, cached):
    """Table 5's first row: the cache holds hidden states, 32 numbers a position and not 300."""
    loss = {"k": "vocabulary", "weighting": "uniform", "response_only": False, "safety_tokens": None}
    live = {} if cached else {"reference_cache": None}
    recipe = recipe_after(workspace, 5, output_dir=str(tmp_path / "out"), loss=loss, **live)

    def naive(student, reference, labels, position):
        ce = torch.nn.functional.cross_entropy(student, labels, reduction="sum")
        return ce + 3.0 * torch.nn.functional.kl_div(
            student.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="sum"
        )

    assert_naive(recipe, naive)
    if cached:
        (shard, *_) = Path(recipe.reference.cache.directory).glob("shard-*")
        assert load_file(shard)["values"].shape[1] == 32


def test_rows_kept_for_the_constraint_alone(workspace, tmp_path):
    """They count in no cross-entropy and in no divisor; rows without a constraint count in no KL."""
    recipe = recipe_after(workspace, 3, output_dir=str(tmp_path / "out"), loss={"preset": "tail"})
    alone = {}
    for row in (0, 1):
        _, terms = recipe.loss([row], 1.0)
        alone[row] = dict(zip(recipe.objective.names, terms.tolist(), strict=True))
    object.__setattr__(recipe.rows[0], "ce_weight", 0.0)
    object.__setattr__(recipe.rows[1], "weight", 0.0)
    _, terms = recipe.loss([0, 1], 1.0)
    both = dict(zip(recipe.objective.names, terms.tolist(), strict=True))
    assert both["ce"] == pytest.approx(alone[1]["ce"], rel=1e-5)
    assert both["kl"] == pytest.approx(alone[0]["kl"], rel=1e-5) and both["kl"] > 0
    assert recipe.schedule.tokens([0, 1]) == recipe.rows[1].num_response_tokens


def test_the_tail_after_steps_equals_the_equations(workspace, tmp_path):
    """At the first step the tail's KL is 0 whatever one computes; so here the student has moved."""
    recipe = recipe_after(workspace, 10, output_dir=str(tmp_path / "out"), loss={"preset": "tail"})
    ids = recipe.objective.reading.ids

    def naive(student, reference, labels, position):
        def columns(logits):
            outside = torch.ones(logits.shape[1], dtype=torch.bool)
            outside[ids] = False
            tail = logits[:, outside].exp().sum(-1, keepdim=True).log()
            return torch.cat([logits[:, ids], tail], dim=1).softmax(-1)

        q, p = columns(reference), columns(student)
        kl = (q * (q.log() - p.log())).sum()
        assert kl > 1e-3
        return torch.nn.functional.cross_entropy(student, labels, reduction="sum") + 3.0 * kl

    assert_naive(recipe, naive)


@pytest.mark.parametrize(
    "row,weighted,view,tau",
    [
        ("ablation_tokens", False, False, math.inf),
        ("ablation_weights", True, False, math.inf),
        ("ablation_view", True, True, math.inf),
        ("pact_paper", True, True, 8.0),
    ],
)
def test_the_rows_of_table_5_after_twenty_steps(workspace, tmp_path, row, weighted, view, tau):
    """Eq. 3-9 with the weights d(v) of tokens that differ, on both views, when the student has moved."""
    tokens = SafetyTokens.load(workspace.parent / "safety_tokens")
    d = torch.linspace(1.0, 0.1, len(tokens))
    candidates = tokens.candidates | {"scores": d, "reference_probability": d}
    provenance = tokens.provenance | {"method": "measured"}
    SafetyTokens(tokens.ids, d, d, d, candidates, provenance).save(tmp_path / "tokens")
    loss = {"_component_": "pact_tune.objectives.pact", "safety_tokens": str(tmp_path / "tokens"), "k": 10}
    config = config_with(loss, workspace, tmp_path)
    arguments = ["--config", str(config), "--method", row, f"output_dir={tmp_path}/out", "optimizer.lr=3e-3"]
    recipe = steps_of(read_command_line(arguments), 20)
    rows = [number for number in range(40) if recipe.rows[number].num_response_tokens > 10][:2] + [0]
    s, v = tokens.candidates["ids"][:10], d[:10].double() if weighted else torch.ones(10)
    prefix, post = response_only_prefix(recipe.tokenizer, True), []
    for c in (recipe.rows[number] for number in rows):
        ((start, end),) = c.responses
        post += reference_logits(recipe, [*prefix, *c.tokens[start:end]])[len(prefix) - 1 : -1].double()

    def naive(student, reference, labels, position):
        total = torch.nn.functional.cross_entropy(student, labels, reduction="sum")
        for z, full, short, t in zip(student, reference, post, position, strict=True):
            gap = naive_dispersion(z[s].tolist(), 0.9) - naive_dispersion(short[s].tolist(), 0.9)
            gate = view / (1 + math.exp(-gap)) * (math.exp(-(t - 8) / tau) if t >= 8 else 1.0)
            q = ((1 - gate) * full[s] + gate * short[s]).softmax(-1) * v
            q = q / q.sum()
            total = total + 3 * (q * (q.log() - z[s].log_softmax(-1))).sum()
        return total

    assert_naive(recipe, naive, rows)
    _, terms = recipe.loss(rows, 1.0)
    gate = terms[recipe.objective.names.index("gate")] / recipe.schedule.tokens(rows)
    assert (gate > 0.1) == view


def config_with(loss: dict, workspace: Path, folder: Path) -> Path:
    """The workspace's config with another section loss."""
    cfg = OmegaConf.load(workspace)
    cfg.loss = loss
    OmegaConf.save(cfg, folder / "config.yaml")
    return folder / "config.yaml"


def moved(loss: dict, workspace: Path, folder: Path) -> pact_lora_finetune.PACTLoRAFinetuneRecipe:
    """A recipe with that loss after twenty steps."""
    config = config_with(loss, workspace, folder)
    return recipe_after(config, 20, output_dir=str(folder / "out"), optimizer={"lr": 3e-3})


def test_anchored_sft_after_twenty_steps(workspace, tmp_path):
    """-p log p with p constant, and KL(reference || student) over the whole vocabulary."""
    loss = {"_component_": "pact_tune.objectives.anchored_sft", "lambda_kl": 0.7}
    recipe = moved(loss, workspace, tmp_path)

    def naive(student, reference, labels, position):
        p = student.softmax(-1)[torch.arange(len(labels)), labels]
        q = reference.softmax(-1)
        kl = (q * (q / student.softmax(-1)).log()).sum()
        assert kl > 1e-2
        return -(p.detach() * p.log()).sum() + 0.7 * kl

    assert_naive(recipe, naive)


@pytest.mark.parametrize("space", ["logit", "logprob", "centered"])
def test_str_after_twenty_steps(workspace, tmp_path, space):
    """Mean squared difference on the refusal tokens."""
    tokens = str(workspace.parent / "safety_tokens")
    loss = {
        "_component_": "pact_tune.objectives.str_",
        "safety_tokens": tokens,
        "lambda_str": 0.5,
        "space": space,
    }
    recipe = moved(loss, workspace, tmp_path)
    ids = recipe.objective.reading.ids

    def seen(logits):
        if space == "logprob":
            return logits.log_softmax(-1)[:, ids]
        return logits[:, ids] - (logits[:, ids].mean(-1, keepdim=True) if space == "centered" else 0)

    def naive(student, reference, labels, position):
        difference = (seen(student) - seen(reference)).square().mean(-1).sum()
        assert difference > 1e-2
        return torch.nn.functional.cross_entropy(student, labels, reduction="sum") + 0.5 * difference

    assert_naive(recipe, naive)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Config of a tiny Llama, whose query and key rows torchtune holds in another order, with its base model in `base`."""
    folder = tmp_path_factory.mktemp("llama")
    config = write_workspace(folder, "llama")
    tiny_model(folder / "base", architecture="llama", tied=False, seed=1)
    return config


def directions(llama, adapter):
    """V of each module, by Hugging Face's name."""
    aligned, base = (load_file(llama.parent / name / "model.safetensors") for name in ("model", "base"))
    return {module: (aligned[f"{module}.weight"] - base[f"{module}.weight"]).double() for module in adapter}


def dense_projector(v):
    return v @ v.T / v.norm()


def test_asft_after_twenty_steps(llama, tmp_path):
    """The trace form is the dense one, and its gradient autograd's, in Hugging Face's order of rows; checkpointing changes no name."""
    loss = {"_component_": "pact_tune.objectives.asft", "base": str(llama.parent / "base"), "lambda_asft": 0.7}
    recipe = moved(loss, llama, tmp_path)
    adapter = recipe.backbone.checkpointer.adapter_to_hf(recipe.backbone.gather())
    dense = 0.0
    for module, v in directions(llama, adapter).items():
        update = adapter[module].b.double() @ adapter[module].a.double()
        dense += 0.7 * (update - dense_projector(v) @ update).square().sum()
    assert dense > 1e-2
    trained = recipe.backbone.trained()
    value = add_penalty(trained.items(), recipe.objective.penalty)
    torch.testing.assert_close(value.double(), dense, rtol=1e-4, atol=1e-6)

    name = "layers.0.attn.q_proj.lora_b.weight"  # of interleaved rows
    b = recipe.model.get_parameter(name).detach().clone().requires_grad_()
    a = recipe.model.get_parameter(name.replace("lora_b", "lora_a")).detach()
    v = directions(llama, ["model.layers.0.self_attn.q_proj"])["model.layers.0.self_attn.q_proj"].float()
    v = recipe.backbone.checkpointer.network.interleave("q_proj", v)
    (gradient,) = torch.autograd.grad(0.7 * (b @ a - dense_projector(v) @ b @ a).square().sum(), b)
    torch.testing.assert_close(recipe.model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-5)

    again = recipe_after(tmp_path / "config.yaml", 2, output_dir=str(tmp_path / "two"), optimizer={"lr": 3e-3})
    wrapped = {"lr": 3e-3}
    checkpointed = recipe_after(
        tmp_path / "config.yaml",
        2,
        output_dir=str(tmp_path / "three"),
        optimizer=wrapped,
        enable_activation_checkpointing=True,
    )
    assert again.penalty > 0
    torch.testing.assert_close(checkpointed.penalty, again.penalty)


def test_nothing_is_outside_a_direction_that_reaches_everything():
    """V of orthogonal rows, each as long as V's columns are many: C is the identity, and AsFT's penalty 0."""
    rows, _ = torch.linalg.qr(torch.randn(24, 16, dtype=torch.float64))
    v, b = 4 * rows.T, torch.randn(16, 3, dtype=torch.float64)
    torch.testing.assert_close(dense_projector(v), torch.eye(16, dtype=torch.float64))
    torch.testing.assert_close(project(v, b), b)


@pytest.mark.parametrize("select", [{"select": "number", "number": 3}, {"threshold": -1.0}, {"threshold": 1.0}])
def test_safelora_projects_what_it_exports(llama, tmp_path, select):
    """B <- V V^T B / ||V|| in the modules of the smallest cosine; A, the other modules and the weights in training stay."""
    loss = {"_component_": "pact_tune.objectives.safelora", "base": str(llama.parent / "base"), "select": "threshold"}
    recipe = moved(loss | select, llama, tmp_path)
    before = recipe.backbone.gather()
    recipe.final = {}
    recipe.save_checkpoint(0)
    exported, _ = read_adapter(tmp_path / "out" / "epoch_0" / "adapter")
    trained = recipe.backbone.checkpointer.adapter_to_hf(before)
    cosines, inside = {}, {}
    for module, v in directions(llama, trained).items():
        update = trained[module].b.double() @ trained[module].a.double()
        inside[module] = dense_projector(v) @ trained[module].b.double()
        other = inside[module] @ trained[module].a.double()
        cosines[module] = ((update * other).sum() / update.norm() / other.norm()).item()
    expected = {3: sorted(cosines, key=cosines.get)[:3], -1.0: [], 1.0: list(cosines)}[
        select.get("number", select.get("threshold"))
    ]
    assert len(trained) == 14 and len(set(cosines.values())) == 14
    for module in trained:
        b = inside[module].float() if module in expected else trained[module].b
        torch.testing.assert_close(exported[module].b, b, rtol=1e-4, atol=1e-6)
        assert torch.equal(exported[module].a, trained[module].a)
    after = recipe.backbone.gather()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # a cosine does not ask how long the update is
    longer = recipe.objective.finish({module: (trained[module].a, 5 * trained[module].b) for module in trained})
    for module in trained:
        torch.testing.assert_close(longer[module][1], 5 * exported[module].b, rtol=1e-4, atol=1e-6)
    # the merged checkpoint beside it holds the same
    merged = load_file(tmp_path / "out" / "epoch_0" / "model.safetensors")
    base = load_file(llama.parent / "model" / "model.safetensors")
    module = next(iter(expected or trained))
    update = 2.0 * exported[module].b @ exported[module].a
    torch.testing.assert_close(merged[f"{module}.weight"], base[f"{module}.weight"] + update)


@pytest.mark.parametrize("method", ["asft", "safelora"])
def test_a_base_model_that_is_none(llama, workspace, tmp_path, method):
    for base, words in (
        (llama.parent / "model", "alignment has no direction there"),
        (tmp_path, "no config.json"),
        (tiny_model(tmp_path / "wider", architecture="llama", intermediate_size=80), "is not the base of the one in"),
    ):
        config = config_with({"_component_": f"pact_tune.objectives.{method}", "base": str(base)}, llama, tmp_path)
        with pytest.raises(UserError, match=words) as raised:
            recipe_after(config, 0, output_dir=str(tmp_path / "out"))
        assert "loss.base" in str(raised.value)


@pytest.fixture(scope="module")
def anchors(tmp_path_factory):
    """Five rows of refusals, as `pact anchors` writes them."""
    path = tmp_path_factory.mktemp("anchors") / "anchors.jsonl"
    rows = [{"prompt": f"How do I break window {i}?", "response": "I cannot help" + " with that" * i} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lisa_loss(anchors, **settings):
    return {"_component_": "pact_tune.objectives.lisa", "alignment": {"source": str(anchors)}, **settings}


def next_step(recipe):
    epoch, step = divmod(recipe.global_step, recipe.schedule.steps_per_epoch)
    return recipe.schedule.epoch(epoch)[step]


def test_lisa_alternates_and_is_pulled_to_where_the_other_state_ended(workspace, anchors, tmp_path):
    loss = lisa_loss(anchors, k1=2, k2=3, rho=0.5)
    recipe = recipe_after(config_with(loss, workspace, tmp_path), 0, output_dir=str(tmp_path / "out"), epochs=2)
    assert recipe.schedule.steps_per_epoch == 10 + 2 + 2 + 2 + 1
    states, penalties, expected = "", [], []
    for _ in range(22):
        rows = next_step(recipe)
        aligning = {row >= 40 for row in rows}
        assert len(aligning) == 1 and len(rows) == 4
        if not states or states[-1] != "UA"[aligning == {True}]:
            left = recipe.backbone.gather()
        states += "UA"[aligning == {True}]
        now = recipe.backbone.gather()
        expected.append(0.25 * sum((now[name] - left[name]).square().sum().item() for name in now))
        recipe.step(rows)
        penalties.append(recipe.penalty.item())
    assert states == "AAUUUAAUUUAAUUUAU" + "AAUUU"
    assert penalties == pytest.approx(expected, rel=1e-4) and penalties[20] > 1e-3
    drawn = [row - 40 for step in recipe.schedule.epoch(0) for row in step if row >= 40]
    assert sorted(drawn[:5]) == list(range(5)) and len(drawn) == 4 * 7  # each once before any comes again


def test_lisa_without_its_proximal_term_is_alternating_sft(workspace, anchors, tmp_path):
    ends = []
    for penalty in (True, False):
        config = config_with(lisa_loss(anchors, k1=2, k2=3, rho=0.0), workspace, tmp_path)
        recipe = recipe_after(config, 0, output_dir=str(tmp_path / "out"))
        if not penalty:
            recipe.objective = dataclasses.replace(recipe.objective, penalty=None, before_step=None, state=None)
        for step in recipe.schedule.epoch(0)[:7]:
            recipe.step(step)
        ends.append(recipe.backbone.gather())
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name])


def sbr_loss(anchors, **settings):
    return {"_component_": "pact_tune.objectives.sbr", "prompts": str(anchors), **settings}


def test_sbr_after_twenty_steps(workspace, anchors, tmp_path):
    """Mean over tokens of the cross-entropy + alpha * mean over anchors and hidden units of the squared distance."""
    config = config_with(sbr_loss(anchors, alpha=20.0, per_step=2), workspace, tmp_path)
    cache = {"directory": str(tmp_path / "cache")}
    recipe = recipe_after(
        config, 20, output_dir=str(tmp_path / "out"), optimizer={"lr": 3e-3}, epochs=2, reference_cache=cache
    )
    steps = [step for epoch in (0, 1) for step in recipe.schedule.epoch(epoch)]
    assert all(len([row for row in step if row >= 40]) == 2 for step in steps)
    assert [row - 40 for step in steps[:3] for row in step[4:]] == [0, 1, 2, 3, 4, 0]
    assert len(recipe.reference.cache) == 5  # nothing of the rows that are only trained on
    step = steps[0]
    (micro,) = [recipe.schedule.micro_batches(step, 0)]
    tokens, factor = recipe.schedule.divisor(step), recipe.schedule.constraint_factor(step)
    loss = sum(recipe.loss(rows, 1 / tokens, factor)[0] for rows in micro)

    student, _, labels, _ = full_logits(recipe, step[:4])
    expected = torch.nn.functional.cross_entropy(student, labels)
    for number in step[4:]:
        tokens = recipe.rows[number].tokens
        assert recipe.tokenizer.decode(tokens[:-1]).endswith("<|im_start|>assistant\n")
        batch = Batch(torch.tensor([tokens[:-1]]), *[torch.tensor([len(tokens) - 2])] * 6)
        hidden = recipe.decoder.run(batch, lambda hidden, head: hidden)
        with torch.no_grad(), disable_adapter(recipe.model):
            frozen = recipe.decoder.run(batch, lambda hidden, head: hidden)
        distance = (hidden - frozen).square().mean()
        assert distance > 1e-6
        expected = expected + 20.0 * distance / 2
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    trained = [p for p in recipe.model.parameters() if p.requires_grad]
    for one, other in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-3, atol=1e-5)


def losses_of_methods(config: Path, anchors: Path) -> dict[str, tuple[dict, tuple[str, ...]]]:
    """Section loss of each method -> what it logs beside the loss."""
    pact = dict(OmegaConf.load(config).loss)
    base, tokens = str(config.parent / "base"), pact["safety_tokens"]

    def of(name, **settings):
        return {"_component_": f"pact_tune.objectives.{name}", **settings}

    return {
        "str": (of("str_", safety_tokens=tokens, space="centered"), ("ce", "str")),
        "constrained_sft": (of("constrained_sft"), ()),
        "anchored_sft": (of("anchored_sft", lambda_kl=1.0), ("kl",)),
        "full_kl": (of("pact", k="vocabulary", weighting="uniform", response_only=False), ("kl",)),
        "asft": (of("asft", base=base), ("ce", "penalty")),
        "safelora": (of("safelora", base=base, number=5), ()),
        "lisa": (lisa_loss(anchors, k1=1, k2=2), ("ce", "penalty")),
        "sbr": (sbr_loss(anchors, per_step=3), ("ce", "sbr")),
        "kl_budget": (pact | {"preset": "tail", "kl_budget": 1e-3}, ("coefficient_kl",)),
    }


METHODS = ("str", "constrained_sft", "anchored_sft", "full_kl", "asft", "safelora", "lisa", "sbr", "kl_budget")


@pytest.mark.parametrize("method", METHODS)
def test_a_method_on_one_process_and_on_two(llama, anchors, tmp_path, method):
    loss, metrics = losses_of_methods(llama, anchors)[method]
    config = config_with(loss, llama, tmp_path)
    recipe = recipe_after(config, 0, output_dir=str(tmp_path / "1"), batch_by_length=False)
    recipe.train()
    recipe.cleanup()
    arguments = [f"output_dir={tmp_path}/2", "batch_size=2", "batch_by_length=False"]
    done = tune_run_processes(config, *arguments, processes=2)
    assert done.returncode == 0, done.stderr
    for metric in ("loss", *metrics):
        one, two = logged(tmp_path / "1", metric), logged(tmp_path / "2", metric)
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5) and len(set(one)) > 5, metric
        assert max(one) > 0 and (method != "asft" or one[-1] > 1e-2), metric
    adapters = [read_adapter(tmp_path / name / "epoch_0" / "adapter")[0] for name in ("1", "2")]
    for module, one in adapters[0].items():
        torch.testing.assert_close(adapters[1][module].a, one.a, rtol=1e-3, atol=2e-4)
        torch.testing.assert_close(adapters[1][module].b, one.b, rtol=1e-3, atol=2e-4)


def resumed_is_whole(config: Path, folder: Path, at: int, **overrides) -> None:
    """A run that stops after some steps and goes on ends with the same bits as one that does not."""
    cfg = OmegaConf.merge(OmegaConf.load(config), OmegaConf.create(overrides))
    for name in ("whole", "parts"):
        cfg.output_dir = str(folder / name)
        OmegaConf.save(cfg, config)
        if name == "parts":
            recipe_after(config, at)._save_state()
            OmegaConf.save(OmegaConf.merge(cfg, {"resume_from_checkpoint": True}), config)
        recipe = recipe_after(config, 0)
        recipe.train()
        recipe.cleanup()
    whole, parts = (
        load_file(folder / name / f"epoch_{cfg.epochs - 1}" / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("lisa", "kl_budget")])
def test_a_resumed_method_goes_on_from_where_it_was(llama, anchors, tmp_path, method):
    loss, _ = losses_of_methods(llama, anchors)[method]
    resumed_is_whole(config_with(loss, llama, tmp_path), tmp_path, at=4, epochs=1)


def test_lisa_resumes_with_both_states(workspace, anchors, tmp_path):
    config = config_with(lisa_loss(anchors, k1=2, k2=3, rho=2.0), workspace, tmp_path)
    resumed_is_whole(config, tmp_path, at=9, epochs=1)  # in the middle of a state


@pytest.mark.parametrize("scale", [1e-3, 1.0])
@pytest.mark.parametrize("start", [0.01, 300.0])
def test_the_budget_is_met_from_both_sides_at_any_scale(scale, start):
    """A student whose KL is scale / (1 + lambda), and follows lambda with a delay."""
    coefficients = {"ce": 1.0, "kl": start}
    budget, kl = Budget(coefficients, "kl", scale / 10), scale
    trace = []
    for _ in range(600):
        kl += 0.1 * (scale / (1 + coefficients["kl"]) - kl)
        budget.after_step({"kl": kl})
        trace.append(coefficients["kl"])
    assert kl == pytest.approx(scale / 10, rel=0.05) and trace[-1] == pytest.approx(9, rel=0.05)
    assert coefficients["ce"] == 1.0 and len(set(trace)) > 500
    for _ in range(1000):
        budget.after_step({"kl": 0.0})
    assert coefficients["kl"] == 1e-3  # and no further


def test_a_run_finds_lambda_for_its_budget(workspace, tmp_path):
    """Without it the KL of this run is 0.07 at the end; the trace is in the log, the last value in pact.json."""
    loss = dict(OmegaConf.load(workspace).loss) | {"preset": "tail", "lambda_kl": 3.0, "kl_budget": 0.02}
    config = config_with(loss, workspace, tmp_path)
    more = {"epochs": 16, "optimizer": {"lr": 5e-3}, "save_adapter_weights_only": True}
    recipe = recipe_after(config, 0, output_dir=str(tmp_path / "out"), **more)
    recipe.train()
    recipe.cleanup()
    kl, strength = (logged(tmp_path / "out", name) for name in ("kl", "coefficient_kl"))
    assert max(kl) > 0.03 and sum(kl[-40:]) / 40 == pytest.approx(0.02, rel=0.3)
    assert min(strength) < 2.5 and strength[-1] > 6
    stamp = json.loads((tmp_path / "out" / "epoch_15" / "pact.json").read_text())
    assert stamp["final"]["coefficient_kl"] == pytest.approx(strength[-1], rel=1e-3)


def test_a_resumed_controller_goes_on_from_where_it_was(workspace, tmp_path):
    loss = dict(OmegaConf.load(workspace).loss) | {"preset": "tail", "kl_budget": 0.02}
    resumed_is_whole(config_with(loss, workspace, tmp_path), tmp_path, at=6, epochs=1)


def test_a_budget_without_a_constraint(workspace, tmp_path):
    loss = dict(OmegaConf.load(workspace).loss) | {"lambda_kl": 0, "kl_budget": 0.05}
    with pytest.raises(UserError, match="loss.kl_budget finds lambda_kl"):
        recipe_after(config_with(loss, workspace, tmp_path), 0, output_dir=str(tmp_path / "out"))


def test_constrained_sft_of_rows_without_a_constraint_is_cross_entropy(workspace, tmp_path):
    recipe = moved(CONSTRAINED, workspace, tmp_path)
    object.__setattr__(recipe.rows[1], "weight", 0.0)

    def naive(student, reference, labels, position):
        return torch.nn.functional.cross_entropy(student, labels, reduction="sum")

    assert_naive(recipe, naive, rows=[1])
    with pytest.raises(AssertionError):
        assert_naive(recipe, naive, rows=[0])
