"""Publishing safety tokens to the Hugging Face Hub, with a card that says where they come from."""

import json
import tempfile
from pathlib import Path

from pact_tune import hub
from pact_tune.errors import printable
from pact_tune.safety_tokens import FILES, SafetyTokens


def publish(
    tokens: SafetyTokens, repo: str, subfolder: str, *, private: bool = False, dry_run: bool = False
) -> hub.Published:
    """Publishes safety tokens: one commit with tensors, JSON and model card, and a tag; nothing when nothing changed.

    Args:
        tokens (SafetyTokens): what to publish.
        repo (str): "namespace/repository", made where it does not exist; one a model family.
        subfolder (str): folder of the model.
        private (bool): the repository must be private.
        dry_run (bool): find out what would change, and write nothing.

    Returns:
        hub.Published: what was done.

    Raises:
        UserError: no login, no right, no network, or the repository is public where a private one was asked for.
    """
    with tempfile.TemporaryDirectory() as directory:
        tokens.save(Path(directory) / "tokens")
        files = {name: (Path(directory) / "tokens" / name).read_bytes() for name in FILES}
    files["README.md"] = model_card(tokens, repo, subfolder).encode()
    title = f"Safety tokens of {subfolder}"
    return hub.publish(files, repo, subfolder, title=title, private=private, dry_run=dry_run)


def model_card(tokens: "SafetyTokens", repo: str, subfolder: str) -> str:
    """The card of one model: where the tokens come from, the first of them, how to use them (Markdown)."""
    provenance = tokens.provenance
    rows = [
        f"| {rank} | {token_id} | {_cell(text)} | {weight:.5f} | {probability:.5f} |"
        for rank, (token_id, text, weight, probability) in enumerate(
            zip(
                tokens.ids.tolist()[:20],
                tokens.tokens[:20],
                tokens.weights.tolist()[:20],
                tokens.reference_probability.tolist()[:20],
                strict=True,
            ),
            1,
        )
    ]
    facts = [f"| {name} | {_cell(value)} |" for name, value in sorted(provenance.items())]
    return "\n".join(
        [
            f"# Safety tokens of {subfolder}",
            "",
            f"{len(tokens)} tokens that {_cell(provenance.get('aligned_model', 'the aligned model'))} prefers while it refuses, and "
            "their weights, for fine-tuning that keeps refusals (PACT, arXiv 2603.07445).",
            "",
            "## Use",
            "",
            "```python",
            "from pact_tune import SafetyTokens",
            "",
            f'tokens = SafetyTokens.load("{repo}", subfolder="{subfolder}")',
            "```",
            "",
            f"or `pact tokens download {repo} --subfolder {subfolder} --output {subfolder}`.",
            "",
            "## The first tokens",
            "",
            "| rank | id | token | weight | mean reference probability |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "## Provenance",
            "",
            "| what | value |",
            "|---|---|",
            *facts,
            "",
        ]
    )


def _cell(value: object) -> str:
    """A value in Markdown, as code: nothing in it is markup, ends the table's cell, or moves a terminal's cursor."""
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else f'"{printable(value)}"'
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return "`" + escaped.replace("|", "\\|").replace("`", "'") + "`"
