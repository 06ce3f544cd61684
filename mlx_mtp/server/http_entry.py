"""What every HTTP request passes first: its host is checked, its path made plain, and its answer given an id."""

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
# Endpoints that are served without the version, too: with what follows them.
_BARE = re.compile(r"/(chat/completions|completions|messages|models|responses)(/.*)?")
_PORT = re.compile(r":[0-9]*$")


def local_hosts(bound_to: str) -> tuple[str, ...]:
    """Names by which this machine may be asked, where the server is bound to an address of this machine only.

    No web page of another machine has such a name: a name under one of these domains is not found in public DNS.
    """
    own = socket.gethostname()
    names = ("localhost", "127.0.0.1", "[::1]", "*.localhost", "*.local", "*.internal", bound_to, own)
    return tuple(dict.fromkeys([*names, own.split(".")[0]]))


class Entry:
    """ASGI middleware. `hosts` are the names this server answers to, `*` for any, `*.domain` for any in a domain."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self._app = app
        self._hosts = frozenset(_plain_host(host) for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
        # GET answers HEAD as well: the server leaves the body out.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        await self._app({**scope, "path": plain_path(scope["path"]), "method": method}, receive, send_with_id)

    def _is_known(self, host: str) -> bool:
        domains = [host[index:] for index, character in enumerate(host) if character == "."]
        return not self._hosts.isdisjoint(["*", host, *(f"*{domain}" for domain in domains)])


def plain_path(path: str) -> str:
    """The path without doubled and trailing slashes, and with the version, once, where an endpoint has one."""
    parts = [part for part in path.split("/") if part]
    while parts[:2] == [_VERSION[1:]] * 2:
        del parts[0]
    plain = "/" + "/".join(parts)
    return _VERSION + plain if _BARE.fullmatch(plain) else plain


def _plain_host(host: str) -> str:
    """A name without port, final dot and case; an IPv6 address in brackets."""
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
