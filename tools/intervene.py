"""pact tokens intervene: boost or ablate safety tokens while a model answers (paper, Table 1)."""

import sys

from pact_tune import cli
from pact_tune.arguments import Parser
from pact_tune.errors import UserError
from pact_tune.intervention import BOOST, Answerer, intervene, load_judge
from pact_tune.prompts import column, read_prompts
from pact_tune.safety_tokens import SafetyTokens


def main(argv: list[str] | None = None) -> None:
    """Runs the experiment and prints one row an arm.

    Args:
        argv (list[str] | None): arguments; default: those of the process.
    """
    parser = Parser(
        prog="pact tokens intervene",
        description="Boost or ablate safety tokens, or as many random ones, while a model answers harmful requests, and "
        "print how often it complies. Answers are judged and not kept.",
    )
    parser.add_argument("--model", required=True, help="folder or Hub name")
    parser.add_argument("--tokens", required=True, metavar="DIR", help="folder, NAMESPACE/NAME, or a short name")
    parser.add_argument("--subfolder")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="harmful requests")
    parser.add_argument("--prompt-column", default="prompt")
    parser.add_argument("--num-prompts", type=int)
    parser.add_argument("--judge", default="keywords", help="keywords, demo, or MODULE:FUNCTION")
    parser.add_argument("--boost", type=float, default=BOOST, help=f"added to the logits (default: {BOOST})")
    parser.add_argument("--draws", type=int, default=3, help="random sets to average over (default: 3)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--tokens-per-batch", type=int, default=4096)
    parser.add_argument("--device")
    parser.add_argument("--trust-remote-code", action="store_true", help=cli.TRUST_HELP)
    args = parser.parse_args(argv)
    if min(args.draws, args.max_new_tokens, args.tokens_per_batch) < 1:
        raise UserError("--draws, --max-new-tokens and --tokens-per-batch must be at least 1.")
    judge = load_judge(args.judge)
    tokens = SafetyTokens.load(args.tokens, subfolder=args.subfolder)
    prompts = column(read_prompts(args.prompts, limit=args.num_prompts), args.prompt_column, args.prompts)
    answerer = Answerer(
        args.model,
        device=args.device,
        tokens_per_batch=args.tokens_per_batch,
        max_new_tokens=args.max_new_tokens,
        trust_remote_code=args.trust_remote_code,
    )
    arms = intervene(answerer, tokens, prompts, judge, boost=args.boost, draws=args.draws)
    verdicts = sorted({verdict for arm in arms for verdict in arm.rates} - {"helpful"})
    print(f"{len(prompts)} prompts, {len(tokens)} tokens, boost {args.boost:g}, judge {args.judge}; percent of answers")
    print(f"{'arm':<16} {'compliance':>10} " + " ".join(f"{verdict:>10}" for verdict in verdicts))
    for arm in arms:
        rest = " ".join(f"{arm.rates.get(verdict, 0.0):>10.1f}" for verdict in verdicts)
        print(f"{arm.name:<16} {arm.compliance:>10.1f} {rest}".rstrip())


if __name__ == "__main__":
    sys.exit(cli.main(["tokens", "intervene", *sys.argv[1:]]))
