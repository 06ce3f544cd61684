"""Conversations with tool calls as every published chat template of Gemma 4 renders them right.

Google published several templates. Each of them goes wrong somewhere: most write the text of an answer behind the
results of its calls, the first one writes a result as a turn of its own, the older ones write a null argument as
`None`, and none takes arguments that are no JSON object. The template stays the owner of the format: a part that it
would render wrong is replaced by a marker, and the marker in the rendered text by the part. A template with another
format, in which a marker is not found where Gemma's format has it, gets the messages as they are.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .call_syntax import CALL_START, STRING_MARK

Messages = list[dict[str, Any]]

# Begins the markers. In no text but a marker's: more of it is taken if a message holds it.
_MARK = "\ue000"
# What a template writes for a message of role `tool` if it does not know the role.
_TOOL_TURN = "<|turn>tool\n"
_CALL = f"{CALL_START}call:"


def render_conversation(messages: Sequence[Mapping[str, Any]], render: Callable[[Messages], str]) -> str:
    """The text of a conversation, up to where the model's answer goes on.

    `messages` have OpenAI's form; the arguments of a call are an object, or the text of one. Text that is no JSON
    object is rendered as it stands. `render` is the chat template. Raises what it raises.
    """
    plain = _plain(messages)
    if not any(message.get("tool_calls") for message in plain):
        return render(plain)
    for embeds_results in (False, True):
        marked = _Marked(plain, embeds_results)
        text = render(marked.messages)
        if embeds_results or _TOOL_TURN not in text or not any(message["role"] == "tool" for message in plain):
            break
    replaced = marked.replace(text)
    return render(plain) if replaced is None else replaced


def _plain(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """Copies of the messages: the arguments of calls are objects, if they are the text of one; every call has an id of
    its own, and every result the id and the name of its call. A text and the calls after it are one message."""
    plain: Messages = []
    # Calls without a result: the id they came with, their own id, and their name.
    waiting: list[tuple[Any, str, str]] = []
    for index, message in enumerate(messages):
        found = dict(message)
        if found.get("tool_calls"):
            found["tool_calls"] = [_plain_call(call, f"{index}.{n}") for n, call in enumerate(message["tool_calls"])]
            names = zip(message["tool_calls"], found["tool_calls"], strict=True)
            waiting = [(call.get("id"), own["id"], own["function"]["name"]) for call, own in names]
            if plain and _is_text_before(plain[-1], found):
                found |= {**plain.pop(), "tool_calls": found["tool_calls"]}
        elif found["role"] == "tool" and waiting:
            given = found.get("tool_call_id")
            # In their order where the ids do not tell.
            call = next((call for call in waiting if call[0] == given), waiting[0])
            waiting.remove(call)
            found |= {"tool_call_id": call[1], "name": call[2]}
        plain.append(found)
    return plain


def _plain_call(call: Mapping[str, Any], own_id: str) -> dict[str, Any]:
    return {**call, "id": own_id, "function": {**call["function"], "arguments": _arguments(call["function"])}}


def _is_text_before(message: Mapping[str, Any], calling: Mapping[str, Any]) -> bool:
    """Whether a message is the text of the same answer as the calls of the next one."""
    is_text = message["role"] == "assistant" and isinstance(message.get("content"), str)
    is_bare = not calling.get("content") and not calling.get("reasoning_content")
    return is_text and not message.get("tool_calls") and is_bare


def _arguments(function: Mapping[str, Any]) -> Any:
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        return {}
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


class _Marked:
    """A conversation with markers, and the text that takes the place of each.

    With `embeds_results`, the results of calls are part of the message that called, and so is the answer after them:
    the form that the first published template takes.
    """

    def __init__(self, messages: Messages, embeds_results: bool) -> None:
        everything = json.dumps(messages, ensure_ascii=False, default=str)
        self._mark = _MARK
        while self._mark in everything:
            self._mark += _MARK
        # What a template writes for each marker, and the text that takes its place.
        self._parts: list[tuple[str, str]] = []
        messages = self._closed(messages)
        self.messages = self._embedded(messages) if embeds_results else [self._message(m) for m in messages]

    def replace(self, text: str) -> str | None:
        """The rendered text with every marker replaced; None if one is not where Gemma's format has it."""
        for written, part in self._parts:
            if text.count(written) != 1:
                return None
            text = text.replace(written, part)
        return None if self._mark in text else text

    def _closed(self, messages: Messages) -> Messages:
        """The messages with an empty one of the model where the user speaks after a result: it closes the turn."""
        closed: Messages = []
        for message in messages:
            if closed and closed[-1]["role"] == "tool" and message["role"] == "user":
                closed.append({"role": "assistant", "content": self._add("", "", "")})
            closed.append(message)
        return closed

    def _embedded(self, messages: Messages) -> Messages:
        embedded: Messages = []
        # The message whose calls are answered, until another one follows the answer.
        caller: dict[str, Any] | None = None
        for message in messages:
            if message["role"] == "tool" and caller is not None:
                result = {"name": message.get("name") or "unknown", "response": message.get("content")}
                caller.setdefault("tool_responses", []).append(result)
                continue
            has_results = caller is not None and "tool_responses" in caller
            if message["role"] == "assistant" and not message.get("tool_calls") and has_results:
                assert caller is not None
                caller["content"], caller = message.get("content"), None
                continue
            is_next = message["role"] == "assistant" and has_results
            embedded.append(self._message(message, continues_turn=is_next))
            caller = embedded[-1] if message.get("tool_calls") else None
        return embedded

    def _message(self, message: dict[str, Any], *, continues_turn: bool = False) -> dict[str, Any]:
        if not message.get("tool_calls"):
            return message
        calls = [{**call, "function": self._function(call["function"])} for call in message["tool_calls"]]
        content = message.get("content") or ""
        if content or continues_turn:
            first = calls[0]["function"]
            before = "<|turn>model\n" if continues_turn else ""
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
        return [self._without_nulls(item) for item in value] if isinstance(value, list) else value

    def _add(self, before: str, after: str, text: str) -> str:
        """A new marker, which stands for this text, and for what the template writes before and after it."""
        marker = f"{self._mark}{len(self._parts)};"
        self._parts.append((f"{before}{marker}{after}", text))
        return marker
