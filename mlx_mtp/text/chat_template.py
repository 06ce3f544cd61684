"""Conversations with tool calls as every published chat template of Gemma 4 renders them right.

Google published several templates. Each of them goes wrong somewhere: most write the text of an answer behind the
results of its calls, the first one writes a result as a turn of its own, the older ones write a null argument as
`None`, and none takes arguments that are no JSON object. The template stays the owner of the format: a part that it
would render wrong is replaced by a marker, and the marker in the rendered text by the part. A template with another
format, in which a marker is not found where Gemma's format has it, gets the messages and the tools as they are.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from .call_syntax import CALL_START, STRING_MARK
from .conversation import Messages, canonical_messages
from .markers import Markers
from .tool_schemas import marked_tools

Tools = Sequence[Mapping[str, Any]]

# What a template writes for a message of role `tool` if it does not know the role.
_TOOL_TURN = "<|turn>tool\n"
_MODEL_TURN, _TURN_END = "<|turn>model\n", "<turn|>\n"
_CALL = f"{CALL_START}call:"


class Render(Protocol):
    """A chat template."""

    def __call__(self, messages: Messages, tools: Tools | None, /) -> str: ...


def render_conversation(messages: Sequence[Mapping[str, Any]], render: Render, tools: Tools | None = None) -> str:
    """The text of a conversation, up to where the model's answer goes on.

    `messages` have OpenAI's form or that of Hugging Face; the arguments of a call are an object, or the text of one.
    Arguments of another kind are rendered as they stand. `tools` are declarations as `usable_tools` makes them.

    Raises PromptError for messages that no template could render, and what `render` raises.
    """
    plain = canonical_messages(messages)
    markers = Markers(plain, tools)
    declared = None if tools is None else marked_tools(tools, markers)
    has_results = any(message["role"] == "tool" for message in plain)
    marked = _Marked(markers)
    if has_results and _writes_tool_turns(render, declared, markers):
        given = marked.embedded(plain)
    else:
        given = marked.separate(plain)
    text = markers.replace(render(given, declared))
    return render(plain, tools) if text is None else text


def _writes_tool_turns(render: Render, tools: Tools | None, markers: Markers) -> bool:
    """Whether a template writes a result as a turn of its own, as the first published one does."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    probe: Messages = [
        {"role": "user", "content": "Call."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": markers.mark, "tool_call_id": "1", "name": "f"},
    ]
    return f"{_TOOL_TURN}{markers.mark}" in render(probe, tools)


class _Marked:
    """Conversations with markers, in the forms that templates take."""

    def __init__(self, markers: Markers) -> None:
        self._add = markers.add

    def separate(self, messages: Messages) -> Messages:
        """The messages, and an empty one of the model where another role speaks after a result: it closes the turn."""
        return [self._message(message) for message in _closed(messages)]

    def embedded(self, messages: Messages) -> Messages:
        """The form that the first published template takes: the results of calls are part of the message that called,
        and so is the answer after them."""
        embedded: Messages = []
        # The message with results that the model has not gone on from.
        caller: dict[str, Any] | None = None
        for message in _closed(messages):
            if message["role"] == "tool":
                caller = embedded[-1]
                result = {"name": message["name"], "response": message["content"]}
                caller["tool_responses"] = [*caller.get("tool_responses", []), result]
            elif caller is not None and message["role"] == "assistant" and not message.get("tool_calls"):
                # Without content, the template leaves the turn open.
                content = message.get("content") or ""
                caller["content"], caller = content if content.strip() else self._add("", "", ""), None
            else:
                is_next = caller is not None and message["role"] == "assistant"
                embedded.append(self._message(message, continues_turn=is_next))
                caller = embedded[-1] if message.get("tool_responses") else None
        if caller is None and embedded[-1].get("tool_responses"):
            # Behind a message with results, the template begins no turn for an answer: it does so behind this one.
            embedded.append({"role": "assistant", "content": self._add(_MODEL_TURN, _TURN_END, "")})
        return embedded

    def _message(self, message: dict[str, Any], *, continues_turn: bool = False) -> dict[str, Any]:
        if not message.get("tool_calls"):
            return message
        calls = [{**call, "function": self._function(call["function"])} for call in message["tool_calls"]]
        content = message.get("content") or ""
        if content or continues_turn:
            first = calls[0]["function"]
            before = _MODEL_TURN if continues_turn else ""
            first["name"] = self._add(f"{before}{_CALL}", "", f"{content}{_CALL}") + first["name"]
            # Else a template takes the name for the call's result from here.
            del calls[0]["id"]
        return {**message, "content": "", "tool_calls": calls}

    def _function(self, function: dict[str, Any]) -> dict[str, Any]:
        arguments = function["arguments"]
        if isinstance(arguments, str):
            raw = arguments if arguments.startswith("{") else f"{{{arguments}}}"
            # Between braces: in these the template puts the arguments, whatever their name and value.
            return {**function, "arguments": {self._add("{", ":0}", raw): 0}}
        return {**function, "arguments": self._without_nulls(arguments)}

    def _without_nulls(self, value: Any) -> Any:
        if value is None:
            return self._add(STRING_MARK, STRING_MARK, "null")
        if isinstance(value, Mapping):
            return {key: self._without_nulls(item) for key, item in value.items()}
        return [self._without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _closed(messages: Messages) -> Messages:
    closed: Messages = []
    for message in messages:
        if closed and closed[-1]["role"] == "tool" and message["role"] not in ("assistant", "tool"):
            closed.append({"role": "assistant", "content": ""})
        closed.append(message)
    return closed
