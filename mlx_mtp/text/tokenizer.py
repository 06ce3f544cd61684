"""Tokenizer of a checkpoint folder, in a thin layer over mlx-lm's wrapper: chat template and detokenizer."""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_mtp.checkpoints.config import read_json
from mlx_mtp.checkpoints.files import BYTE_ORDER_MARK, fault, read_text
from mlx_mtp.decoding.constraints import Channel
from mlx_mtp.decoding.prompt_media import MediaSpan, PreparedPrompt, PromptMedia
from mlx_mtp.errors import MTPError, PromptError, TokenizerError

from .chat_template import Tools, render_conversation
from .conversation import Messages
from .media_parts import MediaKind, MediaPart, find_mark, split_at_media, take_media
from .tokenizer_files import check_template, check_tokenizer_fields, read_template_field
from .tool_schemas import usable_tools

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# A prompt is text, token ids, or the messages of a conversation, each with its role and content. A prepared prompt may
# also have media.
Prompt = str | Sequence[int] | mx.array | Sequence[Mapping[str, Any]] | PreparedPrompt

# This stands for the user's text in a rendered turn. No template changes or adds it.
_PLACEHOLDER = "<<user's text>>"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# This package and transformers set these options of rendering. They are no switches of a chat template.
_NOT_SWITCHES = {
    "chat_template", "continue_final_message", "conversation", "documents", "max_length", "messages", "padding",
    "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens", "tokenize",
    "tokenizer_kwargs", "tools", "truncation",
}  # fmt: skip
# This folder holds the named templates beside the default template, one file for each.
TEMPLATES_FOLDER = "additional_chat_templates"


def load_tokenizer(folder: Path, eos_token_ids: tuple[int, ...]) -> "TokenizerWrapper":
    """Load the folder's tokenizer, with `eos_token_ids` as its stop tokens.

    Raises TokenizerError if the folder has no tokenizer or the tokenizer cannot be read.
    """
    _vocabulary_file(folder)
    _template_files(folder)
    try:
        with _without_marks(folder) as source:
            tokenizer = _load(source, _chat_template_json(folder), list(eos_token_ids))
    # Rust code raises plain Exception. transformers raises the errors that its guesses cause.
    except Exception as error:
        check_tokenizer(folder)
        raise TokenizerError(f"{folder}: the tokenizer cannot be read: {error}") from error
    _name_a_default(tokenizer)
    # The context limit is checked where decoding starts. transformers would warn about a limit of its own.
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def _load(folder: Path, fields: dict[str, Any], eos_token_ids: list[int]) -> "TokenizerWrapper":
    # mlx-lm imports transformers, which takes seconds. --help and the converter do not need it.
    from mlx_lm import tokenizer_utils

    if (folder / "tokenizer.json").is_file():
        return tokenizer_utils.load(folder, fields, eos_token_ids=eos_token_ids)
    from transformers import AutoTokenizer

    # mlx-lm detects sentencepiece by tokenizer.json. Its general detokenizer repeats characters that are split into
    # bytes.
    detokenizer = partial(tokenizer_utils.SPMStreamingDetokenizer, trim_space=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, **fields)
    return tokenizer_utils.TokenizerWrapper(tokenizer, detokenizer, eos_token_ids=eos_token_ids)


def _chat_template_json(folder: Path) -> dict[str, Any]:
    """Return the field chat_template from chat_template.json; empty if it is in another file or missing.

    Older processors kept this field of tokenizer_config.json in a file of its own.
    """
    file, config = folder / "chat_template.json", folder / "tokenizer_config.json"
    elsewhere = (folder / "chat_template.jinja").is_file() or (folder / TEMPLATES_FOLDER).is_dir()
    if not file.is_file() or elsewhere or (config.is_file() and read_json(config).get("chat_template")):
        return {}
    template = read_template_field(file, read_json(file))
    return {} if template is None else {"chat_template": template}


def _name_a_default(tokenizer: "TokenizerWrapper") -> None:
    """Add a default chat template if the named templates have none.

    Of several named templates, transformers takes `tool_use` for tools and `default` otherwise. Without a default, a
    single named template becomes the default. With several of them, the default template raises an error when it is
    rendered.
    """
    templates = tokenizer.chat_template
    if not isinstance(templates, dict) or "default" in templates:
        return
    names = sorted(templates)
    message = f"the model has chat templates named {', '.join(names)}, but none named default"
    refusal = "{{ raise_exception(" + json.dumps(message) + ") }}"
    tokenizer.chat_template = templates | {"default": templates[names[0]] if len(names) == 1 else refusal}


def check_tokenizer(folder: Path) -> None:
    """Check that `load_tokenizer` can load the tokenizer and that its chat templates can be rendered.

    Raises TokenizerError, naming the file, if it finds a fault. The check does not use transformers. It takes a second
    for a vocabulary of 262144 tokens, and the memory of the vocabulary.
    """
    file = _vocabulary_file(folder)
    check_tokenizer_fields(folder)
    for template in _template_files(folder):
        check_template(template, read_text(template))
    if (reason := fault(file)) is not None:
        raise TokenizerError(f"{file}: {reason}")
    try:
        if file.suffix == ".json":
            # mlx-lm installs this package together with transformers.
            from tokenizers import Tokenizer

            Tokenizer.from_str(read_text(file))
        else:
            from sentencepiece import SentencePieceProcessor

            SentencePieceProcessor(model_file=str(file))
    # Rust code raises plain Exception.
    except Exception as error:
        raise TokenizerError(f"{file}: not a tokenizer: {error}") from None


def _template_files(folder: Path) -> list[Path]:
    """Return the files of chat templates.

    Raises TokenizerError, naming the file, if a file holds no text.
    """
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
    """Yield the folder, or a copy of its files without byte order marks if a file begins with one.

    transformers reads a byte order mark as a part of the JSON or of the chat template.
    """
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
    """Return the token ids of a user's prompt: one user turn of the chat template, or the plain text.

    The template adds the beginning-of-text token once. For plain text, the tokenizer adds it.

    Raises PromptError if the prompt is empty or holds half a surrogate pair, or if a system prompt or thinking is
    requested without a chat template.
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
    """Return the token ids of one of the two parts of a user's turn.

    The first part is a prompt that is read ahead, and the second part is the question about it. If the part `begins`
    the turn, the ids include the chat template's text before the part. Otherwise, they include its text after the part.

    Raises PromptError if the text is empty or holds half a surrogate pair, if the first part has a system prompt
    without a chat template, or if the chat template cannot render the turn.
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
    """Return the token ids of a conversation, up to the start of the model's answer. `render_chat` has the details."""
    text = render_chat(
        tokenizer, messages, enable_thinking=enable_thinking, tools=tools, template_options=template_options
    )
    return encode_text(tokenizer, text)


def render_chat(
    tokenizer: "TokenizerWrapper",
    messages: Sequence[Mapping[str, Any]],
    *,
    enable_thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of a conversation, up to the start of the model's answer.

    All system messages become one message, which comes first. `tools` are functions in OpenAI's format.
    `template_options` are further switches of the chat template, such as `preserve_thinking`.

    Raises PromptError if there is no chat template, if it cannot render the messages, if it has no switch for the
    requested thinking, if it has no place for tools, or if an option is no switch of a template.
    """
    if not tokenizer.has_chat_template:
        raise PromptError("messages need a chat template: this model has none")
    switches = _switches(template_options or {})
    _check_roles(messages)

    def render(enable_thinking: bool, tools: Tools | None) -> str:
        # The switch is always set: mlx-lm's wrapper would turn thinking on where Gemma's own template leaves it off.
        apply = partial(_apply_template, tokenizer, {**switches, "enable_thinking": enable_thinking})
        return render_conversation(messages, apply, tools)

    with _template_errors():
        usable = None if tools is None else usable_tools(tools)
        text = render(enable_thinking, usable)
        if enable_thinking and text == render(False, usable):
            raise PromptError("thinking cannot be enabled: the chat template has no switch enable_thinking")
        if tools and text == render(enable_thinking, None):
            raise PromptError("tools cannot be given: the chat template has no place for them")
    return text


def _check_roles(messages: Sequence[Mapping[str, Any]]) -> None:
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(f"messages[{index}] must have a role and content, found {message!r}")


def _switches(template_options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the switches of the chat template. Raises PromptError if an option is no switch of a template."""
    switches = dict(template_options)
    if switches.pop("add_generation_prompt", True) is not True:
        raise PromptError("add_generation_prompt must be true: the prompt ends where the model's answer begins")
    for name in _NOT_SWITCHES & switches.keys():
        raise PromptError(f"{name} is no switch of a chat template")
    return switches


def _apply_template(
    tokenizer: "TokenizerWrapper", switches: Mapping[str, Any], messages: Messages, tools: Tools | None
) -> str:
    rendered: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, tools=tools, **switches
    )
    return rendered


def encode_text(tokenizer: "TokenizerWrapper", text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Return the token ids of a text.

    Raises PromptError if the text holds half a surrogate pair, which is not a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt holds {text[error.start]!r}, half a surrogate pair: expected text that UTF-8 can write"
        ) from None
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))


@contextmanager
def _template_errors() -> Iterator[None]:
    """Raise PromptError in place of an error of the chat template. Errors of this package pass through."""
    try:
        yield
    except MTPError:
        raise
    # A template is a program of the checkpoint's author. It may divide by zero, read a missing value, and so on.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise PromptError(f"the chat template cannot render the messages: {reason}") from None


class MediaEncoder(Protocol):
    """The media parts of a model (see `media_reader.MediaReader`)."""

    @property
    def kinds(self) -> tuple[MediaKind, ...]:
        """The kinds of media that the checkpoint reads."""

    @property
    def placeholders(self) -> frozenset[int]:
        """The ids of soft tokens."""

    def encode(
        self, texts: Sequence[str], parts: Sequence[MediaPart], encode: Callable[[str], list[int]], /
    ) -> tuple[list[int], list[MediaSpan]]:
        """Return the token ids of texts with media between them, and the spans of the media."""


def prepare(
    tokenizer: "TokenizerWrapper",
    prompt: Prompt,
    vocab_size: int,
    media: MediaEncoder,
    *,
    enable_thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> PreparedPrompt:
    """Return the token ids and media of a prompt for a model with embeddings of `vocab_size` tokens.

    The options apply to messages only, and only messages can have media.

    Raises PromptError if the messages cannot be rendered, if a text holds the mark of a medium, or if a token id has no
    embedding. Raises MediaError if a medium cannot be read.
    """
    if isinstance(prompt, PreparedPrompt):
        if prompt.media.spans and prompt.media.reader is not media:
            raise PromptError("the prompt has media that another model has read: prepare it with this model")
        return prompt
    if isinstance(prompt, str):
        _check_marks(media, prompt)
        tokens = encode_prompt(tokenizer, prompt, use_chat_template=False)
        return PreparedPrompt(_with_embeddings(tokenizer, tokens, vocab_size), PromptMedia())
    items: list[Any] = prompt.tolist() if isinstance(prompt, mx.array) else list(prompt)  # type: ignore[assignment]
    if items and isinstance(items[0], Mapping):
        _check_roles(items)
        _check_marks(media, items)
        messages, parts = take_media(items)
        _check_kinds(media, parts)
        text = render_chat(
            tokenizer, messages, enable_thinking=enable_thinking, tools=tools, template_options=template_options
        )
        spans: list[MediaSpan] = []
        texts = split_at_media(text, parts) if parts else [text]
        for each in texts:
            # The template may have made a mark of several texts.
            _check_marks(media, each)
        if parts:
            tokens, spans = media.encode(texts, parts, partial(encode_text, tokenizer))
        else:
            tokens = encode_text(tokenizer, text)
        return PreparedPrompt(_with_embeddings(tokenizer, tokens, vocab_size), PromptMedia(spans, media))
    for token in items:
        is_id = isinstance(token, int | np.integer) and not isinstance(token, bool)
        if not is_id or not 0 <= token < vocab_size:
            raise PromptError(f"the prompt must hold token ids from 0 to {vocab_size - 1}, found {token!r}")
        if token in media.placeholders:
            raise PromptError(f"the prompt holds token {token}, the place of a medium: give messages with their media")
    return PreparedPrompt([int(token) for token in items], PromptMedia())


def _check_marks(media: MediaEncoder, prompt: str | Sequence[Mapping[str, Any]]) -> None:
    """Check that no text holds a mark of media. In a checkpoint that reads only text, such a mark is a text."""
    found = find_mark(prompt)
    if found is not None and media.kinds:
        place, mark = found
        raise PromptError(f"{place}: {mark} stands for media and cannot be in a text: give media as parts of a message")


def _check_kinds(media: MediaEncoder, parts: Sequence[MediaPart]) -> None:
    """Check that the checkpoint reads the kinds of these media, which the chat template may not know either."""
    for part in parts:
        if part.kind not in media.kinds:
            known = ", ".join(("text", *media.kinds))
            hint = "the model has no other parts, or mlx-mtp convert --modalities left them out"
            raise PromptError(f"{part.place}: found {part.kind}, but this checkpoint reads only {known} ({hint})")


def _with_embeddings(tokenizer: "TokenizerWrapper", tokens: list[int], vocab_size: int) -> list[int]:
    """Return the tokens unchanged if the model has an embedding for each of them.

    A fine-tune may have added tokens without embeddings. Raises PromptError if the prompt holds such a token.
    """
    for token in tokens:
        if token >= vocab_size:
            text = tokenizer.convert_ids_to_tokens(token)
            raise PromptError(f"the prompt holds {text!r}, token {token}, but the model has embeddings of {vocab_size}")
    return tokens


def thought_channel(tokenizer: "TokenizerWrapper") -> Channel | None:
    """Return the tokens that Gemma 4 puts around a thought; None if the tokenizer has none."""
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<|channel>", "<channel|>")]
    if any(token in (None, tokenizer.unk_token_id) for token in ids):
        return None
    return Channel(ids[0], len(tokenizer.encode("thought\n", add_special_tokens=False)), ids[1])


def open_thought(tokenizer: "TokenizerWrapper", channel: Channel, prompt: Sequence[int]) -> int | None:
    """Return the number of tokens since the prompt opened the thought channel.

    Return None if the prompt does not end inside the channel.
    """
    turn = tokenizer.convert_tokens_to_ids("<|turn>")
    for count, token in enumerate(reversed(prompt)):
        if token == channel.start:
            return count
        if token in (channel.end, turn):
            return None
    return None
