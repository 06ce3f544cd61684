"""Tools and tool choices in requests of OpenAI's API.

Chat completions and responses write them with different fields: in a chat, a function is inside an object of its own.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar

from pydantic import BeforeValidator, Discriminator, Field, Tag

from mlx_mtp.errors import OptionError

from .field_types import RequestPart, type_of


class Function(RequestPart):
    """Function that the model can call, with the JSON Schema of its parameters."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] = Field({})
    strict: bool = False

    @property
    def declaration(self) -> dict[str, Any]:
        """Tool with this function, as chat templates take it."""
        return {"type": "function", "function": self.model_dump(exclude_none=True, exclude={"type"})}


class FunctionTool(RequestPart):
    """Tool of a chat that is a function."""

    type: Literal["function"] = "function"
    function: Function


class ResponseTool(Function):
    """Tool of a request of `/v1/responses` that is a function."""

    type: Literal["function"]


class OtherTool(RequestPart):
    """Tool that does not exist here: OpenAI runs it, or its input is not JSON."""

    type: str


def _response_tool_type(tool: Any) -> str:
    return "function" if type_of(tool) == "function" else "other"


def _chat_tool_type(tool: Any) -> str:
    return "function" if type_of(tool) in (None, "function") else "other"


AnyChatTool: TypeAlias = Annotated[
    Annotated[FunctionTool, Tag("function")] | Annotated[OtherTool, Tag("other")], Discriminator(_chat_tool_type)
]
AnyResponseTool: TypeAlias = Annotated[
    Annotated[ResponseTool, Tag("function")] | Annotated[OtherTool, Tag("other")], Discriminator(_response_tool_type)
]


def other_tools(tools: Iterable[Any]) -> list[str]:
    """Return the names, for `ignored`, of the tools that do not exist here."""
    return sorted({f"tools.{tool.type}" for tool in tools if isinstance(tool, OtherTool)})


class NamedFunction(RequestPart):
    """Name of a function."""

    name: str


class ChatNamedTool(RequestPart):
    """Choice of one function to call, in a chat."""

    type: Literal["function"]
    function: NamedFunction

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.function.name


class ResponseNamedTool(RequestPart):
    """Choice of one function to call, in a request of `/v1/responses`."""

    type: Literal["function"]
    name: str


class AllowedTools(RequestPart):
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
    if type_of(choice) == "allowed_tools" and isinstance(choice, dict):
        inner = choice.get("allowed_tools")
        return {**inner, "type": "allowed_tools"} if isinstance(inner, dict) else choice
    return choice


def _choice_type(choice: Any) -> str:
    kind = type_of(choice)
    return str(kind) if kind in ("function", "allowed_tools") else "other"


NamedTool = TypeVar("NamedTool")
# `NamedTool` is the class for the choice of one function.
AnyToolChoice: TypeAlias = Annotated[
    Literal["none", "auto", "required"]
    | Annotated[
        Annotated[NamedTool, Tag("function")]
        | Annotated[AllowedTools, Tag("allowed_tools")]
        | Annotated[OtherTool, Tag("other")],
        Discriminator(_choice_type),
    ],
    BeforeValidator(_read_choice),
]


class ToolChoice(NamedTuple):
    """Tool choice: a word or the name of one tool, and the names of the tools that may be called.

    `allowed` is None if all tools may be called.
    """

    name: str
    allowed: Sequence[str] | None = None


def tool_choice(choice: str | ChatNamedTool | ResponseNamedTool | AllowedTools | OtherTool) -> ToolChoice:
    """Convert the tool choice of a request. Raises OptionError for a tool that is not a function."""
    if isinstance(choice, OtherTool):
        raise OptionError(f"tool_choice is of type {choice.type!r}: this server has functions only")
    if isinstance(choice, AllowedTools):
        return ToolChoice(choice.mode, choice.names)
    return ToolChoice(choice if isinstance(choice, str) else choice.name)
