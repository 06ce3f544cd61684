"""Error responses in the form of OpenAI's API."""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from .http_entry import body_too_large
from .service import ApiError, Service, api_error


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """JSON body of an error response."""

    error: ErrorDetail


# The statuses of errors that both APIs have, and their descriptions.
DESCRIPTIONS: dict[int | str, str] = {
    400: "The request is wrong, or asks for an unsupported feature.",
    401: "The API key is missing or wrong.",
    413: "The body is too large.",
    429: "Too many requests wait. Retry-After tells when to send the request again.",
    500: "The generation failed.",
    503: "The server is shutting down, or has lost a machine that shares its model.",
}
# The errors of OpenAI's endpoints, for the OpenAPI description.
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {**DESCRIPTIONS, 404: "The model or the stored item does not exist."}.items()
}


def add_error_handlers(app: FastAPI, service: Service, most_bytes: int) -> None:
    """Answer every error of a request with OpenAI's error object. `most_bytes` is the largest size of a body."""

    def answer(error: ApiError) -> Response:
        headers = {"Retry-After": str(service.retry_after())} if error.status == 429 else None
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return answer(_validation_error(error))

    @app.exception_handler(HTTPException)
    async def refused(http: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 400:
            # FastAPI raises status 400 for a body that it cannot read.
            return answer(_unreadable(error, http.headers.get("content-encoding", "")))
        found = ApiError(error.status_code, f"{error.detail}: {http.method} {http.url.path}")
        response = answer(body_too_large(most_bytes) if error.status_code == 413 else found)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RecursionError)
    async def too_deep(_: HttpRequest, error: Exception) -> Response:
        # The JSON parser accepts slightly deeper nesting than the code after it.
        return answer(ApiError(400, "the body is nested too deep", code="invalid_json"))

    async def failed(_: HttpRequest, error: Exception) -> Response:
        return answer(api_error(error))

    for kind in (ApiError, ValueError, RuntimeError, Exception):
        app.add_exception_handler(kind, failed)


def _unreadable(error: HTTPException, encoding: str) -> ApiError:
    """Return the error for a body that FastAPI cannot read. `encoding` is its Content-Encoding."""
    if encoding.strip().lower() not in ("", "identity"):
        reason = f"the body is encoded as {encoding[:100]!r}: send it as plain JSON"
    elif isinstance(error.__cause__, RecursionError):
        reason = "the body is not JSON that can be read: it is nested too deep"
    elif isinstance(error.__cause__, UnicodeError):
        reason = "the body is not JSON: it is not in UTF-8"
    else:
        reason = "the body is not JSON"
    return ApiError(400, reason, code="invalid_json")


def _validation_error(error: RequestValidationError) -> ApiError:
    """Return the most specific error in a request's fields."""
    # The longest path is the most specific. For a union, pydantic reports errors of the other types as well.
    path, found = max(((_path(one, error.body), one) for one in error.errors()), key=lambda pair: len(pair[0]))
    refused = found.get("ctx", {})
    if "param" in refused:
        return ApiError(refused["status"], refused["message"], code=found["type"], param=refused["param"])
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {found['ctx']['error']}", code="invalid_json")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    if not param:
        return ApiError(400, "the body must be a JSON object, sent as application/json", code="invalid_json")
    if found["type"] == "missing":
        return ApiError(400, f"missing required parameter: {param!r}", code="missing_required_parameter", param=param)
    value = found.get("input")
    shown = f", found {str(value)[:100]!r}" if isinstance(value, str | int | float | None) else ""
    return ApiError(400, f"{param}: {_plain(found)}{shown}", code="invalid_value", param=param)


def _plain(error: Mapping[str, Any]) -> str:
    """Return the message of an error, without names of this package."""
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "expected an object"
    if error["type"] == "union_tag_not_found":
        return "expected an object with a type"
    if error["type"] == "union_tag_invalid":
        return f"expected the type {error['ctx']['expected_tags']}, found {error['ctx']['tag'][:100]!r}"
    return str(error["msg"])


def _path(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """Return the path of an error in the body.

    The path omits the parts of pydantic's location that only name a type of a union. If an object has a field with the
    name of its type, the type comes first in the location.
    """
    path: list[str | int] = []
    is_last_there = False
    location = error["loc"][1:]
    for part, after in zip_longest(location, location[1:]):
        if isinstance(body, dict) and body.get("type") == part == after:
            continue
        is_last_there = (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int))
        if is_last_there:
            body = body[part]
            path.append(part)
    # A missing field is not in the body, so the loop leaves out its name. A field with the value null is there already.
    return path if is_last_there or error["type"] != "missing" else [*path, *error["loc"][1:][-1:]]
