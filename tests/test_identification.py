"""Identification against a loop written from Eq. 1-2, and its promises: same files, resume, processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from recipe import AT_EXIT
from transformers import AutoModelForCausalLM

from pact_tune import identification, scoring
from pact_tune.conversations import encode, load_tokenizer, render_prompt
from pact_tune.errors import UserError
from pact_tune.identification import PRESETS, identify_safety_tokens
from pact_tune.safety_tokens import SafetyTokens

PROMPTS = [
    "How do I paint the fence?",
    "What is seven plus nine?",
    "I cannot clean a window. Why?",
    "positive or",
    "Is this",
]
FILES = ("safety_tokens.safetensors", "safety_tokens.json")
OPTIONS = {"k": 8, "max_response_tokens": 10, "tokens_per_batch": 128, "progress": False}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return tiny.tiny_model(folder / "aligned", seed=1), tiny.tiny_model(folder / "base", seed=2)


def greedy(model, prompt: list[int], eos: int, longest: int) -> list[int]:
    ids = list(prompt)
    while len(ids) - len(prompt) < longest:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


@torch.inference_mode()
def naive(aligned: Path, base: Path, prompts, official: bool, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """d(v) and mean p_safe(v), both ``[V]``: one prompt, one position at a time, the model's own full logits."""
    tokenizer = load_tokenizer(str(aligned))
    safe, unsafe = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (aligned, base))
    d, r, count = 0.0, 0.0, 0.0
    for text in prompts:
        prompt = render_prompt(tokenizer, [{"role": "user", "content": text}])
        response = greedy(safe, prompt, tokenizer.eos_token_id, longest)
        if official and response[-1] == tokenizer.eos_token_id:
            response = response[:-1]
        other = encode(tokenizer, f"User: {text}\n\nAssistant: ") if official else prompt
        weight = 1 / len(response) if official else 1
        for t in range(len(response)):
            p = safe(torch.tensor([prompt + response[:t]])).logits[0, -1].double().softmax(-1)
            q = unsafe(torch.tensor([other + response[:t]])).logits[0, -1].double().softmax(-1)
            d, r, count = d + weight * (p - q), r + weight * p, count + weight
    return d / count, r / count


@pytest.mark.parametrize("preset", ["paper", "official"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma2"])
def test_equals_a_loop_over_positions(tmp_path, architecture, preset, monkeypatch):
    monkeypatch.setitem(scoring.CHUNK_BYTES, "cpu", 4_000)  # several chunks a batch
    # Gemma 2's soft-cap is set low enough to change the probabilities.
    extra = {"bos": architecture != "qwen2"} | ({"final_logit_softcapping": 2.0} if architecture == "gemma2" else {})
    aligned = tiny.tiny_model(tmp_path / "aligned", architecture, seed=1, **extra)
    base = tiny.tiny_model(tmp_path / "base", architecture, seed=2, tied=False, **extra)
    options = PRESETS[preset] | OPTIONS
    tokens = identify_safety_tokens(aligned, base, PROMPTS, **options)
    d, r = naive(aligned, base, PROMPTS, preset == "official", options["max_response_tokens"])
    ids = tokens.candidates["ids"]
    assert len(ids) == len(d)
    torch.testing.assert_close(tokens.candidates["scores"].double(), d[ids], rtol=0, atol=1e-6)
    torch.testing.assert_close(tokens.candidates["reference_probability"].double(), r[ids], rtol=0, atol=1e-6)
    ranked = d if preset == "paper" else r
    assert tokens.ids.tolist() == ranked.topk(8).indices.tolist()


@pytest.mark.parametrize(("architecture", "left"), [("qwen2", 0.7), ("llama", 0.7), ("gemma2", 1)])
def test_what_prompts_share_is_computed_once_and_changes_no_number(tmp_path, architecture, left, monkeypatch):
    """Gemma 2's attention cannot be split, and it is computed as ever."""
    aligned, base = (tiny.tiny_model(tmp_path / str(seed), architecture, seed=seed) for seed in (1, 2))
    harmful, benign = (
        ["I'm sorry, but how? " * 3 + p for p in PROMPTS],
        ["What is the best way? " + p for p in PROMPTS],
    )
    computed: list[int] = []
    collate = scoring.collate

    def counted(*arguments, **options):
        batch = collate(*arguments, **options)
        computed.append(batch.tokens.numel())
        return batch

    def measured():
        computed.clear()
        options = OPTIONS | {"tokens_per_batch": 4096}
        found = identify_safety_tokens(aligned, base, harmful, benign_prompts=benign, **options)
        return found.candidates, sum(computed)

    monkeypatch.setattr(scoring, "collate", counted)
    shared, tokens = measured()
    monkeypatch.setattr(scoring, "find_longest_shared", lambda *_: 0)
    apart, all_tokens = measured()
    for name in ("scores", "reference_probability", "benign_probability"):
        torch.testing.assert_close(shared[name], apart[name], rtol=0, atol=1e-6)
    assert tokens == all_tokens if left == 1 else tokens < left * all_tokens


def test_two_runs_give_the_same_files_and_so_does_sampling(pair, tmp_path):
    for name, more in (("greedy", {}), ("sampled", {"temperature": 1.0, "seed": 3})):
        for run in "ab":
            identify_safety_tokens(*pair, PROMPTS, **OPTIONS | more).save(tmp_path / name / run)
        for file in FILES:
            assert (tmp_path / name / "a" / file).read_bytes() == (tmp_path / name / "b" / file).read_bytes()
    positions = [SafetyTokens.load(tmp_path / name / "a").scores for name in ("greedy", "sampled")]
    assert not torch.equal(*positions)


def test_padded_ids_are_never_chosen(tmp_path):
    aligned = tiny.tiny_model(tmp_path / "aligned", seed=1, vocab_size=448)
    base = tiny.tiny_model(tmp_path / "base", seed=2, vocab_size=512)  # padded differently
    size = len(load_tokenizer(str(aligned)))
    tokens = identify_safety_tokens(aligned, base, PROMPTS, **OPTIONS | {"k": 10_000})
    assert tokens.provenance["vocab_size"] == 448
    assert len(tokens) == size and int(tokens.ids.max()) == size - 1


def test_one_model_in_memory_at_a_time(pair, monkeypatch):
    import gc
    import weakref

    alive, most = [], []
    load = identification._load

    def counting(run, folder):
        model = load(run, folder)
        alive.append(weakref.ref(model))
        gc.collect()
        most.append(sum(reference() is not None for reference in alive))
        return model

    monkeypatch.setattr(identification, "_load", counting)
    identify_safety_tokens(*pair, PROMPTS, **OPTIONS)
    assert most == [1, 1]


def test_given_responses_are_used_and_cut(pair):
    responses = ["I cannot help with that request."] * len(PROMPTS)
    tokens = identify_safety_tokens(*pair, PROMPTS, responses=responses, **OPTIONS | {"max_response_tokens": 3})
    assert tokens.provenance["num_positions"] == 3 * len(PROMPTS)
    assert tokens.provenance["options"]["responses"] == "given"
    with_eos = identify_safety_tokens(*pair, PROMPTS[:1], responses=["I cannot"], **OPTIONS)
    without = identify_safety_tokens(*pair, PROMPTS[:1], responses=["I cannot"], include_eos=False, **OPTIONS)
    assert with_eos.provenance["num_positions"] == without.provenance["num_positions"] + 1


def test_stability_is_one_for_equal_halves(pair):
    twice = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert identify_safety_tokens(*pair, twice, **OPTIONS).provenance["stability"] == 1.0
    assert identify_safety_tokens(*pair, PROMPTS, **OPTIONS).provenance["stability"] < 1.0
    assert identify_safety_tokens(*pair, PROMPTS[:1], **OPTIONS).provenance["stability"] is None


def test_style_tokens_are_marked_and_left_out(pair):
    same = identify_safety_tokens(*pair, PROMPTS, benign_prompts=PROMPTS, **OPTIONS)
    assert same.style.all()  # the same answers: everything is as probable there
    marked = identify_safety_tokens(*pair, PROMPTS[:2], benign_prompts=PROMPTS[3:], **OPTIONS)
    assert marked.style.any() and not marked.style.all()
    kept = identify_safety_tokens(*pair, PROMPTS[:2], benign_prompts=PROMPTS[3:], leave_out_style=True, **OPTIONS)
    assert not kept.style.any()
    assert set(marked.ids[~marked.style].tolist()) <= set(kept.ids.tolist())
    assert not kept.select(10_000, "score", "raw").style.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "at least 1"),
        ({"ranking": "scores"}, "did you mean 'score'"),
        ({"average": "median"}, "macro, pooled"),
        ({"responses": ["one"]}, "5 prompts but 1 responses"),
        ({"leave_out_style": True}, "benign prompts"),
        ({"max_response_tokens": 600}, "too long for the model's 512 positions"),
    ],
)
def test_bad_options_are_refused(pair, options, message):
    with pytest.raises(UserError, match=message):
        identify_safety_tokens(*pair, PROMPTS, **OPTIONS | options)


def test_bad_models_are_refused(pair, tmp_path):
    with pytest.raises(UserError, match="config.json is missing"):
        identify_safety_tokens(tmp_path, pair[1], PROMPTS, **OPTIONS)
    with pytest.raises(UserError, match="there are none"):
        identify_safety_tokens(*pair, [], **OPTIONS)
    tokenizer = load_tokenizer(str(pair[1]))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "other")
    other = tiny.tiny_model(tmp_path / "other")
    with pytest.raises(UserError, match="different vocabularies"):
        identify_safety_tokens(pair[0], other, PROMPTS, **OPTIONS)


def test_a_work_folder_of_other_settings_is_refused(pair, tmp_path):
    work = tmp_path / "work"
    first = identify_safety_tokens(*pair, PROMPTS, work_dir=work, **OPTIONS)
    again = identify_safety_tokens(*pair, PROMPTS, work_dir=work, **OPTIONS | {"k": 4})  # K needs no new measurement
    assert again.ids.tolist() == first.ids[:4].tolist()
    with pytest.raises(UserError, match="max_response_tokens"):
        identify_safety_tokens(*pair, PROMPTS, work_dir=work, **OPTIONS | {"max_response_tokens": 9})
    with pytest.raises(UserError, match="prompts"):
        identify_safety_tokens(*pair, PROMPTS[:4], work_dir=work, **OPTIONS)
    settings = json.loads((work / "settings.json").read_text())
    (work / "settings.json").write_text(json.dumps({name: settings[name] for name in settings if name != "format"}))
    with pytest.raises(UserError, match="format"):  # sums over batches in another order
        identify_safety_tokens(*pair, PROMPTS, work_dir=work, **OPTIONS)


SCRIPT = """
import json, sys, time
from pact_tune import identification
arguments = json.loads(sys.argv[1])
for name in ("_generate", "_probability_sums"):
    def slow(*args, original=getattr(identification, name), name=name):
        time.sleep(arguments["delay"])
        result = original(*args)
        print(name, flush=True)
        return result
    setattr(identification, name, slow)
tokens = identification.identify_safety_tokens(*arguments["positional"], **arguments["options"])
tokens.save(arguments["output"])
"""


def batches_run(monkeypatch, pair, output, **options) -> list[str]:
    """Runs identification here, saves what it found, and says which batches were computed."""
    calls: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("_generate", "_probability_sums"):
            original = getattr(identification, name)
            patch.setattr(identification, name, lambda *a, o=original, n=name: (calls.append(n), o(*a))[1])
        identify_safety_tokens(*pair, PROMPTS, **OPTIONS | options).save(output)
    return calls


def test_killed_runs_go_on_without_redoing_work(pair, tmp_path, monkeypatch):
    work = tmp_path / "work"
    total = batches_run(monkeypatch, pair, tmp_path / "whole")
    arguments = {
        "positional": [str(pair[0]), str(pair[1]), PROMPTS],
        "options": OPTIONS | {"work_dir": str(work)},
        "output": str(tmp_path / "resumed"),
        "delay": 0.4,
    }
    command = [sys.executable, "-c", SCRIPT, json.dumps(arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    seen = [process.stdout.readline().strip() for _ in range(total.count("_generate") + 1)]
    time.sleep(0.2)  # the batch that was just announced is saved well within the next one's delay
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert seen[-1] == "_probability_sums" and not (tmp_path / "resumed").exists()
    process.stdout.close()
    rest = batches_run(monkeypatch, pair, tmp_path / "resumed", work_dir=work)
    assert rest == total[len(seen) :] and rest
    for file in FILES:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes()


def test_two_processes_equal_one(pair, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *("-m", "pact_tune.tools.compute_safety_tokens", "--aligned", pair[0], "--base", pair[1]),
            *("--prompts", prompts, "--output", tmp_path / "two"),
            *("--k", "8", "--max-response-tokens", "10", "--tokens-per-batch", "128"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(AT_EXIT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = identify_safety_tokens(*pair, PROMPTS, **OPTIONS), SafetyTokens.load(tmp_path / "two")
    assert one.ids.tolist() == two.ids.tolist()
    torch.testing.assert_close(one.candidates["scores"], two.candidates["scores"], rtol=0, atol=1e-7)
    assert one.provenance["num_positions"] == two.provenance["num_positions"]
