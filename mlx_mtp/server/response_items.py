"""Input items of `/v1/responses`, and their conversion to messages."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from mlx_mtp.errors import PromptError

from .field_types import RequestPart, type_of
from .openai_messages import (
    AnyContent,
    CalledFunction,
    Content,
    Message,
    ToolCall,
    check_parts,
    content_text,
    with_places,
)
from .request_media import MediaInContent


class MessageItem(MediaInContent):
    """Input item: a message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: AnyContent = ""

    @model_validator(mode="after")
    def _check(self) -> "MessageItem":
        check_parts(self.role, self.content)
        return self


class FunctionCallItem(CalledFunction):
    """Input item: a function call of an earlier answer."""

    type: Literal["function_call"]
    call_id: str


class FunctionOutputItem(RequestPart):
    """Input item: the result of a function call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content


class ReasoningText(RequestPart):
    """Text of an earlier thought."""

    text: str = ""


class ReasoningItem(RequestPart):
    """Input item: an earlier thought. The server reads neither its summary nor its encrypted content."""

    type: Literal["reasoning"]
    content: list[ReasoningText] = Field([])


class ItemReference(RequestPart):
    """Input item: a reference to a stored item. The server refuses it because it stores no items."""

    type: Literal["item_reference"] = "item_reference"
    id: str


class SkippedItem(RequestPart):
    """Input item that the server skips: the call of a tool that does not exist here, or its result."""

    type: Literal[
        "additional_tools",
        "apply_patch_call",
        "apply_patch_call_output",
        "code_interpreter_call",
        "compaction",
        "compaction_summary",
        "compaction_trigger",
        "custom_tool_call",
        "custom_tool_call_output",
        "file_search_call",
        "image_generation_call",
        "local_shell_call",
        "local_shell_call_output",
        "mcp_approval_request",
        "mcp_approval_response",
        "mcp_call",
        "mcp_list_tools",
        "program",
        "program_output",
        "shell_call",
        "shell_call_output",
        "tool_search_call",
        "tool_search_output",
        "web_search_call",
    ]


_SKIPPED = get_args(SkippedItem.model_fields["type"].annotation)
_READ_ITEMS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


def _unknown_item(kind: Any) -> Any:
    raise PydanticCustomError("unknown_item", "unknown item type")


class UnknownItem(RequestPart):
    """Item of an unknown type, or a value that is not an item. The server refuses both."""

    type: Annotated[Any, BeforeValidator(_unknown_item)]


def _item_type(item: Any) -> str:
    kind = type_of(item)
    if kind is None and isinstance(item, dict):
        kind = "item_reference" if "id" in item and "role" not in item else "message"
    if kind in _READ_ITEMS:
        return str(kind)
    return "skipped" if kind in _SKIPPED else "unknown"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")]
    | Annotated[SkippedItem, Tag("skipped")]
    | Annotated[UnknownItem, Tag("unknown")],
    Discriminator(_item_type),
]


def item_messages(items: Sequence[Item], instructions: str | None) -> list[Message]:
    """Return the messages that the items stand for. The instructions come first.

    A thought belongs to the answer after it. Raises PromptError if there is no message.
    """
    messages: list[Message] = []
    if instructions is not None:
        messages.append(Message(role="system", content=instructions))
    thought: str | None = None
    for index, item in enumerate(items):
        if isinstance(item, ReasoningItem):
            thought = (thought or "") + "".join(part.text for part in item.content) or None
        elif isinstance(item, FunctionCallItem):
            _add_call(messages, item, thought)
            thought = None
        elif isinstance(item, FunctionOutputItem):
            messages.append(Message(role="tool", content=content_text(item.output), tool_call_id=item.call_id))
        elif isinstance(item, MessageItem):
            own = thought if item.role == "assistant" else None
            content = with_places(item.content, f"input[{index}]")
            messages.append(Message(role=item.role, content=content, reasoning_content=own))
            thought = None
    if not messages:
        raise PromptError("input is empty: expected some text or items")
    return messages


def _add_call(messages: list[Message], item: FunctionCallItem, thought: str | None) -> None:
    """Add a call to the messages.

    A call belongs to the same answer as the text or call before it. A thought begins a new answer.
    """
    call = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
    if messages and messages[-1].role == "assistant" and thought is None:
        messages[-1] = messages[-1].model_copy(update={"tool_calls": [*(messages[-1].tool_calls or []), call]})
    else:
        messages.append(Message(role="assistant", tool_calls=[call], reasoning_content=thought))
