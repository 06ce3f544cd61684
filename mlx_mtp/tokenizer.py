"""Tokenizer of a checkpoint folder: chat template and streaming detokenizer, thin over mlx-lm's wrapper."""

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import read_json
from .errors import ConfigError, PromptError, TokenizerError
from .files import BYTE_ORDER_MARK, fault, read_text
from .guide import Channel

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# Stands for the user's text in a rendered turn: what no template changes or adds.
_PLACEHOLDER = "<<user's text>>"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_OBJECTS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")


def load_tokenizer(folder: Path, eos_token_ids: tuple[int, ...]) -> "TokenizerWrapper":
    """The folder's tokenizer, stopping at these ids. Raises TokenizerError if it has none or it cannot be read."""
    _vocabulary_file(folder)
    # Imported here: mlx-lm brings transformers along, seconds that --help and the converter have no use for.
    from mlx_lm import tokenizer_utils

    try:
        with _without_marks(folder) as source:
            tokenizer = tokenizer_utils.load(source, eos_token_ids=list(eos_token_ids))
    # Rust raises nothing but Exception, and transformers what its guesses run into.
    except Exception as error:
        check_tokenizer(folder)
        raise TokenizerError(f"{folder}: the tokenizer cannot be read: {error}") from error
    if not (folder / "tokenizer.json").is_file():
        # mlx-lm knows sentencepiece by tokenizer.json; its general detokenizer repeats characters split into bytes.
        tokenizer._detokenizer = tokenizer_utils.SPMStreamingDetokenizer(tokenizer, trim_space=False)
    # The context's limit is checked where decoding starts; transformers would warn of a limit of its own.
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def check_tokenizer(folder: Path) -> None:
    """Raise TokenizerError, naming the file, for a tokenizer that `load_tokenizer` could not load.

    Without transformers: it costs a second for a vocabulary of 262144 tokens, and the memory of the vocabulary.
    """
    file = _vocabulary_file(folder)
    try:
        for name in _OBJECTS:
            if (folder / name).is_file():
                read_json(folder / name)
        if (reason := fault(file)) is not None:
            raise TokenizerError(f"{file}: {reason}")
        if file.suffix == ".json":
            from tokenizers import Tokenizer

            Tokenizer.from_str(read_text(file))
        else:
            from sentencepiece import SentencePieceProcessor

            SentencePieceProcessor(model_file=str(file))
    except ConfigError as error:
        raise TokenizerError(str(error)) from None
    except TokenizerError:
        raise
    # Rust raises nothing but Exception.
    except Exception as error:
        raise TokenizerError(f"{file}: not a tokenizer: {error}") from None


def _vocabulary_file(folder: Path) -> Path:
    file = next((folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()), None)
    if file is None:
        raise TokenizerError(f"{folder}: the folder has no tokenizer: expected {' or '.join(_TOKENIZER_FILES)}")
    return file


@contextmanager
def _without_marks(folder: Path) -> Iterator[Path]:
    """The folder, or where a file begins with a byte order mark a copy of all of them without it: transformers takes it
    for a part of the JSON, or of the chat template."""
    files = [file for file in folder.iterdir() if file.suffix in (".json", ".jinja", ".model") and file.is_file()]
    contents = {file.name: file.read_bytes() for file in files}
    if not any(content.startswith(BYTE_ORDER_MARK) for content in contents.values()):
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        for name, content in contents.items():
            Path(copy, name).write_bytes(content.removeprefix(BYTE_ORDER_MARK))
        yield Path(copy)


def encode_prompt(
    tokenizer: "TokenizerWrapper",
    prompt: str,
    *,
    system_prompt: str | None = None,
    use_chat_template: bool = True,
    enable_thinking: bool = False,
) -> list[int]:
    """Token ids of a user's prompt: one user turn of the chat template, or the bare text.

    The beginning-of-text token is added once, by the template or, for bare text, by the tokenizer.

    Raises PromptError for an empty prompt, and for a system prompt or thinking without a chat template.
    """
    if not prompt:
        raise PromptError("the prompt is empty: expected some text")
    if not use_chat_template or not tokenizer.has_chat_template:
        if system_prompt is not None or enable_thinking:
            what = "a system prompt" if system_prompt is not None else "thinking"
            raise PromptError(f"{what} needs a chat template: this model has none, or it is ignored")
        bos = tokenizer.bos_token
        return list(tokenizer.encode(prompt, add_special_tokens=bos is None or not prompt.startswith(bos)))
    messages = [{"role": "user", "content": prompt}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return encode_chat(tokenizer, messages, enable_thinking=enable_thinking)


def encode_in_parts(
    tokenizer: "TokenizerWrapper",
    text: str,
    *,
    begins: bool,
    system_prompt: str | None = None,
    use_chat_template: bool = True,
    enable_thinking: bool = False,
) -> list[int]:
    """Token ids of a part of a user's turn: with what the chat template puts before it where the turn `begins`, else
    with what it puts after it. A prompt read ahead is the first part, what is asked about it the second.

    Raises PromptError as `encode_prompt` does.
    """
    if not text:
        raise PromptError("the prompt is empty: expected some text")
    if not use_chat_template or not tokenizer.has_chat_template:
        if begins:
            return encode_prompt(tokenizer, text, system_prompt=system_prompt, use_chat_template=False)
        return list(tokenizer.encode(text, add_special_tokens=False))
    messages = [{"role": "user", "content": _PLACEHOLDER}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
    )
    before, _, after = rendered.rpartition(_PLACEHOLDER)
    return list(tokenizer.encode(before + text if begins else text + after, add_special_tokens=False))


def encode_chat(
    tokenizer: "TokenizerWrapper",
    messages: Sequence[Mapping[str, Any]],
    *,
    enable_thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Token ids of a conversation, up to where the model's answer begins. `tools` are functions as OpenAI's API
    describes them.

    Raises PromptError if there is no chat template, if it cannot render the messages, or if it has no switch for
    thinking that should be enabled, or no place for tools.
    """
    from jinja2 import TemplateError

    if not tokenizer.has_chat_template:
        raise PromptError("messages need a chat template: this model has none")

    def encode(enable_thinking: bool, tools: Sequence[Mapping[str, Any]] | None) -> list[int]:
        # Always said: mlx-lm's wrapper would turn thinking on where Gemma's own template leaves it off.
        return list(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                enable_thinking=enable_thinking,
                tools=None if tools is None else [dict(tool) for tool in tools],
            )
        )

    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(f"messages[{index}] must have a role and content, found {message!r}")
    try:
        tokens = encode(enable_thinking, tools)
        if enable_thinking and tokens == encode(False, tools):
            raise PromptError("thinking cannot be enabled: the chat template has no switch enable_thinking")
        if tools and tokens == encode(enable_thinking, None):
            raise PromptError("tools cannot be given: the chat template has no place for them")
    except (TemplateError, TypeError, KeyError) as error:
        raise PromptError(f"the chat template cannot render the messages: {error}") from None
    return tokens


def thought_channel(tokenizer: "TokenizerWrapper") -> Channel | None:
    """The tokens that Gemma 4 puts around a thought; None if the tokenizer has none."""
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<|channel>", "<channel|>")]
    if any(token in (None, tokenizer.unk_token_id) for token in ids):
        return None
    return Channel(ids[0], len(tokenizer.encode("thought\n", add_special_tokens=False)), ids[1])


def open_thought(tokenizer: "TokenizerWrapper", channel: Channel, prompt: Sequence[int]) -> int | None:
    """The number of tokens since a prompt opened the thought channel; None if it does not end inside one."""
    turn = tokenizer.convert_tokens_to_ids("<|turn>")
    for count, token in enumerate(reversed(prompt)):
        if token == channel.start:
            return count
        if token in (channel.end, turn):
            return None
    return None
