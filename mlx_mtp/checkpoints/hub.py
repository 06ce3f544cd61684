"""Folders of models: local folders, and downloads of hub repositories with their progress in bytes."""

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

# The folder of the drafter in a converted pair.
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
# A broken connection raises httpx's HTTPError, or RuntimeError if Xet's Rust code downloads.
_REFUSED = (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    OSError,
    RuntimeError,
)
# huggingface-hub's name for its bar of the bytes written. Its other bars count files, or bytes from the network.
_BYTES_BAR = "huggingface_hub.snapshot_download"


class Downloads:
    """A counter of the bytes of all downloads for one model. It calls `on_progress(done, total)`.

    The callback runs on the threads that download, one call at a time. If it raises, the download ends and
    `resolve_folder` raises the exception.
    """

    def __init__(self, on_progress: Callable[[int, int], None]) -> None:
        self._on_progress = on_progress
        self._done = self._total = 0
        self._error: BaseException | None = None
        self._lock = threading.RLock()
        downloads = self

        class Bar(tqdm):
            # tqdm starts no thread that monitors the bars.
            monitor_interval = 0

            def __init__(self, *args: Any, name: str | None = None, **kwargs: Any) -> None:
                self.counts = name == _BYTES_BAR
                super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

            def update(self, n: float | None = 1) -> None:
                if self.counts:
                    downloads.add(int(n or 0))

        self.bar_class: type[Any] = Bar

    def expect(self, name: str, revision: str | None = None) -> list[str]:
        """Add the bytes to download from a repository to the total. Return its file names; [] if the hub gives none."""
        try:
            files = snapshot_download(
                name, revision=revision, allow_patterns=_DOWNLOADED, tqdm_class=self.bar_class, dry_run=True
            )
        except _REFUSED:
            # The repository is missing, or the hub is offline. `resolve_folder` reports that, or uses the cache.
            return []
        self._total += sum(file.file_size or 0 for file in files if file.will_download)
        return [file.filename for file in files]

    def check(self) -> None:
        """Raise the exception that the callback raised, if there is one."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Report that all bytes are downloaded, unless the last report said so."""
        if self._done != self._total:
            self.add(self._total - self._done)

    def add(self, size: int) -> None:
        """Count downloaded bytes, and report them. Raises an exception if the callback does."""
        with self._lock:
            # If the callback raised for one file, the downloads of the other files end as well.
            self.check()
            self._done += size
            try:
                self._on_progress(min(self._done, self._total), self._total)
            except BaseException as error:
                self._error = error
                raise


def resolve_folder(path_or_repo: str | Path, revision: str | None = None, downloads: Downloads | None = None) -> Path:
    """Return a local folder as it is, or the snapshot of a hub repository.

    The snapshot is downloaded or comes from the cache. huggingface-hub's environment variables decide the offline mode,
    the token and the cache folder. Without `downloads`, a terminal shows the hub's own progress bars.

    Raises ConfigError if the name can only be a folder but is none, HubError if the hub does not give the repository,
    and the exception of the callback of `downloads`.
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
    """Return whether a name has the form of a hub repository, and no file, folder or link has that name."""
    text = str(name)
    return not os.path.lexists(text) and _REPO_ID.fullmatch(text) is not None and not text.startswith(".")


def _is_absent(error: Exception) -> bool:
    """Return whether the hub has no such repository. In offline mode, the question is about the cache.

    A gated repository exists.
    """
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
