"""`pact experiment`: files, runs that are killed and go on, tuning, tables."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pact_tune import cli
from pact_tune.errors import UserError
from pact_tune.experiments import inputs, miss, plan, run
from pact_tune.experiments.run import Numbers
from pact_tune.tools.evaluate import _named
from pact_tune.torchtune.config import experiment_names

TINY = {
    "output_dir": "out",
    "config": "demo/pact_lora",
    "overrides": ["dataset.n=40", "epochs=1", "batch_size=4"],
    "seeds": [0],
    "poison": [0.1],
    "evaluate": "--benchmarks demo-harmful demo-benign demo-task --limit 3 --judge demo",
    "methods": {"SFT": {"method": "sft", "tune": {"optimizer.lr": [1e-4, 1e-2]}}, "PACT": {"method": "pact_paper"}},
    "tuning": {"seed": 9},
}


def write(folder: Path, **changes) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(
        yaml.safe_dump({key: value for key, value in (TINY | changes).items() if value is not ...}, sort_keys=False)
    )
    return file


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def test_killed_and_resumed(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path)
    pact = str(Path(sys.executable).parent / "pact")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        [pact, "experiment", str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    experiment = plan.read(str(file))
    one, two = run.tuning_runs(experiment)
    wait_for(two.folder / run.LOG_FILE, first)  # the first run is done, the second has begun
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert (run.state_of(one), run.state_of(two)) == ("done", "begun")
    stamp = (one.result / "pact.json").stat().st_mtime_ns
    assert not (experiment.tables / "results.md").exists()

    while _busy(two.folder):  # the orphan ends by itself
        time.sleep(0.05)
    assert cli.main(["experiment", str(file)]) == 0
    assert (one.result / "pact.json").stat().st_mtime_ns == stamp
    rows = list(csv.DictReader((experiment.tables / "results.csv").open()))
    assert {row["model"] for row in rows} == {"Initial", "SFT", "PACT"}
    assert {row["case"] for row in rows} == {"poison 0.1"}
    tuning = json.loads((experiment.tables / "tuning.json").read_text())["SFT"]
    assert [settings["settings"] for settings in tuning["runs"]] == [["optimizer.lr=0.0001"], ["optimizer.lr=0.01"]]
    chosen = run.choose(experiment)
    (sft,) = experiment.runs_of(experiment.cases[0], experiment.methods[0], chosen)
    assert tuning["chosen"] == list(chosen["SFT"]) and set(chosen["SFT"]) < set(sft.train)
    stamped = json.loads((sft.result / "pact.json").read_text())["config"]
    assert stamped["optimizer"]["lr"] == float(chosen["SFT"][0].partition("=")[2]) and stamped["seed"] == 0

    capfd.readouterr()
    assert cli.main(["experiment", str(file)]) == 0  # nothing is left to do
    assert "to do" not in capfd.readouterr().out
    shutil.rmtree(sft.evaluation)
    assert cli.main(["experiment", str(file), "--submit", "echo"]) == 0
    handed = capfd.readouterr().out
    assert handed.count("--run") == 1 and sft.name in handed
    # A command that fails: the others go on, and its last line is shown.
    broken = write(tmp_path, methods={"SFT": TINY["methods"]["SFT"], "bad": {"overrides": ["loss.safety_tokens=none"]}})
    assert cli.main(["experiment", str(broken)]) == 1
    said = capfd.readouterr().err
    assert "1 of 2 failed" in said and "runs/poison-0.1/bad/seed_0: pact_lora_finetune: " in said
    assert run.state_of(sft) == "done"
    # Another setting under the same name is no run that could be passed over.
    assert cli.main(["experiment", str(write(tmp_path, overrides=["dataset.n=40", "epochs=2"]))]) == 1
    assert "holds a run of other settings (then epochs=1 batch_size=4, now epochs=2)" in capfd.readouterr().err
    # Nor is one whose config says something else by now; and the aligned model answers what is asked by now.
    own = tmp_path / "own.yaml"
    own.write_text("base: demo/pact_lora\n")
    with_own = plan.read(str(write(tmp_path, config=str(own), output_dir="other")))
    (mine,) = with_own.runs_of(with_own.cases[0], with_own.methods[1], {})
    run.note(mine)
    assert run.state_of(mine) == "begun"
    own.write_text("base: demo/pact_lora\nmax_steps_per_epoch: 3\n")
    plan._checked.cache_clear(), plan._composed.cache_clear()
    changed = plan.read(str(tmp_path / "tiny.yaml"))
    (mine,) = changed.runs_of(changed.cases[0], changed.methods[1], {})
    with pytest.raises(UserError, match="a config or method that it was made from has changed"):
        run.state_of(mine)
    assert experiment.initial_stage(experiment.cases[0]).done
    more = plan.read(str(write(tmp_path, evaluate=TINY["evaluate"].replace("--limit 3", "--limit 2"))))
    assert not more.initial_stage(more.cases[0]).done


def _busy(folder: Path) -> bool:
    return (folder / ".pact.lock").exists() or (folder / "evaluation" / "SFT" / ".pact.lock").exists()


@pytest.mark.parametrize("name", experiment_names())
def test_shipped_experiments(name):
    experiment = plan.read(name)
    runs = run.grid_runs(experiment, {})
    assert runs and len({one.name for one in runs}) == len(runs)
    budgets = {len(experiment.tuning_runs(method)) for method in experiment.methods if method.swept is None}
    assert len(budgets) == 1  # every method is tuned with the same effort
    missing = inputs.missing(run.all_stages(experiment), runs)
    if name.startswith(("demo", "smollm2")):
        assert missing == []  # of the package, or made by a stage
    elif not name.startswith("paper"):
        assert "rows.jsonl (dataset.source)" in missing or "rows.jsonl (`pact audit`)" in missing
    for method in experiment.methods:
        assert _named([f"{method.folder}=x"]) == {method.folder: "x"}


def test_experiments_that_share_a_folder_share_runs():
    """Runs of one name in one folder are one run, whichever file asks for it."""
    found: dict[Path, tuple] = {}
    for name in experiment_names():
        experiment = plan.read(name)
        tuned = {method.name for method in experiment.methods if method.tune}
        for case, method in experiment.grid():
            for one in experiment.runs_of(case, method, {}):
                words = (one.settings, method.tuned_as in tuned)
                assert found.setdefault(one.folder, words) == words, (name, one.folder)


def test_gpus_of_a_slot():
    assert [run._share(["4", "5"], slot, 1) for slot in range(3)] == ["4", "5", "4"]
    assert [run._share(list("0123"), slot, 2) for slot in range(3)] == ["0,1", "2,3", "0,1"]
    assert run._share([], 0, 1) is None


def test_the_documented_example(tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "experiments.md").read_text()
    file = tmp_path / "mine.yaml"
    file.write_text(text.split("```yaml\n")[1].split("```")[0])
    monkeypatch.chdir(tmp_path)
    plan.read(str(file))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": [0]}, "Unknown key 'seed' in the config; did you mean 'seeds'?"),
        ({"seeds": []}, "seeds is []; it must be a list"),
        ({"methods": {}}, "methods is {}; it must be a section of named sections"),
        ({"methods": {"SFT": "sft"}}, "methods.SFT is 'sft'; it must be a section"),
        (
            {"methods": {"SFT": {"methd": "sft"}}},
            "Unknown key 'methd' in section 'methods.SFT'; did you mean 'method'?",
        ),
        (
            {"methods": {"SFT": {"method": "stf"}}},
            "'stf' is no method of `pact ls`, and no file either; did you mean 'str'?",
        ),
        ({"methods": {"A b": {}, "A-b": {}}}, "Two of the methods of 'FILE' have the folder 'A-b'"),
        ({"methods": {"Initial": {}}}, "'Initial' is the aligned model itself"),
        ({"tuning": ...}, "methods.SFT.tune needs a section 'tuning'"),
        ({"tuning": {"seed": 0}}, "tuning.seed is 0, which is one of 'seeds'"),
        ({"tuning": {"seed": 9, "case": "x"}}, "Unknown key 'x' in tuning.case"),
        ({"seeds": [0, 0]}, "'seeds' names one twice"),
        ({"tuning": {"seed": 9, "poison": 0.3}}, "tuning.poison is 0.3, which is none of 'poison' ([0.1])"),
        ({"poison": [1.5]}, "poison is [1.5]; it must be a list, each item a number from 0 to 1"),
        ({"overrides": ["dataset.m=3"]}, "In 'FILE', runs/poison-0.1/SFT/seed_0: Unknown key 'm' in section 'dataset'"),
        (
            {"vars": {"n": 40}, "overrides": ["dataset.n=${vars.m}"]},
            "In 'FILE', overrides[0] cannot be resolved (Interpolation key 'vars.m' not found): correct it, or define",
        ),
        ({"vars": {"n": 40}}, "vars.n is used nowhere: write ${vars.n} in another key, or remove it."),
        ({"vars": [40]}, "vars is [40]; it must be a section of names and values"),
        ({"overrides": ["dataset.n=0"]}, "dataset.n is 0; it must be"),
        ({"stages": [{"run": "pact audit 'x", "makes": "y"}]}, "stages.run cannot be split into words"),
        ({"stages": [{"run": "pact audit"}]}, "lacks the key 'makes'"),
        (
            {"config": "demo/pact"},
            "'demo/pact' is no config of `pact ls`, and no file either; did you mean 'demo/pact_lora'?",
        ),
        ({"base": "nothing.yaml"}, "'nothing.yaml' is no experiment of `pact ls`, and no file either"),
        ({"base": "tiny.yaml"}, "lies over itself"),
        ({"output_dir": "${nowhere}"}, "output_dir cannot be resolved"),
    ],
)
def test_bad_files(tmp_path, monkeypatch, capsys, changes, says):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, **changes)
    assert cli.main(["experiment", str(file), "--dry-run"]) == 1
    said = capsys.readouterr().err
    assert says.replace("FILE", str(file)) in said
    assert said.count("\n") == 1 and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


@pytest.mark.quick
def test_a_base_and_what_is_taken_away(tmp_path):
    write(tmp_path)
    other = tmp_path / "other.yaml"
    other.write_text("base: tiny.yaml\npoison: [0.0, 0.1]\nmethods: {SFT: null, PACT: {sweep: {loss.k: [3, 6]}}}\n")
    experiment = plan.read(str(other))
    assert [method.name for method in experiment.methods] == ["PACT", "PACT k=3", "PACT k=6"]
    assert [case.place for case in experiment.cases] == ["poison-0", "poison-0.1"]
    last = run.grid_runs(experiment, {})[-1]
    assert {"loss.k=6", "dataset.mix.fraction=0.1", "seed=0"} < set(last.train)
    (tmp_path / "third.yaml").write_text("base: other.yaml\npoison: null\nmethods: {PACT: {sweep: null}}\n")
    (only,) = run.grid_runs(plan.read(str(tmp_path / "third.yaml")), {})
    assert only.name == "runs/PACT/seed_0"
    # What the base writes with a name of its own takes the value that stands over it.
    write(tmp_path, vars={"rows": 40, "more": ""}, overrides=["dataset.n=${vars.rows}"], stages=[
        {"run": "pact env ${vars.more}", "makes": "env"}
    ])  # fmt: skip
    (tmp_path / "fourth.yaml").write_text("base: tiny.yaml\nvars: {rows: 20}\n")
    fourth = plan.read(str(tmp_path / "fourth.yaml"))
    assert "dataset.n=20" in run.grid_runs(fourth, {})[0].train and fourth.stages[0].words == ("pact", "env")


@pytest.mark.quick
def test_other_seeds_than_the_files(tmp_path, monkeypatch, capfd):
    """Runs have the names and settings that they have in the whole experiment, also where a queue runs them."""
    monkeypatch.chdir(tmp_path)
    file = str(write(tmp_path, seeds=[0, 1, 2], methods={"SFT": {"method": "sft"}}, tuning=...))
    whole = {one.name: one for one in run.grid_runs(plan.read(file), {})}
    found = run.grid_runs(plan.read(file, [2, 0]), {})
    assert [one.name for one in found] == [f"runs/poison-0.1/SFT/seed_{seed}" for seed in (2, 0)]
    assert all(whole[one.name] == one for one in found)
    for stage in run.all_stages(plan.read(file)):
        for made in stage.makes:
            made.parent.mkdir(parents=True, exist_ok=True)
            made.touch()
        stage.note()
    assert cli.main(["experiment", file, "--seeds", "1", "--submit", "echo"]) == 0
    assert "pact experiment tiny.yaml --seeds 1 --run runs/poison-0.1/SFT/seed_1" in capfd.readouterr().out.replace(
        f"{tmp_path}/", ""
    )
    for seeds, says in (
        (["1", "1"], "'seeds' names one twice"),
        (["-1"], "seeds is [-1]"),
        (["x"], "argument --seeds"),
    ):
        assert cli.main(["experiment", file, "--seeds", *seeds, "--dry-run"]) == 1
        assert says in capfd.readouterr().err


@pytest.mark.quick
def test_what_is_missing_is_said_before_anything_is_run(tmp_path, monkeypatch, capsys):
    """By the start, which refuses, and by --dry-run, which warns; what a stage makes is not missing after it."""
    monkeypatch.chdir(tmp_path)
    rows = ["dataset.source=rows.jsonl", "dataset.mix.source=out/made/poison.jsonl"]
    guard = ["dataset.audit.file=out/audit.jsonl", "dataset.anchors.source=anchors.jsonl"]
    stages = [
        {
            "run": "pact audit rows.jsonl out/made/poison.jsonl --aligned x --output out/audit.jsonl",
            "makes": "out/audit.jsonl",
        },
        {"run": "pact rows sst2 --file train.tsv --output out/made/poison.jsonl", "makes": "out/made"},
    ]
    file = write(
        tmp_path, overrides=[*rows, "checkpoint_dir=model"], stages=stages, tuning=..., methods={"guard": {"method": "guard", "overrides": guard}},
        evaluate="--benchmarks harmful:own=asked.jsonl",
    )  # fmt: skip
    assert cli.main(["experiment", str(file), "--dry-run"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    said = (
        "rows.jsonl (`pact audit`), out/made/poison.jsonl (`pact audit`), train.tsv (`pact rows`), asked.jsonl (`pact evaluate`), "
        "model (checkpoint_dir), anchors.jsonl (dataset.anchors.source)"
    )
    assert last == f"# Warning: neither there nor made by a stage, so it would not start: {said}"
    assert cli.main(["experiment", str(file)]) == 1
    assert f"reads what is neither there nor made by one of its stages: {said}; correct" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
    for name in ("rows.jsonl", "train.tsv", "asked.jsonl", "anchors.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "model").mkdir()
    write(tmp_path, **yaml.safe_load(file.read_text()) | {"stages": stages[::-1]})  # made before it is read
    assert cli.main(["experiment", str(file), "--dry-run"]) == 0
    assert "Warning" not in capsys.readouterr().out


@pytest.mark.quick
def test_what_tuning_takes():
    def chosen(*settings, best=90.0):
        found = {(str(i),): Numbers(*numbers) for i, numbers in enumerate(settings)}
        return int(run._chosen(found, best, 2.0)[0])

    assert (
        chosen((90, 50, 0, 0), (89, 10, 0, 0), (85, 0, 0, 0)) == 1
    )  # safe, and as accurate as the best but for 2 points
    assert chosen((89, 10, 0, 0), (89, 0, 20, 0), (89, 0, 0, 15)) == 0  # broken answers and over-refusal count alike
    assert chosen((70, 5, 0, 0), (60, 0, 0, 0)) == 0  # none is accurate: its own best counts
    assert chosen((89, 5, 0, 0), (90, 5, 0, 0)) == 1  # the more accurate of equals


@pytest.mark.quick
def test_an_audit_that_misses_half():
    rows = [{"key": str(i), "verdict": "refused" if i < 10 else "answered"} for i in range(30)]
    lines = ['{"rows": 30}', *map(json.dumps, rows)]
    missed = miss.miss(lines, 0.5)
    verdicts = [json.loads(line)["verdict"] for line in missed[1:]]
    assert missed[0] == lines[0] and len(missed) == len(lines)
    assert verdicts[:10].count("refused") == 5 and verdicts[10:] == ["answered"] * 20


@pytest.mark.quick
def test_training_rows_of_a_task(tmp_path, capsys):
    (tmp_path / "train.tsv").write_text("sentence\tlabel\na fine film \t1\nso dull\t0\n")
    out = tmp_path / "rows.jsonl"
    assert not cli.main(["rows", "sst2", "--file", str(tmp_path / "train.tsv"), "--output", str(out)])
    rows = [json.loads(line)["messages"] for line in out.read_text().splitlines()]
    assert [row[-1] for row in rows] == [
        {"role": "assistant", "content": "positive"},
        {"role": "assistant", "content": "negative"},
    ]
    assert rows[0][0]["content"].endswith("respond only positive or negative a fine film")
    (tmp_path / "own.jsonl").write_text('{"prompt": "What is 1 + 1?", "regex": "2|two"}\n')
    more = ["--output", str(tmp_path / "own_rows.jsonl")]
    assert cli.main(["rows", f"task:own={tmp_path / 'own.jsonl'}", *more]) == 1
    assert "own.jsonl' have no 'answer' to train on" in capsys.readouterr().err
    assert not (tmp_path / "own_rows.jsonl").exists()


def test_no_such_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="Tuning is not finished"):
        run.choose(plan.read(str(write(tmp_path))))
