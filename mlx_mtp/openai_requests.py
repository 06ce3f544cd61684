"""What clients may ask of the server: the requests of OpenAI's API, and what they mean here.

Everything is checked here: a field that is unknown, of the wrong type, or asks for what cannot be done is refused,
never ignored. What has no meaning for a local server (who the user is, where to store) is accepted.
"""

import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from .answer_schema import answer_schema
from .draft_length import MAX_DRAFT_TOKENS
from .engine import GenerationOptions
from .errors import OptionError, PromptError
from .sampling import AcceptanceRule, Sampling
from .tool_grammar import tool_grammar

logger = logging.getLogger(__name__)

JSON_OBJECT = {"type": "object"}
# Efforts of reasoning that mean none.
_NO_EFFORT = ("none", "minimal")

Messages: TypeAlias = list[dict[str, Any]]
Stop: TypeAlias = Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]]


class Fields(BaseModel):
    """Fields of a request, in which null means that one is left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class TextPart(Fields):
    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


Content: TypeAlias = str | list[TextPart]


class CalledFunction(Fields):
    name: str
    arguments: str


class ToolCall(Fields):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    annotations: list[Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Message":
        if self.content is None and not self.tool_calls:
            raise ValueError(f"a message of role {self.role} needs content")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of role tool needs the tool_call_id that it answers")
        return self


class Function(Fields):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] = {}
    strict: bool = False


class Tool(Fields):
    type: Literal["function"]
    function: Function


class NamedFunction(Fields):
    name: str


class NamedTool(Fields):
    type: Literal["function"]
    function: NamedFunction


class TextFormat(Fields):
    type: Literal["text", "json_object"]


class NamedSchema(Fields):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = False


class JsonSchemaFormat(Fields):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class TemplateOptions(Fields):
    enable_thinking: bool | None = None


class StreamOptions(Fields):
    include_usage: bool = False
    include_obfuscation: bool = False


class Request(Fields):
    """What all kinds of request have in common. Beside OpenAI's, the fields of `Sampling` and `GenerationOptions`."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    xtc_probability: float | None = Field(None, ge=0, le=1)
    xtc_threshold: float | None = Field(None, ge=0, le=0.5)
    seed: int | None = None
    acceptance: AcceptanceRule | None = None
    logit_bias: dict[str, float] | None = None
    repetition_penalty: float | None = Field(None, gt=0)
    repetition_context_size: int | None = Field(None, ge=1)
    presence_penalty: float | None = None
    presence_context_size: int | None = Field(None, ge=1)
    frequency_penalty: float | None = None
    frequency_context_size: int | None = Field(None, ge=1)
    num_draft_tokens: Annotated[int, Field(ge=0, le=MAX_DRAFT_TOKENS)] | Literal["auto"] | None = None
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    regex: str | None = None
    grammar: str | None = None
    include_stats: bool = Field(False, description="Add to each part what was drafted and accepted so far.")
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    def sampling(self, default: Sampling) -> Sampling:
        """Those of the fields that are given, else the default. Raises OptionError for a value out of range."""
        given = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        given = {name: value for name, value in given.items() if value is not None}
        # Any integer is a seed.
        given["seed"] = secrets.randbits(32) if self.seed is None else self.seed % 2**64
        if self.logit_bias is not None:
            given["logit_bias"] = {_token_id(token): bias for token, bias in self.logit_bias.items()}
        return replace(default, **given)

    def generation_options(self, default: GenerationOptions, **changes: Any) -> GenerationOptions:
        """The default with what is given. Raises OptionError for what is out of range or contradicts."""
        changes |= {"min_tokens": self.min_tokens, "ignore_eos": self.ignore_eos}
        changes |= {"regex": self.regex, "sampling": self.sampling(default.sampling)}
        if self.grammar is not None:
            if changes.get("grammar") is not None:
                raise OptionError("grammar contradicts the tools, whose calls must follow one of their own")
            changes["grammar"] = self.grammar
        if changes.get("enable_thinking") is False:
            default = replace(default, enable_thinking=False, thinking_budget=None)
        if self.num_draft_tokens is not None:
            changes["num_draft_tokens"] = self.num_draft_tokens
        return replace(default, **{name: value for name, value in changes.items() if value is not None})


@dataclass(frozen=True)
class Task:
    """One generation: a prompt, as `Model.encode` takes it, with tools, and how to go on from it.

    `not_enforced` are the keywords of the request's schemas that the answer may not follow, as `PLACE: KEYWORD`.
    """

    prompt: str | Sequence[int] | Messages
    options: GenerationOptions
    tools: Sequence[Mapping[str, Any]] | None = None
    not_enforced: tuple[str, ...] = ()


class AnswerForm(NamedTuple):
    """The form that an answer must have, and the keywords that it does not hold the answer to."""

    json_schema: Mapping[str, Any] | None = None
    grammar: str | None = None
    not_enforced: tuple[str, ...] = ()


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: Stop = []
    n: Literal[1] = 1
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: TextFormat | JsonSchemaFormat = Field(TextFormat(type="text"), discriminator="type")
    tools: list[Tool] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    thinking_budget: int | None = Field(None, ge=0)
    chat_template_kwargs: TemplateOptions = TemplateOptions()
    modalities: list[Literal["text"]] = ["text"]

    def task(self, default: GenerationOptions) -> Task:
        """Raises OptionError and PromptError for what cannot be honoured."""
        if self.top_logprobs is not None and not self.logprobs:
            raise OptionError("top_logprobs is given, but logprobs is not")
        thinks = self.enable_thinking
        if thinks is None:
            thinks = self.chat_template_kwargs.enable_thinking
        if thinks is None and self.reasoning_effort is not None:
            thinks = self.reasoning_effort not in _NO_EFFORT
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools]
        choice = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else self.tool_choice
        form = _answer_form(tools, choice, self.parallel_tool_calls, self.response_format)
        options = self.generation_options(
            default,
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            stop=self.stop,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            json_schema=form.json_schema,
            grammar=form.grammar,
            enable_thinking=thinks,
            thinking_budget=self.thinking_budget,
        )
        return Task(
            chat_messages(self.messages), options, tools if choice != "none" and tools else None, form.not_enforced
        )


class CompletionRequest(Request):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(None, ge=1)
    stop: Stop = []
    n: Literal[1] = 1
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    logprobs: int | None = Field(None, ge=0, le=20)

    def task(self, default: GenerationOptions) -> Task:
        """Raises OptionError and PromptError for what cannot be honoured."""
        options = self.generation_options(default, max_tokens=self.max_tokens, stop=self.stop, logprobs=self.logprobs)
        return Task(self._one_prompt(), options)

    def _one_prompt(self) -> str | list[int]:
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return self.prompt
        if len(self.prompt) != 1:
            raise PromptError(f"prompt must be one prompt per request, found {len(self.prompt)}")
        return self.prompt[0]  # type: ignore[return-value]


class MessageItem(Fields):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class FunctionCallItem(Fields):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class FunctionOutputItem(Fields):
    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: str | None = None
    status: str | None = None


class ReasoningItem(Fields):
    """An earlier thought: Gemma is not shown these again."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[Any] = []
    content: list[Any] = []
    encrypted_content: str | None = None
    status: str | None = None


def _item_type(item: Any) -> Any:
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_item_type),
]


class ResponseTool(Function):
    type: Literal["function"]


class ResponseNamedTool(Fields):
    type: Literal["function"]
    name: str


class ResponseSchema(NamedSchema):
    type: Literal["json_schema"]


class ResponseText(Fields):
    format: TextFormat | ResponseSchema = Field(default=TextFormat(type="text"), discriminator="type")


class Reasoning(Fields):
    effort: str | None = None
    summary: str | None = None


class ResponseRequest(Request):
    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    text: ResponseText = ResponseText()
    tools: list[ResponseTool] = []
    tool_choice: Literal["none", "auto", "required"] | ResponseNamedTool = "auto"
    parallel_tool_calls: bool = True
    reasoning: Reasoning = Reasoning()
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = []
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False

    def task(self, default: GenerationOptions) -> Task:
        """Raises OptionError and PromptError for what cannot be honoured."""
        tools = [
            {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}
            for tool in self.tools
        ]
        choice = self.tool_choice.name if isinstance(self.tool_choice, ResponseNamedTool) else self.tool_choice
        form = _answer_form(tools, choice, self.parallel_tool_calls, self.text.format)
        effort = self.reasoning.effort
        asks_logprobs = "message.output_text.logprobs" in self.include or self.top_logprobs is not None
        options = self.generation_options(
            default,
            max_tokens=self.max_output_tokens,
            logprobs=(self.top_logprobs or 0) if asks_logprobs else None,
            json_schema=form.json_schema,
            grammar=form.grammar,
            enable_thinking=None if effort is None else effort not in _NO_EFFORT,
        )
        return Task(
            chat_messages(self._messages()), options, tools if choice != "none" and tools else None, form.not_enforced
        )

    def _messages(self) -> list[Message]:
        messages = []
        if self.instructions is not None:
            messages.append(Message(role="system", content=self.instructions))
        items = [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        for item in items:
            if isinstance(item, MessageItem):
                messages.append(Message(role=item.role, content=item.content))
            elif isinstance(item, FunctionOutputItem):
                messages.append(Message(role="tool", content=item.output, tool_call_id=item.call_id))
            elif isinstance(item, FunctionCallItem):
                call = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
                # Calls that follow each other, or a text, belong to one answer.
                if messages and messages[-1].role == "assistant":
                    messages[-1] = messages[-1].model_copy(
                        update={"tool_calls": [*(messages[-1].tool_calls or []), call]}
                    )
                else:
                    messages.append(Message(role="assistant", tool_calls=[call]))
        if not messages:
            raise PromptError("input is empty: expected some text or items")
        return messages


def chat_messages(messages: Sequence[Message]) -> Messages:
    """The messages as chat templates take them: text for content, objects for the arguments of calls, and the names of
    the tools that answer.

    Raises PromptError for arguments that are no JSON object and for an answer to a call that is not there.
    """
    rendered: Messages = []
    names: dict[str, str] = {}
    for index, message in enumerate(messages):
        content = message.content
        text = content if isinstance(content, str) else "".join(part.text for part in content or [])
        found: dict[str, Any] = {"role": message.role, "content": text}
        if message.reasoning_content is not None:
            found["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            found["tool_calls"] = [_template_call(call, index) for call in message.tool_calls]
            names |= {call.id: call.function.name for call in message.tool_calls}
        if message.tool_call_id is not None:
            if message.tool_call_id not in names:
                raise PromptError(f"messages[{index}].tool_call_id is {message.tool_call_id!r}: no call before has it")
            found |= {"tool_call_id": message.tool_call_id, "name": names[message.tool_call_id]}
        elif message.name is not None:
            found["name"] = message.name
        rendered.append(found)
    return rendered


def _template_call(call: ToolCall, index: int) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
        if not isinstance(arguments, dict):
            raise TypeError
    except (ValueError, TypeError, RecursionError):
        raise PromptError(
            f"messages[{index}].tool_calls: the arguments of {call.function.name} must be a JSON object"
        ) from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


ResponseFormat: TypeAlias = TextFormat | JsonSchemaFormat | ResponseSchema


def _answer_form(tools: Sequence[Mapping[str, Any]], choice: str, parallel: bool, wanted: ResponseFormat) -> AnswerForm:
    """The form that an answer with these tools must have. What is not enforced is logged.

    Raises OptionError for what cannot be done, or not in full though it is strict.
    """
    _check_choice(tools, choice)
    schema, left = _schema(wanted) if choice in ("none", "auto") else (None, ())
    if not tools or choice == "none":
        form = AnswerForm(json_schema=schema, not_enforced=left)
    elif choice == "auto" and parallel and schema is None and not any(_is_strict(tool) for tool in tools):
        form = AnswerForm()
    else:
        grammar = tool_grammar(tools, choice, parallel=parallel, answer=schema)
        form = AnswerForm(grammar=grammar.text, not_enforced=(*grammar.not_enforced, *left))
    if form.not_enforced:
        logger.warning("not enforced of the schemas of a request: %s", ascii(", ".join(form.not_enforced)))
    return form


def _schema(wanted: ResponseFormat) -> tuple[Mapping[str, Any] | None, tuple[str, ...]]:
    """The JSON Schema that the answer must follow, if any, and what was left out of it."""
    if isinstance(wanted, TextFormat):
        return (JSON_OBJECT if wanted.type == "json_object" else None), ()
    named = wanted.json_schema if isinstance(wanted, JsonSchemaFormat) else wanted
    return answer_schema(named.schema_, is_strict=named.strict)


def _is_strict(tool: Mapping[str, Any]) -> bool:
    return tool["function"].get("strict") is True


def _check_choice(tools: Sequence[Mapping[str, Any]], choice: str) -> None:
    """Raises OptionError for tools that are named alike, and for a choice of none of them."""
    if not tools:
        if choice not in ("none", "auto"):
            raise OptionError(f"tool_choice is {choice!r}, but no tools are given")
        return
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise OptionError(f"tools must have names of their own, found {', '.join(names)}")
    if choice not in ("none", "auto", "required", *names):
        raise OptionError(f"tool_choice names {choice!r}, the tools are {', '.join(names)}")


def _token_id(token: str) -> int:
    try:
        return int(token)
    except ValueError:
        raise OptionError(f"logit_bias must map token ids to numbers, found the token {token!r}") from None
