"""Grammar terminals for the string keywords of JSON Schema: length, pattern and format.

A terminal is in llguidance's variant of Lark. It matches the plain text of a string, without JSON's escapes.
"""

import re
from collections.abc import Iterable, Sequence

_ANY = "(?s:.*)"
# One part of a regular expression: an escape, a class, or one character.
_PARTS = re.compile(r"\\u[0-9a-fA-F]{4}|\\u\{[0-9a-fA-F]+\}|\\x[0-9a-fA-F]{2}|\\.|\[\^?(?:\\.|[^\]\\])*\]|.", re.DOTALL)
# JSON Schema uses the regular expressions of JavaScript. These classes are ASCII in JavaScript and Unicode in Rust.
_CLASSES = {r"\d": "0-9", r"\D": "^0-9", r"\w": "0-9A-Za-z_", r"\W": "^0-9A-Za-z_"}
# Characters that Rust allows after a backslash.
_ESCAPED = frozenset(r"\.+*?()|[]{}^$#&-~/")


def search_terminal(pattern: str) -> str:
    """Return a terminal that matches each string that contains the pattern, a regular expression of JSON Schema.

    Anchors are supported at both ends of an alternative, and lookaheads at its beginning. In other places they stay
    unchanged, and llguidance rejects the terminal.
    """
    return _alternatives(_PARTS.findall(pattern), is_anchored=False)


def length_terminal(least: int, most: int | None) -> str:
    """Return a terminal that matches each string of `least` to `most` characters (None: no limit)."""
    return f"/(?s:.{{{least},{'' if most is None else most}}})/"


def format_terminal(name: str) -> str | None:
    """Return a terminal that matches each string of a JSON Schema format, or None if the format is not known."""
    return _FORMATS.get(name)


def _alternatives(parts: Sequence[str], *, is_anchored: bool) -> str:
    """Return a terminal that matches one of the alternatives.

    If `is_anchored`, the match begins at the start of the string, else anywhere.
    """
    found = [_alternative(branch, is_anchored) for branch in _split(parts)]
    return found[0] if len(found) == 1 else f"({' | '.join(found)})"


def _split(parts: Sequence[str]) -> list[list[str]]:
    """Split the parts into the alternatives that are not inside a group."""
    branches: list[list[str]] = [[]]
    depth = 0
    for part in parts:
        depth += (part == "(") - (part == ")")
        if part == "|" and depth == 0:
            branches.append([])
        else:
            branches[-1].append(part)
    return branches


def _alternative(parts: list[str], is_anchored: bool) -> str:
    if parts[:1] == ["^"]:
        parts, is_anchored = parts[1:], True
    looks = []
    while is_anchored and parts[:2] == ["(", "?"] and parts[2:3] in (["="], ["!"]) and (end := _group_end(parts)):
        looks.append(("" if parts[2] == "=" else "~") + f"({_alternatives(parts[3:end], is_anchored=True)})")
        parts = parts[end + 1 :]
    is_closed = parts[-1:] == ["$"]
    body = "".join(map(_rust, parts[:-1] if is_closed else parts))
    # Without the group, a repetition at the start of the body would apply to the part before it.
    whole = f"/{'' if is_anchored else _ANY}(?:{body}){'' if is_closed else _ANY}/"
    return whole if not looks else f"({' & '.join([whole, *looks])})"


def _group_end(parts: Sequence[str]) -> int | None:
    """Return the index of the parenthesis that closes the first group, or None."""
    depth = 0
    for index, part in enumerate(parts):
        depth += (part == "(") - (part == ")")
        if depth == 0:
            return index
    return None


def _rust(part: str) -> str:
    """Translate one part of a regular expression to Rust's syntax, for use between slashes."""
    if part in _CLASSES:
        return f"[{_CLASSES[part]}]"
    if part.startswith("[") and len(part) > 1:
        opening = "[^" if part.startswith("[^") else "["
        return opening + "".join(map(_rust_in_class, _PARTS.findall(part[len(opening) : -1], 0))) + "]"
    if len(part) == 2 and part[0] == "\\" and not part[1].isalnum():
        return part if part[1] in _ESCAPED else part[1]
    return {"/": r"\/", "\n": r"\n", "\r": r"\r"}.get(part, part)


def _rust_in_class(part: str) -> str:
    if part in (r"\D", r"\W"):
        return f"[{_CLASSES[part]}]"
    if part in _CLASSES:
        return _CLASSES[part]
    if part == r"\b":
        return r"\x08"
    if part.startswith("[") or part in ("&", "~"):
        # Rust's classes can contain other classes and operators. So these characters need a backslash.
        return "".join("\\" + character if character in "[]&~^" else character for character in part)
    return _rust(part)


def _all_of(terminals: Iterable[str]) -> str:
    return "(" + " & ".join(terminals) + ")"


_DAY = r"(0[1-9]|1[0-9]|2[0-8])"
_LEAP_YEAR = r"([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)"
_DATE = rf"([0-9]{{4}}-((0[1-9]|1[0-2])-{_DAY}|(0[13-9]|1[0-2])-(29|30)|(0[13578]|1[02])-31)|{_LEAP_YEAR}-02-29)"
# Many libraries reject the year 0.
_NOT_YEAR_0 = "~/0000(?s:.*)/"
_HOUR, _SIXTY = "([01][0-9]|2[0-3])", "[0-5][0-9]"
_TIME = rf"{_HOUR}:{_SIXTY}:{_SIXTY}(\.[0-9]{{1,9}})?([Zz]|[+-]{_HOUR}:{_SIXTY})"
_N = "[0-9]{1,9}"
_CLOCK = f"T({_N}H({_N}M({_N}S)?)?|{_N}M({_N}S)?|{_N}S)"
_DURATION = f"P(({_N}Y({_N}M({_N}D)?)?|{_N}M({_N}D)?|{_N}D)({_CLOCK})?|{_CLOCK}|{_N}W)"
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL})*"
_ATOM = r"[A-Za-z0-9!#$%&'*+\/=?^_`{|}~-]+"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = rf"{_BYTE}(\.{_BYTE}){{3}}"
_HEX = "[0-9a-fA-F]"
_GROUP = f"{_HEX}{{1,4}}"
_URI_TEXT = rf"([A-Za-z0-9._~:\/?@!$&'()*+,;=-]|%{_HEX}{{2}})"


def _ipv6() -> str:
    """Return a regular expression for IPv6 addresses.

    An address has eight groups, or fewer groups around `::`. An IPv4 address may replace the last two groups.
    """
    last = f"({_GROUP}:{_GROUP}|{_IPV4})"
    forms = [f"({_GROUP}:){{6}}{last}"]
    for before in range(8):
        head = f"({_GROUP}(:{_GROUP}){{0,{before - 1}}})?" if before else ""
        # `::` replaces at least one group.
        after = 7 - before
        forms.append(f"{head}::" + (f"({_GROUP}:){{0,{after - 1}}}{_GROUP}" if after else ""))
        if after >= 2:
            forms.append(f"{head}::({_GROUP}:){{0,{after - 2}}}{_IPV4}")
        forms.append(f"{head}::")
    return "|".join(dict.fromkeys(forms))


_FORMATS = {
    "date": _all_of([f"/{_DATE}/", _NOT_YEAR_0]),
    "time": f"/{_TIME}/",
    "date-time": _all_of([f"/{_DATE}[Tt]{_TIME}/", _NOT_YEAR_0]),
    "duration": f"/{_DURATION}/",
    "hostname": _all_of([f"/{_HOST}/", length_terminal(1, 253)]),
    "email": _all_of([rf"/{_ATOM}(\.{_ATOM})*@{_HOST}/", length_terminal(3, 254)]),
    "ipv4": f"/{_IPV4}/",
    "ipv6": f"/{_ipv6()}/",
    "uuid": f"/{_HEX}{{8}}(-{_HEX}{{4}}){{3}}-{_HEX}{{12}}/",
    "uri": rf"/[A-Za-z][A-Za-z0-9+.-]*:{_URI_TEXT}+(#{_URI_TEXT}*)?/",
}
