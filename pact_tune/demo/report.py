"""The demo's result as one self-contained HTML page: the table, training curves, safety-token probabilities."""

import base64
import html
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt

COLUMNS = {
    "asr": "harmful requests answered (ASR, %)",
    "accuracy": "task accuracy (%)",
    "over_refusal": "benign requests refused (%)",
    "kl": "KL to the aligned model (nats)",
}
COLORS = {"Initial": "#555555", "SFT": "#c0392b", "PACT": "#2471a3", "PACT+tail": "#1e8449"}


def read_log(folder: Path) -> dict[str, list[float]]:
    """Metrics of a run, from torchtune's DiskLogger: lists by name, and "step"."""
    series: dict[str, list[float]] = {}
    for path in sorted((folder / "logs").glob("*.txt")):
        for line in path.read_text().splitlines():
            step = re.match(r"Step (\d+) \|", line)
            if step is None:
                continue
            series.setdefault("step", []).append(float(step[1]))
            for name, value in re.findall(r"(\w+):(\S+)", line):
                series.setdefault(name, []).append(float(value))
    return series


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The comparison as plain text."""
    rows = [f"{'':<10} {'ASR %':>7} {'accuracy %':>11} {'over-refusal %':>15} {'KL nats':>8}"]
    for name, r in results.items():
        rows.append(f"{name:<10} {r['asr']:>7.1f} {r['accuracy']:>11.1f} {r['over_refusal']:>15.1f} {r['kl']:>8.3f}")
    return "\n".join(rows)


def write_report(
    path: Path, results: Mapping[str, Mapping[str, Any]], runs: Mapping[str, Path], tokens: list[str]
) -> None:
    """Writes the page.

    Args:
        path (Path): the HTML file.
        results (Mapping[str, Mapping[str, Any]]): what :func:`pact_tune.demo.evaluate.evaluate` returned, by method,
            with ``safety_probability``.
        runs (Mapping[str, Path]): output folder of each fine-tuned method.
        tokens (list[str]): the safety tokens as text.
    """
    head = "".join(f"<th>{html.escape(title)}</th>" for title in COLUMNS.values())
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{r[key]:.{3 if key == 'kl' else 1}f}</td>" for key in COLUMNS) + "</tr>"
        for name, r in results.items()
    )  # fmt: skip
    logs = {name: read_log(folder) for name, folder in runs.items()}
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>pact-tune demo</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse }} th, td {{ padding: .4rem .9rem; border-bottom: 1px solid #ccc; text-align: right }}
th {{ font-weight: 600; max-width: 9rem }} td:first-child {{ text-align: left; font-weight: 600 }}
img {{ max-width: 100% }} code {{ background: #f2f2f2; padding: 0 .25em }}
</style></head><body>
<h1>Fine-tuning with and without PACT, on the demo family</h1>
<p>One small aligned chat model, fine-tuned three times on the same rows: a two-class review task with one row in ten that
complies with a request the model should refuse. The harmful requests are harmless nonsense; the model is synthetic, and
its numbers say nothing about large models.</p>
<table><tr><th></th>{head}</tr>{body}</table>
<h2>Probability of the safety tokens at the first response positions</h2>
<p>Mean over held-out harmful requests, with the aligned model's own answer as prefix. Safety tokens:
{" ".join(f"<code>{html.escape(token)}</code>" for token in tokens)}</p>
{_image(_plot_probability(results), "Safety-token probability by response position")}
<p>On this family S holds &ldquo;Sure&rdquo;, which begins compliant answers as well: mass on S alone does not tell a refusal.
PACT sees those answers because of it, and not the ones that begin outside S (&ldquo;Steps:&rdquo;, &ldquo;Guide:&rdquo;); the
tail does not depend on that.</p>
<h2>Training</h2>
{_image(_plot_training(logs), "Training curves")}
<p>The KL is the one that each method constrains: within the safety tokens for PACT, of absolute probabilities (safety
tokens and everything else) for PACT+tail. PACT's is not 0 at the start, since only the reference side is re-weighted.</p>
</body></html>
"""
    path.write_text(page, encoding="utf-8")


def _plot_probability(results: Mapping[str, Mapping[str, Any]]) -> plt.Figure:
    figure, axis = plt.subplots(figsize=(8, 3.6))
    for name, result in results.items():
        values = result["safety_probability"]
        axis.plot(range(len(values)), values, marker="o", label=name, color=COLORS[name])
    axis.set(xlabel="response position t", ylabel="probability of S", ylim=(-0.02, 1.02))
    axis.legend(frameon=False)
    return figure


def _plot_training(logs: Mapping[str, Mapping[str, list[float]]]) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for name, log in logs.items():
        axes[0].plot(log["step"], log["ce"], label=name, color=COLORS[name])
        if "kl" in log:
            axes[1].plot(log["step"], log["kl"], label=name, color=COLORS[name])
    axes[0].set(xlabel="step", ylabel="cross-entropy (nats)", yscale="log")
    axes[1].set(xlabel="step", ylabel="constrained KL (nats)", yscale="log")
    for axis in axes:
        axis.legend(frameon=False)
    return figure


def _image(figure: plt.Figure, alt: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    plt.close(figure)
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
