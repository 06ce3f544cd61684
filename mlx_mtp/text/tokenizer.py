"""Tokenizer of a checkpoint folder: chat template and streaming detokenizer, thin over mlx-lm's wrapper."""

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_mtp.checkpoints.config import read_json
from mlx_mtp.checkpoints.files import BYTE_ORDER_MARK, fault, read_text
from mlx_mtp.decoding.constraints import Channel
from mlx_mtp.errors import MTPError, PromptError, TokenizerError

from .chat_template import Tools, render_conversation
from .conversation import Messages
from .tokenizer_files import check_template, check_tokenizer_fields, read_template_field
from .tool_schemas import usable_tools

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# What to decode from: text, token ids, or the messages of a conversation, each with its role and content.
Prompt = str | Sequence[int] | mx.array | Sequence[Mapping[str, Any]]

# Stands for the user's text in a rendered turn: what no template changes or adds.
_PLACEHOLDER = "<<user's text>>"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# What this package and transformers decide about rendering, whatever a chat template is told.
_NOT_SWITCHES = {
    "chat_template", "continue_final_message", "conversation", "documents", "max_length", "messages", "padding",
    "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens", "tokenize",
    "tokenizer_kwargs", "tools", "truncation",
}  # fmt: skip
# Named templates beside the default one, a file for each.
TEMPLATES_FOLDER = "additional_chat_templates"


def load_tokenizer(folder: Path, eos_token_ids: tuple[int, ...]) -> "TokenizerWrapper":
    """The folder's tokenizer, stopping at these ids. Raises TokenizerError if it has none or it cannot be read."""
    _vocabulary_file(folder)
    _template_files(folder)
    # Imported here: mlx-lm brings transformers along, seconds that --help and the converter have no use for.
    from mlx_lm import tokenizer_utils

    try:
        with _without_marks(folder) as source:
            tokenizer = tokenizer_utils.load(source, _chat_template_json(folder), eos_token_ids=list(eos_token_ids))
    # Rust raises nothing but Exception, and transformers what its guesses run into.
    except Exception as error:
        check_tokenizer(folder)
        raise TokenizerError(f"{folder}: the tokenizer cannot be read: {error}") from error
    if not (folder / "tokenizer.json").is_file():
        # mlx-lm knows sentencepiece by tokenizer.json; its general detokenizer repeats characters split into bytes.
        tokenizer._detokenizer = tokenizer_utils.SPMStreamingDetokenizer(tokenizer, trim_space=False)
    _name_a_default(tokenizer)
    # The context's limit is checked where decoding starts; transformers would warn of a limit of its own.
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def _chat_template_json(folder: Path) -> dict[str, Any]:
    """The field of tokenizer_config.json that older processors kept in a file of its own, if it is nowhere else."""
    file, config = folder / "chat_template.json", folder / "tokenizer_config.json"
    elsewhere = (folder / "chat_template.jinja").is_file() or (folder / TEMPLATES_FOLDER).is_dir()
    if not file.is_file() or elsewhere or (config.is_file() and read_json(config).get("chat_template")):
        return {}
    template = read_template_field(file, read_json(file))
    return {} if template is None else {"chat_template": template}


def _name_a_default(tokenizer: "TokenizerWrapper") -> None:
    """Of several named templates, transformers takes `tool_use` for tools and `default` otherwise. Where there is no
    default, one that is alone is taken, and several are an error when a template is needed."""
    templates = tokenizer.chat_template
    if not isinstance(templates, dict) or "default" in templates:
        return
    names = sorted(templates)
    message = f"the model has chat templates named {', '.join(names)}, but none named default"
    refusal = "{{ raise_exception(" + json.dumps(message) + ") }}"
    tokenizer.chat_template = templates | {"default": templates[names[0]] if len(names) == 1 else refusal}


def check_tokenizer(folder: Path) -> None:
    """Raise TokenizerError, naming the file, for a tokenizer that `load_tokenizer` could not load, or a chat template
    that could not be rendered.

    Without transformers: it costs a second for a vocabulary of 262144 tokens, and the memory of the vocabulary.
    """
    file = _vocabulary_file(folder)
    check_tokenizer_fields(folder)
    for template in _template_files(folder):
        check_template(template, read_text(template))
    if (reason := fault(file)) is not None:
        raise TokenizerError(f"{file}: {reason}")
    try:
        if file.suffix == ".json":
            # mlx-lm brings it along, with transformers.
            from tokenizers import Tokenizer

            Tokenizer.from_str(read_text(file))
        else:
            from sentencepiece import SentencePieceProcessor

            SentencePieceProcessor(model_file=str(file))
    # Rust raises nothing but Exception.
    except Exception as error:
        raise TokenizerError(f"{file}: not a tokenizer: {error}") from None


def _template_files(folder: Path) -> list[Path]:
    """The files of chat templates. Raises TokenizerError, naming the file, for one that holds no text."""
    files = [folder / "chat_template.jinja", *sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))]
    found = [file for file in files if file.is_file()]
    for file in found:
        if (reason := fault(file)) is not None:
            raise TokenizerError(f"{file}: {reason}")
        try:
            text = read_text(file)
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{file}: not UTF-8: {error.reason} at position {error.start}") from None
        if "\0" in text or not text.strip():
            raise TokenizerError(f"{file}: expected a chat template in UTF-8, found {text[:9]!r}")
    return found


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
    files += (folder / TEMPLATES_FOLDER).glob("*.jinja")
    if not any(map(_begins_with_mark, files)):
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        for file in files:
            copied = Path(copy, file.relative_to(folder))
            copied.parent.mkdir(exist_ok=True)
            copied.write_bytes(file.read_bytes().removeprefix(BYTE_ORDER_MARK))
        yield Path(copy)


def _begins_with_mark(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK


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

    Raises PromptError for an empty prompt, for half a surrogate pair, and for a system prompt or thinking without a
    chat template.
    """
    if not prompt:
        raise PromptError("the prompt is empty: expected some text")
    if not use_chat_template or not tokenizer.has_chat_template:
        if system_prompt is not None or enable_thinking:
            what = "a system prompt" if system_prompt is not None else "thinking"
            raise PromptError(f"{what} needs a chat template: this model has none, or it is ignored")
        bos = tokenizer.bos_token
        return encode_text(tokenizer, prompt, add_special_tokens=bos is None or not prompt.startswith(bos))
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
        return encode_text(tokenizer, text)
    messages = [{"role": "user", "content": _PLACEHOLDER}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    with _template_errors():
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
        )
    before, _, after = rendered.rpartition(_PLACEHOLDER)
    return encode_text(tokenizer, before + text if begins else text + after)


def encode_chat(
    tokenizer: "TokenizerWrapper",
    messages: Sequence[Mapping[str, Any]],
    *,
    enable_thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation, up to where the model's answer begins. The messages of the system become one,
    which stands first. `tools` are functions as OpenAI's API describes them. `template_options` are further switches of
    the chat template, such as `preserve_thinking`.

    Raises PromptError if there is no chat template, if it cannot render the messages, if it has no switch for
    thinking that should be enabled, or no place for tools, and for an option that is no switch of a template.
    """
    if not tokenizer.has_chat_template:
        raise PromptError("messages need a chat template: this model has none")
    switches = dict(template_options or {})
    if switches.pop("add_generation_prompt", True) is not True:
        raise PromptError("add_generation_prompt must be true: the prompt ends where the model's answer begins")
    for name in _NOT_SWITCHES & switches.keys():
        raise PromptError(f"{name} is no switch of a chat template")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(f"messages[{index}] must have a role and content, found {message!r}")

    def render(enable_thinking: bool, tools: Tools | None) -> str:
        # Thinking is always said: mlx-lm's wrapper would turn it on where Gemma's own template leaves it off.
        switches["enable_thinking"] = enable_thinking

        def apply(messages: Messages, tools: Tools | None) -> str:
            rendered: str = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, tools=tools, **switches
            )
            return rendered

        return render_conversation(messages, apply, tools)

    with _template_errors():
        usable = None if tools is None else usable_tools(tools)
        text = render(enable_thinking, usable)
        if enable_thinking and text == render(False, usable):
            raise PromptError("thinking cannot be enabled: the chat template has no switch enable_thinking")
        if tools and text == render(enable_thinking, None):
            raise PromptError("tools cannot be given: the chat template has no place for them")
    return encode_text(tokenizer, text)


def encode_text(tokenizer: "TokenizerWrapper", text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Token ids of a text. Raises PromptError for half a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt holds {text[error.start]!r}, half a surrogate pair: expected text that UTF-8 can write"
        ) from None
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))


@contextmanager
def _template_errors() -> Iterator[None]:
    """Makes a PromptError of what a chat template raises, but for the errors of this package."""
    try:
        yield
    except MTPError:
        raise
    # A template is a program of the checkpoint's maker: it may divide by zero, look for what is not there, and so on.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise PromptError(f"the chat template cannot render the messages: {reason}") from None


def encode(
    tokenizer: "TokenizerWrapper",
    prompt: Prompt,
    vocab_size: int,
    *,
    enable_thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt for a model with embeddings of `vocab_size` tokens. The options are for messages alone.

    Raises PromptError for messages that cannot be rendered, and for token ids without an embedding.
    """
    if isinstance(prompt, str):
        return _with_embeddings(tokenizer, encode_prompt(tokenizer, prompt, use_chat_template=False), vocab_size)
    items: list[Any] = prompt.tolist() if isinstance(prompt, mx.array) else list(prompt)  # type: ignore[assignment]
    if items and isinstance(items[0], Mapping):
        tokens = encode_chat(
            tokenizer, items, enable_thinking=enable_thinking, tools=tools, template_options=template_options
        )
        return _with_embeddings(tokenizer, tokens, vocab_size)
    for token in items:
        is_id = isinstance(token, int | np.integer) and not isinstance(token, bool)
        if not is_id or not 0 <= token < vocab_size:
            raise PromptError(f"the prompt must hold token ids from 0 to {vocab_size - 1}, found {token!r}")
    return [int(token) for token in items]


def _with_embeddings(tokenizer: "TokenizerWrapper", tokens: list[int], vocab_size: int) -> list[int]:
    """The tokens themselves, if the model has an embedding for each: a fine-tune may have added some without."""
    for token in tokens:
        if token >= vocab_size:
            text = tokenizer.convert_ids_to_tokens(token)
            raise PromptError(f"the prompt holds {text!r}, token {token}, but the model has embeddings of {vocab_size}")
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
