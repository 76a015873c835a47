"""pact evaluate: answers of one or several models to benchmarks, judged; with several, a comparison page."""

import argparse
import sys
from pathlib import Path

from pact_tune import cli
from pact_tune.arguments import Parser
from pact_tune.environment import install
from pact_tune.errors import UserError
from pact_tune.files import slug

DEFAULT_BENCHMARKS = ["strongreject", "jailbreakbench", "harmbench", "xstest"]
INITIAL = "Initial"


def _parser() -> Parser:
    parser = Parser(
        prog="pact evaluate",
        description="Evaluate checkpoints or adapter folders. Each model gets a folder of its own in the output folder, with "
        "its answers, the verdicts on them and a summary; with more than one model, or --aligned, a comparison page as well. "
        "A run that was killed goes on where it stopped.",
    )
    parser.add_argument(
        "models", nargs="*", metavar="[NAME=]MODEL", help="folder of a checkpoint or adapter, or Hub name"
    )
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument(
        "--aligned", metavar="MODEL",
        help=f"the aligned model: evaluated first, as '{INITIAL}'; the others' KL and loss on its answers, and answers that "
        "it takes for no text, are reported",
    )  # fmt: skip
    parser.add_argument(
        "--initial", type=Path, metavar="DIR",
        help="with --aligned: its evaluation by an earlier call, the folder with summary.json, which is taken as it is",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true", help="delete these models' earlier answers in the output folder"
    )
    what = parser.add_argument_group("what is asked")
    what.add_argument(
        "--benchmarks", nargs="+", metavar="B",
        help="names (see --list), or KIND:NAME=FILE for a file of your own, KIND harmful, benign or task "
        f"(default: {' '.join(DEFAULT_BENCHMARKS)}; none with --lm-eval)",
    )  # fmt: skip
    what.add_argument("--list", action="store_true", help="list the benchmarks and exit")
    what.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with the benchmarks' own files; default: the Hub"
    )
    what.add_argument("--limit", type=int, help="only the first so many rows of each benchmark")
    what.add_argument("--lm-eval", nargs="+", default=[], metavar="TASK", help="tasks of lm-evaluation-harness")
    what.add_argument("--lm-eval-include", metavar="DIR", help="folder with harness tasks of your own")
    how = parser.add_argument_group("how it is answered")
    how.add_argument("--engine", choices=("hf", "vllm", "endpoint"), default="hf")
    how.add_argument(
        "--url", help="address of an OpenAI-compatible endpoint; MODEL is then the name of the model there"
    )
    how.add_argument("--parallel", type=int, default=8, help="requests to an endpoint at a time (default: 8)")
    how.add_argument("--retries", type=int, default=5, help="of a request to an endpoint (default: 5)")
    how.add_argument("--timeout", type=float, default=600.0, help="seconds that one request may take (default: 600)")
    how.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    how.add_argument("--seed", type=int, default=0, help="of sampled answers")
    how.add_argument("--max-new-tokens", type=int, help="instead of each benchmark's own limit")
    how.add_argument(
        "--tokens-per-batch", type=int, default=8192, help="padded tokens of a forward pass (default: 8192)"
    )
    how.add_argument("--device", help="default: a GPU where there is one")
    how.add_argument("--safety-tokens", metavar="DIR", help="with --aligned: their probability by response position")
    judging = parser.add_argument_group("how it is judged")
    judging.add_argument("--judge", default="phrases", help="phrases (default), llama-guard, rubric, or MODULE:CLASS")
    judging.add_argument("--judge-model", metavar="MODEL", help="guard model, or name of the model at --judge-url")
    judging.add_argument("--judge-url", metavar="URL", help="endpoint of judge 'rubric'")
    judging.add_argument("--refusal-judge", help="of benign requests (default: phrases)", default="phrases")
    judging.add_argument(
        "--rejudge", action="store_true", help="judge the answers that are there again; loads no model"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Evaluates models.

    Args:
        argv (list[str] | None): arguments; default: those of the process.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    from pact_tune.evaluation import benchmarks

    if args.list:
        print(benchmarks.listing())
        return
    if args.output is None or not (args.models or args.aligned):
        parser.error("give at least one model, and --output")
    _check(args)
    try:
        import scipy  # noqa: F401
    except ImportError as error:
        raise UserError(f"Evaluation needs scipy and jinja2: {install('eval')}.") from error

    import transformers

    from pact_tune.evaluation import judges, report, run
    from pact_tune.evaluation.answering import VLLM, Local, Remote
    from pact_tune.evaluation.endpoint import Endpoint
    from pact_tune.evaluation.harness import Harness
    from pact_tune.safety_tokens import SafetyTokens

    transformers.utils.logging.disable_progress_bar()  # of loading weights
    named = _named(args.models)
    # The default benchmarks come from the Hub; whoever names tasks of the harness has said what is wanted.
    wanted = args.benchmarks or ([] if args.lm_eval else DEFAULT_BENCHMARKS)
    chosen = [benchmarks.find(name) for name in wanted]
    names = [benchmark.name for benchmark in chosen]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"Two benchmarks are called '{twice}': give each once, and your own files names of their own.")
    loaded = [benchmarks.load(benchmark, args.data, args.limit) for benchmark in chosen]
    for one in loaded:
        _say(one, args.limit)

    asking = {"parallel": args.parallel, "timeout": args.timeout, "retries": args.retries}

    def build(source: str):
        if args.rejudge:
            return None
        if args.engine == "vllm":
            return VLLM(source, temperature=args.temperature, seed=args.seed)
        if args.engine == "endpoint":
            return Remote(Endpoint(args.url, source, temperature=args.temperature, seed=args.seed, **asking))
        return Local(
            source,
            device=args.device,
            tokens_per_batch=args.tokens_per_batch,
            temperature=args.temperature,
            seed=args.seed,
        )

    harness = Harness(args.lm_eval, args.lm_eval_include) if args.lm_eval else None
    # All of them before any work: a missing tokenizer shows now.
    models = {name: build(source) for name, source in named.items()}
    aligned = None if args.aligned is None else build(args.aligned)
    judge_endpoint = None
    if args.judge_url and args.judge_model:
        judge_endpoint = Endpoint(args.judge_url, args.judge_model, **asking)
    options = {"model": args.judge_model, "endpoint": judge_endpoint, "device": args.device}
    plan = run.Plan(
        loaded=loaded,
        judge=judges.load(args.judge, **options),
        refusal_judge=judges.load(args.refusal_judge, **options),
        aligned=aligned,
        safety_tokens=SafetyTokens.load(args.safety_tokens) if args.safety_tokens else None,
        max_new_tokens=args.max_new_tokens,
    )
    if plan.safety_tokens and aligned:
        plan.safety_tokens.check_tokenizer(aligned.tokenizer)

    evaluations = []
    everyone = {INITIAL: aligned} if args.aligned and not args.initial else {}
    reference = None if aligned is None else args.initial or args.output / INITIAL
    for name, model in (everyone | models).items():
        source = args.aligned if name == INITIAL and args.aligned else named[name]
        evaluation = run.Evaluation(name, args.output / name, model, source, reference)
        print(f"{name}: {source} -> {evaluation.folder}", flush=True)
        if args.overwrite:
            run.clear(evaluation.folder)
        run.evaluate(evaluation, plan)
        if harness is not None:
            for task in harness.tasks:
                print(f"{name}: {task} (lm-evaluation-harness)", flush=True)
                run.harness_task(evaluation, harness, task, args.limit)
        evaluations.append(evaluation)
        if isinstance(model, Local) and model is not aligned:
            model.release()

    folders = {INITIAL: [args.initial]} if args.initial else {}
    folders |= {evaluation.name: [evaluation.folder] for evaluation in evaluations}
    comparison = report.compare(folders)
    print("\n" + comparison.text())
    comparison.write(args.output)
    print(f"\nPage: {args.output / report.PAGE_FILE}\nAnswers and verdicts: {args.output}/NAME/verdicts/*.jsonl")


def _check(args: argparse.Namespace) -> None:
    if min(args.parallel, args.tokens_per_batch, args.limit or 1, args.max_new_tokens or 1) < 1 or args.retries < 0:
        raise UserError("--parallel, --tokens-per-batch, --limit and --max-new-tokens must be at least 1, --retries 0.")
    if not args.timeout > 0:
        raise UserError(f"--timeout is {args.timeout:g}; it must be more than 0 seconds.")
    if args.temperature < 0:
        raise UserError(f"--temperature is {args.temperature:g}; it must be 0 (greedy) or more.")
    if args.engine == "endpoint" and not args.url:
        raise UserError("--engine endpoint needs --url, the address of the API (http://localhost:8000/v1).")
    if args.url and args.engine != "endpoint":
        raise UserError("--url is only read with --engine endpoint: give both, or neither.")
    if args.initial and not args.aligned:
        raise UserError("--initial is the aligned model's evaluation: give the model as well, with --aligned.")
    if args.aligned and args.engine != "hf":
        raise UserError(
            f"--aligned needs the models' probabilities, which --engine {args.engine} does not give: leave it out, and name "
            "the aligned model among the models."
        )
    if args.safety_tokens and not args.aligned:
        raise UserError("--safety-tokens is read on the aligned model's answers: give --aligned as well.")
    if args.lm_eval and (args.engine != "hf" or args.rejudge):
        raise UserError("--lm-eval runs models in transformers: use --engine hf, without --rejudge.")
    if args.lm_eval_include and not args.lm_eval:
        raise UserError("--lm-eval-include is only read with --lm-eval: name the tasks as well.")
    if args.overwrite and args.rejudge:
        raise UserError("--rejudge keeps the answers and --overwrite deletes them: give one of the two.")
    judges = {args.judge, args.refusal_judge}
    if args.judge_url and "rubric" not in judges:
        raise UserError("--judge-url is only read by judge 'rubric': give --judge rubric as well.")
    if args.judge_model and not judges & {"rubric", "llama-guard"}:
        raise UserError("--judge-model is only read by judges 'llama-guard' and 'rubric': give one of them as --judge.")
    if args.refusal_judge == "llama-guard":
        raise UserError(
            "--refusal-judge is 'llama-guard', which says whether an answer is safe, not whether it refuses: give phrases, "
            "rubric, or MODULE:CLASS."
        )


def _named(models: list[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for text in models:
        name, equals, source = text.partition("=")
        if not (equals and name and name == slug(name)):
            name, source = slug(text) or "model", text
        if name in named or name == INITIAL:
            raise UserError(
                f"Two models are called '{name}': name them apart, as NAME=MODEL ('{INITIAL}' is the aligned model)."
            )
        named[name] = source
    return named


def _say(loaded, limit: int | None) -> None:
    benchmark = loaded.benchmark
    rows = len(loaded.items)
    line = f"{benchmark.title}: {rows} rows from {loaded.source}"
    if benchmark.rows and rows != benchmark.rows and not limit:
        line += f" (the published set has {benchmark.rows})"
    print(line + (f"; {benchmark.note}" if benchmark.note else ""), flush=True)


if __name__ == "__main__":
    sys.exit(cli.main(["evaluate", *sys.argv[1:]]))
