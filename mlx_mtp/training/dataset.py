"""Training texts as token ids, read from JSONL files in mlx-lm's formats.

The target itself answers a prompt that has no answer in the file.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_mtp.checkpoints.files import read_text
from mlx_mtp.errors import DataError, MTPError
from mlx_mtp.model import Model
from mlx_mtp.options import GenerationOptions
from mlx_mtp.text.tokenizer import encode_prompt


class Text(NamedTuple):
    """The token ids of one text. The answer begins at index `answer` (1 if there is no prompt)."""

    tokens: list[int]
    answer: int


class Data(NamedTuple):
    """The texts to train on, and the held-out texts to measure with."""

    train: list[Text]
    valid: list[Text]


class _Line(NamedTuple):
    """One line of a JSONL file.

    `place` names the line in error messages. `is_prompt` is true if the target still has to answer the text.
    """

    place: str
    text: Text
    is_prompt: bool


def read_data(
    path: Path, model: Model, max_length: int, answer: Callable[[Sequence[list[int]]], list[list[int]]]
) -> Data:
    """Read the training texts and the held-out texts.

    `path` is a JSONL file or a folder with `train.jsonl` and `valid.jsonl`. Of a single file, every twentieth text is
    held out, and at least one text. A line is {"text": ...}, {"messages": [...]} or {"prompt": ..., "completion": ...}.
    The target answers a line that is {"prompt": ...} alone, or messages that end with a user message. Texts longer than
    `max_length` tokens are cut into pieces. `answer` is called once with all prompts and returns the answer tokens of
    each prompt.

    Raises DataError if a line cannot be read or if there is no usable text. The message names the file and line.
    """
    lines = [list(_read_lines(file, model)) for file in _files(path)]
    prompts = [line.text.tokens for part in lines for line in part if line.is_prompt]
    answers = iter(answer(prompts) if prompts else [])
    parts = [
        [
            Text(line.text.tokens + next(answers), len(line.text.tokens)) if line.is_prompt else line.text
            for line in part
        ]
        for part in lines
    ]
    if len(parts) == 1:
        every = max(2, min(20, len(parts[0])))
        parts = [[t for i, t in enumerate(parts[0]) if (i + 1) % every], parts[0][every - 1 :: every]]
    bos = model.tokenizer.bos_token_id
    cut = [[piece for text in part for piece in _pieces(text, max_length, bos)] for part in parts]
    for part, name in zip(cut, ("train on", "measure with"), strict=True):
        if not part:
            raise DataError(f"{path}: no text to {name}: {sum(map(len, lines))} lines read, none long enough is left")
    return Data(*cut)


def check_data(path: Path) -> None:
    """Check the data files without a model. Raises DataError if a file or line is not JSONL, or if a file is empty."""
    for file in _files(path):
        if not list(_entries(file)):
            raise DataError(f"{file}: expected a text a line, found none")


def _files(path: Path) -> list[Path]:
    return [path / "train.jsonl", path / "valid.jsonl"] if path.is_dir() else [path]


def _entries(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each object of a JSONL file as (place, object). The place names the file and line for messages."""
    try:
        content = read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not JSON: {error}") from None
        if not isinstance(entry, dict):
            raise DataError(f"{place}: expected an object, found {type(entry).__name__}")
        yield place, entry


def _read_lines(file: Path, model: Model) -> Iterator[_Line]:
    for place, entry in _entries(file):
        try:
            yield _Line(place, *_encode(entry, model, place))
        except DataError:
            raise
        except MTPError as error:
            raise DataError(f"{place}: {error}") from None


def _encode(entry: dict[str, Any], model: Model, place: str) -> tuple[Text, bool]:
    tokenizer = model.tokenizer
    if isinstance(entry.get("text"), str):
        return Text(encode_prompt(tokenizer, entry["text"], use_chat_template=False), 1), False
    if isinstance(entry.get("prompt"), str):
        messages = [{"role": "user", "content": entry["prompt"]}]
        if "completion" in entry:
            messages.append({"role": "assistant", "content": entry["completion"]})
    elif isinstance(entry.get("messages"), list) and entry["messages"]:
        messages = entry["messages"]
    else:
        raise DataError(f"{place}: expected text, messages or prompt, found {', '.join(entry) or 'nothing'}")
    last = messages[-1]
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return Text(model.encode(messages), 0), True
    prompt = model.encode(messages[:-1])
    if not isinstance(last.get("content"), str):
        raise DataError(f"{place}: expected the answer as text, found {last.get('content')!r}")
    answer = tokenizer.encode(last["content"], add_special_tokens=False)
    # The answer ends with the token with which the model ends a turn. The model does not generate the text that the
    # chat template adds after the turn.
    return Text([*prompt, *answer, *_turn_end(model)], len(prompt)), False


def _turn_end(model: Model) -> list[int]:
    token = model.tokenizer.convert_tokens_to_ids("<turn|>")
    return [] if token in (None, model.tokenizer.unk_token_id) else [token]


def _pieces(text: Text, max_length: int, bos: int | None) -> Iterator[Text]:
    """Yield the pieces of a text, without pieces that are too short.

    If the text begins with `<bos>`, each piece begins with `<bos>`.
    """
    tokens, answer = text
    start = tokens[:1] if tokens[0] == bos else []
    while len(tokens) > max_length:
        yield from _usable(Text(tokens[:max_length], answer))
        tokens = start + tokens[max_length:]
        answer = max(1, answer - max_length + len(start))
    yield from _usable(Text(tokens, answer))


def _usable(text: Text) -> Iterator[Text]:
    # A usable text has enough tokens to read, and its answer has enough tokens to draft.
    if len(text.tokens) >= 16 and text.answer < len(text.tokens) - 8:
        yield text


def answer_prompts(
    model: Model,
    prompts: Sequence[list[int]],
    file: Path,
    options: GenerationOptions,
    on_answer: Callable[[int, int], None],
) -> list[list[int]]:
    """Answer prompts with the target, and append each complete answer to a file.

    Decoding is speculative. If the file already holds the first answers, the function continues after them. `on_answer`
    gets the number of answers and the number of prompts.

    Raises DataError if the file holds answers to other prompts.
    """
    answers: list[list[int]] = []
    if file.is_file():
        # If a line has no newline at its end, the write was interrupted.
        whole = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        for number, (line, prompt) in enumerate(zip(whole, prompts, strict=False), 1):
            entry = json.loads(line)
            if entry["prompt"] != prompt:
                raise DataError(f"{file}, line {number}: answers another prompt than the data's: remove the file")
            answers.append(entry["answer"])
        file.write_text("".join(whole[: len(answers)]))
    with file.open("a") as out:
        for index in range(len(answers), len(prompts)):
            on_answer(index, len(prompts))
            answer = model.generate(prompts[index], options).tokens
            out.write(json.dumps({"prompt": prompts[index], "answer": answer}) + "\n")
            out.flush()
            answers.append(answer)
    on_answer(len(prompts), len(prompts))
    return answers
