"""Command line for a conversation with a target and its drafter: `python -m mlx_mtp.chat --help`.

Answers go to stdout, everything else to stderr.
"""

import sys

if __name__ == "__main__":
    # This comes before the slow imports, so that Ctrl-C ends the command from the first moment on.
    from .commands import run_command

    sys.exit(run_command("chat"))

import argparse
import io
import mimetypes
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_mtp.decoding.prefill import Progress
from mlx_mtp.decoding.prompt_media import PreparedPrompt
from mlx_mtp.decoding.report import Stats

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
from .generation import measures_first
from .loading import follow_others
from .model import Model
from .options import DEFAULT_PREFILL_STEP, GenerationOptions
from .responses import GenerationResponse
from .shell import Parser, check_stdin, exit_status, read_escaped, text_argument

DEFAULT_ANSWER_TOKENS = 1024

_PROMPT = ">>> "
_COMMANDS = {
    "/image FILE": "add a picture to the next message",
    "/audio FILE": "add a sound to the next message",
    "/video FILE": "add a video, or a folder of frames, to the next message",
    "/reset": "forget the conversation, keep the system prompt",
    "/stats": "figures of the last answer and of all answers, and the context used",
    "/help": "this list",
    "/exit": "end the program, as Ctrl-D does; Ctrl-C stops an answer or clears the line",
}

_MEDIA = ("image", "audio", "video")

Message = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    return exit_status(lambda: _run(args))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = Parser(
        prog="mlx_mtp.chat",
        description="Chat with Gemma 4: the drafter proposes, the target verifies. Reads a message per line of stdin. "
        "Arrow keys edit the line and recall earlier lines, Ctrl-C stops the answer, and Ctrl-D ends the chat. "
        "/image, /audio and /video add a file to the next message, as a file does that is dropped on the line. /reset "
        "forgets the conversation, /stats shows speed and acceptance, and /help lists the commands. Thoughts are not "
        "kept in the conversation.",
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
    parser.add_argument("--verbose", action="store_true", help="Print what was loaded, and figures of each answer.")
    return parser


@dataclass
class _Chat:
    """A conversation with a model.

    `messages` holds no thoughts. `answers` holds the last response of every answer since the program began. `media` are
    the parts that are added to the next message.
    """

    model: Model
    options: GenerationOptions
    system_prompt: str | None
    messages: list[Message] = field(default_factory=list)
    answers: list[GenerationResponse] = field(default_factory=list)
    media: list[Message] = field(default_factory=list)
    context_used: int = 0

    def check(self) -> None:
        """Check all options before the first message.

        Raises MTPError if an option is not possible.
        """
        # This call checks everything at once, but decodes nothing until the first response is read.
        self._stream(self._encode([{"role": "user", "content": ""}]))

    def attach(self, kind: str, path: str) -> None:
        """Add a file to the next message. Raises PromptError if it cannot be read, or if the model cannot use it."""
        part = {"type": kind, "path": path, "place": f"/{kind}"}
        found = self.model.prepare([{"role": "user", "content": [part]}]).media.spans
        self.media.append(part)
        print(f"added {path}, {sum(span.count for span in found)} tokens; now type a message", file=sys.stderr)

    def ask(self, text: str) -> None:
        """Print the answer to a message, and add both to the conversation.

        Ctrl-C ends the answer early. Raises PromptError if the conversation no longer fits the context,
        KeyboardInterrupt if Ctrl-C comes before any text. After an exception, the conversation is unchanged.
        """
        content = [*self.media, {"type": "text", "text": text}] if self.media else text
        messages = [*self.messages, {"role": "user", "content": content}]
        prompt = self._encode(messages)
        with prefill_bar(len(prompt.tokens), DEFAULT_PREFILL_STEP) as on_prefill:
            seen, interrupted = print_stream(self._stream(prompt, on_prefill))
        answer = "".join(response.text for response in seen)
        if interrupted and not answer:
            raise KeyboardInterrupt
        last = seen[-1]
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.media = []
        self.answers.append(last)
        self.context_used = last.prompt_tokens + last.generation_tokens

    def reset(self) -> None:
        """Forget the conversation, but keep the answers' figures."""
        self.messages, self.media = [], []
        self.context_used = 0

    def print_stats(self) -> None:
        """Print the figures of the last answer and of all answers, and the context used, on stderr."""
        if self.answers:
            print("Last answer", file=sys.stderr)
            summarize(self.answers[-1], self.model, self.options)
            print(f"All answers: {len(self.answers)}", file=sys.stderr)
            summarize(_total(self.answers), self.model, self.options)
        else:
            print("Nothing answered yet", file=sys.stderr)
        print(f"Context: {self.context_used} of {self.model.max_context} tokens", file=sys.stderr)

    def _encode(self, messages: list[Message]) -> PreparedPrompt:
        system = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        return self.model.prepare(system + messages, enable_thinking=self.options.enable_thinking)

    def _stream(self, prompt: PreparedPrompt, on_prefill: Progress | None = None) -> Iterator[GenerationResponse]:
        # Each answer has its own seed. With one seed, a repeated question after /reset gets the same draws.
        sampling = self.options.sampling
        sampling = replace(sampling, seed=(sampling.seed + len(self.answers)) % 2**64)
        return self.model.stream_generate(prompt, self.options, sampling=sampling, on_prefill=on_prefill)


def _total(answers: Sequence[GenerationResponse]) -> GenerationResponse:
    """Return one response with the figures of all answers."""
    stats = Stats()
    for answer in answers:
        stats.merge(answer.stats)
    # Generation speed leaves out the first token, which belongs to prefill. An answer of one token has no speed.
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
    """Return the tokens per second of all pairs (tokens, tokens per second) together, 0.0 if there are no pairs."""
    seconds = sum(tokens / tps for tokens, tps in timed)
    return sum(tokens for tokens, _ in timed) / seconds if seconds else 0.0


def _run(args: argparse.Namespace) -> int:
    follow_others()
    check_stdin()
    # Check the options first, because loading takes seconds.
    options = GenerationOptions(
        sampling=given_sampling(args),
        max_tokens=args.max_tokens,
        num_draft_tokens=args.num_draft_tokens,
        copy_drafts=args.copy_drafts,
        enable_thinking=args.enable_thinking,
        thinking_budget=args.thinking_budget,
        **read_kv_options(args),
    )
    started = time.perf_counter()
    model = load_model(args.model, args.drafter, args, options)
    options = replace(options, sampling=read_sampling(args, model))
    if measures_first(options):
        calibrate(model, options)
    chat = _Chat(model, options, args.system_prompt)
    chat.check()
    print(_greeting(args, model), file=sys.stderr)
    if args.verbose:
        describe(model, options.sampling, time.perf_counter() - started)
    for line in _lines():
        if line == "/exit":
            break
        path, rest = _dropped(line)
        if path is not None:
            _attach(*path, chat)
            line = rest
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
    """Read the lines of stdin, stripped, until stdin ends.

    A terminal shows a prompt, and Ctrl-C clears the line there. Raises KeyboardInterrupt if Ctrl-C comes during a read
    from a pipe, or comes a second time in a row on an empty line of a terminal.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):
            # This import gives input() line editing, and a history on the arrow keys.
            import readline  # noqa: F401
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A byte that is not valid text must not end the conversation. Only its line is refused.
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
    """Return the text of the line that Ctrl-C cleared, or an empty string without readline."""
    readline = sys.modules.get("readline")
    return "" if readline is None else readline.get_line_buffer()


def _dropped(line: str) -> tuple[tuple[str, str] | None, str]:
    """Return the kind and path of the media file that a line begins with, if there is one, and the rest of the line.

    A terminal writes the path of a file that is dropped on it, with quotes or backslashes as a shell needs them.
    """
    text = io.StringIO(line)
    words = shlex.shlex(text, posix=True)
    words.whitespace_split, words.commenters = True, ""
    try:
        path = words.get_token() or ""
    except ValueError:
        return None, line
    kind = (mimetypes.guess_type(path)[0] or "").partition("/")[0]
    if kind not in _MEDIA or not os.path.isfile(path):
        return None, line
    return (kind, path), text.read().strip()


def _unquoted(path: str) -> str:
    """Return a path without the quotes and backslashes of a shell, if there is no file with them in its name."""
    with suppress(ValueError):
        words = shlex.split(path)
        if len(words) == 1 and not os.path.exists(path):
            return words[0]
    return path


def _attach(kind: str, path: str, chat: _Chat) -> None:
    try:
        chat.attach(kind, path)
    except PromptError as error:
        print(f"error: {error}; nothing is added", file=sys.stderr)


def _obey(command: str, chat: _Chat) -> None:
    name, _, path = command.partition(" ")
    if name[1:] in _MEDIA:
        if path:
            _attach(name[1:], _unquoted(read_escaped(path.strip())), chat)
        else:
            print(f"{name} needs a file", file=sys.stderr)
    elif command == "/reset":
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
