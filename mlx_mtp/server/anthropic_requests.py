"""Requests of Anthropic's API, and their conversion to chat requests.

Fields and blocks that ask for an unsupported feature are refused. docs/anthropic.md names the fields and blocks that
are accepted although they have no meaning for a local model.
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationError

from mlx_mtp.errors import OptionError, PromptError
from mlx_mtp.options import GenerationOptions

from .field_types import RequestPart, type_of
from .openai_messages import AnyContent, CalledFunction, Message, ToolCall, WaitingCalls
from .openai_requests import ChatRequest, Request, Task
from .request_media import Base64Data, ImageUrlData, MediaInContent, Medium, check_image_type

logger = logging.getLogger(__name__)

# Arguments that are not a JSON object become an input with this only key. Anthropic's documentation names the key for
# this purpose.
INVALID_JSON = "INVALID_JSON"
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
# Claude Code begins a block of the system prompt with this text, for Anthropic's billing. The block may change with
# each request.
_BILLING = "x-anthropic-billing-header:"
# These fields of `Request` are not copied to the chat request.
_NOT_COMMON = {"model", "stream", "stream_options"}


class TextBlock(RequestPart):
    """Block of text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(RequestPart):
    """Thought of an earlier answer."""

    type: Literal["thinking"]
    thinking: str = ""


class ToolUseBlock(RequestPart):
    """Tool call of an earlier answer."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any] = Field({})


class SearchResultBlock(RequestPart):
    """Search result with a title, a source and text."""

    type: Literal["search_result"]
    title: str
    source: str
    content: list[TextBlock]


class Source(RequestPart):
    """Content of a document."""

    type: str
    data: str | None = None
    content: str | list[TextBlock] | None = None


class DocumentBlock(RequestPart):
    """Document with an optional title and context."""

    type: Literal["document"]
    source: Source
    title: str | None = None
    context: str | None = None


class Base64Source(RequestPart):
    """Picture in base64."""

    type: Literal["base64"]
    media_type: Annotated[str, AfterValidator(check_image_type)]
    data: Base64Data


class UrlSource(RequestPart):
    """Picture as a `data:` URL."""

    type: Literal["url"]
    url: ImageUrlData


class ImageBlock(RequestPart):
    """Picture of a user's message."""

    type: Literal["image"]
    source: Base64Source | UrlSource = Field(discriminator="type")

    def medium(self, place: str) -> Medium:
        """Return the picture. `place` is the place of the block in the request."""
        return Medium("image", self.source.data if isinstance(self.source, Base64Source) else self.source.url, place)


class ToolReferenceBlock(RequestPart):
    """Reference to a tool by its name."""

    type: Literal["tool_reference"]
    tool_name: str


class OtherBlock(RequestPart):
    """Block of a tool that runs on Anthropic's servers, block of an unknown type, or image in a tool's result."""

    type: str


_RESULT_BLOCKS = ("text", "document", "search_result", "tool_reference")
_BLOCKS = (*_RESULT_BLOCKS, "image", "thinking", "tool_use", "tool_result")


def _tag(known: Sequence[str], block: Any) -> str:
    kind = type_of(block)
    return kind if isinstance(kind, str) and kind in known else "other"


# These blocks have a text. They can be the result of a tool call.
_TextualBlock: TypeAlias = (
    Annotated[TextBlock, Tag("text")]
    | Annotated[DocumentBlock, Tag("document")]
    | Annotated[SearchResultBlock, Tag("search_result")]
    | Annotated[ToolReferenceBlock, Tag("tool_reference")]
)
ResultBlock: TypeAlias = Annotated[
    _TextualBlock | Annotated[OtherBlock, Tag("other")], Discriminator(lambda block: _tag(_RESULT_BLOCKS, block))
]


class ToolResultBlock(RequestPart):
    """Result of a tool call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[ResultBlock] = ""
    is_error: bool = False


Block: TypeAlias = Annotated[
    _TextualBlock
    | Annotated[ImageBlock, Tag("image")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Annotated[OtherBlock, Tag("other")],
    Discriminator(lambda block: _tag(_BLOCKS, block)),
]


class Turn(MediaInContent):
    """Message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]

    @property
    def blocks(self) -> list[Block]:
        """Content as blocks. A string is one block of text."""
        return [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class Tool(RequestPart):
    """Tool of the client, or tool that runs on Anthropic's servers and has no schema."""

    type: str = "custom"
    name: str = ""
    description: str | None = None
    input_schema: dict[str, Any] = Field({})
    strict: bool = False


class ToolChoice(RequestPart):
    """Choice of the tools that the model may or must call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(RequestPart):
    """Switch for thinking, with the token budget of a thought."""

    type: Literal["enabled", "adaptive", "between_tools", "disabled"]
    budget_tokens: int | None = Field(None, ge=0)


class OutputFormat(RequestPart):
    """Answer format: JSON that follows a JSON Schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(RequestPart):
    """Options of the answer: its format."""

    format: OutputFormat | None = None


class _ChatRequest(ChatRequest):
    format_field = "output_config.format"


class MessagesRequest(Request):
    """Request of `/v1/messages` and `/v1/messages/count_tokens`: Anthropic's fields and the fields of `Request`."""

    messages: list[Turn] = Field(min_length=1)
    system: str | list[TextBlock] = ""
    tools: list[Tool] = Field([])
    tool_choice: ToolChoice = ToolChoice(type="auto")
    thinking: Thinking | None = None
    output_config: OutputConfig = OutputConfig()
    # This is the older name of `output_config.format`.
    output_format: OutputFormat | None = None
    max_tokens: int | None = Field(None, ge=0)
    # These fields have no effect on a local model. `undeclared_fields` names such fields for all endpoints.
    betas: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    speed: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None

    def task(self, default: GenerationOptions) -> Task:
        """Convert the request to a chat request, and the chat request to a task.

        Raises OptionError and PromptError for unsupported values.
        """
        turns = self._turns()
        prefill = _prefill(turns)
        if prefill:
            self._check_prefill()
            turns = turns[:-1]
        messages = [*self._system(), *_messages(turns)]
        if not any(message.role != "system" for message in messages):
            raise PromptError("messages: there must be one of the user")
        fields = self._common() | self._chat_fields(bool(prefill)) | {"messages": messages}
        try:
            request = _ChatRequest.model_validate(fields)
        except ValidationError as error:
            wrong = error.errors()[0]
            raise OptionError(f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from None
        return replace(request.task(default), prefill=prefill)

    def _common(self) -> dict[str, Any]:
        """Return the fields that a chat request has too."""
        return self.model_dump(include=Request.model_fields.keys() - _NOT_COMMON, exclude_unset=True)

    def _chat_fields(self, has_prefill: bool) -> dict[str, Any]:
        wanted = self.output_config.format or self.output_format
        schema = None if wanted is None else {"name": "output", "schema": wanted.schema_, "strict": True}
        thinks = None if self.thinking is None else self.thinking.type != "disabled"
        fields: dict[str, Any] = {
            # 0 asks only for the prefill of the prompt, but decoding begins with one token.
            "max_tokens": None if self.max_tokens is None else max(1, self.max_tokens),
            "tools": self._functions(),
            "tool_choice": self._choice(),
            "parallel_tool_calls": not self.tool_choice.disable_parallel_tool_use,
            "response_format": None if schema is None else {"type": "json_schema", "json_schema": schema},
            # An answer that continues a given beginning has no thought before it.
            "enable_thinking": False if has_prefill else thinks,
            "thinking_budget": self.thinking.budget_tokens if self.thinking is not None and thinks else None,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _functions(self) -> list[dict[str, Any]]:
        functions = []
        for index, tool in enumerate(self.tools):
            if tool.type != "custom":
                logger.warning("the tool %s runs on Anthropic's servers: it is left out", tool.type)
                continue
            if not _TOOL_NAME.fullmatch(tool.name):
                expected = "1 to 128 of a-z, A-Z, 0-9, _, . and -"
                raise OptionError(f"tools[{index}].name must be {expected}, found {tool.name!r}")
            function = {"name": tool.name, "parameters": tool.input_schema, "strict": tool.strict}
            described = {} if tool.description is None else {"description": tool.description}
            functions.append({"type": "function", "function": function | described})
        return functions

    def _choice(self) -> Any:
        kind, name = self.tool_choice.type, self.tool_choice.name
        if kind != "tool":
            return "required" if kind == "any" else kind
        if name is None:
            raise OptionError("tool_choice is of type tool: it needs the name of a tool")
        return {"type": "function", "function": {"name": name}}

    def _check_prefill(self) -> None:
        refused = {
            "thinking": self.thinking is not None and self.thinking.type != "disabled",
            "output_config.format": self.output_config.format is not None or self.output_format is not None,
            "tool_choice": self.tool_choice.type in ("any", "tool"),
        }
        for name, is_given in refused.items():
            if is_given:
                raise OptionError(
                    f"{name} contradicts the last message, of role assistant, with which the answer begins"
                )

    def _system(self) -> Iterator[Message]:
        """Yield the system prompt as a message, joined with the system messages before all other messages."""
        blocks = [self.system] if isinstance(self.system, str) else [block.text for block in self.system]
        texts = [text for text in blocks if text and not text.startswith(_BILLING)]
        for index, turn in enumerate(self.messages):
            if turn.role != "system":
                break
            texts += _texts(turn.blocks, f"messages[{index}]")
        if texts:
            yield Message(role="system", content="\n".join(texts))

    def _turns(self) -> list["_Turn"]:
        """Return the messages as turns. Successive messages of one role become one turn."""
        turns: list[_Turn] = []
        for index, turn in enumerate(self.messages):
            places = [f"messages[{index}].content[{number}]" for number in range(len(turn.blocks))]
            blocks = list(zip(places, turn.blocks, strict=True))
            if turn.role == "system":
                # System messages before all other messages belong to the system prompt.
                blocks = [(place, _reminder(block, place)) for place, block in blocks] if turns else []
                if not blocks:
                    continue
            role: Literal["user", "assistant"] = "assistant" if turn.role == "assistant" else "user"
            if turns and turns[-1].role == role:
                turns[-1].blocks += blocks
            else:
                turns.append(_Turn(role, blocks))
        return turns


class _Turn:
    """Blocks of one role, each with its place in the request."""

    def __init__(self, role: Literal["user", "assistant"], blocks: list[tuple[str, Block]]) -> None:
        self.role = role
        self.blocks = blocks


def _reminder(block: Block, place: str) -> TextBlock:
    """Return a block of a later system message as text for the user's turn.

    Gemma has one system prompt, before all turns. A prompt that changes at its beginning would need a new prefill.
    """
    text = "\n".join(_texts([block], place))
    return TextBlock(type="text", text=f"<system-reminder>\n{text}\n</system-reminder>")


def _prefill(turns: Sequence[_Turn]) -> str:
    """Return the text with which the answer begins, empty if the last message is not the assistant's.

    Raises PromptError if this message has a block that is not text.
    """
    if not turns or turns[-1].role != "assistant":
        return ""
    for place, block in turns[-1].blocks:
        if not isinstance(block, TextBlock):
            raise PromptError(
                f"{place}: an answer can be continued after text only, found a block of type {block.type}"
            )
    text = "".join(block.text for _, block in turns[-1].blocks if isinstance(block, TextBlock))
    if not text:
        turns[-1].blocks.clear()
    return text


def _messages(turns: Sequence[_Turn]) -> Iterator[Message]:
    calls = WaitingCalls()
    for turn in turns:
        if turn.role == "user":
            yield from _user_messages(turn, calls)
        elif turn.blocks:
            message = _assistant_message(turn)
            calls.add(message.tool_calls or [])
            yield message


def _assistant_message(turn: _Turn) -> Message:
    """Return the message of an answer: thought, text and calls, in the order in which Gemma writes them."""
    texts, thoughts, calls = [], [], []
    for place, block in turn.blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            calls.append(ToolCall(id=block.id, function=_function(block)))
        elif isinstance(block, OtherBlock):
            # The block is from Anthropic's servers: an encrypted thought, or the call of a tool that ran there.
            logger.warning("%s: a block of type %s is left out", place, block.type)
        else:
            raise PromptError(f"{place}: a block of type {block.type} cannot be in a message of role assistant")
    # The chat template ends a thought with a line break, as the model does, so the text must not have it too.
    thought = "".join(thoughts).removesuffix("\n")
    return Message(
        role="assistant", content="".join(texts), reasoning_content=thought or None, tool_calls=calls or None
    )


def _function(block: ToolUseBlock) -> CalledFunction:
    raw = block.input.get(INVALID_JSON) if block.input.keys() == {INVALID_JSON} else None
    arguments = raw if isinstance(raw, str) else json.dumps(block.input, ensure_ascii=False)
    return CalledFunction(name=block.name, arguments=arguments)


def _user_messages(turn: _Turn, calls: WaitingCalls) -> Iterator[Message]:
    """Yield the results of tool calls, then one message of the user with the rest of the turn."""
    parts: list[str | Medium] = []
    for place, block in turn.blocks:
        if isinstance(block, ImageBlock):
            parts.append(block.medium(place))
            continue
        if not isinstance(block, ToolResultBlock):
            parts += _texts([block], place)
            continue
        calls.take(block.tool_use_id, f"{place}.tool_use_id", "no tool_use block before has this id")
        text = block.content if isinstance(block.content, str) else "\n".join(_texts(block.content, place))
        if block.is_error:
            text = f"Error: {text}" if text else "Error"
        yield Message(role="tool", content=text, tool_call_id=block.tool_use_id)
    if parts or not any(isinstance(block, ToolResultBlock) for _, block in turn.blocks):
        yield Message(role="user", content=_joined(parts))


def _joined(parts: Sequence[str | Medium]) -> AnyContent:
    """Return the content of a user's message. Texts without a picture between them are joined as lines."""
    runs = groupby(parts, key=lambda part: isinstance(part, str))
    return [part for is_text, run in runs for part in (["\n".join(map(str, run))] if is_text else run)]


def _texts(blocks: Sequence[Block | ResultBlock], place: str) -> Iterator[str]:
    """Yield the text of blocks that the model did not write. Raises PromptError for a block without text."""
    for block in blocks:
        if isinstance(block, TextBlock):
            yield block.text
        elif isinstance(block, DocumentBlock):
            yield _document(block, place)
        elif isinstance(block, SearchResultBlock):
            yield "\n".join([f"{block.title} ({block.source})", *(part.text for part in block.content)])
        elif isinstance(block, ToolReferenceBlock):
            yield block.tool_name
        else:
            expected = "expected text, or an image in a user's message outside tool results"
            raise PromptError(f"{place}: {expected}, found a block of type {block.type}")


def _document(block: DocumentBlock, place: str) -> str:
    source = block.source
    if source.type == "text" and source.data is not None:
        text = source.data
    elif source.type == "content" and source.content is not None:
        text = source.content if isinstance(source.content, str) else "\n".join(part.text for part in source.content)
    else:
        raise PromptError(f"{place}: expected a document of type text or content, found {source.type}")
    return "\n".join(filter(None, [block.title, block.context, text]))
