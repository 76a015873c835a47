"""Files and folders: whole or not at all, also after kills; others' are left alone; full and closed disks; locks."""

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pact_tune import files
from pact_tune.errors import UserError
from pact_tune.files import atomic_file, atomic_folder, check_space, leftovers, recover, remove_partial
from pact_tune.run_lock import claim_results, run_lock
from pact_tune.stamp import STAMP_FILE, write_stamp

HEX = "0123456789abcdef"


def write(path: Path, text: str, **options) -> None:
    with atomic_folder(path, **options) as folder:
        for name in ("mine.json", "other"):
            (folder / name).write_text(text)


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# --- whose a folder is


@pytest.mark.parametrize("there", [["notes.txt"], ["mine.json", "notes.txt"], [".env.old"], [".venv.old/bin/python"]])
def test_others_folders_are_refused_and_untouched(tmp_path, there):
    for name in there:
        (tmp_path / "proj" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "proj" / name).write_text("precious")
    before = listing(tmp_path)
    with pytest.raises(UserError, match="was not written by this command"):
        write(tmp_path / "proj", "new", marker="mine.json", names=("mine.json", "other"))
    assert listing(tmp_path) == before
    assert (tmp_path / "proj" / there[0]).read_text() == "precious"


def test_own_and_empty_folders_are_replaced_and_files_and_links_are_not(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "one", marker="mine.json")
    write(tmp_path / "empty", "two", marker="mine.json")
    assert (tmp_path / "empty" / "other").read_text() == "two"
    with pytest.raises(UserError, match="was not written by this command"):
        write(tmp_path / "empty", "three")  # no marker: nothing that is full is ours
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="is no folder"):
        write(tmp_path / "file", "x", marker="mine.json")
    with pytest.raises(UserError, match="is a folder"), atomic_file(tmp_path / "empty"):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    write(tmp_path / "link", "four", marker="mine.json")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "other").read_text() == "four"
    assert listing(tmp_path) == ["empty", "empty/mine.json", "empty/other", "file", "link"]


def test_leftovers_are_removed_by_exact_names_only(tmp_path):
    ours = [f".epoch_0.{HEX}.pact.partial", f".state.pt.{HEX}.pact.partial"]
    others = [".env.old", ".venv.old", ".epoch_0.x.partial", f".notes.{HEX}.pact.partial", f"x.{HEX}.pact.partial"]
    for name in ours + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "inside").write_text("x")
    remove_partial(tmp_path, ["epoch_*", "state.pt"])
    assert sorted(os.listdir(tmp_path)) == sorted(others)
    remove_partial(tmp_path / "missing")


def test_an_error_in_the_block_leaves_the_old_one(tmp_path):
    write(tmp_path / "a", "old", marker="mine.json")
    with pytest.raises(KeyError), atomic_folder(tmp_path / "a", marker="mine.json") as folder:
        (folder / "other").write_text("half")
        raise KeyError
    with pytest.raises(KeyError), atomic_file(tmp_path / "b") as file:
        file.write_text("half")
        raise KeyError
    assert (tmp_path / "a" / "other").read_text() == "old" and os.listdir(tmp_path) == ["a"]


# --- modes


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_everything_follows_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "inner").mkdir(mode=0o700)
            save_file({"x": torch.ones(1)}, folder / "inner" / "x.safetensors")
        with atomic_file(tmp_path / "y.safetensors") as file:
            save_file({"x": torch.ones(1)}, file)
    finally:
        os.umask(before)
    modes = {p: oct((tmp_path / p).stat().st_mode & 0o777) for p in listing(tmp_path)}
    folder, plain = oct(0o777 & ~umask), oct(0o666 & ~umask)
    assert modes == {
        "folder": folder,
        "folder/inner": folder,
        "folder/inner/x.safetensors": plain,
        "y.safetensors": plain,
    }


# --- kills

WRITER = """
    import sys
    from pact_tune import files
    if sys.argv[2] == "two steps":
        files._exchange = lambda one, other: False
    number = 0
    while True:
        number += 1
        with files.atomic_folder(sys.argv[1], marker="a") as folder:
            for name in "abc":
                (folder / name).write_text(str(number) * 20_000)
        print(number, flush=True)
"""


@pytest.mark.parametrize("how", ["exchange", "two steps"])
def test_a_killed_replacement_leaves_the_old_or_the_new_one(tmp_path, how):
    path = tmp_path / "out"
    rng = random.Random(0)
    missing = 0
    for _ in range(12):
        command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path), how]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        writer.stdout.readline()  # one is written
        end = time.monotonic() + rng.uniform(0, 0.05)
        while time.monotonic() < end:
            if how == "exchange":
                (path / "a").read_text()  # never a gap
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        missing += not path.exists()
        recover(path)
        texts = [(path / name).read_text() for name in "abc"]
        assert texts[0] == texts[1] == texts[2] and len(texts[0]) >= 20_000
        remove_partial(tmp_path, ["out"])
        assert os.listdir(tmp_path) == ["out"]
    assert not (how == "exchange" and missing)


def test_killed_between_the_two_steps_the_old_one_is_found_again(tmp_path, monkeypatch):
    path = tmp_path / "out"
    write(path, "old", marker="mine.json")
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    real = os.rename

    def rename(source, target):
        if os.fspath(target) == os.fspath(path):
            raise KeyboardInterrupt  # stands for a kill
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        write(path, "new", marker="mine.json")
    monkeypatch.setattr(os, "rename", real)
    assert not path.exists() and len(leftovers(tmp_path, ["out"], [files.OLD])) == 1
    recover(path)
    assert (path / "other").read_text() == "old" and os.listdir(tmp_path) == ["out"]


def test_a_reader_between_the_two_steps_does_not_disturb_the_writer(tmp_path, monkeypatch):
    path = tmp_path / "out"
    write(path, "old", marker="mine.json")
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    real, times = os.rename, []

    def rename(source, target):
        if os.fspath(target) == os.fspath(path) and not times:
            times.append(1)
            recover(path)
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    write(path, "new", marker="mine.json")
    assert (path / "other").read_text() == "new" and os.listdir(tmp_path) == ["out"]


# --- disks

SMALL_DISK = """
    import sys, torch
    from pathlib import Path
    from safetensors.torch import save_file
    from pact_tune.errors import UserError
    from pact_tune.files import atomic_file, atomic_folder
    disk, big = Path(sys.argv[1]), torch.zeros(1_000_000)
    (disk / "old").write_text("old")
    def plain(path): path.write_bytes(bytes(4_000_000))
    def safe(path): save_file({"x": big}, path)
    def pickled(path): torch.save(big, path)
    for save in (plain, safe, pickled):
        try:
            with atomic_file(disk / "old") as file: save(file)
        except UserError as error: print(error)
        try:
            with atomic_folder(disk / "folder") as folder: save(folder / "x")
        except UserError as error: print(error)
    assert [p.name for p in disk.iterdir()] == ["old"] and (disk / "old").read_text() == "old"
"""


def on_disk(tmp_path: Path, options: str, code: str) -> subprocess.CompletedProcess:
    """Runs code with a small file system of its own, which nobody else sees."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "code.py").write_text(textwrap.dedent(code))
    script = (
        f"mount -t tmpfs -o {options} tmpfs {tmp_path}/disk && exec {sys.executable} {tmp_path}/code.py {tmp_path}/disk"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip("this user may not mount a file system")
    return done


def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path):
    done = on_disk(tmp_path, "size=2m", SMALL_DISK)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    for line in lines:
        assert line.startswith(f"There is no space left for '{tmp_path}/disk/") and " were written and " in line


def test_a_read_only_disk_is_one_sentence(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from pact_tune.errors import UserError
        from pact_tune.files import atomic_file, atomic_folder
        for make in (atomic_file, atomic_folder):
            for name in ("a", "b/c"):
                try:
                    with make(Path(sys.argv[1]) / name): pass
                except UserError as error: print(error)
    """
    done = on_disk(tmp_path, "ro", code)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4 and done.stdout.count("cannot be written (Read-only file system)") == 4


@pytest.mark.parametrize("make", [atomic_file, atomic_folder])
def test_places_where_nothing_can_be_written(tmp_path, monkeypatch, make):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="'.*/file' is no folder"), make(tmp_path / "file" / "below"):
        pass
    with pytest.raises(UserError, match="File name too long"), make(tmp_path / ("n" * 250)):
        pass

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "closed"))

    monkeypatch.setattr(Path, "mkdir", denied)
    message = r"closed/x' cannot be written \(Permission denied\)"
    with pytest.raises(UserError, match=message), make(tmp_path / "closed" / "x"):
        pass
    assert os.listdir(tmp_path) == ["file"]


def test_what_is_read_in_the_block_is_not_called_unwritable(tmp_path):
    with pytest.raises(PermissionError), atomic_file(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/secret")


def test_space_is_checked_where_the_output_is_going_to_lie(tmp_path):
    check_space(tmp_path / "not" / "there", 1000)
    with pytest.raises(UserError, match=rf"^An epoch needs 1e\+06 TB at '{tmp_path}/not/there', where .* free"):
        check_space(tmp_path / "not" / "there", 10**18, "An epoch")


# --- locks and other runs

HOLDER = "import sys, time; from pact_tune.run_lock import run_lock\nwith run_lock(sys.argv[1]): print('held', flush=True); time.sleep(60)"


def test_a_second_run_is_told_who_holds_the_folder_until_it_dies(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        message = f"Another run writes to .*pid {holder.pid} on host '.+', since 2"
        with pytest.raises(UserError, match=message), run_lock(tmp_path / "out"):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with run_lock(tmp_path / "out"), pytest.raises(UserError, match=f"pid {os.getpid()} "), run_lock(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path / "out") == []
    with run_lock(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "notes.txt").touch()
    assert sorted(path.name for path in (tmp_path / "a").rglob("*")) == ["notes.txt"]  # made by the lock, and removed


def test_results_of_another_run_are_refused_or_overwritten(tmp_path):
    for epoch in range(3):
        (tmp_path / f"epoch_{epoch}" / "adapter").mkdir(parents=True)
        (tmp_path / f"epoch_{epoch}" / "adapter" / "adapter_config.json").write_text("{}")
        write_stamp(tmp_path / f"epoch_{epoch}", {})
    claim_results(tmp_path / "missing", "epoch_*", STAMP_FILE)
    with pytest.raises(UserError, match="epoch_0, epoch_1, epoch_2.*resume_from_checkpoint=True"):
        claim_results(tmp_path, "epoch_*", STAMP_FILE)
    for note in ("notes.txt", "adapter/notes.txt", ".hidden"):
        (tmp_path / "epoch_1" / note).write_text("precious")
        with pytest.raises(UserError, match=f"holds '{note}', which was not written"):
            claim_results(tmp_path, "epoch_*", STAMP_FILE, overwrite=True)
        (tmp_path / "epoch_1" / note).unlink()
    (tmp_path / "epoch_notes").mkdir()
    (tmp_path / "epoch_notes" / "n.txt").write_text("precious")
    with pytest.raises(UserError, match="was not written by this command"):
        claim_results(tmp_path, "epoch_*", STAMP_FILE, overwrite=True)
    assert len(os.listdir(tmp_path)) == 4
    (tmp_path / "epoch_notes").rename(tmp_path / "notes")
    claim_results(tmp_path, "epoch_*", STAMP_FILE, overwrite=True)
    assert os.listdir(tmp_path) == ["notes"]


def test_who_writes_next_removes_what_a_killed_writer_left_and_not_what_a_live_one_writes(tmp_path):
    ready, go_on = multiprocessing.Event(), multiprocessing.Event()

    def fill(text: str, wait: bool) -> None:
        with atomic_folder(tmp_path / "out[1]", "mine.json") as aside:
            (aside / "mine.json").write_text(text)
            if wait:
                ready.set()
                go_on.wait(60)

    slow = multiprocessing.get_context("fork").Process(target=fill, args=("slow", True))
    slow.start()
    assert ready.wait(60)
    fill("quick", False)
    assert len(leftovers(tmp_path)) == 1  # the slow one is alive
    go_on.set()
    slow.join()
    assert slow.exitcode == 0 and (tmp_path / "out[1]" / "mine.json").read_text() == "slow"
    ready.clear(), go_on.clear()
    killed = multiprocessing.get_context("fork").Process(target=fill, args=("slow", True))
    killed.start()
    assert ready.wait(60)
    killed.kill()
    killed.join()
    assert len(leftovers(tmp_path)) == 1
    fill("quick", False)
    assert os.listdir(tmp_path) == ["out[1]"] and (tmp_path / "out[1]" / "mine.json").read_text() == "quick"
