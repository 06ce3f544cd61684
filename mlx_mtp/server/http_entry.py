"""Entry of every HTTP request: the checks of host, API key and body size, the path, and the request id."""

import ipaddress
import re
import secrets
import socket
from collections.abc import Iterable, Mapping

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .service import ApiError

REQUEST_ID_HEADER = "X-Request-Id"
_VERSION = "/v1"
# These endpoints, and the paths below them, also work without the version.
_BARE = re.compile(r"/(chat/completions|completions|messages|models|responses)(/.*)?")
_PORT = re.compile(r":[0-9]*$")


def local_hosts(bound_to: str) -> tuple[str, ...]:
    """Return the host names to accept if the server is bound to an address of this machine only.

    No web page of another machine has one of these names, because public DNS has no names under these domains.
    """
    own = socket.gethostname()
    names = ("localhost", "127.0.0.1", "[::1]", "*.localhost", "*.local", "*.internal", bound_to, own)
    return tuple(dict.fromkeys([*names, own.split(".")[0]]))


class EntryMiddleware:
    """ASGI middleware that checks the host, normalizes the path, and adds a request id to the answer.

    `hosts` are the names that this server answers to: `*` is any name, `*.domain` any name in a domain.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self._app = app
        self._hosts = frozenset(_plain_host(host) for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, or answer 400 if its host is unknown."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        if not self._is_known(_plain_host(host)):
            await JSONResponse(_unknown_host(host).body(), 400)(scope, receive, send_with_id)
            return
        # GET endpoints answer HEAD as well. The server omits the body.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        await self._app({**scope, "path": plain_path(scope["path"]), "method": method}, receive, send_with_id)

    def _is_known(self, host: str) -> bool:
        domains = [host[index:] for index, character in enumerate(host) if character == "."]
        return not self._hosts.isdisjoint(["*", host, *(f"*{domain}" for domain in domains)])


def plain_path(path: str) -> str:
    """Return the path without doubled and trailing slashes.

    A path of a versioned endpoint gets the version `/v1` exactly once.
    """
    parts = [part for part in path.split("/") if part]
    while parts[:2] == [_VERSION[1:]] * 2:
        del parts[0]
    plain = "/" + "/".join(parts)
    return _VERSION + plain if _BARE.fullmatch(plain) else plain


def _plain_host(host: str) -> str:
    """Return a host name in lower case, without port and final dot. An IPv6 address gets brackets."""
    with_brackets = f"[{host}]" if _is_ipv6(host) else host
    return _PORT.sub("", with_brackets).rstrip(".").lower()


def _is_ipv6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def _unknown_host(host: str) -> ApiError:
    message = f"the host {host[:200]!r} is not one that this server answers to: name it with --allowed-hosts"
    return ApiError(400, message, code="unknown_host")


class AccessMiddleware:
    """ASGI middleware that rejects a wrong API key or too large a body, before the body is read."""

    _OPEN = ("/", "/health")

    def __init__(self, app: ASGIApp, key: str | None, most_bytes: int) -> None:
        self._app = app
        self._key = None if key is None else key.encode()
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, or answer with its error."""
        error = self._error(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, self._counted(receive), send)
            return
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        await JSONResponse(error.body(), error.status, headers)(scope, receive, send)

    def _error(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if not (self._key is None or scope["path"] in self._OPEN or _has_key(headers, self._key)):
            message = "the API key is missing or wrong: send it as a Bearer token, or as x-api-key"
            return ApiError(401, message, code="invalid_api_key")
        length = headers.get(b"content-length", b"")
        return body_too_large(self._most_bytes) if length.isdigit() and int(length) > self._most_bytes else None

    def _counted(self, receive: Receive) -> Receive:
        """Return a `receive` that raises HTTPException with status 413 if the body gets too large.

        It covers bodies that do not declare their length. FastAPI's own limit would answer in plain text.
        """
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._most_bytes:
                raise HTTPException(413)
            return message

        return counted


def _has_key(headers: Mapping[bytes, bytes], key: bytes) -> bool:
    """Return whether the header `authorization` or `x-api-key` holds the key. The comparison takes constant time."""
    is_bearer = secrets.compare_digest(headers.get(b"authorization", b""), b"Bearer " + key)
    return secrets.compare_digest(headers.get(b"x-api-key", b""), key) or is_bearer


def body_too_large(most_bytes: int) -> ApiError:
    """Return the error for a body of more than `most_bytes` bytes."""
    return ApiError(413, f"the body has more than {most_bytes} bytes", code="body_too_large")
