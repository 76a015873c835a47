"""Two machines, as far as one can play both: two torchrun agents that find each other at a rendezvous, against one process."""

import os
import socket
import subprocess

import pytest
import torch
from recipe import AT_EXIT, logged, run_command, tune_run, write_workspace
from safetensors.torch import load_file


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def agents(config, *overrides: str) -> list[subprocess.CompletedProcess]:
    """The command of docs/multi_node.md, started once for each of two machines with one process each."""
    pact, run, *recipe = run_command(config, *overrides, command="pact")
    where = f"--rdzv_backend c10d --rdzv_endpoint 127.0.0.1:{free_port()} --rdzv_id test --local_addr 127.0.0.1".split()
    command = [pact, run, "--nnodes", "2", "--nproc_per_node", "1", *where, *recipe]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(AT_EXIT)}
    both = [subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=env) for _ in range(2)]
    try:
        ends = [process.communicate(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()
    return [subprocess.CompletedProcess(command, p.returncode, *end) for p, end in zip(both, ends, strict=True)]


def test_two_agents_train_what_one_process_trains(tmp_path, monkeypatch):
    """Equal global batches: the same losses and adapter; one of the two writes, and both fill one reference cache."""
    config = write_workspace(tmp_path, rows=16)
    assert (
        tune_run(monkeypatch, config, f"output_dir={tmp_path}/one", f"reference_cache.directory={tmp_path}/c1") is None
    )
    for end in agents(config, f"output_dir={tmp_path}/two", f"reference_cache.directory={tmp_path}/c2", "batch_size=2"):
        assert end.returncode == 0, end.stderr
    losses = logged(tmp_path / "one", "loss")
    assert len(losses) == 4
    assert logged(tmp_path / "two", "loss") == pytest.approx(losses, abs=1e-4)
    one, two = (
        load_file(tmp_path / run / "epoch_0" / "adapter" / "adapter_model.safetensors") for run in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-3, rtol=1e-3)
