"""Checks of a tokenizer's files except the vocabulary: fields and chat templates, without transformers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlx_mtp.checkpoints.config import read_json
from mlx_mtp.errors import ConfigError, TokenizerError

_TOKEN_FIELDS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def check_tokenizer_fields(folder: Path) -> None:
    """Raise TokenizerError, naming the file and the field, if transformers cannot read a field."""
    checks: dict[str, Callable[[Path, dict[str, Any]], object]] = {
        "tokenizer_config.json": _check_config,
        "special_tokens_map.json": _check_special_tokens,
        "added_tokens.json": _check_ids,
        "chat_template.json": read_template_field,
    }
    for name, check in checks.items():
        if not (folder / name).is_file():
            continue
        try:
            fields = read_json(folder / name)
        except ConfigError as error:
            raise TokenizerError(str(error)) from None
        check(folder / name, fields)


def _check_config(file: Path, fields: dict[str, Any]) -> None:
    _check_special_tokens(file, fields)
    for name in _TOKEN_FIELDS:
        token = fields.get(name)
        if isinstance(token, dict) and token.get("__type") != "AddedToken":
            raise _error(file, name, "a token, as a text or an object with __type AddedToken", token)
    length = fields.get("model_max_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, int | float)):
        raise _error(file, "model_max_length", "a number", length)
    added = fields.get("added_tokens_decoder", {})
    if not isinstance(added, dict):
        raise _error(file, "added_tokens_decoder", "an object of tokens by id", added)
    for index, token in added.items():
        if not index.isdecimal() or not isinstance(token, dict) or not _is_token(token):
            raise _error(file, f"added_tokens_decoder.{index}", "a token with an id", token)
    template = fields.get("chat_template")
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    check_template_field(file, template)


def _check_special_tokens(file: Path, fields: dict[str, Any]) -> None:
    for name in _TOKEN_FIELDS:
        if (token := fields.get(name)) is not None and not _is_token(token):
            raise _error(file, name, "a token, as a text or an object with its content", token)
    for name in ("additional_special_tokens", "extra_special_tokens"):
        others = fields.get(name) or []
        tokens = others.values() if isinstance(others, dict) else others
        if not isinstance(others, list | dict) or not all(map(_is_token, tokens)):
            raise _error(file, name, "a list of tokens", others)


def _is_token(token: object) -> bool:
    if not isinstance(token, dict):
        return isinstance(token, str)
    return isinstance(token.get("content"), str) and all(isinstance(token.get(flag, True), bool) for flag in _FLAGS)


def _check_ids(file: Path, fields: dict[str, Any]) -> None:
    for token, index in fields.items():
        if isinstance(index, bool) or not isinstance(index, int):
            raise _error(file, token, "the token's id", index)


def read_template_field(file: Path, fields: Mapping[str, Any]) -> object:
    """Return the field chat_template of chat_template.json; None if it is null or the file has no fields.

    Raises TokenizerError if the file has other fields only, or if `check_template_field` rejects the value.
    """
    if fields and "chat_template" not in fields:
        raise _error(file, "chat_template", "a template or a list of named ones", f"only {', '.join(fields)}")
    check_template_field(file, fields.get("chat_template"))
    return fields.get("chat_template")


def check_template_field(file: Path, value: object) -> None:
    """Raise TokenizerError if a field chat_template holds no template that can be rendered.

    None counts as an absent field.
    """
    if value is None:
        return
    entries: list[Any] = value if isinstance(value, list) else [{"name": "default", "template": value}]
    for entry in entries:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "template")):
            raise _error(file, "chat_template", "a template or a list of named ones", value)
        check_template(file, entry["template"])


def check_template(file: Path, text: str) -> None:
    """Raise TokenizerError if jinja2 cannot compile the chat template."""
    # Only the check of a tokenizer needs this import.
    from jinja2 import Environment, TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        """Block that transformers adds to jinja2, around the text that the model writes."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    try:
        environment.from_string(text)
    except (TemplateError, SyntaxError, RecursionError) as error:
        raise TokenizerError(f"{file}: not a chat template: {error}") from None


def _error(file: Path, field: str, expected: str, found: object) -> TokenizerError:
    return TokenizerError(f"{file}: field {field} must be {expected}, found {found!r}")
