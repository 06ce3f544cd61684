"""A grammar that only valid tool calls follow, in the syntax of Gemma 4 (see `tool_calls`)."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlx_mtp.decoding.constraints import JSON_WHITESPACE
from mlx_mtp.errors import OptionError
from mlx_mtp.text.call_syntax import CALL_END, CALL_START

from .argument_rules import COMMON_RULES, ArgumentRules, Rules
from .schemas import LeftOut

# Before the calls; one spelled out would be taken for a call.
_TEXT = r"TEXT: /(?s:.+)/ & ~/(?s:.*)<\|tool_call>(?s:.*)/"
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")


class ToolGrammar(NamedTuple):
    """A grammar, and the keywords of the tools' schemas that it does not hold calls to, as `TOOL.PLACE: KEYWORD`."""

    text: str
    not_enforced: tuple[str, ...]


def tool_grammar(
    tools: Sequence[Mapping[str, Any]], choice: str, *, parallel: bool = True, answer: Mapping[str, Any] | None = None
) -> ToolGrammar:
    """A grammar for `GenerationOptions.grammar` that holds the answer to valid calls of OpenAI's function tools.

    `choice` is "auto": text, then any number of calls, "required": at least one call and no text, or the name of the
    tool to call once. Without `parallel`, there is one call at most. `answer` is a JSON Schema that an answer without
    calls must follow: then there are either calls or such an answer, and no other text.

    An object's properties come in alphabetical order, as the chat template writes them, and no others do, unless it
    lists none. A part of a schema that cannot be followed is left out.

    Raises OptionError for a tool that is malformed, that no arguments can satisfy or, if it is strict, whose schema
    cannot be followed in full, and for a choice of no tool.
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
    """What the whole text may be. `call` is the rule of one call, empty if there are no tools."""
    if is_required:
        if not call:
            raise OptionError("tools: a call is required, but there are none")
        return f"{call}{'+' if parallel else ''}"
    if has_answer:
        return f"{call}{'+' if parallel else ''} | answer" if call else "answer"
    return f"TEXT? {call}{'*' if parallel else '?'}" if call else "TEXT?"


def _json(schema: Mapping[str, Any]) -> str:
    """The rule of a JSON text, which may hold as few blanks as one without tools."""
    guidance = {"whitespace_pattern": JSON_WHITESPACE, **schema.get("x-guidance", {})}
    return f"%json {json.dumps({**schema, 'x-guidance': guidance})}"


def _calls(tools: Sequence[Mapping[str, Any]], rules: Rules) -> tuple[dict[str, str], tuple[str, ...]]:
    """The rule of each tool's call, by the tool's name, and what is not enforced."""
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
