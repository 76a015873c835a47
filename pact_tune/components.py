"""What a section's ``_component_`` names: a class or function of this package, of a library, or of the user's own folder."""

import importlib
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pact_tune.config import settings
from pact_tune.errors import UserError, one_line
from pact_tune.objectives.base import Context, Objective

OBJECTIVE = "pact_tune.objectives.pact"  # where a section names none


def build_objective(section: Mapping[str, Any], context: Context, where: str) -> Objective:
    """The objective of a section, whichever trainer reads it: the recipe's ``loss:``, TRL's ``objective=``, Axolotl's ``pact:``.

    Args:
        section (Mapping[str, Any]): ``_component_`` (default: pact) and its settings.
        context (Context): of the run.
        where (str): the section's name, for messages.

    Returns:
        Objective: built, its settings checked.

    Raises:
        UserError: no such component, or everything that is wrong with its settings.
    """
    values = dict(section)
    builder = find_component(where, values.pop("_component_", OBJECTIVE))
    return builder(context, **settings(builder, values, where, given=("context",)))


def find_component(name: str, path: Any) -> Callable[..., Any]:
    """What a section's ``_component_`` names.

    Args:
        name (str): the section, for the message.
        path (Any): dotted path of a class or function; it may lie in the user's folder, as in torchtune.

    Returns:
        Callable[..., Any]: the class or function.

    Raises:
        UserError: there is no such thing.
    """
    if not isinstance(path, str) or not re.fullmatch(r"\w+(\.\w+)+", path):
        raise UserError(f"{name}._component_ is {path!r}; it must be the dotted path of a class or function.")
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)
    parts = path.split(".")
    found: Any = None
    try:
        for i in range(len(parts) - 1, 0, -1):  # the longest part that is a module; the rest are attributes
            try:
                found = importlib.import_module(".".join(parts[:i]))
            except ModuleNotFoundError as error:
                if error.name is None or not ".".join(parts[:i]).startswith(error.name):
                    raise  # the module is there and lacks something itself
                continue
            for part in parts[i:]:
                found = getattr(found, part)
            break
        else:
            raise UserError(f"{name}._component_ '{path}' cannot be imported: there is no module '{parts[0]}'.")
    except (ImportError, AttributeError) as error:
        raise UserError(f"{name}._component_ '{path}' cannot be imported: {one_line(error)}.") from error
    if not callable(found):
        raise UserError(f"{name}._component_ '{path}' is a {type(found).__name__}; it must be a class or function.")
    return found
