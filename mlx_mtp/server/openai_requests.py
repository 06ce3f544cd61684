"""Requests of OpenAI's API, and their conversion to tasks for the model.

A field of the wrong type, or a field that asks for an unsupported feature, is refused, never ignored. `openai_fields`
lists the fields that are accepted although they have no effect here.
"""

import json
import logging
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias, get_args

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from mlx_mtp.decoding.draft_length import MAX_DRAFT_TOKENS
from mlx_mtp.decoding.sampling import SMALLEST, AcceptanceRule, Sampling
from mlx_mtp.errors import OptionError, PromptError
from mlx_mtp.grammars.answer_schema import answer_schema
from mlx_mtp.grammars.tool_call_grammar import tool_grammar
from mlx_mtp.options import GenerationOptions

from .openai_fields import Budget, Limit, LookBack, Strings, TopK, Whole, check_others, refuse, unknown

logger = logging.getLogger(__name__)

JSON_OBJECT = {"type": "object"}
# These are `max_tokens` and its names on other servers.
_TOKEN_LIMITS = ("max_tokens", "max_new_tokens", "n_predict", "num_predict")
# These reasoning efforts mean no thinking.
_NO_EFFORT = ("none", "minimal")

Messages: TypeAlias = list[dict[str, Any]]


def _allow_nulls(schema: dict[str, Any]) -> None:
    """Allow null for each optional field in a JSON Schema. Null means that the field is left out."""
    for name, described in schema.get("properties", {}).items():
        if name not in schema.get("required", ()):
            schema["properties"][name] = {"anyOf": [described, {"type": "null"}]}


class Fields(BaseModel):
    """Base of all parts of a request. Null means that a field is left out. Other fields are not an error."""

    model_config = ConfigDict(extra="ignore", strict=True, json_schema_extra=_allow_nulls)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class TextPart(Fields):
    """Text part of a message."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class RefusalPart(Fields):
    """Part of an earlier answer that refuses the user's request."""

    type: Literal["refusal"]
    refusal: str


Content: TypeAlias = str | list[TextPart | RefusalPart | str]


class ThoughtPart(Fields):
    """Thought part of an earlier answer. An encrypted thought has no text."""

    type: Literal["thinking", "reasoning", "redacted_thinking"]
    thinking: Content | None = None
    text: Content | None = None
    reasoning: Content | None = None

    @property
    def thought(self) -> str:
        """Text of the thought, empty if the part has no text."""
        return _text(self.thinking) or _text(self.text) or _text(self.reasoning)


AnyPart: TypeAlias = TextPart | RefusalPart | ThoughtPart | str
# The content of an earlier answer may have thoughts.
AnswerContent: TypeAlias = str | list[AnyPart]


def _text(content: str | Sequence[AnyPart] | None) -> str:
    """Return the text of a message, without thoughts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(_part_text(part) for part in content)


def _part_text(part: AnyPart) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, ThoughtPart):
        return ""
    return part.refusal if isinstance(part, RefusalPart) else part.text


def _thoughts(content: AnswerContent | None) -> str:
    parts = content if isinstance(content, list) else []
    return "\n".join(filter(None, (part.thought for part in parts if isinstance(part, ThoughtPart))))


def _check_thoughts(role: str, content: AnswerContent | None) -> None:
    """Check the role of a message with thoughts. Raises ValueError if it is not the assistant's."""
    if role != "assistant" and isinstance(content, list) and any(isinstance(part, ThoughtPart) for part in content):
        raise ValueError(f"a message of role {role} cannot hold a thought")


def _arguments(value: Any) -> Any:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


class CalledFunction(Fields):
    """Name and arguments of a called function.

    `arguments` is the text of a JSON object or of another JSON value, or text that is not JSON. It is empty if the call
    has no arguments.
    """

    name: str
    arguments: Annotated[str, BeforeValidator(_arguments, json_schema_input_type=Any)] = ""


class ToolCall(Fields):
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


class Message(Fields):
    """Message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: AnswerContent | None = None
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
        _check_thoughts(self.role, self.content)
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


class Function(Fields):
    """Function that the model can call, with the JSON Schema of its parameters."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] = {}
    strict: bool = False


class Tool(Fields):
    """Tool that is a function."""

    type: Literal["function"] = "function"
    function: Function


class NamedFunction(Fields):
    """Name of the function to call."""

    name: str


class NamedTool(Fields):
    """Choice of one function to call."""

    type: Literal["function"]
    function: NamedFunction


class OtherTool(Fields):
    """Tool that does not exist here: OpenAI runs it, or its input is not JSON."""

    type: str


class AllowedTools(Fields):
    """Choice that allows the listed tools only. The server skips listed tools that are not functions."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[dict[str, Any]]

    @property
    def names(self) -> list[str]:
        """Names of the allowed functions. Raises OptionError for a function without a name."""
        names = []
        for tool in self.tools:
            if tool.get("type", "function") == "function":
                name = (tool["function"] if isinstance(tool.get("function"), dict) else tool).get("name")
                if not isinstance(name, str):
                    raise OptionError(f"tool_choice: a function of allowed_tools needs a name, found {name!r}")
                names.append(name)
        return names


# These are OpenAI's words for a tool choice, and `any`, the word of other servers for `required`.
_CHOICES = {"none": "none", "auto": "auto", "required": "required", "any": "required"}


def _read_choice(choice: Any) -> Any:
    """Return a tool choice in its plain form.

    A word may come as the type of an object. Allowed tools may come inside an outer object.
    """
    is_word = isinstance(choice, dict) and choice.keys() == {"type"}
    word = choice["type"] if is_word else choice
    if isinstance(word, str) and word in _CHOICES:
        return _CHOICES[word]
    if _type_of(choice) == "allowed_tools" and isinstance(choice, dict):
        inner = choice.get("allowed_tools")
        return {**inner, "type": "allowed_tools"} if isinstance(inner, dict) else choice
    return choice


def _choice_type(choice: Any) -> str:
    kind = _type_of(choice)
    return str(kind) if kind in ("function", "allowed_tools") else "other"


class Choice(NamedTuple):
    """Tool choice: a word or the name of one tool, and the names of the tools that may be called.

    `allowed` is None if all tools may be called.
    """

    name: str
    allowed: Sequence[str] | None = None


def _choice(choice: "str | NamedTool | ResponseNamedTool | AllowedTools | OtherTool") -> Choice:
    """Convert the tool choice of a request. Raises OptionError for a tool that is not a function."""
    if isinstance(choice, OtherTool):
        raise OptionError(f"tool_choice is of type {choice.type!r}: there are only functions here")
    if isinstance(choice, AllowedTools):
        return Choice(choice.mode, choice.names)
    if isinstance(choice, str):
        return Choice(choice)
    return Choice(choice.function.name if isinstance(choice, NamedTool) else choice.name)


def _type_of(value: Any) -> Any:
    """Return the `type` of a JSON object or of a parsed part of a request, or None if it has no type."""
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def _tool_type(tool: Any) -> str:
    return "function" if _type_of(tool) == "function" else "other"


def _chat_tool_type(tool: Any) -> str:
    return "function" if _type_of(tool) in (None, "function") else "other"


ChatChoice: TypeAlias = Annotated[
    Literal["none", "auto", "required"]
    | Annotated[
        Annotated[NamedTool, Tag("function")]
        | Annotated[AllowedTools, Tag("allowed_tools")]
        | Annotated[OtherTool, Tag("other")],
        Discriminator(_choice_type),
    ],
    BeforeValidator(_read_choice),
]
ChatTool: TypeAlias = Annotated[
    Annotated[Tool, Tag("function")] | Annotated[OtherTool, Tag("other")], Discriminator(_chat_tool_type)
]


class TextFormat(Fields):
    """Answer format: any text, or any JSON object."""

    type: Literal["text", "json_object"]


class NamedSchema(Fields):
    """JSON Schema with a name."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = False


class JsonSchemaFormat(Fields):
    """Answer format: JSON that follows a JSON Schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class TemplateOptions(Fields):
    """Switches of the chat template. Any name is allowed."""

    model_config = ConfigDict(extra="allow")

    enable_thinking: bool | None = None


class StreamOptions(Fields):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


# Some clients send an empty list for no bias.
_NO_BIAS = BeforeValidator(lambda value: {} if value == [] else value)


# An empty text means no constraint. A constraint to the empty answer is of no use.
_EMPTY_IS_NONE = BeforeValidator(lambda value: None if value == "" else value)


class Request(Fields):
    """Fields that all requests have: OpenAI's fields, and fields of `Sampling` and `GenerationOptions`."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: TopK = None
    min_p: float | None = Field(None, ge=0, le=1)
    xtc_probability: float | None = Field(None, ge=0, le=1)
    xtc_threshold: float | None = Field(None, ge=0, le=0.5)
    seed: Whole | None = Field(None, validation_alias=AliasChoices("seed", "random_seed"))
    acceptance: AcceptanceRule | None = None
    logit_bias: Annotated[dict[str, float] | None, _NO_BIAS] = None
    repetition_penalty: float | None = Field(
        None, gt=0, validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")
    )
    repetition_context_size: LookBack = Field(
        None, validation_alias=AliasChoices("repetition_context_size", "repeat_last_n")
    )
    presence_penalty: float | None = None
    presence_context_size: LookBack = None
    frequency_penalty: float | None = None
    frequency_context_size: LookBack = None
    num_draft_tokens: Annotated[Whole, Field(ge=0, le=MAX_DRAFT_TOKENS)] | Literal["auto"] | None = None
    stop: Strings = Field([], validation_alias=AliasChoices("stop", "stop_sequences"))
    min_tokens: Whole = Field(0, ge=0)
    ignore_eos: bool = False
    regex: Annotated[str | None, _EMPTY_IS_NONE] = None
    grammar: Annotated[str | None, _EMPTY_IS_NONE] = None
    include_stats: bool = Field(False, description="Add to each part what was drafted and accepted so far.")

    @model_validator(mode="after")
    def _check_others(self) -> "Request":
        check_others(self.model_extra or {}, field_names(type(self)), field_names(*ENDPOINTS))
        return self

    @property
    def ignored(self) -> list[str]:
        """Names of the parts of the request that the server does not know or cannot use."""
        return unknown(self.model_extra or {}, field_names(*ENDPOINTS))

    def sampling(self, default: Sampling) -> Sampling:
        """Return the default with the fields that the request sets. Raises OptionError for a value out of range."""
        given = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        given = {name: value for name, value in given.items() if value is not None}
        # Any integer is a valid seed.
        given["seed"] = secrets.randbits(32) if self.seed is None else self.seed % 2**64
        if min(given.get("top_p", 1), given.get("temperature") or 1) < SMALLEST:
            # With a value this small, only the most likely token is left.
            given |= {"temperature": 0.0, "top_p": 1.0}
        if self.logit_bias is not None:
            given["logit_bias"] = {_token_id(token): bias for token, bias in self.logit_bias.items()}
        return replace(default, **given)

    def generation_options(self, default: GenerationOptions, **changes: Any) -> GenerationOptions:
        """Return the default with the changes and the fields that the request sets.

        Raises OptionError for a value out of range, and for options that contradict each other.
        """
        changes |= {"min_tokens": self.min_tokens, "ignore_eos": self.ignore_eos}
        changes |= {"stop": self.stop, "regex": self.regex, "sampling": self.sampling(default.sampling)}
        if self.grammar is not None:
            if changes.get("grammar") is not None:
                raise OptionError("grammar contradicts the tools, whose calls must follow one of their own")
            changes["grammar"] = self.grammar
        if changes.get("enable_thinking") is False:
            default = replace(default, enable_thinking=False, thinking_budget=None)
        if self.num_draft_tokens is not None:
            changes["num_draft_tokens"] = self.num_draft_tokens
        return replace(default, **{name: value for name, value in changes.items() if value is not None})


def field_names(*kinds: type[Request]) -> frozenset[str]:
    """Return the names of the fields of these requests, with all their aliases."""
    return frozenset(name for kind in kinds for field in kind.model_fields.items() for name in _names(*field))


def _names(name: str, info: FieldInfo) -> Iterable[str]:
    alias = info.validation_alias
    return map(str, alias.choices) if isinstance(alias, AliasChoices) else [name]


@dataclass(frozen=True)
class Task:
    """One generation: a prompt as `Model.encode` takes it, tools, and generation options.

    `template_options` are switches of the chat template. `prefill` is the beginning of an answer to messages. The
    generation continues after it. `not_enforced` are the keywords of the request's schemas that the server does not
    enforce, as `PLACE: KEYWORD`.
    """

    prompt: str | Sequence[int] | Messages
    options: GenerationOptions
    tools: Sequence[Mapping[str, Any]] | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    prefill: str = ""
    not_enforced: tuple[str, ...] = ()


class AnswerForm(NamedTuple):
    """Required form of an answer, and the schema keywords that this form does not enforce."""

    json_schema: Mapping[str, Any] | None = None
    grammar: str | None = None
    not_enforced: tuple[str, ...] = ()


class ThinkingOptions(Fields):
    """Anthropic's switch for thinking, which other servers accept too."""

    type: Literal["enabled", "adaptive", "auto", "disabled"]
    budget_tokens: Budget = None


class Reasoning(Fields):
    """OpenAI's and OpenRouter's switch for thinking."""

    effort: str | None = None
    summary: str | None = None
    enabled: bool | None = None
    max_tokens: Budget = None
    exclude: Literal[False] = False

    @property
    def thinks(self) -> bool | None:
        """Whether to think, or None if no field says it."""
        if self.enabled is not None or self.effort is not None:
            return self.enabled is not False and self.effort not in _NO_EFFORT
        return None if self.max_tokens is None else True


class ConversationRequest(Request):
    """Request for an answer to messages."""

    parallel_tool_calls: bool = True
    enable_thinking: bool | None = None
    thinking_budget: Budget = Field(
        None, validation_alias=AliasChoices("thinking_budget", "thinking_budget_tokens", "thinking_token_budget")
    )
    think: bool | str | None = None
    thinking: ThinkingOptions | None = None
    reasoning: Reasoning = Reasoning()
    reasoning_effort: str | None = None
    chat_template_kwargs: TemplateOptions = TemplateOptions()

    def conversation_options(self, default: GenerationOptions, **changes: Any) -> GenerationOptions:
        """Return the generation options like `generation_options`, with the options of thinking."""
        thinks = self._thinks()
        budget = self.thinking_budget
        if budget is None and thinks is not False:
            budget = self.reasoning.max_tokens if self.thinking is None else self.thinking.budget_tokens
        return self.generation_options(default, **changes, enable_thinking=thinks, thinking_budget=budget)

    def _thinks(self) -> bool | None:
        """Return whether to think, by the first switch that is set, or None if no switch is set."""
        switches = (
            self.enable_thinking,
            _effort(self.think),
            None if self.thinking is None else self.thinking.type != "disabled",
            self.reasoning.thinks,
            self.chat_template_kwargs.enable_thinking,
            _effort(self.reasoning_effort),
        )
        return next((switch for switch in switches if switch is not None), None)

    def template_options(self) -> dict[str, Any]:
        """Return the switches of the chat template, except the switch for thinking."""
        return self.chat_template_kwargs.model_extra or {}


def _effort(effort: str | bool | None) -> bool | None:
    return effort not in _NO_EFFORT if isinstance(effort, str) else effort


def _other_tools(tools: Iterable[Any]) -> list[str]:
    """Return the names, for `ignored`, of the tools that do not exist here."""
    return sorted({f"tools.{tool.type}" for tool in tools if isinstance(tool, OtherTool)})


class ChatRequest(ConversationRequest):
    """Request of `/v1/chat/completions`."""

    # Error messages use this name for the field with the answer's form.
    format_field: ClassVar[str] = "response_format"

    messages: list[Message] = Field(min_length=1)
    max_tokens: Limit = Field(None, validation_alias=AliasChoices(*_TOKEN_LIMITS))
    max_completion_tokens: Limit = None
    n: Literal[1] = 1
    logprobs: bool = False
    top_logprobs: Whole | None = Field(None, ge=0, le=20)
    response_format: TextFormat | JsonSchemaFormat = Field(TextFormat(type="text"), discriminator="type")
    tools: list[ChatTool] = []
    tool_choice: ChatChoice = "auto"
    modalities: list[Literal["text"]] = ["text"]

    @property
    def ignored(self) -> list[str]:
        """Names of the parts of the request that the server does not know or cannot use."""
        return [*super().ignored, *_other_tools(self.tools)]

    def task(self, default: GenerationOptions) -> Task:
        """Convert the request to a task. Raises OptionError and PromptError for unsupported values."""
        if self.top_logprobs and not self.logprobs:
            raise OptionError("top_logprobs is given, but logprobs is not")
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools if isinstance(tool, Tool)]
        choice = _choice(self.tool_choice)
        form = _answer_form(tools, choice, self.parallel_tool_calls, self.response_format, self.format_field)
        options = self.conversation_options(
            default,
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            json_schema=form.json_schema,
            grammar=form.grammar,
        )
        return Task(
            chat_messages(self.messages),
            options,
            tools if choice.name != "none" and tools else None,
            self.template_options(),
            not_enforced=form.not_enforced,
        )


class CompletionRequest(Request):
    """Request of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Limit = Field(None, validation_alias=AliasChoices(*_TOKEN_LIMITS))
    n: Literal[1] = 1
    logprobs: Whole | None = Field(None, ge=0, le=20)

    def task(self, default: GenerationOptions) -> Task:
        """Convert the request to a task. Raises OptionError and PromptError for unsupported values."""
        options = self.generation_options(default, max_tokens=self.max_tokens, logprobs=self.logprobs)
        return Task(self._one_prompt(), options)

    def _one_prompt(self) -> str | list[int]:
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return self.prompt
        if len(self.prompt) != 1:
            raise PromptError(f"prompt must be one prompt per request, found {len(self.prompt)}")
        return self.prompt[0]  # type: ignore[return-value]


class MessageItem(Fields):
    """Input item: a message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: AnswerContent = ""

    @model_validator(mode="after")
    def _check(self) -> "MessageItem":
        _check_thoughts(self.role, self.content)
        return self


class FunctionCallItem(CalledFunction):
    """Input item: a function call of an earlier answer."""

    type: Literal["function_call"]
    call_id: str


class FunctionOutputItem(Fields):
    """Input item: the result of a function call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content


class ReasoningText(Fields):
    """Text of an earlier thought."""

    text: str = ""


class ReasoningItem(Fields):
    """Input item: an earlier thought. The server reads neither its summary nor its encrypted content."""

    type: Literal["reasoning"]
    content: list[ReasoningText] = []


class ItemReference(Fields):
    """Input item: a reference to a stored item. The server refuses it because it stores no items."""

    type: Literal["item_reference"] = "item_reference"
    id: str


class SkippedItem(Fields):
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


class UnknownItem(Fields):
    """Item of an unknown type, or a value that is not an item. The server refuses both."""

    type: Annotated[Any, BeforeValidator(_unknown_item)]


def _item_type(item: Any) -> str:
    kind = _type_of(item)
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


class ResponseTool(Function):
    """Tool that is a function."""

    type: Literal["function"]


class ResponseNamedTool(Fields):
    """Choice of one function to call."""

    type: Literal["function"]
    name: str


AnyTool = Annotated[
    Annotated[ResponseTool, Tag("function")] | Annotated[OtherTool, Tag("other")], Discriminator(_tool_type)
]
ResponseChoice: TypeAlias = Annotated[
    Literal["none", "auto", "required"]
    | Annotated[
        Annotated[ResponseNamedTool, Tag("function")]
        | Annotated[AllowedTools, Tag("allowed_tools")]
        | Annotated[OtherTool, Tag("other")],
        Discriminator(_choice_type),
    ],
    BeforeValidator(_read_choice),
]


class ResponseSchema(NamedSchema):
    """Answer format: JSON that follows a JSON Schema."""

    type: Literal["json_schema"]


class ResponseText(Fields):
    """Format and verbosity of the answer's text."""

    format: TextFormat | ResponseSchema = Field(default=TextFormat(type="text"), discriminator="type")
    verbosity: str | None = None


class ResponseRequest(ConversationRequest):
    """Request of `/v1/responses`."""

    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: Limit = Field(
        None, validation_alias=AliasChoices("max_output_tokens", "max_completion_tokens", *_TOKEN_LIMITS)
    )
    top_logprobs: Whole | None = Field(None, ge=0, le=20)
    text: ResponseText = ResponseText()
    tools: list[AnyTool] = []
    tool_choice: ResponseChoice = "auto"
    include: list[str] = []
    truncation: Literal["disabled", "auto"] = "disabled"
    user: str | None = None
    metadata: dict[str, Any] | None = None

    @property
    def functions(self) -> list[ResponseTool]:
        """Tools of the request that are functions. Only functions can be called here."""
        return [tool for tool in self.tools if isinstance(tool, ResponseTool)]

    @property
    def ignored(self) -> list[str]:
        """Names of the parts of the request that the server does not know or cannot use."""
        items = {f"input.{item.type}" for item in self.input if isinstance(item, SkippedItem)}
        return [*super().ignored, *_other_tools(self.tools), *sorted(items)]

    @model_validator(mode="after")
    def _check_references(self) -> "ResponseRequest":
        for item in self.input:
            if isinstance(item, ItemReference):
                message = (
                    f"Item with id {item.id!r} not found. Items are not persisted when `store` is set to false, as it "
                    "always is here. Send the item itself, or remove this item from your input."
                )
                raise refuse("item_not_found", "input", message, status=404)
        return self

    def task(self, default: GenerationOptions) -> Task:
        """Convert the request to a task. Raises OptionError and PromptError for unsupported values."""
        tools = [
            {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}
            for tool in self.functions
        ]
        choice = _choice(self.tool_choice)
        form = _answer_form(tools, choice, self.parallel_tool_calls, self.text.format, "text.format")
        asks_logprobs = "message.output_text.logprobs" in self.include or bool(self.top_logprobs)
        options = self.conversation_options(
            default,
            max_tokens=self.max_output_tokens,
            logprobs=(self.top_logprobs or 0) if asks_logprobs else None,
            json_schema=form.json_schema,
            grammar=form.grammar,
        )
        return Task(
            chat_messages(self._messages()),
            options,
            tools if choice.name != "none" and tools else None,
            self.template_options(),
            not_enforced=form.not_enforced,
        )

    def _messages(self) -> list[Message]:
        messages: list[Message] = []
        if self.instructions is not None:
            messages.append(Message(role="system", content=self.instructions))
        items = [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        thought: str | None = None
        for item in items:
            if isinstance(item, ReasoningItem):
                thought = (thought or "") + "".join(part.text for part in item.content) or None
            elif isinstance(item, FunctionCallItem):
                _add_call(messages, item, thought)
                thought = None
            elif isinstance(item, FunctionOutputItem):
                messages.append(Message(role="tool", content=_text(item.output), tool_call_id=item.call_id))
            elif isinstance(item, MessageItem):
                own = thought if item.role == "assistant" else None
                messages.append(Message(role=item.role, content=item.content, reasoning_content=own))
                thought = None
        if not messages:
            raise PromptError("input is empty: expected some text or items")
        return messages


ENDPOINTS: tuple[type[Request], ...] = (ChatRequest, CompletionRequest, ResponseRequest)


def _add_call(messages: list[Message], item: FunctionCallItem, thought: str | None) -> None:
    """Add a call to the messages.

    A call belongs to the same answer as the text or call before it. A thought begins a new answer.
    """
    call = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
    if messages and messages[-1].role == "assistant" and thought is None:
        messages[-1] = messages[-1].model_copy(update={"tool_calls": [*(messages[-1].tool_calls or []), call]})
    else:
        messages.append(Message(role="assistant", tool_calls=[call], reasoning_content=thought))


def chat_messages(messages: Sequence[Message]) -> Messages:
    """Convert messages to the form that chat templates take.

    The content becomes text, the arguments of tool calls become objects, and each tool result gets the name of its
    tool. Arguments that are not a JSON object stay text.

    Gemma has one system text, before all turns. It consists of all system and developer messages, in their order and
    with blank lines between them.

    Raises PromptError for a result of a call that does not exist, or that has a result already.
    """
    rendered: Messages = []
    system: list[str] = []
    names: dict[str, str] = {}
    waiting: Counter[str] = Counter()
    for index, message in enumerate(messages):
        text = _text(message.content)
        if message.role in ("system", "developer"):
            system.append(text)
            continue
        found: dict[str, Any] = {"role": message.role, "content": text}
        if message.reasoning_content is not None:
            found["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            found["tool_calls"] = [_template_call(call) for call in message.tool_calls]
            names |= {call.id: call.function.name for call in message.tool_calls}
            waiting.update(call.id for call in message.tool_calls)
        if message.tool_call_id is not None:
            if message.tool_call_id not in names:
                raise PromptError(f"messages[{index}].tool_call_id is {message.tool_call_id!r}: no call before has it")
            if not waiting[message.tool_call_id]:
                found_id = repr(message.tool_call_id)
                raise PromptError(f"messages[{index}].tool_call_id is {found_id}: its call has a result already")
            waiting[message.tool_call_id] -= 1
            found |= {"tool_call_id": message.tool_call_id, "name": names[message.tool_call_id]}
        elif message.name is not None:
            found["name"] = message.name
        rendered.append(found)
    first = [{"role": "system", "content": "\n\n".join(filter(None, system))}] if system else []
    return first + rendered


def _template_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": _arguments_object(call.function.arguments)}
    return {"id": call.id, "type": "function", "function": function}


def _arguments_object(text: str) -> dict[str, Any] | str:
    """Return the arguments of a call as an object.

    The result is the text itself if it is not a JSON object, for example if the call was cut off.
    """
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, dict) else text


ResponseFormat: TypeAlias = TextFormat | JsonSchemaFormat | ResponseSchema


def _answer_form(
    tools: Sequence[Mapping[str, Any]], wanted_tools: Choice, parallel: bool, wanted: ResponseFormat, field: str
) -> AnswerForm:
    """Return the form that an answer with these tools must have. Log the keywords that are not enforced.

    `field` is the name of the request's field with the value `wanted`, for error messages.

    Raises OptionError for a tool choice or schema that cannot be followed, and for a strict schema that cannot be
    followed in full.
    """
    choice, allowed = wanted_tools
    _check_choice(tools, choice)
    callable_tools = tools if allowed is None else _allowed_tools(tools, allowed, choice)
    is_limited = len(callable_tools) < len(tools)
    schema, left = _schema(wanted, field) if choice in ("none", "auto") else (None, ())
    if not tools or choice == "none":
        form = AnswerForm(json_schema=schema, not_enforced=left)
    elif (
        choice == "auto"
        and parallel
        and schema is None
        and not is_limited
        and not any(_is_strict(tool) for tool in tools)
    ):
        form = AnswerForm()
    else:
        grammar = tool_grammar(callable_tools, choice, parallel=parallel, answer=schema)
        form = AnswerForm(grammar=grammar.text, not_enforced=(*grammar.not_enforced, *left))
    if form.not_enforced:
        logger.warning("not enforced of the schemas of a request: %s", ascii(", ".join(form.not_enforced)))
    return form


def _schema(wanted: ResponseFormat, field: str) -> tuple[Mapping[str, Any] | None, tuple[str, ...]]:
    """Return the JSON Schema that the answer must follow, or None, and the keywords that were left out of it."""
    if isinstance(wanted, TextFormat):
        return (JSON_OBJECT if wanted.type == "json_object" else None), ()
    named = wanted.json_schema if isinstance(wanted, JsonSchemaFormat) else wanted
    return answer_schema(named.schema_, field, is_strict=named.strict)


def _is_strict(tool: Mapping[str, Any]) -> bool:
    return tool["function"].get("strict") is True


def _check_choice(tools: Sequence[Mapping[str, Any]], choice: str) -> None:
    """Check the tools and the choice. Raises OptionError for equal tool names, or a choice that fits no tool."""
    if not tools:
        if choice not in ("none", "auto"):
            raise OptionError(f"tool_choice is {choice!r}, but no tools are given")
        return
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise OptionError(f"tools must have names of their own, found {', '.join(names)}")
    if choice not in ("none", "auto", "required", *names):
        raise OptionError(f"tool_choice names {choice!r}, the tools are {', '.join(names)}")


def _allowed_tools(
    tools: Sequence[Mapping[str, Any]], allowed: Sequence[str], choice: str
) -> Sequence[Mapping[str, Any]]:
    """Return the tools that may be called.

    Raises OptionError for a name that no tool has, and for no names at all if a call is required.
    """
    names = [tool["function"]["name"] for tool in tools]
    for name in allowed:
        if name not in names:
            raise OptionError(f"tool_choice allows {name!r}, the tools are {', '.join(names) or 'none'}")
    if choice == "required" and not allowed:
        raise OptionError("tool_choice requires a call, but allows no function")
    return [tool for tool, name in zip(tools, names, strict=True) if name in allowed]


def _token_id(token: str) -> int:
    try:
        return int(token)
    except ValueError:
        raise OptionError(f"logit_bias must map token ids to numbers, found the token {token!r}") from None
