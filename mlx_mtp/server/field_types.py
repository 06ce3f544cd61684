"""Types of the fields of requests, which all APIs share."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _allow_nulls(schema: dict[str, Any]) -> None:
    """Allow null for each optional field in a JSON Schema. Null means that the field is left out."""
    for name, described in schema.get("properties", {}).items():
        if name not in schema.get("required", ()):
            schema["properties"][name] = {"anyOf": [described, {"type": "null"}]}


class RequestPart(BaseModel):
    """Base of all parts of a request. Null means that a field is left out. Other fields are not an error."""

    model_config = ConfigDict(extra="ignore", strict=True, json_schema_extra=_allow_nulls)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


def _as_whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _minus_one_as(meaning: int | None) -> BeforeValidator:
    """Return a validator that runs before the validator of an integer and replaces -1 with `meaning`."""

    def read(value: Any) -> Any:
        value = _as_whole(value)
        return meaning if value == -1 else value

    return BeforeValidator(read, json_schema_input_type=int | None)


def _as_list(value: Any) -> Any:
    """Return one string or several as a list, without empty strings, which stop nothing."""
    items = [value] if isinstance(value, str) else value
    return [item for item in items if item != ""] if isinstance(items, list) else value


# This is an integer. Clients may write 16 as 16.0.
Whole = Annotated[int, BeforeValidator(_as_whole)]
# This is a maximum number of tokens. -1 means no limit.
Limit = Annotated[Annotated[int, Field(ge=1)] | None, _minus_one_as(None)]
# This is a maximum number of tokens of a thought. It may be 0, and -1 means no limit.
Budget = Annotated[Annotated[int, Field(ge=0)] | None, _minus_one_as(None)]
# This is a number of tokens to choose from. -1 and 0 mean all tokens.
TopK = Annotated[Annotated[int, Field(ge=0)] | None, _minus_one_as(0)]
# This is a number of tokens to look back at. -1 means all tokens.
LookBack = Annotated[Annotated[int, Field(ge=1)] | None, _minus_one_as(2**31)]
Strings = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]


def type_of(value: Any) -> Any:
    """Return the `type` of a JSON object or of a parsed part of a request, or None if it has no type."""
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
