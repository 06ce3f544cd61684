"""The library inside an app: event loop, threads, freed memory, progress, and no effect on the process."""

import asyncio
import gc
import json
import logging
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.tiny import make_target, random_tokens

import mlx_mtp
from mlx_mtp.decoding import calibration

TinyPair = Callable[[str], Path]
PROMPT = random_tokens(40, seed=3)
LONG = random_tokens(400, seed=4)
OPTIONS = mlx_mtp.GenerationOptions(max_tokens=30, num_draft_tokens=3, ignore_eos=True)
ENDLESS: dict[str, Any] = {"max_tokens": 3000, "num_draft_tokens": 3, "ignore_eos": True}


@pytest.fixture
def model(tiny_pair: TinyPair) -> Iterator[mlx_mtp.Model]:
    with mlx_mtp.load(tiny_pair("e2b") / "target") as model:
        yield model


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def is_idle(model: mlx_mtp.Model) -> bool:
    return model.worker().running == 0


# --- the event loop ---------------------------------------------------------------------------------------------------


def test_the_stream_is_that_of_stream_generate(model: mlx_mtp.Model) -> None:
    expected = list(model.stream_generate(PROMPT, OPTIONS))
    progress: list[Any] = []

    def note(done: int, total: int) -> None:
        progress.append((done, total, threading.current_thread() is threading.main_thread()))

    async def main() -> list[mlx_mtp.GenerationResponse]:
        found = []
        prompt = [*LONG, *PROMPT]
        options: dict[str, Any] = {"max_tokens": 3, "prefill_step_size": 200, "reuse_prompt": False}
        async for response in model.astream_generate(prompt, **options, on_prefill=note):
            # All progress is reported before the first token.
            assert [done for done, *_ in progress] == [200, 400, 440]
            found.append(response)
        assert len(found) == 3
        return [response async for response in model.astream_generate(PROMPT, OPTIONS)]

    found = asyncio.run(main())
    assert [(r.token, r.text, r.from_draft) for r in found] == [(r.token, r.text, r.from_draft) for r in expected]
    assert found[-1].stats == expected[-1].stats
    assert progress == [(done, 440, True) for done in (200, 400, 440)]
    result = asyncio.run(model.agenerate(PROMPT, OPTIONS))
    assert result.tokens == [r.token for r in expected]
    assert result.text == "".join(r.text for r in expected)


def test_several_at_once_decode_together(model: mlx_mtp.Model) -> None:
    """The texts advance together, and each is what it is alone."""
    order: list[int] = []
    prompts = [random_tokens(30 + index, seed=index) for index in range(3)]

    async def answer(index: int) -> list[int]:
        tokens = []
        async for response in model.astream_generate(prompts[index], OPTIONS):
            tokens.append(response.token)
            order.append(index)
        return tokens

    async def main() -> list[list[int]]:
        return await asyncio.gather(*(answer(index) for index in range(3)))

    assert asyncio.run(main()) == [model.generate(prompt, OPTIONS).tokens for prompt in prompts]
    # The first text has not ended when the last one begins.
    assert order.index(2) < len(order) - 1 - order[::-1].index(0)


def test_closing_and_cancelling_end_the_generation(model: mlx_mtp.Model) -> None:
    async def closed() -> None:
        async with aclosing(model.astream_generate(PROMPT, **ENDLESS)) as responses:
            async for response in responses:
                if response.generation_tokens == 5:
                    break

    async def main() -> None:
        await closed()
        await wait_until(lambda: is_idle(model))
        # The tokens that were read stay cached, as after an iterator's close.
        assert 40 <= len(model.prompt_cache.entries[-1].tokens) < 2000
        task = asyncio.create_task(model.agenerate(LONG, **ENDLESS))
        await wait_until(lambda: not is_idle(model))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await wait_until(lambda: is_idle(model))
        # A waiting generation never starts, and none of its prompt is read.
        read = model.prompt_cache.read
        async with aclosing(model.astream_generate(PROMPT, **ENDLESS)) as first:
            await anext(first)
            task = asyncio.create_task(model.agenerate([*LONG, 5, 6], **ENDLESS))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await wait_until(lambda: is_idle(model))
        assert model.prompt_cache.read - read <= len(PROMPT)
        assert (await model.agenerate(PROMPT, OPTIONS)).tokens == model.generate(PROMPT, OPTIONS).tokens

    asyncio.run(main())


def test_cancelling_between_two_chunks_of_the_prompt(model: mlx_mtp.Model) -> None:
    seen: list[int] = []

    async def main() -> None:
        stream = model.astream_generate(
            random_tokens(4000, seed=8), max_tokens=5, prefill_step_size=1, on_prefill=lambda at, _: seen.append(at)
        )
        task = asyncio.ensure_future(anext(stream))
        await wait_until(lambda: bool(seen))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await wait_until(lambda: is_idle(model))

    asyncio.run(main())
    assert seen[-1] < 4000


@pytest.mark.parametrize("how", ["cancelled", "closed"])
def test_ending_it_while_rounds_are_measured(
    model: mlx_mtp.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    measuring = threading.Event()

    def measure(target: object, drafter: object, sampling: object, on_progress: Any, *_: object, **__: object) -> None:
        measuring.set()
        while True:
            on_progress(0, 1)

    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "measure_rounds", measure)

    async def main() -> None:
        task = asyncio.create_task(model.agenerate(PROMPT, min_tokens=1))
        await wait_until(measuring.is_set)
        if how == "closed":
            await asyncio.to_thread(model.close)
            with pytest.raises(mlx_mtp.ClosedError):
                await task
        else:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await wait_until(lambda: is_idle(model))

    asyncio.run(main())


def test_errors_are_raised_with_the_first_item(model: mlx_mtp.Model) -> None:
    def refuse(done: int, total: int) -> None:
        raise KeyError("the window is closed")

    async def main() -> None:
        for prompt, options, error in (
            ([], {}, mlx_mtp.PromptError),
            (PROMPT, {"max_tokens": 0}, mlx_mtp.OptionError),
            (PROMPT, {"regex": "[a"}, mlx_mtp.OptionError),
            (PROMPT, {"colour": "red"}, TypeError),
        ):
            responses = model.astream_generate(prompt, **options)
            with pytest.raises(error):
                await anext(responses)
        with pytest.raises(KeyError, match="the window is closed"):
            await anext(model.astream_generate(PROMPT, on_prefill=refuse))
        assert (await model.agenerate(PROMPT, max_tokens=3)).tokens

    asyncio.run(main())


# --- close ------------------------------------------------------------------------------------------------------------


def active() -> int:
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


@pytest.mark.parametrize("how", ["resident", "mapped", "exact"])
def test_close_gives_the_memory_back(tiny_pair: TinyPair, how: str) -> None:
    """Memory is free after generations of every kind, with open streams, and while the model is still referenced."""
    before = active()
    options = replace(OPTIONS, max_tokens=12)
    kind: dict[str, Any] = {"exact": True} if how == "exact" else {"per_layer_embeddings": how}
    model = mlx_mtp.load(tiny_pair("e2b") / "target", **kind)
    loaded = active() - before
    sampled = mlx_mtp.Sampling(temperature=1.0, top_k=20, seed=5, repetition_penalty=1.1)
    for _ in range(2):
        model.generate(PROMPT, options)
        model.generate(PROMPT, options, sampling=sampled)
        model.generate(PROMPT, max_tokens=12, regex="[a-z ]{5,80}")
        model.generate(PROMPT, options, num_draft_tokens="auto", logprobs=2)
    asyncio.run(model.agenerate(LONG, options))
    if how != "exact":
        assert model.prompt_cache.entries
    is_open = [model.stream_generate(LONG, **ENDLESS) for _ in range(2)]
    next(is_open[0])
    cache = model.prompt_cache
    model.close()
    # Nothing is left for the garbage collector except a few keys of random numbers.
    assert mx.get_active_memory() - before < 4096 < loaded / 20
    assert mx.get_cache_memory() == 0
    assert not cache.entries
    for iterator in is_open:
        with pytest.raises(mlx_mtp.ClosedError, match="the model is closed"):
            next(iterator)
        with pytest.raises(StopIteration):
            next(iterator)


def test_models_used_on_two_threads_leave_nothing_to_each_other(tmp_path: Path) -> None:
    """MLX caches compiled functions by thread and function address. A later model can have the same address."""
    options = mlx_mtp.GenerationOptions(max_tokens=12, num_draft_tokens=0, ignore_eos=True)
    folders = [make_target(tmp_path / str(seed), "e2b", seed=seed) for seed in (1, 2)]
    expected = []
    for folder in folders:
        with mlx_mtp.load(folder) as model:
            expected.append(model.generate(PROMPT, options).tokens)
    assert expected[0] != expected[1]
    before = active()
    for _ in range(3):
        for folder, tokens in zip(folders, expected, strict=True):
            with mlx_mtp.load(folder) as model:
                assert model.generate(PROMPT, options).tokens == tokens
                # The last use is on the thread that ends with the model. The main thread must also forget the model.
                assert asyncio.run(model.agenerate(PROMPT, options)).tokens == tokens
            assert active() - before < 4096


def test_everything_is_an_error_once_it_is_closed(model: mlx_mtp.Model, tmp_path: Path) -> None:
    assert not model.is_closed
    model.close()
    model.close()
    assert model.is_closed
    for use in (
        lambda: model.stream_generate(PROMPT),
        lambda: model.generate("text"),
        lambda: model.encode("text"),
        lambda: model.encode([]),
        lambda: model.calibrate(),
        lambda: model.save_prompt(PROMPT, tmp_path / "file"),
        lambda: model.load_prompt(tmp_path / "file"),
        lambda: model.prompt_cache,
        lambda: model.target,
        lambda: model.drafter,
        lambda: model.tokenizer,
        lambda: model.embedding_stats,
        lambda: model.__enter__(),
        lambda: asyncio.run(model.agenerate(PROMPT)),
    ):
        with pytest.raises(mlx_mtp.ClosedError):
            use()
    with pytest.raises(AttributeError, match="'Model' object has no attribute 'colour'"):
        model.colour  # noqa: B018
    # The facts from its folder are still available.
    assert model.max_context == 4096


def test_closing_ends_what_runs_on_the_loop(model: mlx_mtp.Model) -> None:
    async def main() -> None:
        running, waiting = (model.astream_generate(PROMPT, **ENDLESS) for _ in range(2))
        await anext(running)
        task = asyncio.ensure_future(anext(waiting))
        await asyncio.sleep(0)
        await asyncio.to_thread(model.close)
        with pytest.raises(mlx_mtp.ClosedError):
            async for _ in running:
                pass
        with pytest.raises(mlx_mtp.ClosedError):
            await task

    asyncio.run(main())


@pytest.mark.parametrize("step", [512, 1], ids=["in rounds", "in a prompt"])
def test_closing_while_another_thread_generates(model: mlx_mtp.Model, step: int) -> None:
    begun = threading.Event()
    found: list[str] = []

    def run() -> None:
        options = {**ENDLESS, "max_tokens": 90000, "prefill_step_size": step}
        try:
            for _ in model.stream_generate(random_tokens(500, seed=8), on_prefill=lambda *_: begun.set(), **options):
                pass
        except mlx_mtp.ClosedError as error:
            found.append(str(error))
        finally:
            mx.clear_streams()

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(20)
    model.close()
    thread.join(20)
    assert found == ["the model is closed: load it again"]


def test_closing_from_a_callback(tiny_pair: TinyPair) -> None:
    before = active()
    model = mlx_mtp.load(tiny_pair("e2b") / "target")

    async def waits() -> None:
        # This generation waits on the model's thread for the generation whose callback closes the model.
        with pytest.raises(mlx_mtp.ClosedError):
            await model.agenerate(PROMPT, **ENDLESS)

    other = threading.Thread(target=lambda: asyncio.run(waits()))

    def close(done: int, total: int) -> None:
        other.start()
        while not model.worker().waiting:
            pass
        model.close()

    with pytest.raises(mlx_mtp.ClosedError):
        next(model.stream_generate(LONG, on_prefill=close, prefill_step_size=50))
    other.join(20)
    assert not other.is_alive()
    assert active() - before < 4096


def test_a_model_that_is_dropped_needs_no_closing(tiny_pair: TinyPair) -> None:
    before, threads = active(), set(threading.enumerate())
    model = mlx_mtp.load(tiny_pair("e2b") / "target")
    asyncio.run(model.agenerate(PROMPT, OPTIONS))
    (thread,) = set(threading.enumerate()) - threads
    del model
    assert active() - before < 4096
    thread.join(10)
    assert not thread.is_alive()


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["resident", "mapped"])
def test_progress_of_loading(tiny_pair: TinyPair, placement: Any) -> None:
    folder = tiny_pair("e2b")
    seen: list[tuple[int, int]] = []
    model = mlx_mtp.load(
        folder / "target",
        per_layer_embeddings=placement,
        on_load=lambda *at: seen.append(at),
        on_download=pytest.fail,  # type: ignore[arg-type]
    )
    done = [at for at, _ in seen]
    assert len(done) > 20
    assert done == sorted(set(done))
    (total,) = {total for _, total in seen}
    assert done[-1] == total
    sizes = [(folder / name / "model.safetensors").stat().st_size for name in ("target", "target-assistant")]
    table = 0 if placement == "resident" else model.target.config.vocab_size * 4 * 128
    assert 0.5 * sum(sizes) < total <= sum(sizes) - table
    expected = mlx_mtp.load(folder / "target").generate(PROMPT, OPTIONS).tokens
    assert model.generate(PROMPT, OPTIONS).tokens == expected


@pytest.mark.parametrize("share", [0.1, 0.9], ids=["target", "drafter"])
def test_an_error_of_the_callback_ends_loading(tiny_pair: TinyPair, share: float) -> None:
    folder = tiny_pair("e2b") / "target"
    before = active()

    def cancel(done: int, total: int) -> None:
        if done > share * total:
            raise OSError("enough")

    with pytest.raises(OSError, match="enough"):
        mlx_mtp.load(folder, on_load=cancel)
    assert active() - before < 4096
    assert mlx_mtp.load(folder).generate(PROMPT, max_tokens=3).tokens


def test_loading_for_an_event_loop(tiny_pair: TinyPair) -> None:
    folder = tiny_pair("e2b") / "target"
    before = active()
    seen: list[tuple[int, bool]] = []

    def note(done: int, total: int) -> None:
        seen.append((done, threading.current_thread() is threading.main_thread()))

    def refuse(done: int, total: int) -> None:
        raise KeyError("enough")

    async def main() -> list[int]:
        with pytest.raises(mlx_mtp.ConfigError, match="no such folder"):
            await mlx_mtp.aload("absent")
        with pytest.raises(KeyError, match="enough"):
            await mlx_mtp.aload(folder, on_load=refuse)
        task = asyncio.create_task(mlx_mtp.aload(folder, on_load=note))
        await wait_until(lambda: bool(seen))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # The load's thread has ended.
        assert not any(thread.name == "mlx-mtp load" for thread in threading.enumerate())
        seen.clear()
        with await mlx_mtp.aload(folder, "none", on_load=note, max_context=100) as model:
            assert (model.drafter, model.max_context) == (None, 100)
            return (await model.agenerate(PROMPT, max_tokens=9)).tokens

    tokens = asyncio.run(main())
    assert len(seen) > 20
    assert all(on_loop for _, on_loop in seen)
    assert active() - before < 4096
    with mlx_mtp.load(folder, "none") as model:
        assert model.generate(PROMPT, max_tokens=9).tokens == tokens


# --- the process ------------------------------------------------------------------------------------------------------

QUIET = """
import sys
# As in an app that is packaged without PyTorch.
sys.modules["torch"] = None
import asyncio, os, signal, threading

def handlers():
    return {s: signal.getsignal(s) for s in signal.valid_signals()}

before, environment = handlers(), dict(os.environ)
import logging, mlx_mtp
loggers = [logging.getLogger().handlers[:], logging.getLogger().level]
models = [mlx_mtp.load(folder, on_load=lambda *_: None) for folder in sys.argv[1:3]]
answers = []
for model in models:
    answers.append(model.generate("hello there", max_tokens=20, num_draft_tokens=3).tokens)

async def both():
    return await asyncio.gather(*(m.agenerate("hello there", max_tokens=20, num_draft_tokens=3) for m in models))

assert [result.tokens for result in asyncio.run(both())] == answers
interleaved = [[], []]
streams = [m.stream_generate("hello there", max_tokens=20, num_draft_tokens=3, reuse_prompt=False) for m in models]
for pair in zip(*streams):
    for tokens, response in zip(interleaved, pair):
        tokens.append(response.token)
assert interleaved == answers, (interleaved, answers)
models[0].close()
assert models[1].generate("hello there", max_tokens=20, num_draft_tokens=3).tokens == answers[1]
assert models[1].generate([{"role": "user", "content": "hi"}], max_tokens=9).tokens
models[1].close()
assert handlers() == before
assert [logging.getLogger().handlers, logging.getLogger().level] == loggers
# What mlx-lm sets when it is imported.
assert dict(os.environ) == environment | {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}, os.environ
assert threading.active_count() == 1, threading.enumerate()
"""


def test_nothing_is_printed_and_nothing_of_the_process_is_changed(tiny_pair: TinyPair) -> None:
    folders = [str(tiny_pair(variant) / "target") for variant in ("e2b", "12b")]
    result = subprocess.run([sys.executable, "-c", QUIET, *folders], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_what_is_logged(tiny_pair: TinyPair, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "lonely"
    shutil.copytree(tiny_pair("12b") / "target", folder)
    with caplog.at_level(logging.INFO, logger="mlx_mtp"):
        mlx_mtp.load(folder).close()
    assert caplog.messages == [
        f"no drafter found for {folder}: decoding plainly",
        next(message for message in caplog.messages if message.startswith(f"loaded {folder} in ")),
        f"closed {folder}",
    ]


THREADS = """
import asyncio, json, sys, threading
import mlx.core as mx, mlx_mtp

def in_thread(function):
    result = []

    def run():
        try:
            result.append(function())
        finally:
            mx.clear_streams()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result[0]

def generate():
    return model.generate("def f(x):", max_tokens=12, num_draft_tokens=3, reuse_prompt=False).tokens

async def agenerate():
    result = await model.agenerate("def f(x):", max_tokens=12, num_draft_tokens=3, reuse_prompt=False)
    return result.tokens

async def load_in_pool():
    return await asyncio.to_thread(load)

load = lambda: mlx_mtp.load(mlx_mtp.DEMO_PAIR)
where, ways, end = sys.argv[1:]
model = {"main": load, "thread": lambda: in_thread(load), "pool": lambda: asyncio.run(load_in_pool())}[where]()
run = {"main": generate, "thread": lambda: in_thread(generate), "loop": lambda: asyncio.run(agenerate())}
print(json.dumps([run[way]() for way in ways.split()]))
if end == "close":
    model.close()
"""


@pytest.fixture(scope="module")
def text() -> list[int]:
    """The tokens that the program makes, made on this thread."""
    with mlx_mtp.load(mlx_mtp.DEMO_PAIR) as model:
        return model.generate("def f(x):", max_tokens=12, num_draft_tokens=3).tokens


@pytest.mark.parametrize(
    ("where", "ways", "end"),
    [
        ("main", "loop main loop", "leave"),
        ("main", "main thread loop", "close"),
        ("thread", "main loop thread", "leave"),
        ("thread", "loop thread main", "close"),
        ("pool", "loop main", "leave"),
    ],
)
def test_threads_in_every_combination(text: list[int], where: str, ways: str, end: str) -> None:
    """A model is loaded on one thread and used on others. The program ends without an abort."""
    command = [sys.executable, "-c", THREADS, where, ways, end]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    tokens = json.loads(result.stdout)
    assert tokens == [text] * len(ways.split())
