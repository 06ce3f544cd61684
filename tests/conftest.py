"""Fixtures that the tests share: tiny random pairs of every variant, and the demo pair."""

import importlib
import os
import pkgutil
import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from llguidance import LLMatcher
from support.compiled_header import precompile_header
from support.curves import use_known_costs
from support.paths import WITHOUT_TORCH
from support.tiny import (
    STOP_IDS,
    VOCAB_SIZE,
    load_drafter,
    load_target,
    make_drafter,
    make_target,
    make_tokenizer,
    unpack_demo_pair,
)
from support.tiny_media import make_media_target

import mlx_mtp
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.target import Target
from mlx_mtp.grammars.compiler import compile_grammar
from mlx_mtp.guides import grammar_tokenizer
from mlx_mtp.text.tokenizer import load_tokenizer

# A shell's background jobs ignore this signal, and the commands under test inherit this. A handler is not inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Hypothesis tries constants of all imported modules. Import all, so that earlier tests do not change its examples.
for module in pkgutil.walk_packages(mlx_mtp.__path__, "mlx_mtp."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

# Without this, LiteLLM asks the network for prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers take all cores. More threads of PyTorch and NumPy only wait for each other.
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


# MLX gives its limit only when another one is set.
MEMORY_LIMIT = mx.set_memory_limit(2**40)
mx.set_memory_limit(MEMORY_LIMIT)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", metavar="DIR", help="Where the tests of the chat page put their pictures.")


def pytest_configure(config: pytest.Config) -> None:
    """Prepare a run of many tests, which are those on several workers, before the workers start."""
    if "PYTEST_XDIST_WORKER" not in os.environ and config.getoption("numprocesses", None):
        compiled = precompile_header()
        if compiled is not None:
            config.add_cleanup(lambda: compiled.unlink(missing_ok=True))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests of memory that hold for the CPU only. An accelerator copies a buffer that is in flight."""
    if item.get_closest_marker("in_place") and mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("not covered on this device: writes copy a buffer in flight")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Skip a test of a model or an option that the package refuses on this device. The CPU computes them all."""
    try:
        return (yield)
    except mlx_mtp.DeviceError as error:
        if mx.default_device() == mx.Device(mx.cpu):
            raise
        pytest.skip(f"not covered on this device: {error}")


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Set the folder where commands keep their measurements. All workers share it, and the user's folder is unused."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    os.environ["MLX_MTP_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def commands_without_torch(cache_directory: Path) -> None:
    """Let the commands under test start quickly. See support/without_torch."""
    os.environ["MLX_MTP_TESTS_IMPORTS"] = str(cache_directory.with_name("imports"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(WITHOUT_TORCH), os.environ.get("PYTHONPATH")]))


@pytest.fixture(autouse=True)
def memory_limit() -> Iterator[None]:
    """Undo --memory-limit of a command in this process. Above a limit, all later tests would take twice as long."""
    yield
    mx.set_memory_limit(MEMORY_LIMIT)


@pytest.fixture(autouse=True)
def known_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    use_known_costs(monkeypatch)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo pair in Hugging Face layout, `target/` and `assistant/`. It is read only."""
    folder = tmp_path_factory.mktemp("pair")
    unpack_demo_pair(folder)
    return folder


@pytest.fixture(scope="session")
def switchless(tiny_pair: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny target whose chat template has no switch for thinking."""
    folder = tmp_path_factory.mktemp("switchless") / "target"
    shutil.copytree(tiny_pair("e2b") / "target", folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return folder


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a variant to a tiny pair's folder: `target/` and `target-assistant/`. It is read only."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(variant: str) -> Path:
        if not (root / variant).is_dir():
            make_target(root / variant / "target", variant)
            make_drafter(root / variant / "target-assistant", variant)
        return root / variant

    return folder


@pytest.fixture(scope="session")
def tiny_media(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a variant to the folder of a tiny target with media parts. It is read only."""
    root = tmp_path_factory.mktemp("media")

    def folder(variant: str) -> Path:
        if not (root / variant).is_dir():
            make_media_target(root / variant, variant)
        return root / variant

    return folder


@pytest.fixture(scope="session")
def tiny_models(tiny_pair: Callable[[str], Path]) -> Callable[[str], tuple[Target, Drafter]]:
    """Return a function from a variant to the target and drafter of a tiny random pair, in float32."""
    models: dict[str, tuple[Target, Drafter]] = {}

    def load(variant: str) -> tuple[Target, Drafter]:
        if variant not in models:
            folder = tiny_pair(variant)
            models[variant] = load_target(folder / "target")[0], load_drafter(folder / "target-assistant")[0]
        return models[variant]

    return load


@pytest.fixture(scope="session")
def is_allowed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bool]:
    """Return a check whether a Lark grammar allows a whole text. No token spans two of the text's pieces."""
    wrapper = load_tokenizer(make_tokenizer(tmp_path_factory.mktemp("tokenizer")), STOP_IDS)
    tokenizer = grammar_tokenizer(wrapper, VOCAB_SIZE)

    def check(grammar: str, *pieces: str) -> bool:
        compiled = compile_grammar(grammar=grammar)
        assert compiled is not None
        matcher = LLMatcher(tokenizer, compiled, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        tokens = [token for piece in pieces for token in wrapper.encode(piece, add_special_tokens=False)]
        return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())

    return check
