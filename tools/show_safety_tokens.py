"""pact tokens show: a table of safety tokens, a plot, the difference of two vectors, coverage of a model's refusals."""

import argparse
import sys
from pathlib import Path

from pact_tune import cli
from pact_tune.arguments import Parser
from pact_tune.errors import UserError, printable
from pact_tune.files import atomic_file
from pact_tune.safety_tokens import SafetyTokens

MOST_BARS, MOST_CHARACTERS = 200, 60  # of a plot; the table shows all
PLOT_KINDS = (".png", ".svg", ".pdf")


def main(argv: list[str] | None = None) -> None:
    """Shows safety tokens.

    Args:
        argv (list[str] | None): arguments; default: those of the process.
    """
    parser = Parser(prog="pact tokens show", description="Look at safety tokens, or compare two.")
    parser.add_argument("source", metavar="DIR", help="folder, NAMESPACE/NAME, or a short name")
    parser.add_argument("--subfolder")
    parser.add_argument("--revision")
    parser.add_argument("--diff", metavar="DIR", help="another vector to compare with")
    parser.add_argument("--plot", metavar="FILE", type=Path, help=f"bar plot ({', '.join(PLOT_KINDS)})")
    parser.add_argument("--aligned", metavar="MODEL", help="the aligned model, for coverage; needs --prompts")
    parser.add_argument("--prompts", metavar="FILE", help="harmful requests, for coverage")
    parser.add_argument("--prompt-column", default="prompt")
    parser.add_argument("--judge", default="keywords", help="keywords, demo, or MODULE:FUNCTION")
    parser.add_argument("--device")
    parser.add_argument("--trust-remote-code", action="store_true", help=cli.TRUST_HELP)
    args = parser.parse_args(argv)
    if bool(args.aligned) != bool(args.prompts):
        raise UserError("Coverage needs both --aligned and --prompts.")
    if args.plot and args.plot.suffix not in PLOT_KINDS:
        raise UserError(f"--plot needs a file that ends in {', '.join(PLOT_KINDS)}, not '{args.plot}'.")
    tokens = SafetyTokens.load(args.source, revision=args.revision, subfolder=args.subfolder)
    if args.diff:
        _print_diff(tokens, SafetyTokens.load(args.diff), args.source, args.diff)
    else:
        _print_table(tokens)
    if args.plot:
        _plot(tokens, args.plot)
    if args.aligned:
        _print_coverage(tokens, args)


def _text(token: str) -> str:
    return '"' + printable(token).replace('"', '\\"') + '"'


def _print_table(tokens: SafetyTokens) -> None:
    facts = tokens.provenance
    model = printable(facts.get("aligned_model", "unknown model"))
    print(f"{model}: {len(tokens)} safety tokens, method {printable(facts['method'])}")
    measured = facts["method"] != "templates"
    if not measured:
        print("Not measured, for any model of this tokenizer: all weights are equal.")
    style = tokens.style if tokens.style is not None else [False] * len(tokens)
    largest = tokens.weights.max().item()
    share = "mean p_ref" if measured else "in templates"  # what share of the templates uses the token
    print(f"{'rank':>4} {'id':>7}  {'token':<18} {'weight':>9}  {share:>12}")
    names = tokens.tokens or [""] * len(tokens)
    rows = zip(tokens.ids, names, tokens.weights, tokens.reference_probability, style, strict=True)
    for rank, (token_id, text, weight, probability, mere) in enumerate(rows, 1):
        bar = "#" * round(20 * weight.item() / largest)
        note = "  (style)" if mere else ""
        print(f"{rank:>4} {token_id:>7}  {_text(text):<18} {weight:>9.5f}  {probability:>12.5f}  {bar}{note}".rstrip())


def _print_diff(first: SafetyTokens, second: SafetyTokens, first_name: str, second_name: str) -> None:
    mine, theirs = (tokens.provenance["tokenizer_fingerprint"] for tokens in (first, second))
    if mine != theirs:
        raise UserError(
            f"'{first_name}' (tokenizer {mine[:8]}) and '{second_name}' (tokenizer {theirs[:8]}) are of different "
            "tokenizers, so their ids mean different tokens: compare vectors of one model family."
        )
    sides = [_by_id(tokens) for tokens in (first, second)]
    common = sides[0].keys() & sides[1].keys()
    print(
        f"{len(common)} tokens in both, {len(sides[0]) - len(common)} only in the first, "
        f"{len(sides[1]) - len(common)} only in the second."
    )
    print(f"{'id':>7}  {'token':<18} {'rank':>4} {'rank':>4}  {'share':>8} {'share':>8}   (share of all weight)")
    order = sorted(sides[0].keys() | sides[1].keys(), key=lambda i: min(s[i][0] for s in sides if i in s))
    for token_id in order:
        ranks = [str(side[token_id][0]) if token_id in side else "-" for side in sides]
        shares = [f"{side[token_id][1]:.4f}" if token_id in side else "-" for side in sides]
        text = next(side[token_id][2] for side in sides if token_id in side)
        print(f"{token_id:>7}  {_text(text):<18} {ranks[0]:>4} {ranks[1]:>4}  {shares[0]:>8} {shares[1]:>8}")


def _by_id(tokens: SafetyTokens) -> dict[int, tuple[int, float, str]]:
    """id -> (rank, share of the weight, text)."""
    shares = (tokens.weights / tokens.weights.sum()).tolist()
    names = tokens.tokens or [""] * len(tokens)
    return {i: (r, s, t) for r, (i, s, t) in enumerate(zip(tokens.ids.tolist(), shares, names, strict=True), 1)}


def _plot(tokens: SafetyTokens, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = min(len(tokens), MOST_BARS)
    figure, axes = pyplot.subplots(figsize=(8, 0.22 * shown + 1.2), layout="constrained")
    # A '$' would start a formula.
    texts = tokens.tokens or [str(token_id) for token_id in tokens.ids.tolist()]
    names = [_text(text[:MOST_CHARACTERS]).replace("$", r"\$") for text in texts[:shown]]
    axes.barh(range(shown), tokens.weights.tolist()[:shown])
    axes.set_yticks(range(shown), names)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel(
        "weight" if tokens.provenance["method"] == "templates" else "weight (difference of mean probabilities)"
    )
    model = printable(tokens.provenance.get("aligned_model", "unknown model"))[:MOST_CHARACTERS].replace("$", r"\$")
    axes.set_title(f"Safety tokens of {model}" if shown == len(tokens) else f"First {shown} safety tokens of {model}")
    with atomic_file(path) as aside:
        figure.savefig(aside, format=path.suffix[1:], dpi=120)
    pyplot.close(figure)
    print(f"Plot written to {path}" + ("" if shown == len(tokens) else f" (the first {shown} of {len(tokens)} tokens)"))


def _print_coverage(tokens: SafetyTokens, args: argparse.Namespace) -> None:
    from pact_tune.intervention import Answerer, coverage, load_judge
    from pact_tune.prompts import column, read_prompts

    prompts = column(read_prompts(args.prompts), args.prompt_column, args.prompts)
    answerer = Answerer(args.aligned, device=args.device, trust_remote_code=args.trust_remote_code)
    share, refusals = coverage(answerer, tokens, prompts, load_judge(args.judge))
    print(
        f"Coverage: S holds {100 * share:.1f} % of the first token's probability, over {refusals} refusals "
        f"of {len(prompts)} prompts."
    )


if __name__ == "__main__":
    sys.exit(cli.main(["tokens", "show", *sys.argv[1:]]))
