"""The tasks of the bench by kind of text: prompts, and answers that the target is told.

All are made from files that come with Python.
"""

import keyword
import pydoc_data.topics
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from mlx_mtp.errors import OptionError
from mlx_mtp.model import Model

# The source of these modules is the text of the kind "code". Each machine has them: they are in the standard library.
_MODULES = ("argparse", "queue", "posixpath", "textwrap", "statistics", "inspect", "typing", "tarfile", "turtle")
# The head of a function, if it is a single line: its indentation, and its name.
_FUNCTION = re.compile(r"^( *)def (\w+)\(.*\).*:\n", re.MULTILINE)
# A block of a change has this many lines of the file after the head of a function.
_LINES_OF_BLOCK = 3
# The speed of a shorter answer cannot be measured.
_SHORTEST_ANSWER = 2


class Task(NamedTuple):
    """The tokens of a prompt, and of the answer that the target is told. If it is None, the target answers itself."""

    prompt: list[int]
    answer: list[int] | None = None


class Question(NamedTuple):
    """An instruction about a text, and the told answer."""

    instruction: str
    answer: str


def task(model: Model, kind: str, length: int, room: int) -> Task:
    """Return the task of one of the `KINDS` or of the `TOLD_KINDS`.

    The prompt has `length` tokens. With a told answer, it has an instruction and a text of `length` tokens. The answer
    has at most `room` tokens.

    Raises OptionError if the prompt and `room` more tokens do not fit in the model's context, or if the text is too
    short for a question.
    """
    if kind in KINDS:
        return Task(prompt(model, kind, length, room))
    text = _cut(model, _prose() if kind == "cite" else map(_functions, _code()), length)
    question = QUESTIONS[kind](text)
    asked = model.encode([{"role": "user", "content": f"{question.instruction}\n\n{text}"}])
    _check_room(model, len(asked), room)
    answer = model.tokenizer.encode(question.answer, add_special_tokens=False)[:room]
    if len(answer) < _SHORTEST_ANSWER:
        raise OptionError(f"a context of {length} tokens is too short for the kind {kind}")
    return Task(asked, answer)


def prompt(model: Model, kind: str, length: int, room: int) -> list[int]:
    """Return a prompt of `length` tokens of one of the `KINDS`.

    Raises OptionError if the prompt and `room` more tokens do not fit in the model's context.
    """
    _check_room(model, length, room)
    return _PROMPTS[kind](model, length)


def _check_room(model: Model, length: int, room: int) -> None:
    if length + room > model.max_context:
        raise OptionError(f"a context of {length} and {room} more tokens: the model holds {model.max_context}")


def _copy(model: Model, length: int) -> list[int]:
    """Encode a text, and then the first half of the text again. The model continues the copy."""
    half = _fill(model, _code(), (2 * length) // 3)
    return (half + half)[:length]


def _chat(model: Model, length: int) -> list[int]:
    """Encode one question about a text with the chat template.

    The text is cut to fit, so that the end of the template is also the end of the prompt.
    """
    question = "Explain in your own words:\n\n"

    def encode(text: list[int]) -> list[int]:
        return model.encode([{"role": "user", "content": question + model.tokenizer.decode(text)}])

    text = _fill(model, _prose(), length)
    over = len(encode(text)) - length
    return encode(text[: max(1, len(text) - over)])


def _fill(model: Model, pieces: Iterator[str], length: int) -> list[int]:
    tokens = model.encode(next(pieces))
    while len(tokens) < length:
        tokens += model.tokenizer.encode("\n\n" + next(pieces), add_special_tokens=False)
    return tokens[:length]


def _code() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    while True:
        for name in _MODULES:
            yield (root / f"{name}.py").read_text(encoding="utf-8")


def _prose() -> Iterator[str]:
    """Yield the topics of Python's language reference, as `help` shows them."""
    while True:
        yield from pydoc_data.topics.topics.values()


def _list() -> Iterator[str]:
    names = sorted(sys.stdlib_module_names)
    while True:
        yield "\n".join(f"{number}. {name}" for number, name in enumerate(names, start=1))


def _cut(model: Model, pieces: Iterator[str], length: int) -> str:
    """Return a text of `length` tokens."""
    text: str = model.tokenizer.decode(_fill(model, pieces, length), skip_special_tokens=True)
    return text


def _functions(source: str) -> str:
    """Return the source from its first function on."""
    found = _FUNCTION.search(source)
    return source if found is None else source[found.start() :]


def _rename(text: str) -> Question:
    """Ask for the text with another name for its most frequent identifier."""
    names = re.findall(r"\b[a-z_]{4,}\b", text)
    found = Counter(name for name in names if name != "self" and not keyword.iskeyword(name))
    name = found.most_common(1)[0][0] if found else "name"
    answer = re.sub(rf"\b{name}\b", f"new_{name}", text)
    return Question(f"Rename {name} to new_{name}. Answer with the whole file.", answer)


def _with_logging(text: str) -> str:
    return _FUNCTION.sub(lambda found: f'{found[0]}{found[1]}    logger.debug("{found[2]}")\n', text)


_LOG = 'Log the name of each function as its first statement, as in logger.debug("main").'


def _rewrite(text: str) -> Question:
    """Ask for the text with one more line in each function."""
    return Question(f"{_LOG} Answer with the whole file.", _with_logging(text))


def _blocks(text: str) -> Question:
    """Ask for the same change as blocks of lines to search for, and of lines to put in their place."""
    lines = text.splitlines(keepends=True)
    blocks = []
    for index, line in enumerate(lines):
        if _FUNCTION.fullmatch(line):
            search = line + "".join(takewhile(str.strip, lines[index + 1 : index + 1 + _LINES_OF_BLOCK]))
            blocks.append(f"<<<<<<< SEARCH\n{search}=======\n{_with_logging(search)}>>>>>>> REPLACE\n")
    return Question(f"{_LOG} Answer with SEARCH/REPLACE blocks.", "\n".join(blocks))


def _cite(text: str) -> Question:
    """Ask for an answer that cites every second sentence of the text."""
    sentences = re.findall(r"[A-Z][^.:]{20,}\.", text)
    cited = (f'{number}. The text says: "{sentence}"' for number, sentence in enumerate(sentences[::2], 1))
    return Question("Say in short what the text is about, and cite it.", "\n".join(cited))


_PROMPTS: dict[str, Callable[[Model, int], list[int]]] = {
    "code": lambda model, length: _fill(model, _code(), length),
    "prose": lambda model, length: _fill(model, _prose(), length),
    "chat": _chat,
    "copy": _copy,
    "list": lambda model, length: _fill(model, _list(), length),
}
# The questions about a text, by kind.
QUESTIONS: dict[str, Callable[[str], Question]] = {
    "edit": _rename,
    "rewrite": _rewrite,
    "blocks": _blocks,
    "cite": _cite,
}
# The target answers the kinds of `KINDS` itself. It is told the answers of the `TOLD_KINDS`.
KINDS, TOLD_KINDS = tuple(_PROMPTS), tuple(QUESTIONS)
