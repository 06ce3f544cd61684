"""Parser of tool calls as Gemma 4 writes them, which reads them while the answer arrives.

A call is `<|tool_call>call:NAME{key:<|"|>text<|"|>,n:3,o:{},l:[true,null]}<tool_call|>`. Keys have no quotes. Strings
are between marks of their own and have no escapes. `tool_call_repair` reads arguments in any other syntax.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .argument_schema import ANYTHING, ArgumentSchema
from .call_syntax import CALL_END, CALL_START, HEAD, HEAD_BEGINNING, STRING_MARK, beginning_at_end
from .gemma_arguments import GemmaArguments
from .whole_arguments import WholeArguments

logger = logging.getLogger(__name__)

_QUOTED_NAME = re.compile(r"([\"'`])([\w.:-]+)\1")


class ToolCallDelta(NamedTuple):
    """New part of one tool call.

    `index` is the index of the call within the answer. `name` is in the first delta of the call only. `arguments` is
    text to append to the call's arguments, which are the text of a JSON object.
    """

    index: int  # type: ignore[assignment]  # A tuple has a method of this name, which nothing here needs.
    name: str | None
    arguments: str


class ToolCallParser:
    """Parser that separates the tool calls of one answer from its content.

    The answer arrives in pieces, cut anywhere. `tools` are the tools of the request in OpenAI's format. Their schemas
    help to read faulty arguments.

    The parser emits arguments as they arrive, as far as their meaning is certain. At the first irregularity, it holds
    the rest back until the call ends, and reads the arguments as a whole. Nothing is lost. A call without `call:NAME`
    is content. Arguments that cannot be read with certainty are passed on unchanged, so they are not JSON. The parser
    logs a warning in both cases. If the text ends within a call, the arguments of the call are incomplete.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self._schemas = {name: ArgumentSchema(schema) for name, schema in map(_name_and_parameters, tools)}
        self._held = ""
        self._calls = 0
        self._call: _Arguments | None = None
        # True if a call is complete, but its block is not.
        self._in_block = False
        self._unreadable = 0

    @property
    def unreadable(self) -> int:
        """Number of calls whose arguments could not be read and were passed on unchanged."""
        return self._unreadable

    def add(self, text: str, *, is_last: bool = False, is_cut: bool = False) -> tuple[str, list[ToolCallDelta]]:
        """Add text, and return the content and the parts of calls that become certain.

        After the last text, nothing is held back. `is_cut` tells that the model had not finished at the last text. A
        call that is open then stays incomplete.
        """
        self._held += text
        content: list[str] = []
        deltas: list[ToolCallDelta] = []
        while True:
            name: str | None = None
            if self._call is None:
                name = self._take_head(content, is_last, is_cut)
                if self._call is None:
                    return "".join(content), deltas
            arguments, rest = self._call.add(self._held, is_last=is_last, is_cut=is_cut)
            if arguments or name is not None:
                deltas.append(ToolCallDelta(self._calls - 1, name, arguments))
            self._held = rest or ""
            if rest is None:
                return "".join(content), deltas
            self._in_block = self._call.is_block_open
            self._unreadable += not self._call.is_readable
            self._call = None

    def _take_content(self, is_last: bool) -> str:
        """Take the content before the next call."""
        start = self._held.find(CALL_START)
        if start < 0:
            start = len(self._held) - (0 if is_last else beginning_at_end(self._held, CALL_START))
        taken, self._held = self._held[:start], self._held[start:]
        return taken

    def _take_head(self, content: list[str], is_last: bool, is_cut: bool) -> str | None:
        """Take the head of the next call and return the tool's name.

        Return None if the name is not known yet or there is no call. Text that only looks like a call becomes content.
        """
        if not self._in_block:
            content.append(self._take_content(is_last))
        while self._in_block or self._held.startswith(CALL_START):
            start = 0 if self._in_block else len(CALL_START)
            head = HEAD.match(self._held, start)
            is_whole = head is not None and (head.end() < len(self._held) or (is_last and not is_cut))
            if head is not None and is_whole:
                self._held = self._held[head.end() :]
                self._in_block = False
                return self._begin(head[1])
            marked = beginning_at_end(self._held, CALL_END, CALL_START, STRING_MARK)
            unmarked = self._held[: len(self._held) - marked]
            if len(unmarked) < start or HEAD_BEGINNING.fullmatch(unmarked, start):
                if is_last and is_cut:
                    # The text was cut off before the name of the tool.
                    self._held = ""
                if not is_last or is_cut:
                    return None
            logger.warning("a tool call without call:NAME{ is passed on as content")
            content.append(self._held[:start])
            self._held = self._held[start:]
            self._in_block = False
            content.append(self._take_content(is_last))
        return None

    def _begin(self, written: str) -> str:
        """Begin a call and return the tool's name, without the namespace before it. Tool names have no colon."""
        name, rest = self._name(written)
        self._held = rest + self._held
        self._call = _Arguments(name, self._schemas.get(name, ANYTHING))
        self._calls += 1
        return name

    def _name(self, written: str) -> tuple[str, str]:
        """Return the tool's name, and the text after it that belongs to the arguments."""
        if written in self._schemas:
            return written, ""
        name, bracket, rest = written.partition("[")
        for found, after in ((written, ""), (name, bracket + rest)):
            whole = found.rstrip(":=")
            bare = whole[1:-1] if len(whole) > 2 and whole[0] == whole[-1] and whole[0] in "\"'`" else whole
            for tool in (whole, bare, bare.rpartition(":")[2]):
                if tool in self._schemas:
                    return tool, after
        unquoted = _QUOTED_NAME.fullmatch(written)
        return unquoted[2] if unquoted else written, ""


class _Arguments:
    """Conversion of one call's arguments to JSON, from the opening brace on.

    Arguments in Gemma's own syntax are converted while they arrive. At the first irregularity, the rest is held back,
    and all arguments are read again when the call has ended.
    """

    def __init__(self, name: str, schema: ArgumentSchema) -> None:
        self._name = name
        self._schema = schema
        self._incremental = GemmaArguments(schema)
        self._whole: WholeArguments | None = None

    @property
    def is_block_open(self) -> bool:
        """True if another call follows in the same block."""
        return (self._whole or self._incremental).is_block_open

    @property
    def is_readable(self) -> bool:
        """False if the arguments could not be read and were passed on unchanged."""
        return self._whole is None or self._whole.is_readable

    def add(self, text: str, *, is_last: bool, is_cut: bool) -> tuple[str, str | None]:
        """Add text. Return JSON to append, and the text after the call; None while the call continues."""
        if self._whole is not None:
            return self._add_to_whole(self._whole, text, is_last, is_cut)
        steps = self._incremental
        json = steps.add(text)
        if steps.rest is not None:
            return json, steps.rest
        # At the last text, the end of the call is within a string that is not closed.
        if steps.is_broken or (is_last and steps.is_loose):
            self._whole = WholeArguments(self._name, self._schema, steps.text, *steps.emitted)
            more, rest = self._add_to_whole(self._whole, "", is_last, is_cut)
            return json + more, rest
        if is_last and is_cut:
            return json + steps.cut(), None
        if is_last:
            self._whole = WholeArguments(self._name, self._schema, steps.text, *steps.emitted)
            json += self._whole.finish()
            return json, self._whole.rest
        return json, None

    def _add_to_whole(self, whole: WholeArguments, text: str, is_last: bool, is_cut: bool) -> tuple[str, str | None]:
        json = whole.add(text)
        if is_last and whole.rest is None:
            json += whole.cut() if is_cut else whole.finish()
        return json, whole.rest


def _name_and_parameters(tool: Mapping[str, Any]) -> tuple[str, Any]:
    function = tool["function"]
    return function["name"], function.get("parameters")
