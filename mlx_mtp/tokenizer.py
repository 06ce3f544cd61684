"""Tokenizer of a checkpoint folder: chat template and streaming detokenizer, thin over mlx-lm's wrapper."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import PromptError, TokenizerError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def load_tokenizer(folder: Path, eos_token_ids: tuple[int, ...]) -> "TokenizerWrapper":
    """The folder's tokenizer, stopping at these ids. Raises TokenizerError if it has none or it cannot be read."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise TokenizerError(f"{folder}: the folder has no tokenizer: expected {' or '.join(_TOKENIZER_FILES)}")
    # Imported here: mlx-lm brings transformers along, seconds that --help and the converter have no use for.
    from mlx_lm import tokenizer_utils

    try:
        tokenizer = tokenizer_utils.load(folder, eos_token_ids=list(eos_token_ids))
    except (ValueError, OSError, KeyError) as error:
        raise TokenizerError(f"{folder}: the tokenizer cannot be read: {error}") from error
    if not (folder / "tokenizer.json").is_file():
        # mlx-lm knows sentencepiece by tokenizer.json; its general detokenizer repeats characters split into bytes.
        tokenizer._detokenizer = tokenizer_utils.SPMStreamingDetokenizer(tokenizer, trim_space=False)
    # The context's limit is checked where decoding starts; transformers would warn of a limit of its own.
    tokenizer.model_max_length = sys.maxsize
    return tokenizer


def encode_prompt(
    tokenizer: "TokenizerWrapper", prompt: str, *, system_prompt: str | None = None, use_chat_template: bool = True
) -> list[int]:
    """Token ids of a user's prompt: one user turn of the chat template, or the bare text.

    The beginning-of-text token is added once, by the template or, for bare text, by the tokenizer.

    Raises PromptError for an empty prompt, and for a system prompt without a chat template to put it in.
    """
    if not prompt:
        raise PromptError("the prompt is empty: expected some text")
    if not use_chat_template or not tokenizer.has_chat_template:
        if system_prompt is not None:
            raise PromptError("a system prompt needs a chat template: this model has none, or it is ignored")
        bos = tokenizer.bos_token
        return list(tokenizer.encode(prompt, add_special_tokens=bos is None or not prompt.startswith(bos)))
    messages = [{"role": "user", "content": prompt}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return encode_chat(tokenizer, messages)


def encode_chat(tokenizer: "TokenizerWrapper", messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation, up to where the model's answer begins."""
    # Thinking is off by default in Gemma's own template; mlx-lm's wrapper would turn it on.
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False))
