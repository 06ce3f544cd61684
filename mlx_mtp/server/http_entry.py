"""Entry of every HTTP request: check the host, normalize the path, and give the answer a request id."""

import ipaddress
import re
import secrets
import socket
from collections.abc import Iterable

from starlette.datastructures import MutableHeaders
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


class Entry:
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
