"""Messages of OpenAI's API, and their conversion to the form that chat templates take."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, InstanceOf, Tag, model_validator
from pydantic.json_schema import SkipJsonSchema

from mlx_mtp.errors import PromptError
from mlx_mtp.text.conversation import SYSTEM_ROLES, Messages, read_object, second_result, system_message

from .field_types import RequestPart, type_of
from .request_media import AudioPart, ImagePart, MediaInContent, Medium


class TextPart(RequestPart):
    """Text part of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class RefusalPart(RequestPart):
    """Part of an earlier answer that refuses the user's request."""

    type: Literal["refusal"]
    refusal: str


Content: TypeAlias = str | list[TextPart | RefusalPart | str]


class ThoughtPart(RequestPart):
    """Thought part of an earlier answer. An encrypted thought has no text."""

    type: Literal["thinking", "reasoning", "redacted_thinking"]
    thinking: Content | None = None
    text: Content | None = None
    reasoning: Content | None = None

    @property
    def thought(self) -> str:
        """Text of the thought, empty if the part has no text."""
        return content_text(self.thinking) or content_text(self.text) or content_text(self.reasoning)


_MEDIA = (ImagePart, AudioPart, Medium)


def _part_tag(part: Any) -> str | None:
    kind = type_of(part)
    return kind if kind is None or isinstance(kind, str) else repr(kind)


# The type of a part decides its model, so that an error names no fields of other parts. Only the server makes a Medium.
AnyPart: TypeAlias = (
    Annotated[
        Annotated[TextPart, Tag("text")]
        | Annotated[TextPart, Tag("input_text")]
        | Annotated[TextPart, Tag("output_text")]
        | Annotated[ImagePart, Tag("image_url")]
        | Annotated[ImagePart, Tag("input_image")]
        | Annotated[AudioPart, Tag("input_audio")]
        | Annotated[RefusalPart, Tag("refusal")]
        | Annotated[ThoughtPart, Tag("thinking")]
        | Annotated[ThoughtPart, Tag("reasoning")]
        | Annotated[ThoughtPart, Tag("redacted_thinking")],
        Discriminator(_part_tag),
    ]
    | str
    | SkipJsonSchema[InstanceOf[Medium]]
)
# The content of an earlier answer may have thoughts, and that of the user may have media.
AnyContent: TypeAlias = str | list[AnyPart]


def content_text(content: str | Sequence[AnyPart] | None) -> str:
    """Return the text of a message, without thoughts and media."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(_part_text(part) for part in content)


def _part_text(part: AnyPart) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, ThoughtPart | ImagePart | AudioPart | Medium):
        return ""
    return part.refusal if isinstance(part, RefusalPart) else part.text


def with_places(content: AnyContent | None, message: str) -> AnyContent | None:
    """Return the content with its media as `Medium`. `message` is the place of the message in the request."""
    if not isinstance(content, list):
        return content
    return [
        part.medium(f"{message}.content[{number}]") if isinstance(part, ImagePart | AudioPart) else part
        for number, part in enumerate(content)
    ]


def _template_content(content: AnyContent | None, message: str) -> str | list[dict[str, Any]]:
    """Return the content for `Model.prepare`: its text, or its parts in order if there are media among them."""
    parts = with_places(content, message)
    if not isinstance(parts, list) or not any(isinstance(part, Medium) for part in parts):
        return content_text(content)
    return [part.part if isinstance(part, Medium) else {"type": "text", "text": _part_text(part)} for part in parts]


def _thoughts(content: AnyContent | None) -> str:
    parts = content if isinstance(content, list) else []
    return "\n".join(filter(None, (part.thought for part in parts if isinstance(part, ThoughtPart))))


def check_parts(role: str, content: AnyContent | None) -> None:
    """Check the role of a message with thoughts or media. Raises ValueError if the role cannot have them."""
    for number, part in enumerate(content if isinstance(content, list) else []):
        if role != "assistant" and isinstance(part, ThoughtPart):
            raise ValueError(f"a message of role {role} cannot hold a thought")
        if role != "user" and isinstance(part, _MEDIA):
            raise ValueError(f"content[{number}]: expected text, as only user messages have media, found role {role}")


def _json_text(value: Any) -> Any:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


class CalledFunction(RequestPart):
    """Name and arguments of a called function.

    `arguments` is the text of a JSON object or of another JSON value, or text that is not JSON. It is empty if the call
    has no arguments.
    """

    name: str
    arguments: Annotated[str, BeforeValidator(_json_text, json_schema_input_type=Any)] = ""


class ToolCall(RequestPart):
    """Tool call of an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    @model_validator(mode="before")
    @classmethod
    def _read_custom(cls, data: Any) -> Any:
        """Read the call of a custom tool, whose input text replaces the arguments."""
        custom = data.get("custom") if isinstance(data, dict) and data.get("type") == "custom" else None
        if not isinstance(custom, dict):
            return data
        return {"id": data.get("id"), "function": {"name": custom.get("name"), "arguments": custom.get("input")}}


class Message(MediaInContent):
    """Message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: AnyContent | None = None
    refusal: str | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None
    reasoning_content: str | None = None
    # Some servers use this name for `reasoning_content`.
    reasoning: Any = None
    audio: None = None

    @model_validator(mode="after")
    def _check(self) -> "Message":
        if self.content is None:
            if self.role not in ("assistant", "tool", "function"):
                raise ValueError(f"a message of role {self.role} needs content")
            self.content = self.refusal or ""
        check_parts(self.role, self.content)
        if self.reasoning_content is None:
            thoughts = _thoughts(self.content) or None
            self.reasoning_content = self.reasoning if isinstance(self.reasoning, str) else thoughts
        if self.function_call is not None and not self.tool_calls:
            self.tool_calls = [ToolCall(id=self.function_call.name, function=self.function_call)]
        if self.role == "function":
            # In the older API without tools, a result names the function.
            self.role, self.tool_call_id = "tool", self.name
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of role tool needs the tool_call_id that it answers")
        return self


class WaitingCalls:
    """Calls of a conversation so far, and the number of calls with each id that have no result yet."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._waiting: Counter[str] = Counter()

    def add(self, calls: Iterable[ToolCall]) -> None:
        """Add calls without a result."""
        for call in calls:
            self._names[call.id] = call.function.name
            self._waiting[call.id] += 1

    def take(self, call_id: str, place: str, unknown: str) -> str:
        """Take the call that a result belongs to. Return the name of its tool.

        `place` is the place of the id in the request. `unknown` is the error message for an id that no call has.

        Raises PromptError for a result of a call that does not exist, or that has a result already.
        """
        if call_id not in self._names:
            raise PromptError(f"{place} is {call_id!r}: {unknown}")
        if not self._waiting[call_id]:
            raise second_result(place, call_id)
        self._waiting[call_id] -= 1
        return self._names[call_id]


def chat_messages(messages: Iterable[Message]) -> Messages:
    """Convert messages to the form that chat templates take.

    The content becomes text, or a list of parts if it has media. The arguments of tool calls become objects, and each
    tool result gets the name of its tool. Arguments that are not a JSON object stay text.

    Gemma has one system text, before all turns. It consists of all system and developer messages, in their order and
    with blank lines between them.

    Raises PromptError for a result of a call that does not exist, or that has a result already.
    """
    converted: Messages = []
    system: list[str] = []
    calls = WaitingCalls()
    for index, message in enumerate(messages):
        if message.role in SYSTEM_ROLES:
            system.append(content_text(message.content))
            continue
        calls.add(message.tool_calls or [])
        name = message.name
        if message.tool_call_id is not None:
            name = calls.take(message.tool_call_id, f"messages[{index}].tool_call_id", "no call before has it")
        converted.append(_template_message(message, name, f"messages[{index}]"))
    return system_message(system) + converted


def _template_message(message: Message, name: str | None, place: str) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role, "content": _template_content(message.content, place)}
    if message.reasoning_content is not None:
        found["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        found["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if name is not None:
        found["name"] = name
    return found


def _template_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": read_object(call.function.arguments)}
    return {"id": call.id, "type": "function", "function": function}
