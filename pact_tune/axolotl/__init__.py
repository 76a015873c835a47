"""Axolotl's training with an objective of ours: ``plugins: [pact_tune.axolotl.PACTPlugin]`` and a section ``pact:``.

Axolotl needs an environment of its own; only this package imports it.
"""

from pact_tune.axolotl.plugin import PACTPlugin

__all__ = ["PACTPlugin"]
