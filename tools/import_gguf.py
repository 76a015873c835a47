"""pact import-gguf: a GGUF file becomes a Hugging Face checkpoint."""

import sys

from pact_tune import cli
from pact_tune.arguments import Parser
from pact_tune.hf.gguf_import import ARCHITECTURES, DTYPES, STORED_WHOLE, import_gguf


def main(argv: list[str] | None = None) -> None:
    """Imports one file and says what was dequantised from what.

    Args:
        argv (list[str] | None): arguments; default: those of the process.
    """
    parser = Parser(
        prog="pact import-gguf",
        description="Write a GGUF file as a Hugging Face checkpoint with its tokenizer and chat template, dequantised.",
        epilog=f"Architectures: {', '.join(ARCHITECTURES)}. Fine-tuning and evaluation take the folder like any other.",
    )
    parser.add_argument("file", metavar="FILE.gguf")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the weights (default: float32)")
    args = parser.parse_args(argv)
    done = import_gguf(args.file, args.output, args.dtype)
    print(f"{done.name} ({done.architecture}), written as {done.dtype}:")
    for kind, names in sorted(done.types.items(), key=lambda item: -len(item[1])):
        how = "as it was stored" if kind in STORED_WHOLE else "dequantised"
        which = f" ({names[0]})" if len(names) == 1 else ""
        print(f"  {len(names):>4} tensor{'s' if len(names) > 1 else ''} of {kind}, {how}{which}")
    if not done.has_template:
        print("The file has no chat template: put the model's chat_template.jinja into the folder before using it.")
    print(f"Written to {done.output}")


if __name__ == "__main__":
    sys.exit(cli.main(["import-gguf", *sys.argv[1:]]))
