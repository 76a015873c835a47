"""The `pact` command: a table of tools, each a module with `main(argv)`."""

import importlib
import os
import sys
from collections.abc import Sequence

from pact_tune import log
from pact_tune.errors import UserError, unknown_name
from pact_tune.version import __version__

# words on the command line -> (module, what it does)
COMMANDS = {
    ("demo",): ("pact_tune.tools.demo", "the whole story on a small model: SFT, PACT and PACT+tail compared"),
    ("ls",): ("pact_tune.tools.configs", "list the recipe's configs"),
    ("cp",): ("pact_tune.tools.configs", "copy a config to edit it"),
    ("run",): ("pact_tune.tools.configs", "run the recipe; same as `tune run`"),
    ("validate",): ("pact_tune.tools.configs", "check a config, by name or path"),
    ("verify",): ("pact_tune.tools.verify", "check a result: constrained, unaltered, loads; its KL to the reference"),
    ("merge",): ("pact_tune.tools.merge", "merge a LoRA adapter into its base model"),
    ("import-gguf",): ("pact_tune.tools.import_gguf", "write a GGUF file as a Hugging Face checkpoint"),
    ("evaluate",): ("pact_tune.tools.evaluate", "ask models the benchmarks, judge the answers, compare"),
    ("anchors",): (
        "pact_tune.tools.anchors",
        "prompts with the aligned model's own answers, to train on beside the data",
    ),
    ("audit",): ("pact_tune.tools.audit", "which training rows the aligned model itself would have refused"),
    ("compare",): ("pact_tune.tools.compare", "evaluations side by side: table and page"),
    ("experiment",): ("pact_tune.tools.experiment", "methods x data x poison x seeds: runs, evaluations, one table"),
    ("rows",): ("pact_tune.tools.rows", "a task's training rows, asked as its benchmark asks"),
    ("smollm2", "prepare"): ("pact_tune.tools.smollm2", "get, import and align SmolLM2, and measure its safety tokens"),
    ("smollm2", "answers"): (
        "pact_tune.tools.smollm2",
        "let SmolLM2 answer the harmless instructions of its alignment",
    ),
    ("env",): ("pact_tune.tools.env", "versions, devices, and what is missing for which feature"),
    ("tokens", "compute"): ("pact_tune.tools.compute_safety_tokens", "measure a model's safety tokens"),
    ("tokens", "from-templates"): (
        "pact_tune.tools.safety_tokens_from_templates",
        "safety tokens from a tokenizer alone",
    ),
    ("tokens", "show"): ("pact_tune.tools.show_safety_tokens", "look at, or compare, safety tokens"),
    ("tokens", "publish"): ("pact_tune.tools.publish_safety_tokens", "publish safety tokens to the Hugging Face Hub"),
    ("tokens", "download"): ("pact_tune.tools.download_safety_tokens", "download safety tokens from the Hub"),
    ("tokens", "intervene"): ("pact_tune.tools.intervene", "boost or ablate safety tokens during generation"),
    ("cache", "list"): ("pact_tune.tools.cache", "list the reference caches that runs share"),
    ("cache", "info"): ("pact_tune.tools.cache", "what a cached reference depends on"),
    ("cache", "verify"): ("pact_tune.tools.cache", "compare the caches' checksums"),
    ("cache", "prune"): ("pact_tune.tools.cache", "remove the least recently used caches"),
    ("cache", "build"): ("pact_tune.tools.cache", "fill the cache of a config without training"),
}


TRUST_HELP = "let the model folder's own Python code run (read it first)"


def _usage() -> str:
    rows = [f"  pact {' '.join(words):<24} {text}" for words, (_, text) in COMMANDS.items()]
    return "usage: pact COMMAND ... (each command has --help)\n\n" + "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    """Runs one tool.

    Args:
        argv (list[str] | None): the command line after `pact`; default `sys.argv[1:]`.

    Returns:
        int: exit code; 0 when it worked.

    Raises:
        UserError: instead of its message alone, where PACT_TUNE_DEBUG=1 asks for tracebacks.
    """
    argv = sys.argv[1:] if argv is None else argv
    log.setup()
    try:
        try:
            return _answer(argv)
        finally:
            sys.stdout.flush()  # here, where a reader that has gone is no fault
    except UserError as error:
        if log.debugging():
            raise
        message = f"pact: {error}"
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            from pact_tune.distributed import refuse  # imports torch, which `pact --help` does not need

            message = refuse(message)
        print(message, file=sys.stderr)
        return 1
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("pact: interrupted.", file=sys.stderr)
        return 130


def _answer(argv: list[str]) -> int:
    """What one command line asks for."""
    group = argv[:1] in (["tokens"], ["cache"], ["smollm2"])
    if argv[group:] in ([], ["-h"], ["--help"]):
        print(_usage())
        return 0
    if argv == ["--version"]:
        print(__version__)
        return 0
    words = _command(argv[: 1 + group])
    # A module that serves several commands is told which one.
    told = {"ls": 0, "cp": 0, "run": 0, "validate": 0, "cache": 1, "smollm2": 1}
    return _run(COMMANDS[words][0], argv[told.get(words[0], len(words)) :]) or 0


def _command(words: Sequence[str]) -> tuple[str, ...]:
    """The words, which are one of our commands."""
    if tuple(words) not in COMMANDS:
        raise unknown_name("command of `pact --help`", " ".join(words), map(" ".join, COMMANDS))
    return tuple(words)


def _run(tool: str, argv: list[str]) -> int | None:
    """Imports a tool and runs it; a package of an extra that is not installed is a user error, wherever it is imported."""
    try:
        return importlib.import_module(tool).main(argv)
    except ModuleNotFoundError as error:
        from pact_tune import environment  # imports torch, which most commands need and `pact --help` does not

        missing = environment.missing_package(error)
        if missing is None:
            raise
        raise missing from error


if __name__ == "__main__":
    sys.exit(main())
