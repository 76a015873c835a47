"""A tiny base/aligned pair of chat models and synthetic data, so that PACT can be tried without a download."""

import pathlib

from pact_tune.demo.generator import demo_data, write_demo_data

__all__ = ["demo_data", "demo_family_path", "write_demo_data"]


def demo_family_path():
    """Return the folder that holds the shipped demo models `base/` and `aligned/` (Hugging Face format)."""
    return pathlib.Path(__file__).parent / "family"
