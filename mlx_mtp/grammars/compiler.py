"""Compilation of a JSON Schema, a regular expression or a grammar to llguidance's own form.

llguidance needs only NumPy, and compiles a schema in about a millisecond.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlx_mtp.decoding.constraints import error_reason
from mlx_mtp.errors import OptionError

if TYPE_CHECKING:
    from llguidance import LLMatcher

# This is the whitespace between the tokens of JSON. Without a limit, a model that loops on blanks never ends.
JSON_WHITESPACE = r" |\n{1,2}[ \t]{0,40}"


def compile_grammar(
    *, json_schema: str | Mapping[str, Any] | None = None, regex: str | None = None, grammar: str | None = None
) -> str | None:
    """Return the given constraint as a grammar in llguidance's own form, or None if none is given.

    `json_schema` is a JSON Schema, as text or parsed. `regex` has the syntax of Rust's regex crate and must match the
    whole answer. `grammar` is in llguidance's variant of Lark or in llama.cpp's GBNF.

    Raises OptionError if more than one constraint is given, or if the constraint is invalid or not supported by
    llguidance. Raises OptionError if llguidance is not installed.
    """
    given = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if not names:
        return None
    if len(names) > 1:
        raise OptionError(f"only one of json_schema, regex and grammar can be given, found {' and '.join(names)}")
    matcher = _matcher_class(names[0])
    from llguidance.gbnf_to_lark import any_to_lark

    if json_schema is not None:
        source = matcher.grammar_from_json_schema(
            _read_schema(json_schema), defaults={"whitespace_pattern": JSON_WHITESPACE}
        )
    elif regex is not None:
        source = matcher.grammar_from_regex(regex)
    else:
        assert grammar is not None
        try:
            source = matcher.grammar_from_lark(any_to_lark(grammar))
        except Exception as error:  # The converter raises Exception itself.
            raise OptionError(f"grammar is neither Lark, with a rule start, nor GBNF: {error}") from None
    problem = _problem(source)
    if problem is not None:
        raise OptionError(f"{names[0]} cannot be followed: {problem}")
    return source


def schema_problem(schema: bool | Mapping[str, Any]) -> str | None:
    """Return the reason why no grammar follows a JSON Schema in full, or None if one does.

    Raises OptionError if llguidance is not installed.
    """
    return _problem(_matcher_class("json_schema").grammar_from_json_schema(json.dumps(schema)))


def lark_problem(grammar: str) -> str | None:
    """Return the reason why a grammar in llguidance's variant of Lark cannot be followed, or None if it can.

    Raises OptionError if llguidance is not installed.
    """
    return _problem(_matcher_class("grammar").grammar_from_lark(grammar))


def _matcher_class(option: str) -> "type[LLMatcher]":
    """Import llguidance and return its matcher class.

    Raises OptionError if llguidance is not installed. The message names the option that needs it.
    """
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise OptionError(f"{option} needs llguidance: pip install 'mlx-mtp[grammar]'") from None
    return LLMatcher


def _problem(source: str) -> str | None:
    """Return the reason why a grammar in llguidance's own form cannot be followed, or None if it can."""
    failed, messages = _matcher_class("grammar").validate_grammar_with_warnings(source)
    if not failed:
        # Special tokens are looked up later in the model's tokenizer.
        messages = [message for message in messages if not message.startswith("no tokenizer - can't validate <")]
    # A warning names a part of the grammar that would not be followed. This is an error too.
    return error_reason(messages[0]) if failed or messages else None


def _read_schema(schema: str | Mapping[str, Any]) -> str:
    try:
        content = json.loads(schema) if isinstance(schema, str) else schema
        if isinstance(content, bool | Mapping):
            return json.dumps(content)
    except (ValueError, TypeError, RecursionError) as error:
        raise OptionError(f"json_schema is not JSON: {error}") from None
    raise OptionError(f"json_schema must be a JSON object, found {type(content).__name__}")
