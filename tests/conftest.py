"""Shared by all tests: no network, one thread, and a small checkpoint with its config."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import axolotl_environment
import pytest
import torch
from recipe import write_workspace

torch.set_num_threads(1)

# Whole files, so that a new test in one of them is in the quick tier without a thought.
QUICK = (
    "test_batching.py",
    "test_conversations.py",
    "test_files.py",
    "test_head.py",
    "test_log.py",
    "test_losses.py",
    "test_scoring.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the quick tier, and skips what needs an environment that is not there."""
    for item in items:
        if item.get_closest_marker("axolotl") and not axolotl_environment.INSTALLED:
            item.add_marker(pytest.mark.skip(reason="there is no environment of Axolotl: `make test-axolotl`"))
        if item.path.name in QUICK:
            item.add_marker(pytest.mark.quick)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """Config of a tiny Qwen2 checkpoint; tests give output_dir themselves."""
    return write_workspace(tmp_path_factory.mktemp("qwen2"))
