"""Conversion of messages from the forms of OpenAI and Hugging Face to one form.

All system texts become one message, which comes first. The model's output up to the next result or user message becomes
one message with its thoughts, its text and its calls. The results of calls follow the message with the calls.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

from mlx_mtp.errors import PromptError

Messages = list[dict[str, Any]]
# This is the index of a message in the conversation, and the message.
_Indexed = tuple[int, Mapping[str, Any]]

SYSTEM_ROLES = ("system", "developer")
_THOUGHTS = ("reasoning", "reasoning_content")
# This separates the texts of two messages that become one.
_BLANK_LINE = "\n\n"


@dataclass
class _MessageGroup:
    """Message of the model or the user, its index, and the results of its calls with their indexes."""

    index: int
    message: dict[str, Any]
    results: list[tuple[int, dict[str, Any]]] = field(default_factory=list)


class _Call(NamedTuple):
    """Call without a result.

    `given_id` is the id in the client's message. `own_id` is the id that this module assigns. `group` is the group with
    the call.
    """

    given_id: Any
    own_id: str
    name: str
    group: _MessageGroup


# A result is matched with a call by its id, by its name, or by its order.
_WAYS: tuple[Callable[[_Call, Mapping[str, Any]], bool], ...] = (
    lambda call, result: bool(call.given_id) and call.given_id == result.get("tool_call_id"),
    lambda call, result: call.name == result.get("name"),
    lambda call, result: True,
)


def canonical_messages(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """Return copies of the messages in one form.

    Every call has an id of its own. Every result has the id and the name of its call. Arguments are objects, or text
    that is not an object.

    Raises PromptError if a result has no call that waits for it, or if content or arguments have another type.
    """
    system = [
        _text(message.get("content"), index)
        for index, message in enumerate(messages)
        if message["role"] in SYSTEM_ROLES
    ]
    first = system_message(system)
    others = [(index, message) for index, message in enumerate(messages) if message["role"] not in SYSTEM_ROLES]
    groups = _merged(_groups(others))
    return first + [
        message for group in groups for message in (group.message, *(result for _, result in group.results))
    ]


def system_message(texts: Sequence[str]) -> Messages:
    """Return the system message that consists of these texts, as a list that is empty without a text."""
    return [{"role": "system", "content": _BLANK_LINE.join(filter(None, texts))}] if texts else []


def _groups(messages: Sequence[_Indexed]) -> list[_MessageGroup]:
    """Return the messages of all roles except tool, with the results of their calls."""
    groups: list[_MessageGroup] = []
    # These calls have no result. The calls of the latest messages come first.
    waiting: list[_Call] = []
    ids: set[Any] = set()
    for role, found in groupby(messages, key=lambda item: item[1]["role"]):
        run = list(found)
        if role == "tool":
            _add_results(run, waiting, ids)
            continue
        for index, message in run:
            groups.append(_MessageGroup(index, _answer(message, index) if role == "assistant" else dict(message)))
        if role == "assistant":
            new = zip(groups[-len(run) :], run, strict=True)
            calls = [call for group, (_, message) in new for call in _calls(group, message)]
            waiting[:0] = calls
            ids.update(call.given_id for call in calls if call.given_id)
    return groups


def _calls(group: _MessageGroup, message: Mapping[str, Any]) -> list[_Call]:
    pairs = zip(message.get("tool_calls") or [], group.message.get("tool_calls") or [], strict=True)
    return [_Call(given.get("id"), own["id"], own["function"]["name"], group) for given, own in pairs]


def _add_results(results: Sequence[_Indexed], waiting: list[_Call], ids: set[Any]) -> None:
    """Add results to the groups with their calls. `ids` are the ids of all calls so far."""
    calls: dict[int, _Call] = {}
    for way in _WAYS:
        for index, message in results:
            # A result with a known id belongs to the call with this id only. If this call has a result already, the new
            # one is a second result.
            if index in calls or (way is not _WAYS[0] and message.get("tool_call_id") in ids):
                continue
            call = next((call for call in waiting if way(call, message)), None)
            if call is not None:
                calls[index] = call
                waiting.remove(call)
    for index, message in results:
        if index not in calls:
            raise _unexpected(message, index, ids)
        call = calls[index]
        own = {"content": _result_text(message, index), "tool_call_id": call.own_id, "name": call.name}
        call.group.results.append((index, {**message, **own}))


def _merged(groups: Sequence[_MessageGroup]) -> list[_MessageGroup]:
    """Return the groups, with consecutive groups of the model merged if they belong together."""
    merged: list[_MessageGroup] = []
    # The loop starts at the end, where it is known whether calls follow.
    for group in reversed(groups):
        if merged and _belong_together(group, merged[-1]):
            merged[-1] = _joined(group, merged[-1])
        else:
            merged.append(group)
    return merged[::-1]


def _belong_together(first: _MessageGroup, second: _MessageGroup) -> bool:
    """Return whether two groups are one message, which the model wrote before it had a result.

    Text after calls without a result is a message of its own.
    """
    is_model = first.message["role"] == second.message["role"] == "assistant"
    if not is_model or first.message.get("tool_responses"):
        return False
    if first.results:
        return all(index > second.index for index, _ in first.results)
    return bool(second.message.get("tool_calls")) or not first.message.get("tool_calls")


def _joined(first: _MessageGroup, second: _MessageGroup) -> _MessageGroup:
    messages = (first.message, second.message)
    joined = {**second.message, **first.message}
    for name in ("content", "reasoning_content"):
        texts = [message[name] for message in messages if message.get(name)]
        if texts:
            joined[name] = _BLANK_LINE.join(filter(str.strip, texts)) or texts[0]
    if calls := [call for message in messages for call in message.get("tool_calls") or []]:
        joined["tool_calls"] = calls
    return _MessageGroup(first.index, joined, sorted([*first.results, *second.results], key=lambda result: result[0]))


def _text(content: Any, index: int) -> str:
    """Return the text of a message's content.

    Raises PromptError, naming the message, if the content is not text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    text = _parts_text(content) if isinstance(content, list | tuple) else None
    if text is None:
        found = repr(content)[:100]
        raise PromptError(f"messages[{index}].content must be text, or a list of parts of type text, found {found}")
    return text


def _answer(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return the model's message with text as content, its thought under one name, and own call ids."""
    found = {name: value for name, value in message.items() if name not in _THOUGHTS}
    thoughts = [message[name] for name in _THOUGHTS if isinstance(message.get(name), str)]
    if thought := next(filter(None, thoughts), None):
        found["reasoning_content"] = thought
    if found.get("content") is not None:
        found["content"] = _text(found["content"], index)
    if found.get("tool_calls"):
        found["tool_calls"] = [_own_call(call, index, number) for number, call in enumerate(found["tool_calls"])]
    return found


def _own_call(call: Mapping[str, Any], index: int, number: int) -> dict[str, Any]:
    function = call["function"]
    arguments = _arguments(function.get("arguments"), f"messages[{index}].tool_calls[{number}].function.arguments")
    return {**call, "id": f"{index}.{number}", "function": {**function, "arguments": arguments}}


def _arguments(arguments: Any, place: str) -> Mapping[str, Any] | str:
    """Return the arguments as an object, or as text if they are not an object."""
    if arguments is None:
        return {}
    if isinstance(arguments, Mapping):
        return arguments
    return read_object(arguments) if isinstance(arguments, str) else _json(arguments, place)


def read_object(text: str) -> dict[str, Any] | str:
    """Return the arguments of a call as an object.

    The result is the text itself if it is not a JSON object, for example if the call was cut off.
    """
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, dict) else text


def _parts_text(parts: Sequence[Any]) -> str | None:
    """Return the text of a list of parts; None if a part is not text."""
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part for part in parts]
    strings = [text for text in texts if isinstance(text, str)]
    return "".join(strings) if len(strings) == len(texts) else None


def _result_text(message: Mapping[str, Any], index: int) -> str:
    """Return the text of a result's parts, or else the JSON of its value."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    has_parts = isinstance(content, list) and content and all(isinstance(part, Mapping) for part in content)
    text = _parts_text(content or []) if has_parts else None
    return _json(content, f"messages[{index}].content") if text is None else text


def _json(value: Any, place: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"{place} cannot be written as JSON: {error}") from None


def _unexpected(message: Mapping[str, Any], index: int, ids: set[Any]) -> PromptError:
    given = message.get("tool_call_id")
    if given in ids:
        return second_result(f"messages[{index}].tool_call_id", given)
    return PromptError(f"messages[{index}] is the result of a call, but no call before it waits for one")


def second_result(place: str, call_id: Any) -> PromptError:
    """Return the error for a result whose call has a result already. `place` is the place of the call's id."""
    return PromptError(f"{place} is {call_id!r}: its call has a result already")
