"""Command line: read a prompt ahead and keep its K/V in a file. `python -m mlx_mtp.cache_prompt --help`."""

import argparse
import sys
from pathlib import Path

from .cli import add_kv_options, add_model_options, exit_status, load_or_demo, prefill_bar, read_kv_options
from .engine import DEFAULT_PREFILL_STEP, GenerationOptions
from .errors import OutputError
from .tokenizer import encode_in_parts


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    return exit_status(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx_mtp.cache_prompt",
        description="Read the beginning of a user's turn, such as a long text, and keep its K/V in a file. "
        "mlx_mtp.generate --prompt-cache FILE --prompt TEXT goes on with TEXT in the same turn.",
    )
    add_model_options(parser, default="the demo pair in the package", lengths=False)
    parser.add_argument("--prompt", "-p", required=True, metavar="TEXT|-", help="The text; '-' reads it from stdin.")
    parser.add_argument(
        "--prompt-cache", "--prompt-cache-file", required=True, metavar="FILE", help="The safetensors file to write."
    )
    parser.add_argument("--system-prompt", help="System prompt for the chat template.")
    parser.add_argument("--ignore-chat-template", action="store_true", help="Read the bare text.")
    parser.add_argument(
        "--enable-thinking", action="store_true", help="Begin as for an answer that may begin with a thought."
    )
    add_kv_options(parser)
    return parser


def _run(args: argparse.Namespace) -> int:
    file = Path(args.prompt_cache)
    if not file.parent.is_dir() or file.is_dir():
        raise OutputError(f"{file}: cannot be written: it is a folder, or would lie in none")
    options = GenerationOptions(**read_kv_options(args))
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    model = load_or_demo(args)
    prompt = encode_in_parts(
        model.tokenizer,
        text,
        begins=True,
        system_prompt=args.system_prompt,
        use_chat_template=not args.ignore_chat_template,
        enable_thinking=args.enable_thinking,
    )
    with prefill_bar(len(prompt), DEFAULT_PREFILL_STEP) as on_prefill:
        count = model.save_prompt(prompt, file, options, on_prefill=on_prefill)
    print(f"{file}: {count} tokens, {file.stat().st_size / 1e6:.1f} MB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
