"""The structure: imports point one way, importing is light, and only config.py reads config.json."""

import ast
import subprocess
import sys
from pathlib import Path

import mlx_mtp

PACKAGE = Path(mlx_mtp.__file__).parent
# A module may import from the lines below its own only.
LAYERS = (
    ("server",),
    ("http_api",),
    ("anthropic_answers",),
    ("anthropic_errors", "anthropic_requests"),
    ("http_entry",),
    ("openai_answers", "service"),
    ("openai_requests",),
    ("openai_fields",),
    ("probe",),
    ("bench", "generate", "chat", "train", "cache_prompt"),
    ("cli", "training", "peers", "plots"),
    ("load", "dataset"),
    ("engine",),
    ("tokenizer", "text", "tool_grammar", "answer_schema", "calibration", "exact", "graph", "memory"),
    ("argument_rules",),
    ("speculative", "distill", "centroids", "draft_vocab"),
    ("drafter",),
    ("chat_template", "control_marks", "acceptance", "gemma4", "guide", "sampling", "prompt_cache"),
    ("tool_calls", "tool_schemas"),
    ("tool_call_repair",),
    ("call_syntax",),
    ("cache", "embeddings", "argument_schema", "tokenizer_files", "conversation", "markers"),
    ("weights",),
    ("config", "draft_length"),
    ("output", "lifetime", "hub", "shell", "schemas", "string_rules"),
    ("files",),
    ("worker",),
    ("errors", "commands"),
)


def imported(file: Path) -> set[str]:
    """Names of this package's modules a file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            names.add(node.module)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_mtp."):
            names.add((node.module or "").split(".")[1])
    return names


def test_imports_point_one_way() -> None:
    level = {module: index for index, modules in enumerate(LAYERS) for module in modules}
    modules = {file.stem for file in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules == level.keys(), "a new module belongs in LAYERS"
    for module in modules:
        for name in imported(PACKAGE / f"{module}.py"):
            assert level[name] > level[module], f"{module} imports {name}"


def test_nothing_imports_the_converter_and_config_json_has_one_reader() -> None:
    for file in PACKAGE.glob("*.py"):
        assert "convert" not in imported(file)
        # output.py looks whether there is one.
        if file.stem not in ("config", "output"):
            assert '"config.json"' not in file.read_text(), file


def test_importing_is_light() -> None:
    """transformers and torch take seconds: --help and the converter do without them."""
    modules = ", ".join(f"mlx_mtp.{name}" for name in ("generate", "chat", "train", "server", "convert.cli"))
    code = f"import sys, mlx_mtp, {modules}; print(*[name for name, module in sys.modules.items() if module])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"transformers", "torch", "mlx_lm", "fastapi"} & set(result.stdout.split())


def test_public_names() -> None:
    assert mlx_mtp.__version__
    for name in mlx_mtp.__all__:
        assert hasattr(mlx_mtp, name)
    assert (PACKAGE / "py.typed").is_file()
