"""Command line: a conversation with a target and its drafter. `python -m mlx_mtp.chat --help`.

Answers go to stdout, everything else to stderr.
"""

import sys

if __name__ == "__main__":
    # Before anything that takes time is imported.
    from .commands import run_command

    sys.exit(run_command("chat"))

import argparse
import io
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from mlx_mtp.decoding.report import Stats
from mlx_mtp.decoding.stream import Progress

from .command_line import (
    add_kv_options,
    add_model_options,
    add_sampling_options,
    add_thinking_options,
    calibrate,
    describe,
    given_sampling,
    load_model,
    prefill_bar,
    print_stream,
    read_kv_options,
    read_sampling,
    summarize,
)
from .errors import PromptError
from .model import Model
from .options import DEFAULT_PREFILL_STEP, GenerationOptions
from .responses import GenerationResponse
from .shell import Parser, check_stdin, exit_status, read_escaped, text_argument

DEFAULT_ANSWER_TOKENS = 1024

_PROMPT = ">>> "
_COMMANDS = {
    "/reset": "forget the conversation, keep the system prompt",
    "/stats": "figures of the last answer and of all answers, and the context used",
    "/help": "this list",
    "/exit": "end the program, as Ctrl-D does; Ctrl-C stops an answer or clears the line",
}

Message = dict[str, str]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    return exit_status(lambda: _run(args))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlx_mtp.chat",
        description="Chat with Gemma 4: the drafter proposes, the target verifies. Reads a message per line of stdin.",
    )
    add_model_options(parser)
    parser.add_argument("--system-prompt", type=text_argument, help="System prompt of the conversation.")
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=int,
        default=DEFAULT_ANSWER_TOKENS,
        help="Most tokens of an answer (default: %(default)s).",
    )
    add_sampling_options(parser)
    add_thinking_options(parser)
    add_kv_options(parser)
    parser.add_argument("--verbose", action="store_true", help="Say what was loaded, and the figures of each answer.")
    return parser


@dataclass
class _Chat:
    """A conversation, and the last response of every answer since the program began. Thoughts are not kept in it."""

    model: Model
    options: GenerationOptions
    system_prompt: str | None
    messages: list[Message] = field(default_factory=list)
    answers: list[GenerationResponse] = field(default_factory=list)
    context_used: int = 0

    def check(self) -> None:
        """Raises MTPError for an option that cannot be honoured, before a message is asked for."""
        # Checks everything at once, but decodes nothing until a response is asked for.
        self._stream(self._encode([{"role": "user", "content": ""}]))

    def ask(self, text: str) -> None:
        """Print the answer to a message, and keep both. Ctrl-C ends the answer there.

        Raises PromptError if the conversation no longer fits the context, KeyboardInterrupt after Ctrl-C before any
        text: the conversation is then as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._encode(messages)
        with prefill_bar(len(prompt), DEFAULT_PREFILL_STEP) as on_prefill:
            seen, interrupted = print_stream(self._stream(prompt, on_prefill))
        answer = "".join(response.text for response in seen)
        if interrupted and not answer:
            raise KeyboardInterrupt
        last = seen[-1]
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.answers.append(last)
        self.context_used = last.prompt_tokens + last.generation_tokens

    def reset(self) -> None:
        self.messages = []
        self.context_used = 0

    def print_stats(self) -> None:
        if self.answers:
            print("Last answer", file=sys.stderr)
            summarize(self.answers[-1], self.model, self.options)
            print(f"All answers: {len(self.answers)}", file=sys.stderr)
            summarize(_total(self.answers), self.model, self.options)
        else:
            print("Nothing answered yet", file=sys.stderr)
        print(f"Context: {self.context_used} of {self.model.max_context} tokens", file=sys.stderr)

    def _encode(self, messages: list[Message]) -> list[int]:
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        return self.model.encode(system + messages, enable_thinking=self.options.enable_thinking)

    def _stream(self, prompt: list[int], on_prefill: Progress | None = None) -> Iterator[GenerationResponse]:
        # A seed of its own for each answer: a question asked again after /reset would get the same draws.
        sampling = self.options.sampling
        sampling = replace(sampling, seed=(sampling.seed + len(self.answers)) % 2**64)
        return self.model.stream_generate(prompt, self.options, sampling=sampling, on_prefill=on_prefill)


def _total(answers: Sequence[GenerationResponse]) -> GenerationResponse:
    """The figures of all answers in one response."""
    stats = Stats()
    for answer in answers:
        stats.merge(answer.stats)
    # Speed is of the tokens after the first, which belongs to prefill; an answer of one token has none.
    timed = [(a.generation_tokens - 1, a.generation_tps) for a in answers if a.generation_tps]
    return replace(
        answers[-1],
        prompt_tokens=sum(a.prompt_tokens for a in answers),
        prompt_tps=_mean_tps([(a.prompt_tokens, a.prompt_tps) for a in answers]),
        generation_tokens=sum(a.generation_tokens for a in answers),
        generation_tps=_mean_tps(timed),
        stats=stats,
    )


def _mean_tps(timed: list[tuple[int, float]]) -> float:
    """Tokens per second in all, from (tokens, tokens per second); 0.0 if there are none."""
    seconds = sum(tokens / tps for tokens, tps in timed)
    return sum(tokens for tokens, _ in timed) / seconds if seconds else 0.0


def _run(args: argparse.Namespace) -> int:
    check_stdin()
    # Made first: what is wrong with the options shows before seconds of loading.
    options = GenerationOptions(
        sampling=given_sampling(args),
        max_tokens=args.max_tokens,
        num_draft_tokens=args.num_draft_tokens,
        enable_thinking=args.enable_thinking,
        thinking_budget=args.thinking_budget,
        **read_kv_options(args),
    )
    started = time.perf_counter()
    model = load_model(args.model, args.drafter, args, options)
    options = replace(options, sampling=read_sampling(args, model))
    calibrate(model, options)
    chat = _Chat(model, options, args.system_prompt)
    chat.check()
    print(_greeting(args, model), file=sys.stderr)
    if args.verbose:
        describe(model, options.sampling, time.perf_counter() - started)
    for line in _lines():
        if line == "/exit":
            break
        if line.startswith("/"):
            _obey(line, chat)
        elif line:
            _ask(line, chat, args.verbose)
    return 0


def _greeting(args: argparse.Namespace, model: Model) -> str:
    if model.drafter_config is not None:
        drafter = f"drafter: {model.drafter_config.path.parent}"
    elif args.drafter is None:
        drafter = f"no drafter found for {args.model}: decoding plainly"
    else:
        drafter = "drafter: none"
    return f"model: {args.model}, {drafter}; /help lists the commands"


def _lines() -> Iterator[str]:
    """The lines of stdin, stripped, until it ends. On a terminal with a prompt, and Ctrl-C clears the line there.

    Raises KeyboardInterrupt for Ctrl-C while waiting for a pipe, and for a second one in a row with nothing typed.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):
            # Imported for what it does to input(): editing, and a history on the arrow keys.
            import readline  # noqa: F401
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A stray byte must not end the conversation: its line is refused.
        sys.stdin.reconfigure(errors="surrogateescape")
    cleared = False
    while True:
        try:
            line = input(_PROMPT if is_terminal else "")
        except EOFError:
            if is_terminal:
                print()
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print()
            if cleared and not _typed():
                raise
            cleared = True
            continue
        cleared = False
        yield line.strip()


def _typed() -> str:
    """What was on the line when Ctrl-C cleared it. Unknown, and so empty, without readline."""
    readline = sys.modules.get("readline")
    return "" if readline is None else readline.get_line_buffer()


def _obey(command: str, chat: _Chat) -> None:
    if command == "/reset":
        chat.reset()
        print("conversation forgotten", file=sys.stderr)
    elif command == "/stats":
        chat.print_stats()
    elif command == "/help":
        print("\n".join(f"{name}  {effect}" for name, effect in _COMMANDS.items()), file=sys.stderr)
    else:
        print(f"unknown command {command}: /help lists them", file=sys.stderr)


def _ask(line: str, chat: _Chat, verbose: bool) -> None:
    try:
        text = read_escaped(line)
    except PromptError as error:
        print(f"error: stdin: {error}; the message is dropped", file=sys.stderr)
        return
    try:
        chat.ask(text)
    except PromptError as error:
        print(f"error: {error}; the message is dropped, /reset begins a new conversation", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped before the answer: the message is dropped", file=sys.stderr)
    else:
        if verbose:
            summarize(chat.answers[-1], chat.model, chat.options)
