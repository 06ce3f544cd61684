"""Folders of models: local ones as they are, those of hub repositories downloaded, with progress in bytes."""

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import tqdm

from mlx_mtp.errors import ConfigError, HubError

from .files import fault

# Where a converted pair keeps its drafter.
DRAFTER_FOLDER = "drafter"

_DOWNLOADED = [
    "*.json",
    "*.jinja",
    "README.md",
    "tokenizer.model",
    "model*.safetensors",
    f"{DRAFTER_FOLDER}/model*.safetensors",
]
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
# A connection that is cut raises HTTPError, of httpx, or RuntimeError where Xet's Rust code downloads.
_REFUSED = (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    OSError,
    RuntimeError,
)
# The name by which huggingface-hub knows its bar of the bytes written; others count files, or what the network gave.
_BYTES_BAR = "huggingface_hub.snapshot_download"


class Downloads:
    """Counts the bytes of all that is downloaded for one model, and calls `on_progress(done, total)`.

    It is called on the threads that download, one at a time. What it raises ends the download, and is raised by
    `resolve_folder`.
    """

    def __init__(self, on_progress: Callable[[int, int], None]) -> None:
        self._on_progress = on_progress
        self._done = self._total = 0
        self._error: BaseException | None = None
        self._lock = threading.RLock()
        downloads = self

        class Bar(tqdm):
            # No thread that looks after bars.
            monitor_interval = 0

            def __init__(self, *args: Any, name: str | None = None, **kwargs: Any) -> None:
                self.counts = name == _BYTES_BAR
                super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

            def update(self, n: float | None = 1) -> None:
                if self.counts:
                    downloads._add(int(n or 0))

        self.bar_class: type[Any] = Bar

    def expect(self, name: str, revision: str | None = None) -> list[str]:
        """Add what is to be downloaded of a repository to the total: its files' names, [] where the hub gives none."""
        try:
            files = snapshot_download(
                name, revision=revision, allow_patterns=_DOWNLOADED, tqdm_class=self.bar_class, dry_run=True
            )
        except _REFUSED:
            # Not there, or offline: said, or served from the cache, when it is asked for.
            return []
        self._total += sum(file.file_size or 0 for file in files if file.will_download)
        return [file.filename for file in files]

    def check(self) -> None:
        """Raises what the callback raised."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """All was downloaded: say so, if that was not the last that was said."""
        if self._done != self._total:
            self._add(self._total - self._done)

    def _add(self, size: int) -> None:
        with self._lock:
            # Files that are downloaded beside the one whose progress raised end as well.
            self.check()
            self._done += size
            try:
                self._on_progress(min(self._done, self._total), self._total)
            except BaseException as error:
                self._error = error
                raise


def resolve_folder(path_or_repo: str | Path, revision: str | None = None, downloads: Downloads | None = None) -> Path:
    """A local folder as it is, or a hub repository's snapshot, downloaded or from the cache (offline mode, tokens and
    cache folder as huggingface-hub's environment variables say). Without `downloads`, the hub's own progress bars are
    shown on a terminal.

    Raises ConfigError if it can only be a folder and is none, HubError if the hub does not give it, and what the
    callback of `downloads` raises.
    """
    name = str(path_or_repo)
    if Path(name).is_dir():
        return Path(name)
    if not is_repo(name):
        reason = fault(Path(name)) if Path(name).is_symlink() else None
        raise ConfigError(f"{name}: {reason or 'no such folder'}")
    bar_class = None if downloads is None else downloads.bar_class
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=_DOWNLOADED, tqdm_class=bar_class)
    except _REFUSED as error:
        if downloads is not None:
            downloads.check()
        message = f"{name}: no such folder, and the hub does not give it: {_reason(error)}"
        raise HubError(message, is_absent=_is_absent(error)) from error
    if downloads is not None:
        downloads.check()
    return Path(folder)


def is_repo(name: str | Path) -> bool:
    """Whether it is spelled like a hub repository, and no file, folder or link is there."""
    text = str(name)
    return not os.path.lexists(text) and _REPO_ID.fullmatch(text) is not None and not text.startswith(".")


def _is_absent(error: Exception) -> bool:
    """Whether the hub, or in offline mode the cache, has no such repository; a gated one is there."""
    if isinstance(error, RepositoryNotFoundError):
        return not isinstance(error, GatedRepoError)
    is_offline = isinstance(error.__cause__, OfflineModeIsEnabled) or isinstance(error, OfflineModeIsEnabled)
    return is_offline or isinstance(error, HFValidationError)


def _reason(error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return "a gated repository, whose terms must be accepted there and which needs an access token (HF_TOKEN)"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or a private one, which needs an access token (HF_TOKEN)"
    return str(error).strip().splitlines()[0]
