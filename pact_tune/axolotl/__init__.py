"""Axolotl's training with an objective of ours: ``plugins: [pact_tune.axolotl.PACTPlugin]`` and a section ``pact:``.

Axolotl needs an environment of its own; only the plugin imports it.
"""

from typing import Any

__all__ = ["PACTPlugin"]


def __getattr__(name: str) -> Any:
    if name != "PACTPlugin":
        raise AttributeError(f"module 'pact_tune.axolotl' has no attribute '{name}'")
    from pact_tune.axolotl.plugin import PACTPlugin

    return PACTPlugin
