"""pact tokens compute: measures a model's safety tokens."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pact_tune import cli, log
from pact_tune.arguments import Parser
from pact_tune.distributed import finish
from pact_tune.errors import UserError
from pact_tune.identification import PRESETS, check_work_dir, identify_safety_tokens, remove_work_dir
from pact_tune.prompts import column, read_prompts
from pact_tune.safety_tokens import check_output

# Both sets are gated: accept their terms on the Hub, and log in.
PROMPT_SETS: dict[str, dict[str, Any]] = {
    "wildjailbreak": {
        "source": "allenai/wildjailbreak",
        "name": "train",
        "where": {"data_type": "vanilla_harmful"},
        "options": {"delimiter": "\t", "keep_default_na": False},
        "column": "vanilla",
    },
    "advbench": {"source": "walledai/AdvBench", "column": "prompt"},
}


def _parser() -> Parser:
    parser = Parser(
        prog="pact tokens compute",
        description="Measure which tokens an aligned model prefers over its base model while it refuses (paper, Eq. 1-2).",
        epilog="Killed? The same command goes on where it stopped. Several GPUs: torchrun --nproc_per_node N -m "
        "pact_tune.tools.compute_safety_tokens ...",
    )
    parser.add_argument("--aligned", required=True, metavar="MODEL", help="aligned model, a folder or a Hub name")
    parser.add_argument("--base", required=True, metavar="MODEL", help="its base model, with the same tokenizer")
    parser.add_argument("--output", required=True, metavar="DIR", type=Path, help="folder to write")
    parser.add_argument("--aligned-revision", help="branch, tag or commit")
    parser.add_argument("--base-revision", help="branch, tag or commit")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--prompts", required=True, help=f"a file, a Hub data set, or {' or '.join(PROMPT_SETS)} (both gated)"
    )
    prompts.add_argument("--prompt-column", help="default: prompt, or the one of a named set")
    prompts.add_argument("--prompts-config", help="configuration of a Hub data set")
    prompts.add_argument("--prompts-split", help="split of a Hub data set (default: train)")
    prompts.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE", help="keep only such rows")
    prompts.add_argument("--num-prompts", type=int, help="the first so many")
    prompts.add_argument("--response-column", help="take the responses from there, rather than from the aligned model")
    prompts.add_argument("--benign-prompts", metavar="FILE", help="harmless requests, to find tokens of mere style")
    prompts.add_argument("--benign-column", default="prompt")
    prompts.add_argument("--leave-out-style", action="store_true", help="never choose style tokens")
    method = parser.add_argument_group("method (default: what --preset says)")
    method.add_argument("--preset", choices=list(PRESETS), default="paper", help="default: paper")
    method.add_argument("-k", "--k", type=int, default=50, help="how many safety tokens (default: 50)")
    method.add_argument("--ranking", choices=["score", "reference_probability"])
    method.add_argument("--weighting", choices=["raw", "centred", "uniform"])
    method.add_argument("--average", choices=["pooled", "macro"])
    method.add_argument("--base-prompting", choices=["same_tokens", "plain_text"])
    method.add_argument("--max-response-tokens", type=int, metavar="N")
    method.add_argument("--include-eos", action=argparse.BooleanOptionalAction, default=None)
    method.add_argument("--temperature", type=float, default=0.0, help="of the responses; 0 is greedy")
    method.add_argument("--seed", type=int, default=0)
    machine = parser.add_argument_group("machine")
    machine.add_argument("--tokens-per-batch", type=int, default=4096, metavar="N")
    machine.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    machine.add_argument("--device-map", choices=["auto"], help="spread one model over all GPUs (needs accelerate)")
    machine.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    machine.add_argument("--trust-remote-code", action="store_true", help=cli.TRUST_HELP)
    machine.add_argument("--work-dir", type=Path, metavar="DIR", help="finished work (default: OUTPUT.work)")
    machine.add_argument("--keep-work", action="store_true", help="do not delete it at the end")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measures safety tokens and writes them.

    Args:
        argv (list[str] | None): arguments; default: those of the process.
    """
    args = _parser().parse_args(argv)
    work_dir = args.work_dir or args.output.with_name(args.output.name + ".work")
    if log.rank() == 0:  # before any rank writes
        check_output(args.output)
        check_work_dir(work_dir)
    prompts, responses = _read_prompts(args)
    benign = None
    if args.benign_prompts:
        benign = column(read_prompts(args.benign_prompts), args.benign_column, args.benign_prompts)
    chosen = ("ranking", "weighting", "average", "base_prompting", "max_response_tokens", "include_eos", "num_prompts")
    options = PRESETS[args.preset] | {name: vars(args)[name] for name in chosen if vars(args)[name] is not None}
    same = (
        "k",
        "temperature",
        "seed",
        "tokens_per_batch",
        "device",
        "device_map",
        "dtype",
        "leave_out_style",
        "trust_remote_code",
    )
    options |= {name: vars(args)[name] for name in (*same, "aligned_revision", "base_revision")}
    tokens = identify_safety_tokens(
        args.aligned, args.base, prompts, responses=responses, benign_prompts=benign, work_dir=work_dir, **options
    )
    if not dist.is_initialized() or dist.get_rank() == 0:
        tokens.save(args.output)
        if not args.keep_work:
            remove_work_dir(work_dir)
        _report(tokens, args.output)
    if dist.is_initialized():
        finish()


def _read_prompts(args: argparse.Namespace) -> tuple[list[str], list[str] | None]:
    named = dict(PROMPT_SETS.get(args.prompts, {"source": args.prompts, "name": args.prompts_config}))
    name = args.prompt_column or named.pop("column", "prompt")
    named.pop("column", None)
    named.setdefault("where", {})
    for condition in args.where:
        key, equals, value = condition.partition("=")
        if not equals:
            raise UserError(f"--where needs COLUMN=VALUE, not '{condition}'.")
        named["where"] = named["where"] | {key: value}
    rows = read_prompts(**named, split=args.prompts_split, limit=args.num_prompts)
    responses = column(rows, args.response_column, args.prompts) if args.response_column else None
    return column(rows, name, args.prompts), responses


def _report(tokens, output: Path) -> None:
    facts = tokens.provenance
    print(f"{len(tokens)} safety tokens from {facts['num_prompts']} prompts, {facts['num_positions']} positions.")
    if facts["num_prompts_left_out"]:
        print(f"Left out: {facts['num_prompts_left_out']} prompts, too long or without a response.")
    if facts["stability"] is not None:
        print(f"Stability: two halves of the prompts have {100 * facts['stability']:.0f} % of their top K in common.")
    if tokens.style is not None:
        style = [text for text, mere in zip(tokens.tokens, tokens.style.tolist(), strict=True) if mere]
        print(f"Mere style (as probable in benign answers): {style or 'none'}.")
        mass = facts["benign_first_token_mass"]
        print(f"Benign answers begin with a safety token with probability {mass:.2f}.")
        if mass > 0.5:
            print(
                "Warning: benign training rows will fight the constraint at their first token; use --leave-out-style."
            )
    print(f"Written to {output}; look at them with: pact tokens show {output}")


if __name__ == "__main__":
    sys.exit(cli.main(["tokens", "compute", *sys.argv[1:]]))
