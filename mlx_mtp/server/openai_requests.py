"""Requests of OpenAI's API, and their conversion to tasks for the model.

A field of the wrong type, or a field that asks for an unsupported feature, is refused, never ignored.
`undeclared_fields` lists the fields that are accepted although they have no effect here.
"""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from mlx_mtp.decoding.draft_length import MAX_DRAFT_TOKENS
from mlx_mtp.decoding.sampling import SMALLEST, AcceptanceRule, Sampling
from mlx_mtp.errors import OptionError, PromptError
from mlx_mtp.options import GenerationOptions
from mlx_mtp.text.conversation import Messages

from .answer_rules import AnswerRules, JsonSchemaFormat, ResponseText, TextFormat, answer_rules
from .field_types import Budget, Limit, LookBack, RequestPart, Strings, TopK, Whole
from .openai_messages import Message, chat_messages
from .openai_tools import (
    AnyChatTool,
    AnyResponseTool,
    AnyToolChoice,
    ChatNamedTool,
    FunctionTool,
    ResponseNamedTool,
    ResponseTool,
    other_tools,
    tool_choice,
)
from .response_items import Item, ItemReference, MessageItem, SkippedItem, item_messages
from .undeclared_fields import check_others, refuse, unknown

# These are `max_tokens` and its names on other servers.
_TOKEN_LIMITS = ("max_tokens", "max_new_tokens", "n_predict", "num_predict")
# The largest number of answers to one request, as in OpenAI's API.
_MOST_CHOICES = 128
# These reasoning efforts mean no thinking.
_NO_EFFORT = ("none", "minimal")


class TemplateOptions(RequestPart):
    """Switches of the chat template. Any name is allowed."""

    model_config = ConfigDict(extra="allow")

    enable_thinking: bool | None = None


class StreamOptions(RequestPart):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


# Some clients send an empty list for no bias.
_NO_BIAS = BeforeValidator(lambda value: {} if value == [] else value)
# An empty text means no constraint. A constraint to the empty answer is of no use.
_EMPTY_IS_NONE = BeforeValidator(lambda value: None if value == "" else value)


class Request(RequestPart, ABC):
    """RequestPart that all requests have: OpenAI's fields, and fields of `Sampling` and `GenerationOptions`."""

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
    copy_drafts: Literal["auto", "off"] | None = None
    stop: Strings = Field([], validation_alias=AliasChoices("stop", "stop_sequences"))
    min_tokens: Whole = Field(0, ge=0)
    ignore_eos: bool = False
    regex: Annotated[str | None, _EMPTY_IS_NONE] = None
    grammar: Annotated[str | None, _EMPTY_IS_NONE] = None
    include_stats: bool = Field(
        False, description="Add the numbers of drafted and accepted tokens so far to each part."
    )

    @model_validator(mode="after")
    def _check_others(self) -> "Request":
        check_others(self.model_extra or {}, field_names(type(self)), field_names(*ENDPOINTS))
        return self

    @property
    def ignored(self) -> list[str]:
        """Names of the parts of the request that the server does not know or cannot use."""
        return unknown(self.model_extra or {}, field_names(*ENDPOINTS))

    @abstractmethod
    def task(self, default: GenerationOptions) -> "Task":
        """Convert the request to a task. Raises OptionError and PromptError for unsupported values."""

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
                raise OptionError("grammar contradicts the tools: their calls must follow a grammar of the server")
            changes["grammar"] = self.grammar
        if changes.get("enable_thinking") is False:
            default = replace(default, enable_thinking=False, thinking_budget=None)
        if self.num_draft_tokens is not None:
            changes["num_draft_tokens"] = self.num_draft_tokens
        if self.copy_drafts is not None:
            changes["copy_drafts"] = self.copy_drafts
        return replace(default, **{name: value for name, value in changes.items() if value is not None})


def field_names(*kinds: type[Request]) -> frozenset[str]:
    """Return the names of the fields of these requests, with all their aliases."""
    return frozenset(name for kind in kinds for field in kind.model_fields.items() for name in _names(*field))


def _names(name: str, info: FieldInfo) -> Iterable[str]:
    alias = info.validation_alias
    return map(str, alias.choices) if isinstance(alias, AliasChoices) else [name]


@dataclass(frozen=True)
class Task:
    """One generation: a prompt as `Model.prepare` takes it, tools, and generation options.

    `template_options` are switches of the chat template. `prefill` is the beginning of an answer to messages. The
    generation continues after it. `is_seeded` says whether the client gave a seed. `not_enforced` are the keywords of
    the request's schemas that the server does not enforce, as `PLACE: KEYWORD`.
    """

    prompt: str | Sequence[int] | Messages
    options: GenerationOptions
    tools: Sequence[Mapping[str, Any]] | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    prefill: str = ""
    is_seeded: bool = False
    not_enforced: tuple[str, ...] = ()

    def choice(self, index: int) -> "Task":
        """Return the task of the choice with this index, which has a seed of its own."""
        sampling = self.options.sampling
        seed = (sampling.seed + index) % 2**64
        return replace(self, options=replace(self.options, sampling=replace(sampling, seed=seed)))


class ThinkingOptions(RequestPart):
    """Anthropic's switch for thinking, which other servers accept too."""

    type: Literal["enabled", "adaptive", "auto", "disabled"]
    budget_tokens: Budget = None


class Reasoning(RequestPart):
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

    def conversation_options(
        self, default: GenerationOptions, rules: AnswerRules, *, max_tokens: int | None, logprobs: int | None
    ) -> GenerationOptions:
        """Return the generation options like `generation_options`, with the rules and the options of thinking."""
        thinks = self._thinks()
        budget = self.thinking_budget
        if budget is None and thinks is not False:
            budget = self.reasoning.max_tokens if self.thinking is None else self.thinking.budget_tokens
        return self.generation_options(
            default,
            max_tokens=max_tokens,
            logprobs=logprobs,
            json_schema=rules.json_schema,
            grammar=rules.grammar,
            enable_thinking=thinks,
            thinking_budget=budget,
        )

    def conversation_task(self, messages: Iterable[Message], options: GenerationOptions, rules: AnswerRules) -> Task:
        """Return the task of an answer to the messages. Raises PromptError as `chat_messages` does."""
        # The switch for thinking is an option of the generation.
        template_options = self.chat_template_kwargs.model_extra or {}
        prompt = chat_messages(messages)
        return Task(
            prompt,
            options,
            rules.tools,
            template_options,
            is_seeded=self.seed is not None,
            not_enforced=rules.not_enforced,
        )

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


def _effort(effort: str | bool | None) -> bool | None:
    return effort not in _NO_EFFORT if isinstance(effort, str) else effort


class ChatRequest(ConversationRequest):
    """Request of `/v1/chat/completions`."""

    # Error messages use this name for the field with the answer's format.
    format_field: ClassVar[str] = "response_format"

    messages: list[Message] = Field(min_length=1)
    max_tokens: Limit = Field(None, validation_alias=AliasChoices(*_TOKEN_LIMITS))
    max_completion_tokens: Limit = None
    n: Whole = Field(1, ge=1, le=_MOST_CHOICES)
    logprobs: bool = False
    top_logprobs: Whole | None = Field(None, ge=0, le=20)
    response_format: TextFormat | JsonSchemaFormat = Field(TextFormat(type="text"), discriminator="type")
    tools: list[AnyChatTool] = Field([])
    tool_choice: AnyToolChoice[ChatNamedTool] = "auto"
    modalities: list[Literal["text"]] = Field(["text"])

    @property
    def ignored(self) -> list[str]:
        """Names of the parts of the request that the server does not know or cannot use."""
        return [*super().ignored, *other_tools(self.tools)]

    def task(self, default: GenerationOptions) -> Task:
        """Convert the request to a task. Raises OptionError and PromptError for unsupported values."""
        if self.top_logprobs and not self.logprobs:
            raise OptionError("top_logprobs is given, but logprobs is not")
        tools = [tool.function.declaration for tool in self.tools if isinstance(tool, FunctionTool)]
        choice = tool_choice(self.tool_choice)
        rules = answer_rules(tools, choice, self.parallel_tool_calls, self.response_format, self.format_field)
        options = self.conversation_options(
            default,
            rules,
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
        return self.conversation_task(self.messages, options, rules)


class CompletionRequest(Request):
    """Request of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Limit = Field(None, validation_alias=AliasChoices(*_TOKEN_LIMITS))
    n: Whole = Field(1, ge=1, le=_MOST_CHOICES)
    logprobs: Whole | None = Field(None, ge=0, le=20)

    def task(self, default: GenerationOptions) -> Task:
        """Convert the request to a task. Raises OptionError and PromptError for unsupported values."""
        options = self.generation_options(default, max_tokens=self.max_tokens, logprobs=self.logprobs)
        return Task(self._one_prompt(), options, is_seeded=self.seed is not None)

    def _one_prompt(self) -> str | list[int]:
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return self.prompt
        if len(self.prompt) != 1:
            raise PromptError(f"prompt must be one prompt per request, found {len(self.prompt)}")
        return self.prompt[0]  # type: ignore[return-value]


class ResponseRequest(ConversationRequest):
    """Request of `/v1/responses`."""

    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: Limit = Field(
        None, validation_alias=AliasChoices("max_output_tokens", "max_completion_tokens", *_TOKEN_LIMITS)
    )
    top_logprobs: Whole | None = Field(None, ge=0, le=20)
    text: ResponseText = ResponseText()
    tools: list[AnyResponseTool] = Field([])
    tool_choice: AnyToolChoice[ResponseNamedTool] = "auto"
    include: list[str] = Field([])
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
        return [*super().ignored, *other_tools(self.tools), *sorted(items)]

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
        tools = [tool.declaration for tool in self.functions]
        choice = tool_choice(self.tool_choice)
        rules = answer_rules(tools, choice, self.parallel_tool_calls, self.text.format, "text.format")
        asks_logprobs = "message.output_text.logprobs" in self.include or bool(self.top_logprobs)
        options = self.conversation_options(
            default,
            rules,
            max_tokens=self.max_output_tokens,
            logprobs=(self.top_logprobs or 0) if asks_logprobs else None,
        )
        items = [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        return self.conversation_task(item_messages(items, self.instructions), options, rules)


ENDPOINTS: tuple[type[Request], ...] = (ChatRequest, CompletionRequest, ResponseRequest)


def _token_id(token: str) -> int:
    try:
        return int(token)
    except ValueError:
        raise OptionError(f"logit_bias must map token ids to numbers, found the token {token!r}") from None
