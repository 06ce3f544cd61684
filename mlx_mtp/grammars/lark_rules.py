"""Rules of a Lark grammar, with the rules that all tool calls share."""

import json
from collections.abc import Iterable

from mlx_mtp.text.call_syntax import STRING_MARK

# The grammar matches special tokens as tokens. But a mark that other tokens spell out also ends a string, or begins a
# call. So the text of a string must not contain the string mark.
NO_MARK = r'~/(?s:.*)<\|"\|>(?s:.*)/'
# The length of numbers has a limit, because without it a model may never end a number.
COMMON_RULES = rf"""
STRING: /(?s:.+)/ & {NO_MARK}
INTEGER: /-?(0|[1-9][0-9]{{0,15}})/
NUMBER: /-?(0|[1-9][0-9]{{0,15}})(\.[0-9]{{1,15}})?([eE][+-]?[0-9]{{1,2}})?/
KEY: /[^\s:,<{{}}\[\]]([^\t\r\n:,<{{}}\[\]]{{0,62}}[^\s:,<{{}}\[\]])?/
string: {STRING_MARK} STRING? {STRING_MARK}
boolean: "true" | "false"
key: KEY | string
pair: key ":" any
any: string | NUMBER | boolean | "null" | "{{" (pair ("," pair)*)? "}}" | "[" (any ("," any)*)? "]"
""".strip()


class Rules:
    """The rules of a grammar. Equal bodies share one rule."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._reserved: dict[str, str] = {}

    def add(self, body: str) -> str:
        """Add a rule with this body, if it is new. Return its name."""
        return self._names.setdefault(body, f"rule_{len(self._names)}")

    def terminal(self, body: str) -> str:
        """Add a terminal with this body, if it is new. Return its name."""
        return self._names.setdefault(body, f"TERMINAL_{len(self._names)}")

    def reserve(self) -> str:
        """Reserve the name of a rule that is defined later, so that its body can refer to itself."""
        name = f"named_{len(self._reserved)}"
        self._reserved[name] = ""
        return name

    def define(self, name: str, body: str) -> None:
        """Set the body of a reserved rule."""
        self._reserved[name] = body

    def any_of(self, bodies: Iterable[str]) -> str:
        """Add a rule that matches any of the bodies. Return its name."""
        return self.add(" | ".join(dict.fromkeys(bodies)))

    def text(self) -> str:
        """Return all rules as the text of a Lark grammar."""
        pairs = [*self._reserved.items(), *((name, body) for body, name in self._names.items())]
        return "".join(f"{name}: {body}\n" for name, body in pairs)


def exact_text(text: str) -> str:
    """Return a Lark string that matches exactly this text. Lark strings use JSON's escapes."""
    return json.dumps(text)


def sequence(opener: str, items: Iterable[str], closer: str) -> str:
    """Return a body that matches the brackets with these items between them, separated by commas."""
    return " ".join((exact_text(opener), ' "," '.join(items), exact_text(closer)))


def list_of(opener: str, item: str, closer: str) -> str:
    """Return a body that matches the brackets with any number of items between them."""
    return f'"{opener}" ({item} ("," {item})*)? "{closer}"'


def times(least: int, most: int | None) -> str:
    """Return the suffix that repeats a part `least` to `most` times (None: no limit)."""
    least = max(0, least)
    return ("*" if least == 0 else f"{{{least},}}") if most is None else f"{{{least},{most}}}"
