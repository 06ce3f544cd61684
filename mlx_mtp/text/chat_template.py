"""Rendering of conversations with tool calls, correct with every published chat template of Gemma 4.

Google published several templates, and each of them has faults. Most of them write the text of an answer after the
results of its calls. The first template writes a result as a turn of its own. The older templates write a null argument
as `None`. None of them accepts arguments that are not a JSON object.

The template stays the owner of the format. This module puts a marker in place of each part that the template would
render wrong. It then replaces the marker in the rendered text with the part. If a marker is not at its place in Gemma's
format, the template has another format. It then gets the messages and the tools unchanged.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from .call_syntax import CALL_START, STRING_MARK
from .conversation import Messages, canonical_messages
from .markers import Markers
from .tool_schemas import marked_tools

Tools = Sequence[Mapping[str, Any]]

# A template writes this text for a message of role `tool` if it does not know the role.
_TOOL_TURN = "<|turn>tool\n"
_MODEL_TURN, _TURN_END = "<|turn>model\n", "<turn|>\n"
_CALL = f"{CALL_START}call:"


# A conversation that no message of a client can disturb.
_PROBE: Messages = [
    {"role": "user", "content": "Call."},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}],
    },
    {"role": "tool", "content": "Done.", "tool_call_id": "1", "name": "f"},
]


class Render(Protocol):
    """Function that renders messages and tools with a chat template."""

    def __call__(self, messages: Messages, tools: Tools | None, /) -> str:
        """Return the rendered text."""


def render_conversation(messages: Sequence[Mapping[str, Any]], render: Render, tools: Tools | None = None) -> str:
    """Return the text of a conversation, up to the point where the model's answer continues.

    `messages` have the form of OpenAI or of Hugging Face. The arguments of a call are an object, or the text of an
    object. Arguments of another kind are rendered unchanged. `tools` are declarations from `usable_tools`.

    Raises PromptError if no template can render the messages. Exceptions of `render` pass through.
    """
    plain = canonical_messages(messages)
    markers = Markers(plain, tools)
    declared = None if tools is None else marked_tools(tools, markers)
    has_results = any(message["role"] == "tool" for message in plain)
    marked = _Marked(markers)
    given = marked.embedded(plain) if has_results and _writes_tool_turns(render) else marked.separate(plain)
    text = markers.replace(render(given, declared))
    return render(plain, tools) if text is None else text


def _writes_tool_turns(render: Render) -> bool:
    """Return whether the template writes a result as its own turn, as the first published template does."""
    return f"{_TOOL_TURN}Done." in render(_PROBE, None)


class _Marked:
    """Conversations with markers, in the forms that templates accept."""

    def __init__(self, markers: Markers) -> None:
        self._add = markers.add

    def separate(self, messages: Messages) -> Messages:
        """Return the messages with markers, each result as a message of its own.

        An empty message of the model closes the turn where another role speaks after a result.
        """
        return [self._message(message) for message in _closed(messages)]

    def embedded(self, messages: Messages) -> Messages:
        """Return the messages in the form of the first published template.

        The results of calls are a part of the message with the calls. The answer after the results is also a part of
        this message.
        """
        embedded: Messages = []
        # This is the message with results after which the model has not continued.
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
            # The template begins no turn for an answer after a message with results. It begins one after the message
            # added here.
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
            # A template looks up the name for the call's result by this id. It would find the name with the marker.
            del calls[0]["id"]
        return {**message, "content": "", "tool_calls": calls}

    def _function(self, function: dict[str, Any]) -> dict[str, Any]:
        arguments = function["arguments"]
        if isinstance(arguments, str):
            raw = arguments if arguments.startswith("{") else f"{{{arguments}}}"
            # The template writes braces around the marker and its value. The raw arguments replace all of it.
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
