"""Grammar rules for the leaves of a JSON Schema: strings, numbers and listed values, in the syntax of Gemma 4."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mlx_mtp.grammars.compiler import lark_problem, schema_problem
from mlx_mtp.text.call_syntax import STRING_MARK

from .lark_rules import NO_MARK, Rules, exact_text, sequence
from .schemas import BY_TYPE, NUMERIC, TYPES, Document, Flat, LeftOut, json_types
from .string_rules import format_terminal, length_terminal, search_terminal

_BARE_KEY = re.compile(r"[\w.-]+( [\w.-]+)*")
# The largest absolute value of a number with bounds, and its smallest step.
_LARGEST = 10**16
_STEP = 1e-10


class LeafRules:
    """The rules for the leaves of a schema. Keywords that they cannot follow go to `left_out`.

    `path` is the place of a value in the arguments.
    """

    def __init__(self, rules: Rules, document: Document, left_out: LeftOut) -> None:
        self._rules = rules
        self._document = document
        self._left_out = left_out

    def string(self, schema: Flat, path: str) -> str:
        """Return the rule of a string. Raises OptionError if no string satisfies the schema."""
        parts = []
        if "minLength" in schema or "maxLength" in schema:
            least = max(0, math.ceil(schema.get("minLength", 0)))
            most = math.floor(schema["maxLength"]) if "maxLength" in schema else None
            if most is not None and least > most:
                raise self._document.error(f"no string has at least {least} and at most {most} characters")
            parts.append(length_terminal(least, most))
        for pattern in schema.get("pattern", []):
            terminal = search_terminal(pattern)
            if lark_problem(f"start: PATTERN\nPATTERN: {terminal}") is None:
                parts.append(terminal)
            else:
                self._left_out.add(["pattern"], path)
        for name in schema.get("format", []):
            if (format_ := format_terminal(name)) is not None:
                parts.append(format_)
            else:
                self._left_out.add(["format"], path)
        if not parts:
            return "string"
        terminal = self._rules.terminal(" & ".join([*parts, NO_MARK]))
        return f"{STRING_MARK} {terminal} {STRING_MARK}"

    def number(self, name: str, schema: Flat, path: str) -> str:
        """Return the rule of a number of the type `name`. Raises OptionError if no number satisfies the schema."""
        bounds = {keyword: schema[keyword] for keyword in NUMERIC if keyword in schema}
        if not bounds:
            return name.upper()
        # A bound beyond the largest number has no effect.
        kept = {
            keyword: bound
            for keyword, bound in bounds.items()
            if keyword == "multipleOf" or bound * (-1 if "inimum" in keyword else 1) < _LARGEST
        }
        if name == "integer" and not kept:
            return "INTEGER"
        wanted = {"x-guidance": {"whitespace_flexible": False}, "type": name, **kept}
        if name == "number":
            wanted.setdefault("multipleOf", _STEP)
        if max(kept.get("minimum", 0), kept.get("exclusiveMinimum", 0)) < _LARGEST:
            wanted.setdefault("maximum", _LARGEST - 1)
        if min(kept.get("maximum", 0), kept.get("exclusiveMaximum", 0)) > -_LARGEST:
            wanted.setdefault("minimum", 1 - _LARGEST)
        problem = schema_problem(wanted)
        if problem is None:
            return self._rules.add(f"%json {json.dumps(wanted)}")
        if problem.startswith("Unsatisfiable"):
            raise self._document.error(f"no {name} satisfies {json.dumps(bounds)}")
        self._left_out.add(bounds, path)
        return name.upper()

    def literals(self, schema: Flat, path: str) -> str:
        """Return the rule of the values in `enum`. Raises OptionError if the schema allows none of them."""
        types = schema.get("type", [])
        is_known = set(types) <= set(TYPES)
        kept = [value for value in schema["enum"] if not types or not is_known or json_types(value) & set(types)]
        if not kept:
            raise self._document.error("no value of enum is of the type beside it")
        # With listed values, `format` needs no check: the author of the schema chose them.
        followed = {"enum", "format", "type"} if is_known else {"enum", "format"}
        found = {name for value in kept for name in json_types(value)}
        self._left_out.add([name for name in schema if name not in followed and applies(name, found)], path)
        return self._rules.any_of([self._literal(value) for value in kept])

    def _literal(self, value: Any) -> str:
        if isinstance(value, str):
            return self._quoted(value)
        if isinstance(value, Mapping):
            names = sorted(value, key=lambda name: (name.lower(), name))
            return sequence("{", [f'{self.key(name)} ":" {self._literal(value[name])}' for name in names], "}")
        if isinstance(value, list):
            return sequence("[", [self._literal(item) for item in value], "]")
        try:
            return exact_text(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            raise self._document.error(f"{value!r} is not JSON") from None

    def key(self, name: str) -> str:
        """Return the terminal of a property's name. It is without quotes if no reader can misread the bare name."""
        return exact_text(name) if _BARE_KEY.fullmatch(name) else self._quoted(name)

    def _quoted(self, text: str) -> str:
        if STRING_MARK in text:
            raise self._document.error(f"{text!r} holds the mark that ends a string")
        return f"{STRING_MARK} {exact_text(text)} {STRING_MARK}" if text else f"{STRING_MARK} {STRING_MARK}"


def applies(keyword: str, types: Iterable[str]) -> bool:
    """Return whether a keyword can restrict values of these types."""
    is_for_types = any(keyword in keywords for keywords in BY_TYPE.values())
    return not is_for_types or any(keyword in BY_TYPE.get(name, ()) for name in types)
