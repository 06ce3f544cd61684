"""Source files for prompts and measurements that are not in the training data of the small pairs."""

import importlib.util
import sysconfig
from pathlib import Path

import mlx_mtp

# These files of the standard library are left out when a pair is trained.
STDLIB = (
    "curses/has_key.py",
    "asyncio/streams.py",
    "lib2to3/fixes/fix_raise.py",
    "wsgiref/simple_server.py",
    "tkinter/simpledialog.py",
    "posixpath.py",
    "queue.py",
    "email/mime/image.py",
    "venv/__init__.py",
    "importlib/resources/_common.py",
    "xmlrpc/client.py",
    "hmac.py",
)
# These files are from installed packages of other authors.
PACKAGES = (
    "mlx_lm/generate.py",
    "huggingface_hub/hf_file_system.py",
    "numpy/lib/_npyio_impl.py",
    "mlx/nn/layers/linear.py",
    "tqdm/std.py",
)


def stdlib_files() -> list[Path]:
    """Return the held-out files of this Python's standard library. Some versions lack some of the files."""
    root = Path(sysconfig.get_path("stdlib"))
    return [root / name for name in STDLIB if (root / name).is_file()]


def package_files() -> list[Path]:
    """Return the held-out files of installed packages."""
    files = []
    for name in PACKAGES:
        package, _, rest = name.partition("/")
        spec = importlib.util.find_spec(package)
        folders = [] if spec is None else list(spec.submodule_search_locations or [])
        files += [Path(folder) / rest for folder in folders if (Path(folder) / rest).is_file()]
    return files


def prompts(model: mlx_mtp.Model, files: list[Path], length: int) -> list[list[int]]:
    """Return the first `length` tokens of each file that has at least `length` tokens."""
    texts = (model.tokenizer.encode(file.read_text(encoding="utf-8")) for file in files)
    return [tokens[:length] for tokens in texts if len(tokens) >= length]
