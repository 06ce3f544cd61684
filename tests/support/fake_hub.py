"""A Hugging Face hub on loopback that serves folders as model repositories to the real hub client."""

import hashlib
import json
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(
    repos: dict[str, Path],
    token: str | None = None,
    failing: Mapping[str, int] | None = None,
    cut: Collection[str] = (),
) -> Iterator[tuple[str, list[str]]]:
    """Serve folders by repository id. Yield the endpoint and the list of requests, each as "METHOD path".

    If `token` is given, requests without it get status 401, as for private repositories. `failing` maps repositories to
    the status of all their requests. 403 means a gated repository. `cut` names files whose downloads stop in the middle
    and cannot resume while the name is in `cut`.
    """
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, *args: object) -> None:
            pass

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            requests.append(f"{self.command} {path}")
            if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
                self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
                return
            for repo, status in (failing or {}).items():
                if path.startswith((f"/api/models/{repo}/", f"/{repo}/")):
                    self._send(status, b"{}", {"X-Error-Code": "GatedRepo"} if status == 403 else {}, with_body)
                    return
            for repo, folder in repos.items():
                if path.startswith((f"/api/models/{repo}/revision/", f"/api/models/{repo}/tree/")):
                    self._send_json(_info(repo, folder, path), with_body)
                    return
                if path.startswith(f"/{repo}/resolve/"):
                    self._send_file(folder / path.split("/", 5)[5], with_body)
                    return
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)

        def _send_json(self, content: object, with_body: bool) -> None:
            self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"}, with_body)

        def _send_file(self, file: Path, with_body: bool) -> None:
            if not file.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
                return
            content = file.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            begun = self.headers.get("Range", "")
            start = int(begun.removeprefix("bytes=").rstrip("-")) if begun else 0
            if begun:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            stop = max(0, len(content) // 2 - start) if file.name in cut else None
            self._send(206 if begun else 200, content[start:], headers, with_body, stop)

        def _send(
            self, status: int, content: bytes, headers: dict[str, str], with_body: bool, stop: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content[:stop])
                self.close_connection = stop is not None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        server.server_close()


def _info(repo: str, folder: Path, path: str) -> object:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = [str(file.relative_to(folder)) for file in files]
    if "/tree/" in path:
        return [
            {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
            for name, file in zip(names, files, strict=True)
        ]
    return {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
