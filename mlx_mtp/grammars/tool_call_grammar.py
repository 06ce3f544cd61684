"""A grammar that accepts only valid tool calls in the syntax of Gemma 4 (see `text.tool_call_parser`)."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlx_mtp.errors import OptionError
from mlx_mtp.grammars.compiler import JSON_WHITESPACE
from mlx_mtp.text.call_syntax import CALL_END, CALL_START

from .argument_rules import ArgumentRules
from .lark_rules import COMMON_RULES, Rules
from .schemas import LeftOut

# The text before the calls. It must not spell out the start mark of a call, which a reader takes for a call.
_TEXT = r"TEXT: /(?s:.+)/ & ~/(?s:.*)<\|tool_call>(?s:.*)/"
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")


class ToolGrammar(NamedTuple):
    """A grammar, and the schema keywords that it does not enforce, as `TOOL.PLACE: KEYWORD`."""

    text: str
    not_enforced: tuple[str, ...]


def tool_grammar(
    tools: Sequence[Mapping[str, Any]], choice: str, *, parallel: bool = True, answer: Mapping[str, Any] | None = None
) -> ToolGrammar:
    """Return a grammar for `GenerationOptions.grammar` that allows only valid calls of OpenAI's function tools.

    `choice` is "auto" (text, then any number of calls), "required" (at least one call and no text), or the name of the
    tool to call once. Without `parallel`, there is at most one call. `answer` is a JSON Schema for an answer without
    calls. With `answer`, the text is either calls or an answer that follows this schema, and nothing else.

    The properties of an object come in alphabetical order, as the chat template writes them. An object has no other
    properties, unless its schema lists none. The grammar leaves out the parts of a schema that it cannot follow.

    Raises OptionError if a tool is malformed, if no arguments can satisfy its schema, or if it is strict and its schema
    cannot be followed in full. Raises OptionError if `choice` names no tool.
    """
    rules = Rules()
    try:
        calls, not_enforced = _calls(tools, rules)
    except RecursionError:
        raise OptionError("tools: a schema is nested too deep") from None
    if choice in ("auto", "required"):
        start = _start(
            rules.any_of(calls.values()) if calls else "", choice == "required", parallel, answer is not None
        )
    elif choice in calls:
        start = calls[choice]
    else:
        raise OptionError(f"tools: there is no tool {choice!r} to call, expected auto, required, {', '.join(calls)}")
    whole = "" if answer is None else f"answer: {_json(answer)}\n"
    return ToolGrammar(f"start: {start}\n{_TEXT}\n{whole}{COMMON_RULES}\n{rules.text()}", not_enforced)


def _start(call: str, is_required: bool, parallel: bool, has_answer: bool) -> str:
    """Return the body of the start rule. `call` is the rule of one call, empty if there are no tools."""
    if is_required:
        if not call:
            raise OptionError("tools: a call is required, but there are none")
        return f"{call}{'+' if parallel else ''}"
    if has_answer:
        return f"{call}{'+' if parallel else ''} | answer" if call else "answer"
    return f"TEXT? {call}{'*' if parallel else '?'}" if call else "TEXT?"


def _json(schema: Mapping[str, Any]) -> str:
    """Return the rule of a JSON text. The limit on its whitespace is the same as for an answer without tools."""
    guidance = {"whitespace_pattern": JSON_WHITESPACE, **schema.get("x-guidance", {})}
    return f"%json {json.dumps({**schema, 'x-guidance': guidance})}"


def _calls(tools: Sequence[Mapping[str, Any]], rules: Rules) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the rule of each tool's call by the tool's name, and the schema keywords that are not enforced."""
    calls: dict[str, str] = {}
    not_enforced: list[str] = []
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            raise OptionError(f"tools[{index}] must be of type function and have a function, found {tool!r}")
        name = function.get("name")
        if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
            raise OptionError(f"tools[{index}]: name must be 1 to 128 of a-z, A-Z, 0-9, _, . and -, found {name!r}")
        if name in calls:
            raise OptionError(f"tools[{index}]: there is a tool {name!r} already")
        left_out = LeftOut(f"tools: parameters of {name}", name, is_strict=function.get("strict") is True)
        arguments = ArgumentRules(rules, function.get("parameters"), left_out).arguments()
        calls[name] = rules.add(f'{CALL_START} "call:{name}" {arguments} {CALL_END}')
        not_enforced += sorted(left_out.keywords)
    return calls, tuple(not_enforced)
