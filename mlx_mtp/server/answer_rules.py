"""Rules that an answer must follow: its format and the calls of tools, as a JSON Schema or as a grammar."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from pydantic import Field

from mlx_mtp.errors import OptionError
from mlx_mtp.grammars.answer_schema import answer_schema
from mlx_mtp.grammars.tool_call_grammar import tool_grammar

from .field_types import RequestPart
from .openai_tools import ToolChoice

logger = logging.getLogger(__name__)

JSON_OBJECT = {"type": "object"}


class TextFormat(RequestPart):
    """Answer format: any text, or any JSON object."""

    type: Literal["text", "json_object"]


class NamedSchema(RequestPart):
    """JSON Schema with a name."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = False


class JsonSchemaFormat(RequestPart):
    """Answer format: JSON that follows a JSON Schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class ResponseSchema(NamedSchema):
    """Answer format: JSON that follows a JSON Schema."""

    type: Literal["json_schema"]


AnswerFormat: TypeAlias = TextFormat | JsonSchemaFormat | ResponseSchema


class ResponseText(RequestPart):
    """Format and verbosity of the answer's text."""

    format: TextFormat | ResponseSchema = Field(default=TextFormat(type="text"), discriminator="type")
    verbosity: str | None = None


class AnswerRules(NamedTuple):
    """Tools that the prompt declares, and what the answer must follow: a JSON Schema, a grammar or nothing.

    `tools` is None if the prompt declares no tools. `not_enforced` are the keywords of the schemas that the rules do
    not enforce.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    json_schema: Mapping[str, Any] | None = None
    grammar: str | None = None
    not_enforced: tuple[str, ...] = ()


def answer_rules(
    tools: Sequence[Mapping[str, Any]], choice: ToolChoice, parallel: bool, wanted: AnswerFormat, field: str
) -> AnswerRules:
    """Return the rules for an answer with these tools. Log the keywords that are not enforced.

    `field` is the name of the request's field with the format `wanted`, for error messages.

    Raises OptionError for a tool choice or schema that cannot be followed, and for a strict schema that cannot be
    followed in full.
    """
    _check_choice(tools, choice.name)
    callable_tools = tools if choice.allowed is None else _allowed_tools(tools, choice.allowed, choice.name)
    schema, not_enforced = _schema(wanted, field) if choice.name in ("none", "auto") else (None, ())
    if not tools or choice.name == "none":
        rules = AnswerRules(json_schema=schema, not_enforced=not_enforced)
    elif choice.name == "auto" and parallel and schema is None and _may_be_called_freely(tools, callable_tools):
        rules = AnswerRules(tools)
    else:
        grammar = tool_grammar(callable_tools, choice.name, parallel=parallel, answer=schema)
        rules = AnswerRules(tools, grammar=grammar.text, not_enforced=(*grammar.not_enforced, *not_enforced))
    if rules.not_enforced:
        logger.warning("schema keywords of a request are not enforced: %s", ascii(", ".join(rules.not_enforced)))
    return rules


def _schema(wanted: AnswerFormat, field: str) -> tuple[Mapping[str, Any] | None, tuple[str, ...]]:
    """Return the JSON Schema that the answer must follow, or None, and the keywords that were left out of it."""
    if isinstance(wanted, TextFormat):
        return (JSON_OBJECT if wanted.type == "json_object" else None), ()
    named = wanted.json_schema if isinstance(wanted, JsonSchemaFormat) else wanted
    return answer_schema(named.schema_, field, is_strict=named.strict)


def _may_be_called_freely(tools: Sequence[Mapping[str, Any]], callable_tools: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether no grammar of calls is needed, because every tool may be called and none is strict."""
    return len(callable_tools) == len(tools) and not any(tool["function"].get("strict") is True for tool in tools)


def _check_choice(tools: Sequence[Mapping[str, Any]], choice: str) -> None:
    """Check the tools and the choice. Raises OptionError for equal tool names, or a choice that fits no tool."""
    if not tools:
        if choice not in ("none", "auto"):
            raise OptionError(f"tool_choice is {choice!r}, but no tools are given")
        return
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise OptionError(f"tools must have names of their own, found {', '.join(names)}")
    if choice not in ("none", "auto", "required", *names):
        raise OptionError(f"tool_choice names {choice!r}, the tools are {', '.join(names)}")


def _allowed_tools(
    tools: Sequence[Mapping[str, Any]], allowed: Sequence[str], choice: str
) -> Sequence[Mapping[str, Any]]:
    """Return the tools that may be called.

    Raises OptionError for a name that no tool has, and for no names at all if a call is required.
    """
    names = [tool["function"]["name"] for tool in tools]
    for name in allowed:
        if name not in names:
            raise OptionError(f"tool_choice allows {name!r}, the tools are {', '.join(names) or 'none'}")
    if choice == "required" and not allowed:
        raise OptionError("tool_choice requires a call, but allows no function")
    return [tool for tool, name in zip(tools, names, strict=True) if name in allowed]
