"""Shared by all tests: no network, one thread, and a small checkpoint with its config."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from recipe import write_workspace

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """Config of a tiny Qwen2 checkpoint; tests give output_dir themselves."""
    return write_workspace(tmp_path_factory.mktemp("qwen2"))
