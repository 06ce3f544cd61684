"""The structure: imports go one way, importing is light, and only config.py reads config.json.

Tests import no tests or scripts. Scripts import no tests.
"""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import mlx_mtp

PACKAGE = Path(mlx_mtp.__file__).parent
ROOT = Path(__file__).parents[2]
# A package or top-level module may import only from the lines below its own.
LAYERS = (
    ("__main__",),
    ("server",),
    ("probe",),
    ("bench", "generate", "chat", "train", "cache_prompt"),
    ("command_line", "training"),
    ("loading",),
    ("shared_loading",),
    ("networks",),
    ("model",),
    ("scheduler",),
    ("batch",),
    ("generation", "prompt_files"),
    ("loaded_model",),
    ("guides", "responses", "media_reader"),
    ("options",),
    ("grammars",),
    ("text", "memory_plan"),
    ("decoding",),
    ("group",),
    ("gemma4", "media"),
    ("checkpoints", "threads", "shell"),
    ("launched",),
    ("errors", "commands", "bandwidth"),
)


def imported(file: Path) -> set[str]:
    """Return the packages and modules below `mlx_mtp` that a file imports from."""
    here = file.relative_to(PACKAGE).parts
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ""
        if node.level:
            # The import is relative to the file's own package.
            names |= {module.split(".")[0]} if len(here) == 1 and module else {here[0]}
        elif module == "mlx_mtp":
            names |= {alias.name for alias in node.names} - {"__version__"}
        elif module.startswith("mlx_mtp."):
            names.add(module.split(".")[1])
    return names


def test_imports_point_one_way() -> None:
    level = {room: index for index, rooms in enumerate(LAYERS) for room in rooms}
    files = [file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"]
    rooms = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in files}
    assert rooms == level.keys(), "a new package belongs in LAYERS"
    for file in files:
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imported(file) - {room}:
            assert name in level, f"{file} imports {name}"
            assert level[name] > level[room], f"{file} imports {name}"


def test_nothing_imports_the_converter_and_config_json_has_one_reader() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert "convert" not in imported(file)
        # output_files.py checks whether the file exists.
        if file.stem not in ("config", "output_files"):
            assert '"config.json"' not in file.read_text(), file


def modules_of(file: Path) -> set[str]:
    """Return the modules that a file imports, each by the first part of its name."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def test_tests_and_scripts_do_not_import_each_other() -> None:
    folders = {name: list((ROOT / name).rglob("*.py")) for name in ("tests", "scripts")}
    assert all(folders.values())
    names = {name: {file.stem for file in files} for name, files in folders.items()}
    for file in folders["tests"]:
        assert not modules_of(file) & (names["scripts"] | {"scripts"} | {n for n in names["tests"] if "test" in n}), (
            file
        )
    for file in folders["scripts"]:
        assert not modules_of(file) & (names["tests"] | {"tests", "support"}), file


def test_importing_is_light() -> None:
    """transformers and torch take seconds. --help and the converter work without them."""
    modules = ", ".join(f"mlx_mtp.{name}" for name in ("generate", "chat", "train", "server.cli", "convert.cli"))
    code = f"import sys, mlx_mtp, {modules}; print(*[name for name, module in sys.modules.items() if module])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"transformers", "torch", "mlx_lm", "fastapi"} & set(result.stdout.split())


def test_a_process_that_is_alone_builds_nothing_of_a_group() -> None:
    code = (
        "import sys, mlx_mtp; model = mlx_mtp.load(mlx_mtp.DEMO_PAIR); model.generate('x', max_tokens=2); "
        "print(*[name for name in sys.modules if name.startswith('mlx_mtp')], type(model.target))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "mlx_mtp.loading" in result.stdout
    assert "mlx_mtp.group" not in result.stdout
    assert "mlx_mtp.shared_loading" not in result.stdout
    assert "mlx_mtp.gemma4.target.Target" in result.stdout


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {file.parent.relative_to(PACKAGE.parent) for file in PACKAGE.rglob("__init__.py")}
    assert {".".join(folder.parts) for folder in found} == set(listed) - {"mlx_mtp.convert"}


def test_public_names() -> None:
    assert mlx_mtp.__version__
    for name in mlx_mtp.__all__:
        assert hasattr(mlx_mtp, name)
    assert (PACKAGE / "py.typed").is_file()
