"""The server with many clients, clients that disconnect, and signals."""

import asyncio
import gc
import json
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import httpx2
import mlx.core as mx
import openai
import pytest
from support.serving import Served, eventually, process, serve, value

import mlx_mtp
from mlx_mtp import DEMO_PAIR, GenerationOptions, Model
from mlx_mtp.decoding.report import RoundReport
from mlx_mtp.responses import Responder
from mlx_mtp.server import cli as server

K = 2
# This is far more than any test waits for.
ENDLESS = 3900
DEMO = ("--num-draft-tokens", str(K), "--temp", "0")


def load() -> Model:
    return mlx_mtp.load(DEMO_PAIR)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    options = GenerationOptions(num_draft_tokens=K, max_tokens=16)
    with serve(load, options, max_waiting=250, keep_alive=0.05) as found:
        yield found


def body(prompt: str, **options: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 4, "temperature": 0} | options


def is_idle(served: Served) -> bool:
    return served.service.worker.running == served.service.worker.waiting == 0


@pytest.fixture(scope="module")
def tiny(tiny_pair: Callable[[str], Path]) -> Iterator[Served]:
    options = GenerationOptions(num_draft_tokens=K, max_tokens=16)
    with serve(lambda: mlx_mtp.load(tiny_pair("31b") / "target"), options, max_waiting=250) as found:
        yield found


def test_200_at_once(tiny: Served, tiny_pair: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No request is lost or mixed up, requests run in order of arrival, and memory returns to its level."""
    prompts = [f"value_{i} = compute_{i * 7 % 200}(" for i in range(200)]
    model = mlx_mtp.load(tiny_pair("31b") / "target")
    expected = {prompt: model.generate(prompt, max_tokens=4, num_draft_tokens=K).text for prompt in prompts}
    assert len(set(expected.values())) > 150
    asked: list[Any] = []
    ran: list[Any] = []
    service = tiny.service
    # The prompt cache is small, so memory must become free again. A leak of 60 texts would be seen.
    entry = model.prompt_cache.entries[0].nbytes
    assert 30 * entry > 1_000_000
    service.model.prompt_cache.limit = 10 * entry
    submit, prepare = service.submit, service.prepare

    def and_note(task: Any) -> Any:
        asked.append(task.prompt)
        return submit(task)

    def and_note_too(task: Any) -> Any:
        ran.append(task.prompt)
        return prepare(task)

    monkeypatch.setattr(service, "submit", and_note)
    monkeypatch.setattr(service, "prepare", and_note_too)

    async def ask_all(prompts: list[str]) -> list[str]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=tiny.v1, limits=limits, timeout=120) as client:
            answers = await asyncio.gather(*[client.post("/completions", json=body(prompt)) for prompt in prompts])
        assert [answer.status_code for answer in answers] == [200] * len(prompts)
        return [answer.json()["choices"][0]["text"] for answer in answers]

    assert dict(zip(prompts, asyncio.run(ask_all(prompts)), strict=True)) == expected
    assert sorted(asked) == sorted(prompts)
    assert ran == asked
    gc.collect()
    before = mx.get_active_memory()
    asyncio.run(ask_all(prompts[:60]))
    gc.collect()
    assert mx.get_active_memory() <= before + 1_000_000
    assert is_idle(tiny)


def test_100_clients_that_leave(served: Served) -> None:
    rng = random.Random(0)

    async def leave(client: httpx.AsyncClient, index: int, seconds: float) -> None:
        content = body(f"x_{index} = ", max_tokens=ENDLESS, ignore_eos=True, stream=index % 2 == 0)

        async def ask() -> None:
            async with client.stream("POST", "/completions", json=content) as answer:
                async for _ in answer.aiter_lines():
                    pass

        with suppress(TimeoutError):
            await asyncio.wait_for(ask(), seconds)

    async def leave_all() -> None:
        async with httpx.AsyncClient(base_url=served.v1, timeout=60) as client:
            for wave in range(5):
                clients = [leave(client, 20 * wave + index, rng.uniform(0, 0.4)) for index in range(20)]
                await asyncio.gather(*clients)

    asyncio.run(leave_all())
    eventually(lambda: is_idle(served))
    answer = httpx.post(f"{served.v1}/completions", json=body("def f("))
    assert answer.json()["choices"][0]["text"] == load().generate("def f(", max_tokens=4, num_draft_tokens=K).text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_generation(served: Served, stream: bool) -> None:
    tokens = served.service.metrics.generation_tokens
    before = value(tokens)
    content = body("def f(", max_tokens=ENDLESS, ignore_eos=True, stream=stream)
    timeout = httpx.Timeout(60, read=None if stream else 1.0)
    with (
        suppress(httpx.ReadTimeout),
        httpx.stream("POST", f"{served.v1}/completions", json=content, timeout=timeout) as answer,
    ):
        # The lines before tell the progress of the prompt.
        next(line for line in answer.iter_lines() if line.startswith("data:"))
        assert served.service.worker.running == 1
    eventually(lambda: is_idle(served))
    assert 0 < value(tokens) - before < ENDLESS / 2


def test_streams_say_that_they_live(served: Served) -> None:
    long = body("def f(" * 400, stream=True, max_tokens=1)
    with httpx.stream("POST", f"{served.v1}/completions", json=long, timeout=60) as answer:
        lines = list(answer.iter_lines())
    assert sum(re.fullmatch(r": prefill \d+/1200", line) is not None for line in lines) == 3


def test_a_stream_that_waits_says_that_it_lives() -> None:
    endless = body("x = ", max_tokens=ENDLESS, ignore_eos=True, stream=True)
    alone = serve(load, GenerationOptions(num_draft_tokens=K), keep_alive=0.05, concurrency=1)
    with alone as served, httpx.stream("POST", f"{served.v1}/completions", json=endless, timeout=60) as busy:
        # The iterator must stay referenced, because a lost iterator closes the connection.
        busy_lines = busy.iter_lines()
        next(busy_lines)
        with httpx.stream("POST", f"{served.v1}/completions", json=body("y", stream=True), timeout=60) as waiting:
            lines_waiting = waiting.iter_lines()
            assert next(lines_waiting) == ": keep-alive"
            busy.close()
            assert any(line.startswith("data: ") for line in lines_waiting)


def test_a_full_queue_is_said() -> None:
    with serve(load, GenerationOptions(num_draft_tokens=K), max_waiting=1, concurrency=1) as served:
        endless = body("x = ", max_tokens=ENDLESS, ignore_eos=True, stream=True)
        url = f"{served.v1}/completions"
        with httpx.stream("POST", url, json=endless, timeout=60) as busy:
            busy_lines = busy.iter_lines()
            next(busy_lines)
            with suppress(httpx.ReadTimeout):
                httpx.post(url, json=endless, timeout=0.3)
            # The client that disconnected makes room.
            eventually(lambda: served.service.worker.waiting == 0)

            async def two_more() -> list[httpx.Response]:
                async with httpx.AsyncClient(timeout=60) as client:
                    asked = [asyncio.create_task(client.post(url, json=body("y"))) for _ in range(3)]
                    done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
                    while len(done) < 2:
                        done, _ = await asyncio.wait(asked, timeout=0.01)
                    refused = [task.result() for task in done]
                    busy.close()
                    return refused + [await task for task in asked if task not in done]

            *refused, served_one = asyncio.run(two_more())
        for answer in refused:
            assert answer.status_code == 429
            assert answer.json()["error"]["code"] == "queue_full"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert served_one.status_code == 200


def test_what_fails_is_said_and_the_next_is_served(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a secret of the machine")

    failed = served.service.metrics.requests.labels("error")
    before = value(failed)
    for stream in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(served.service, "prepare", fail)
            answer = httpx.post(f"{served.v1}/completions", json=body("x", stream=stream))
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "secret" not in answer.text
    assert value(failed) - before == 2
    assert httpx.post(f"{served.v1}/completions", json=body("x")).status_code == 200


def test_what_fails_later_is_said_in_the_stream(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Responder.add

    def fail_after_two(self: Responder, report: RoundReport) -> Iterator[Any]:
        for response in add(self, report):
            if response.generation_tokens > 2:
                raise RuntimeError("a secret of the machine")
            yield response

    monkeypatch.setattr(Responder, "add", fail_after_two)
    with openai.OpenAI(base_url=served.v1, api_key="any", max_retries=0) as client:
        chunks = client.completions.create(model="pair", prompt="def f(", stream=True, max_tokens=8)
        assert [next(chunks).choices[0].text for _ in range(2)]
        with pytest.raises(openai.APIError, match="the server's log says why"):
            next(chunks)
        events = list(client.responses.create(model="pair", input="def f(", stream=True))
    assert events[-1].type == "response.failed"


def ask(url: str, **options: Any) -> str:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        answer = client.completions.create(model="demo", prompt="def f(", max_tokens=6, temperature=0, **options)
        text: str = answer.choices[0].text
    return text


def test_a_killed_server_is_a_clean_error_and_the_next_one_serves() -> None:
    with process(*DEMO) as (url, running), openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        expected = ask(url)
        extra = {"ignore_eos": True}
        stream = client.completions.create(model="demo", prompt="x", stream=True, max_tokens=ENDLESS, extra_body=extra)
        next(iter(stream))
        running.kill()
        with pytest.raises((openai.APIConnectionError, httpx2.TransportError)):
            list(stream)
        port = url.rpartition(":")[2]
    with process(*DEMO, "--port", port) as (again, _):
        assert again == url
        assert ask(again) == expected


def test_shutting_down_lets_generations_finish() -> None:
    with process(*DEMO) as (url, running):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            extra = {"ignore_eos": True}
            options: Any = {"model": "demo", "prompt": "x", "stream": True, "extra_body": extra}
            chunks = iter(client.completions.create(max_tokens=200, **options))
            next(chunks)
            running.send_signal(signal.SIGTERM)
            assert list(chunks)[-1].choices[0].finish_reason == "length"
        assert running.wait(20) == 0
        assert running.stderr is not None
        assert "Traceback" not in running.stderr.read()


def test_shutting_down_ends_what_takes_too_long() -> None:
    with process(*DEMO, "--shutdown-timeout", "0.2") as (url, running):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            extra = {"ignore_eos": True}
            options: Any = {"model": "demo", "prompt": "x", "stream": True, "extra_body": extra}
            chunks = iter(client.completions.create(max_tokens=ENDLESS, **options))
            next(chunks)
            running.send_signal(signal.SIGINT)
            with pytest.raises(openai.APIError, match="shutting down"):
                list(chunks)
        assert running.wait(20) == 0
        assert running.stderr is not None
        assert "Traceback" not in running.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from other machines: give an --api-key"),
        (["--host", "::"], "--host :: can be reached from other machines: give an --api-key"),
        (["--host", "example.com"], "--host example.com can be reached from other machines: give an --api-key"),
        (["--api-key", ""], "--api-key is empty"),
        (["--max-queue", "-1"], "--max-queue must be at least 0, found -1"),
        (["--port", "70000"], "--port must be between 0 and 65535, found 70000"),
        (["--model", "no/such/folder"], "no/such/folder: no such folder"),
        (["--prefill-step-size", "0"], "prefill_step_size must be an integer of at least 1, found 0"),
        (["--max-tokens", "0"], "max_tokens must be an integer of at least 1, found 0"),
        (["--num-draft-tokens", "3", "--drafter", "none"], "num_draft_tokens is 3, but no drafter is loaded"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert server.main(["--port", "0", *arguments]) == 1
    found = capsys.readouterr()
    assert message in found.err
    assert found.out == ""


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert server.main(["--port", str(port)]) == 1
    assert f"error: 127.0.0.1:{port} cannot be bound" in capsys.readouterr().err


def test_without_the_extra(tmp_path: Path) -> None:
    (tmp_path / "fastapi.py").write_text("raise ImportError('No module named fastapi', name='fastapi')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from mlx_mtp.server.cli import main; sys.exit(main([]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "error: the server needs fastapi: pip install 'mlx-mtp[server]'\n"


def test_help() -> None:
    result = subprocess.run([sys.executable, "-m", "mlx_mtp.server", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    for option in ("--host", "--port", "--api-key", "--max-queue", "--allowed-origins", "--num-draft-tokens"):
        assert option in result.stdout


def test_the_log_and_the_chunks_of_a_prompt() -> None:
    with process(*DEMO, "--prefill-step-size", "5") as (url, running):
        body = {"messages": [{"role": "user", "content": "x" * 30}], "max_tokens": 1, "colour": "red", "stream": True}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert ": prefill 5/" in answer.text
        assert ": prefill 10/" in answer.text
        assert httpx.get(f"{url}/health").status_code == 200
        running.send_signal(signal.SIGTERM)
        log = running.communicate(timeout=60)[1]
    assert log.count("'colour' of a request is ignored") == 1
    assert "POST /v1/chat/completions" in log
    # Apps ask for it again and again.
    assert "/health" not in log


def test_key_from_the_environment_and_a_model_by_name() -> None:
    arguments = ("--host", "127.0.0.1", "--served-model-name", "gemma", "--allowed-hosts", "mac.example", *DEMO)
    with process(*arguments, env={"MLX_MTP_API_KEY": "s3cret"}) as (url, running):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        answer = httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer s3cret"})
        assert json.loads(answer.text)["data"][0]["id"] == "gemma"
        # Only this machine's names and allowed hosts are accepted. A page on another host cannot make a browser ask.
        hosts = {"evil.example": 400, "mac.example:80": 200, "localhost": 200, "host.docker.internal:8080": 200}
        for host, status in hosts.items():
            assert httpx.get(f"{url}/health", headers={"Host": host}).status_code == status, host
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 0
