"""Messages and progress: streams, ranks, bars on a terminal, lines elsewhere."""

import io
import json
import logging
import os
import subprocess
import sys

import pytest
from recipe import tune_run

from pact_tune import cli, distributed, log
from pact_tune.errors import UserError
from pact_tune.log import EVERY_RANK, logger, progress


@pytest.fixture(autouse=True)
def screen():
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    log.setup()
    log.setup()  # again: nothing is said twice
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_information_goes_to_stdout_and_warnings_to_stderr(capsys):
    logger.info("computing %d views", 3)
    logger.warning("not measured")
    assert capsys.readouterr() == ("computing 3 views\n", "WARNING: not measured\n")


def test_other_ranks_say_errors_and_what_they_are_asked_to(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    logger.info("from everyone")
    logger.warning("from everyone")
    logger.warning("a damaged shard", extra=EVERY_RANK)
    logger.error("broken")
    for _ in progress(range(3), desc="Rows"):
        pass
    assert capsys.readouterr() == ("", "[rank 3] WARNING: a damaged shard\n[rank 3] ERROR: broken\n")


def test_without_a_terminal_there_are_lines_and_no_carriage_returns(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 16))
    monkeypatch.setattr(log.time, "monotonic", lambda: next(clock))
    with progress(total=8, desc="Rows", unit="row") as bar:
        for _ in range(8):
            bar.update()
            bar.set_postfix_str("loss 1.0")
    out, err = capsys.readouterr()
    assert err == "" and "\r" not in out
    lines = out.splitlines()
    assert 3 <= len(lines) < 8 and all(line.startswith("Rows: ") for line in lines)
    assert lines[-1].startswith("Rows: 100 % (8 of 8 row, ") and lines[-1].endswith(", loss 1.0)")


def test_short_work_writes_no_line(capsys):
    assert list(progress(range(5), desc="Rows")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")


def test_a_message_is_never_glued_to_a_bar(monkeypatch):
    both = Terminal()
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)
    with progress(total=2, desc="Rows") as bar:
        bar.update()
        logger.info("a message")
        bar.update()
    text = both.getvalue()
    assert "Rows:" in text and "\r" in text
    before, after = text.split("a message")
    # What stands on the line before the message was overwritten with blanks.
    assert before.split("\r")[-1] == "" and before.split("\r")[-2].strip() == "" and after.startswith("\n")


def test_torchao_says_nothing_when_it_is_imported():
    code = "from pact_tune import log; log.setup(); import torchtune"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert logging.getLogger("torchao").filters == [log._is_news]


def test_the_recipe_shows_tracebacks_on_demand(monkeypatch):
    """One sentence for users; the error itself, and so its traceback, with PACT_TUNE_DEBUG=1 (the commands likewise)."""
    monkeypatch.setenv("PACT_TUNE_DEBUG", "0")
    sentence = tune_run(monkeypatch, "demo/pact_lora", "epochs=0")
    assert isinstance(sentence, str) and sentence.startswith("pact_lora_finetune: ") and "epochs" in sentence
    assert cli.main(["validate", "demo/pact_lora", "epochs=0"]) == 1
    monkeypatch.setenv("PACT_TUNE_DEBUG", "1")
    with pytest.raises(UserError, match="epochs"):
        tune_run(monkeypatch, "demo/pact_lora", "epochs=0")
    with pytest.raises(UserError, match="epochs"):
        cli.main(["validate", "demo/pact_lora", "epochs=0"])


def test_one_of_several_processes_leaves_a_user_error_to_torchruns_report(tmp_path, capsys, monkeypatch):
    """Any command, so that the sentence stands below the report and not above it."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setattr(distributed, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="1"):
        cli.main(["tokens", "show", f"{tmp_path}/absent"])
    assert "is neither a folder" in json.loads(file.read_text())["message"]["message"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["ls"], ["ls", "--help"]])
def test_a_reader_that_has_read_enough_is_no_fault(words):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = subprocess.Popen(
        [sys.executable, "-m", "pact_tune.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert command.stdout and command.stderr
    command.stdout.close()
    assert (command.stderr.read(), command.wait()) == ("", 0)
