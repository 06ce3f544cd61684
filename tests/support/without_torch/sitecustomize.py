"""Let the commands that tests run start in a third of the time.

PyTorch is hidden: users do not have it. transformers reads all of its source files and the lists of all installed files
when it is imported. The commands of a run share what it finds, in the folder of the variable MLX_MTP_TESTS_IMPORTS.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

sys.modules["torch"] = None  # type: ignore[assignment]


def kept(function: Callable[..., Any], folder: str) -> Callable[..., Any]:
    """Return `function` with results that are kept in files of this folder."""
    import hashlib
    import pickle

    def read_or_call(*args: Any, **kwargs: Any) -> Any:
        key = hashlib.sha256(repr((function.__name__, args, kwargs)).encode()).hexdigest()
        file = os.path.join(folder, key)
        try:
            with open(file, "rb") as kept_result:
                return pickle.load(kept_result)
        except FileNotFoundError:
            result = function(*args, **kwargs)
            os.makedirs(folder, exist_ok=True)
            with open(f"{file}.{os.getpid()}", "wb") as part:
                pickle.dump(result, part)
            os.replace(part.name, file)
            return result

    return read_or_call


class ImportUtilsFinder:
    """Find the module of transformers that reads the files, and replace its slow functions."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "transformers.utils.import_utils":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            import importlib.metadata

            original = importlib.metadata.packages_distributions
            importlib.metadata.packages_distributions = kept(original, self.folder)
            try:
                execute(module)
            finally:
                importlib.metadata.packages_distributions = original
            module.define_import_structure = kept(module.define_import_structure, self.folder)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if folder := os.environ.get("MLX_MTP_TESTS_IMPORTS"):
    sys.meta_path.insert(0, ImportUtilsFinder(folder))
