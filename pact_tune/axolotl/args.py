"""The keys that the plugin adds to Axolotl's config."""

from typing import Any

from pydantic import BaseModel, field_validator

from pact_tune.components import OBJECTIVE, find_component
from pact_tune.config import AnalysisSettings, ReferenceCacheSettings, check

OWN_KEYS = ("_component_", "reference_cache", "reference", "analysis")


class PACTArgs(BaseModel):
    """Section ``pact``: the recipe's section ``loss``, and three keys more.

    Attributes:
        pact (dict[str, Any] | None): the objective's settings; ``reference_cache`` as in the recipe (null: computed in every
            step); ``reference``: "base" (the model without an adapter) or "initial" (with the one that training goes on from);
            ``analysis`` as in the recipe.
    """

    pact: dict[str, Any] | None = None

    @field_validator("pact")
    @classmethod
    def is_right(cls, section: dict[str, Any] | None) -> dict[str, Any] | None:
        """Raises ValueError with all that is wrong, before anything is loaded."""
        if section is None:
            return None
        builder = find_component("pact", section.get("_component_", OBJECTIVE))
        settings = {key: value for key, value in section.items() if key not in OWN_KEYS}
        problems = check(builder, settings, "pact", given=("context",))
        problems += check(ReferenceCacheSettings, section.get("reference_cache") or {}, "pact.reference_cache")
        if section.get("analysis") is not None:
            problems += check(AnalysisSettings, section["analysis"], "pact.analysis")
        if section.get("reference", "base") not in ("base", "initial"):
            problems.append(f"pact.reference is {section['reference']!r}; it must be base or initial.")
        if problems:
            raise ValueError(" ".join(problems))
        return section
