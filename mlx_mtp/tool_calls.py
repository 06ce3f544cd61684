"""Tool calls as Gemma 4 writes them: read from the answer as it comes, and a grammar that only valid ones follow.

A call is `<|tool_call>call:NAME{key:<|"|>text<|"|>,n:3,o:{},l:[true,null]}<tool_call|>`: bare keys, strings between
marks of their own and without escapes.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .errors import OptionError

logger = logging.getLogger(__name__)

_CALL, _END, _QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_BLANKS = " \t\r\n"
# What must follow `<|tool_call>`, and every beginning of it.
_HEAD = re.compile(r"[ \t\r\n]*call:[ \t\r\n]*([^\s{}<>]+)[ \t\r\n]*(?=\{)")
_HEAD_BEGINNING = re.compile(r"[ \t\r\n]*(?:c|ca|cal|call|call:[ \t\r\n]*(?:[^\s{}<>]+[ \t\r\n]*)?)?")
# Bare words that are JSON as they are.
_BARE_JSON = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
# Where a bare key and a bare value end, the latter by what closes the object or list it is in.
_KEY_END = re.compile(f":|{re.escape(_END)}")
_VALUE_END = {closer: re.compile("|".join(map(re.escape, (",", closer, _END, _QUOTE)))) for closer in "}]"}


class ToolCallDelta(NamedTuple):
    """What became known of one call.

    `index` is that of the call within the answer; `name` is in its first delta only; `arguments` is to be appended to
    the call's arguments, the text of a JSON object.
    """

    index: int  # type: ignore[assignment]  # A tuple has a method of this name, which nothing here needs.
    name: str | None
    arguments: str


class ToolCallParser:
    """Separates the calls from the content of one answer, which comes in pieces cut anywhere.

    Arguments are emitted as they come. What is malformed is not lost: a call without `call:NAME{` is content, and from
    where the syntax of arguments breaks, they go on as the model wrote them, so that they are no JSON. Both are warned
    of. The arguments of a call that the end of the text cuts off are incomplete.
    """

    def __init__(self) -> None:
        self._held = ""
        self._calls = 0
        self._call: _Arguments | None = None

    def add(self, text: str, *, is_last: bool = False) -> tuple[str, list[ToolCallDelta]]:
        """The content and the parts of calls that this text makes known; after the last one, nothing is held back."""
        self._held += text
        content: list[str] = []
        deltas: list[ToolCallDelta] = []
        name: str | None = None
        while True:
            if self._call is None:
                content.append(self._take_content(is_last))
                name = self._take_head(content, is_last)
                if self._call is None:
                    return "".join(content), deltas
            arguments, rest = self._call.add(self._held, is_last=is_last)
            if arguments or name is not None:
                deltas.append(ToolCallDelta(self._calls - 1, name, arguments))
            self._held = rest or ""
            if rest is None:
                return "".join(content), deltas
            self._call = None

    def _take_content(self, is_last: bool) -> str:
        """What comes before the next call."""
        start = self._held.find(_CALL)
        if start < 0:
            start = len(self._held) - (0 if is_last else _beginning_at_end(self._held, _CALL))
        taken, self._held = self._held[:start], self._held[start:]
        return taken

    def _take_head(self, content: list[str], is_last: bool) -> str | None:
        """The name of the call that is begun here; None if it is not known yet, or if there is no call.

        What only looks like a call is added to the content.
        """
        while self._held.startswith(_CALL):
            head = _HEAD.match(self._held, len(_CALL))
            if head is not None:
                self._held = self._held[head.end() :]
                self._call = _Arguments(head[1])
                self._calls += 1
                return head[1]
            if not is_last and _HEAD_BEGINNING.fullmatch(self._held, len(_CALL)):
                return None
            logger.warning("a tool call without call:NAME{ is passed on as content")
            content.append(_CALL)
            self._held = self._held[len(_CALL) :]
            content.append(self._take_content(is_last))
        return None


class _Arguments:
    """Makes JSON of one call's arguments, from `{` on, as they come.

    Keys and bare values are held back until they end: only then it is known what they are.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._held = ""
        # What closes the objects and lists that are open.
        self._closers: list[str] = []
        self._is_over = False
        # A step takes what it can from the held text and gives the JSON of it; None if it needs more.
        self._step: Callable[[], str | None] = self._value

    def add(self, text: str, *, is_last: bool) -> tuple[str, str | None]:
        """JSON to append, and the text after the call, None as long as the call goes on."""
        self._held += text
        parts: list[str] = []
        while not self._is_over and (part := self._step()) is not None:
            parts.append(part)
        if self._is_over:
            return "".join(parts), self._held
        if is_last:
            is_string = self._step in (self._string, self._quoted_key)
            parts.append(_escape(self._held) if is_string else self._held)
            self._held = ""
        return "".join(parts), None

    def _first_key(self) -> str | None:
        self._skip_blanks()
        return self._close() if self._held.startswith("}") else self._key()

    def _key(self) -> str | None:
        self._skip_blanks()
        if self._awaits(_QUOTE):
            return None
        if self._held.startswith(_QUOTE):
            return self._open_string(self._quoted_key)
        end = _KEY_END.search(self._held)
        if end is None:
            return None
        key = self._held[: end.start()].rstrip(_BLANKS)
        if end[0] == _END or not key or key.startswith("}"):
            return self._break()
        self._held = self._held[end.end() :]
        self._step = self._value
        return json.dumps(key, ensure_ascii=False) + ":"

    def _quoted_key(self) -> str | None:
        return self._rest_of_string(self._colon)

    def _colon(self) -> str | None:
        self._skip_blanks()
        return self._take(":", self._value) if self._held.startswith(":") else self._break_unless_empty()

    def _first_value(self) -> str | None:
        self._skip_blanks()
        return self._close() if self._held.startswith("]") else self._value()

    def _value(self) -> str | None:
        self._skip_blanks()
        if self._awaits(_QUOTE):
            return None
        if self._held.startswith(_QUOTE):
            return self._open_string(self._string)
        for opener, closer, step in (("{", "}", self._first_key), ("[", "]", self._first_value)):
            if self._held.startswith(opener):
                self._closers.append(closer)
                return self._take(opener, step)
        return self._bare_value()

    def _bare_value(self) -> str | None:
        end = _VALUE_END[self._closers[-1]].search(self._held)
        if end is None:
            return None
        value = self._held[: end.start()].rstrip(_BLANKS)
        if end[0] in (_END, _QUOTE) or not value:
            return self._break()
        self._held = self._held[end.start() :]
        self._step = self._after_value
        return value if _BARE_JSON.fullmatch(value) else json.dumps(value, ensure_ascii=False)

    def _string(self) -> str | None:
        return self._rest_of_string(self._after_value)

    def _after_value(self) -> str | None:
        self._skip_blanks()
        if self._held.startswith(self._closers[-1]):
            return self._close()
        if self._held.startswith(","):
            return self._take(",", self._key if self._closers[-1] == "}" else self._value)
        return self._break_unless_empty()

    def _end(self) -> str | None:
        self._skip_blanks()
        if self._awaits(_END) or self._awaits(_CALL):
            return None
        # All of the call is there, so that one without its end does no harm to the next.
        self._is_over = self._held.startswith((_END, _CALL))
        self._held = self._held.removeprefix(_END)
        return "" if self._is_over else self._break()

    def _verbatim(self) -> str | None:
        end = self._held.find(_END)
        self._is_over = end >= 0
        ready = end if end >= 0 else len(self._held) - _beginning_at_end(self._held, _END)
        taken = self._held[:ready]
        self._held = self._held[ready + len(_END) :] if self._is_over else self._held[ready:]
        return taken if taken or self._is_over else None

    def _open_string(self, step: Callable[[], str | None]) -> str:
        self._held = self._held[len(_QUOTE) :]
        self._step = step
        return '"'

    def _rest_of_string(self, step: Callable[[], str | None]) -> str | None:
        """What is there of a string, closed if it ends."""
        end = self._held.find(_QUOTE)
        if end >= 0:
            text, self._held = self._held[:end], self._held[end + len(_QUOTE) :]
            self._step = step
            return _escape(text) + '"'
        ready = len(self._held) - _beginning_at_end(self._held, _QUOTE)
        text, self._held = self._held[:ready], self._held[ready:]
        return _escape(text) if text else None

    def _close(self) -> str:
        closer = self._closers.pop()
        return self._take(closer, self._after_value if self._closers else self._end)

    def _take(self, mark: str, step: Callable[[], str | None]) -> str:
        self._held = self._held[len(mark) :]
        self._step = step
        return mark

    def _break_unless_empty(self) -> str | None:
        return self._break() if self._held else None

    def _break(self) -> str:
        logger.warning("the syntax of a call of %s breaks: the rest of its arguments is passed on as it is", self._name)
        self._step = self._verbatim
        return ""

    def _skip_blanks(self) -> None:
        self._held = self._held.lstrip(_BLANKS)

    def _awaits(self, mark: str) -> bool:
        """Whether the held text may yet become this mark."""
        return len(self._held) < len(mark) and mark.startswith(self._held)


def _escape(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _beginning_at_end(text: str, mark: str) -> int:
    """The number of characters at the end of the text that may yet become this mark."""
    return max((count for count in range(1, len(mark)) if text.endswith(mark[:count])), default=0)


# Special tokens are matched as tokens; spelled out by other tokens they would end a string or begin a call as well.
# Numbers are bounded because a model may never end one.
_COMMON_RULES = rf"""
TEXT: /(?s:.+)/ & ~/(?s:.*)<\|tool_call>(?s:.*)/
STRING: /(?s:.+)/ & ~/(?s:.*)<\|"\|>(?s:.*)/
INTEGER: /-?(0|[1-9][0-9]{{0,15}})/
NUMBER: /-?(0|[1-9][0-9]{{0,15}})(\.[0-9]{{1,15}})?([eE][+-]?[0-9]{{1,2}})?/
KEY: /[^\s:,<{{}}\[\]]([^\t\r\n:,<{{}}\[\]]{{0,62}}[^\s:,<{{}}\[\]])?/
string: {_QUOTE} STRING? {_QUOTE}
boolean: "true" | "false"
key: KEY | string
pair: key ":" any
any: string | NUMBER | boolean | "null" | "{{" (pair ("," pair)*)? "}}" | "[" (any ("," any)*)? "]"
"""
_SCALARS = {"string": "string", "integer": "INTEGER", "number": "NUMBER", "boolean": "boolean", "null": '"null"'}
# Keywords that are followed, by type, and those that restrict nothing.
_FOLLOWED = {
    "object": frozenset({"type", "properties", "required", "additionalProperties"}),
    "array": frozenset({"type", "items"}),
    **dict.fromkeys(_SCALARS, frozenset({"type"})),
}
_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
    | {"$schema", "$id", "$comment", "$defs", "definitions"}
)
_EXPECTED: dict[type, str] = {Mapping: "an object", list: "a list", str: "a string"}
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


def tool_grammar(tools: Sequence[Mapping[str, Any]], choice: str, *, parallel: bool = True) -> str:
    """A grammar for `GenerationOptions.grammar` that holds the answer to valid calls of OpenAI's function tools.

    `choice` is "auto": text, then any number of calls, "required": at least one call and no text, or the name of the
    tool to call once. Without `parallel`, there is one call at most. An object's properties come in alphabetical order,
    as the chat template writes them, and no others do, unless it lists none. A part of a schema that cannot be followed
    is left to the caller to check.

    Raises OptionError for a tool that is malformed, that no arguments can satisfy or, if it is strict, whose schema
    cannot be followed in full, and for a choice of no tool.
    """
    rules = _Rules()
    try:
        calls = _calls(tools, rules)
    except RecursionError:
        raise OptionError("tools: a schema is nested too deep") from None
    if choice in ("auto", "required"):
        if not calls and choice == "required":
            raise OptionError("tools: a call is required, but there are none")
        call = rules.any_of(calls.values()) if calls else ""
        is_required = choice == "required"
        count = ("+" if is_required else "*") if parallel else ("" if is_required else "?")
        start = f"{'' if is_required else 'TEXT? '}{call + count if call else ''}"
    elif choice in calls:
        start = calls[choice]
    else:
        raise OptionError(f"tools: there is no tool {choice!r} to call, expected auto, required, {', '.join(calls)}")
    return f"start: {start}\n{_COMMON_RULES.strip()}\n{rules.text()}"


def _calls(tools: Sequence[Mapping[str, Any]], rules: "_Rules") -> dict[str, str]:
    """The rule of each tool's call, by the tool's name."""
    calls: dict[str, str] = {}
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            raise OptionError(f"tools[{index}] must be of type function and have a function, found {tool!r}")
        name = function.get("name")
        if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
            raise OptionError(f"tools[{index}]: name must be 1 to 64 of a-z, A-Z, 0-9, _, . and -, found {name!r}")
        if name in calls:
            raise OptionError(f"tools[{index}]: there is a tool {name!r} already")
        schema = _Schema(rules, name, is_strict=function.get("strict") is True)
        arguments = schema.arguments(function.get("parameters"))
        calls[name] = rules.add(f'{_CALL} "call:{name}" {arguments} {_END}')
    return calls


class _Rules:
    """Rules of a grammar, one for each body."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def add(self, body: str) -> str:
        """The name of the rule with this body."""
        return self._names.setdefault(body, f"rule_{len(self._names)}")

    def any_of(self, bodies: Iterable[str]) -> str:
        return self.add(" | ".join(dict.fromkeys(bodies)))

    def text(self) -> str:
        return "".join(f"{name}: {body}\n" for body, name in self._names.items())


class _Schema:
    """Makes rules of the JSON Schema of one tool's parameters."""

    def __init__(self, rules: _Rules, tool: str, *, is_strict: bool) -> None:
        self._rules = rules
        self._tool = tool
        self._is_strict = is_strict

    def arguments(self, parameters: Any) -> str:
        """What a call's arguments may be: always an object, an empty one if no parameters are declared."""
        if parameters is None:
            return '"{" "}"'
        schema = self._read(parameters, Mapping, "parameters")
        if "type" in schema and "object" not in self._types(schema):
            raise self._error(f"type must be object, found {schema['type']!r}")
        return self._value({**schema, "type": "object"})

    def _value(self, schema: Any) -> str:
        """What a value may be that satisfies the schema."""
        if schema is False:
            raise self._error("no value satisfies the schema false")
        if schema is True:
            return "any"
        self._read(schema, Mapping, "a schema")
        if "const" in schema or "enum" in schema:
            return self._literals(schema)
        if self._can_follow_any_of(schema):
            shared = {name: schema[name] for name in ("type",) if name in schema}
            return self._rules.any_of([self._value(_merge(shared, branch)) for branch in schema["anyOf"]])
        types = self._types(schema)
        if not types or not set(types) <= _FOLLOWED.keys():
            self._leave(schema, frozenset())
            return "any"
        self._leave(schema, frozenset().union(*(_FOLLOWED[name] for name in types)))
        return self._rules.any_of([self._typed(name, schema) for name in types])

    def _typed(self, name: str, schema: Mapping[str, Any]) -> str:
        if name == "object":
            return self._object(schema)
        if name != "array":
            return _SCALARS[name]
        items = schema.get("items", True)
        if isinstance(items, list):
            # Of older drafts: a schema for each place.
            self._leave({"items": items}, frozenset())
            items = True
        return _list_of("[", self._value(items), "]")

    def _object(self, schema: Mapping[str, Any]) -> str:
        others = schema.get("additionalProperties", True)
        required = self._names(schema.get("required", []), "required")
        if "properties" not in schema and not required:
            return '"{" "}"' if others is False else _list_of("{", f'key ":" {self._value(others)}', "}")
        listed = self._read(schema.get("properties", {}), Mapping, "properties")
        properties = dict.fromkeys(required, others) | dict(listed)
        # What the object may begin with, and the rule of what may follow, at each property from the last to the first.
        beginnings: list[str] = []
        rest = ""
        # The template's order leaves case aside.
        for name in sorted(properties, key=lambda name: (name.lower(), name), reverse=True):
            if properties[name] is False and name not in required:
                continue
            pair = self._rules.add(f'{self._key(name)} ":" {self._value(properties[name])}')
            beginnings = [f"{pair} {rest}", *([] if name in required else beginnings)]
            rest = self._rules.add(f'"," {pair} {rest}' if name in required else f'("," {pair})? {rest}')
        if not beginnings:
            return '"{" "}"'
        return f'"{{" {self._rules.any_of(beginnings)}{"" if required else "?"} "}}"'

    def _can_follow_any_of(self, schema: Mapping[str, Any]) -> bool:
        """Whether the branches, with the type beside them, say all: else they are left, and the rest is followed."""
        if "anyOf" not in schema:
            return False
        branches = self._read(schema["anyOf"], list, "anyOf")
        named = schema.get("type")
        types = [branch["type"] for branch in branches if isinstance(branch, Mapping) and "type" in branch]
        has_one_type = named is None or all(found == named for found in types)
        return bool(branches) and has_one_type and schema.keys() <= _ANNOTATIONS | {"anyOf", "type"}

    def _literals(self, schema: Mapping[str, Any]) -> str:
        keyword = "const" if "const" in schema else "enum"
        types = set(self._types(schema))
        is_known = types <= _FOLLOWED.keys()
        self._leave(schema, frozenset({keyword, "type"} if is_known else {keyword}))
        values = [schema["const"]] if keyword == "const" else self._read(schema["enum"], list, "enum")
        kept = [value for value in values if not types or not is_known or _json_types(value) & types]
        if not kept:
            raise self._error(f"no value of {keyword} is of the type beside it")
        return self._rules.any_of([self._literal(value) for value in kept])

    def _literal(self, value: Any) -> str:
        if isinstance(value, str):
            return self._quoted(value)
        if isinstance(value, Mapping):
            names = sorted(value, key=lambda name: (name.lower(), name))
            return _sequence("{", [f'{self._key(name)} ":" {self._literal(value[name])}' for name in names], "}")
        if isinstance(value, list):
            return _sequence("[", [self._literal(item) for item in value], "]")
        try:
            return _text(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            raise self._error(f"{value!r} is not JSON") from None

    def _key(self, name: str) -> str:
        """A property's name, bare where that is read back as the same name."""
        is_bare = name == name.strip(_BLANKS) and not name.startswith("}")
        if not name or not is_bare or any(mark in name for mark in (":", _END, _QUOTE)):
            return self._quoted(name)
        return _text(name)

    def _quoted(self, text: str) -> str:
        if _QUOTE in text:
            raise self._error(f"{text!r} holds the mark that ends a string")
        return f"{_QUOTE} {_text(text)} {_QUOTE}" if text else f"{_QUOTE} {_QUOTE}"

    def _types(self, schema: Mapping[str, Any]) -> list[str]:
        """The types a value may have, as far as the schema says."""
        named = schema.get("type")
        if named is None:
            return [name for name, keyword in (("object", "properties"), ("array", "items")) if keyword in schema]
        return self._names([named] if isinstance(named, str) else named, "type")

    def _leave(self, schema: Mapping[str, Any], followed: frozenset[str]) -> None:
        """Leave what is not followed to the caller. Raises OptionError if the tool is strict."""
        left = [name for name in schema if name not in followed | _ANNOTATIONS]
        if left and self._is_strict:
            raise self._error(f"it is strict, but {', '.join(left)} cannot be followed")

    def _read(self, value: Any, kind: type, what: str) -> Any:
        if not isinstance(value, kind):
            raise self._error(f"{what} must be {_EXPECTED[kind]}, found {value!r}")
        return value

    def _names(self, value: Any, what: str) -> list[str]:
        names: list[str] = self._read(value, list, what)
        return [self._read(name, str, f"a name in {what}") for name in names]

    def _error(self, message: str) -> OptionError:
        return OptionError(f"tools: parameters of {self._tool}: {message}")


def _merge(shared: Mapping[str, Any], branch: Any) -> Any:
    """A branch of anyOf together with what is beside it."""
    if isinstance(branch, Mapping):
        return {**shared, **branch}
    return shared if branch is True and shared else branch


def _json_types(value: Any) -> set[str]:
    """The types of JSON Schema that a value has."""
    if isinstance(value, bool) or value is None:
        return {"null" if value is None else "boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if value == value // 1 else {"number"}
    return {"string" if isinstance(value, str) else "object" if isinstance(value, Mapping) else "array"}


def _text(text: str) -> str:
    """What matches just this text: strings of Lark have JSON's escapes."""
    return json.dumps(text)


def _sequence(opener: str, items: Iterable[str], closer: str) -> str:
    return " ".join((_text(opener), ' "," '.join(items), _text(closer)))


def _list_of(opener: str, item: str, closer: str) -> str:
    return f'"{opener}" ({item} ("," {item})*)? "{closer}"'
