"""Command line that saves a prompt's K/V to a file: `python -m mlx_mtp.cache_prompt --help`."""

import sys

if __name__ == "__main__":
    # This comes before the slow imports, so that Ctrl-C ends the command from the first moment on.
    from .commands import run_command

    sys.exit(run_command("cache_prompt"))

import argparse
from pathlib import Path

from mlx_mtp.checkpoints.output_files import check_file
from mlx_mtp.text.tokenizer import encode_in_parts

from .command_line import (
    add_kv_options,
    add_model_options,
    check_template_options,
    load_or_demo,
    prefill_bar,
    read_kv_options,
)
from .launched import check_alone
from .options import DEFAULT_PREFILL_STEP, GenerationOptions
from .shell import Parser, exit_status, read_prompt, text_argument


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    return exit_status(lambda: _run(args))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = Parser(
        prog="mlx_mtp.cache_prompt",
        description="Read the beginning of a user's turn, such as a long text, and keep its K/V in a file. "
        "mlx_mtp.generate --prompt-cache FILE --prompt TEXT goes on with TEXT in the same turn.",
    )
    add_model_options(parser, default="the demo pair in the package", lengths=False)
    add = parser.add_argument
    add(
        "--prompt",
        "-p",
        required=True,
        type=text_argument,
        metavar="TEXT|-",
        help="The text, in UTF-8; '-' reads it from stdin.",
    )
    add("--prompt-cache", "--prompt-cache-file", required=True, metavar="FILE", help="The safetensors file to write.")
    add("--system-prompt", type=text_argument, help="System prompt for the chat template.")
    add("--ignore-chat-template", action="store_true", help="Read the bare text.")
    add("--enable-thinking", action="store_true", help="Read the prompt as for an answer with a thought.")
    add_kv_options(parser)
    return parser


def _run(args: argparse.Namespace) -> int:
    check_alone("a prompt file")
    file = Path(args.prompt_cache)
    check_file(file)
    check_template_options(args)
    options = GenerationOptions(**read_kv_options(args))
    text = read_prompt(args.prompt)
    model = load_or_demo(args, options)
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
