"""The server with several requests at the same time: their answers are those of single requests."""

import asyncio
import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.scripted import load_demo_pair
from support.serving import Served, eventually, serve

from mlx_mtp import GenerationOptions
from mlx_mtp.server import cli as server

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}},
    "required": ["a"],
}
SCHEMA |= {"additionalProperties": False}
# Requests of every kind. The texts of seeds do not depend on other requests, also where rounds copy draft tokens.
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("completions", {"prompt": "def main(", "logprobs": 2}),
    ("completions", {"prompt": "import os\n" * 40, "stop": ["\n\n"]}),
    ("completions", {"prompt": "x = ", "temperature": 1.0, "acceptance": "coupled", "seed": 5}),
    ("completions", {"prompt": "x = ", "repetition_penalty": 1.3, "num_draft_tokens": 0}),
    ("chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "logit_bias": {"300": 5}}),
    (
        "chat/completions",
        {
            "messages": [{"role": "user", "content": "Hi"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
        },
    ),
    ("completions", {"prompt": "class A:", "temperature": 0.9, "seed": 3, "num_draft_tokens": 3}),
    ("completions", {"prompt": "def add(a, b):\n" * 20, "temperature": 0.5, "seed": 5, "include_stats": True}),
    ("completions", {"prompt": "while True", "num_draft_tokens": 8, "ignore_eos": True}),
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(load_demo_pair, GenerationOptions(max_tokens=24), concurrency=4) as found:
        yield found


def metrics(served: Served) -> dict[str, float]:
    families = text_string_to_metric_families(httpx.get(f"{served.url}/metrics").text)
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


def test_answers_are_those_of_single_requests(served: Served) -> None:
    """Nine requests at once, of which four run together, have the answers that they have alone."""

    async def ask(client: httpx.AsyncClient, path: str, fields: dict[str, Any]) -> Any:
        answer = await client.post(f"{served.v1}/{path}", json={"temperature": 0} | fields)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        copied = body["stats"]["copied"]["rounds"] if "stats" in body else 0
        return body["choices"], body["usage"]["completion_tokens"], copied

    async def main() -> tuple[list[Any], list[Any]]:
        async with httpx.AsyncClient(timeout=60) as client:
            alone = [await ask(client, *each) for each in REQUESTS]
            return alone, await asyncio.gather(*(ask(client, *each) for each in REQUESTS))

    alone, together = asyncio.run(main())
    assert together == alone
    assert sum(copied for *_, copied in alone) > 0
    found = metrics(served)
    assert found["mlx_mtp_rows_per_pass_sum"] > found["mlx_mtp_rows_per_pass_count"]
    assert found["mlx_mtp_time_per_token_seconds_count"] == 2 * len(REQUESTS)


def test_a_request_need_not_wait_for_the_end_of_others(served: Served) -> None:
    """Three endless streams run. A fourth request is answered meanwhile, and clients that leave end their own text."""
    endless = {"prompt": "x = ", "max_tokens": 3900, "ignore_eos": True, "stream": True}
    with ExitStack() as stack:
        streams = [
            stack.enter_context(httpx.stream("POST", f"{served.v1}/completions", json=endless, timeout=60))
            for _ in range(3)
        ]
        lines = [stream.iter_lines() for stream in streams]
        for each in lines:
            assert any(line.startswith("data: ") for line in each)
        for path, fields in REQUESTS[:2]:
            assert httpx.post(f"{served.v1}/{path}", json=fields, timeout=60).status_code == 200
        health = httpx.get(f"{served.url}/health").json()
        assert (health["running"], health["waiting"]) == (3, 0)
        assert health["last_pass"]["rows"] >= 3
        assert 0 <= health["last_pass"]["without_drafts"] <= 3
        streams[0].close()
        eventually(lambda: served.service.worker.running == 2)
        # The others go on.
        for each in lines[1:]:
            assert any(line.startswith("data: ") for line in each)
    eventually(lambda: served.service.worker.running == 0)


def test_a_long_prompt_does_not_stop_a_running_text(served: Served) -> None:
    """A text goes on while a prompt of many chunks is read. Signs of life tell how far the prompt is."""
    endless = {"prompt": "x = ", "max_tokens": 3900, "ignore_eos": True, "stream": True}
    prompt = {"prompt": "y = 1\n" * 500, "max_tokens": 2, "stream": True}
    tokens = 0
    at_chunk: list[int] = []
    url = f"{served.v1}/completions"

    async def main() -> None:
        nonlocal tokens

        async def read(client: httpx.AsyncClient) -> None:
            async with client.stream("POST", url, json=prompt) as stream:
                async for line in stream.aiter_lines():
                    if re.match(r": prefill \d+/\d+", line):
                        at_chunk.append(tokens)

        async with httpx.AsyncClient(timeout=60) as client, client.stream("POST", url, json=endless) as running:
            reader: asyncio.Task[None] | None = None
            async for line in running.aiter_lines():
                tokens += line.startswith("data: ")
                if tokens == 5 and reader is None:
                    reader = asyncio.create_task(read(client))
                if reader is not None and reader.done():
                    await reader
                    break

    asyncio.run(main())
    assert len(at_chunk) >= 3
    # Between two chunks, the running text has at least one round.
    assert at_chunk[0] < at_chunk[1] < at_chunk[2]


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices(served: Served, stream: bool) -> None:
    """The choices have the seed of the request and those after it, and each is what it is alone."""
    fields: dict[str, Any] = {"model": "pair", "temperature": 1.0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
    messages: Any = [{"role": "user", "content": "Hi"}]
    with openai.OpenAI(base_url=served.v1, api_key="any", max_retries=0) as client:
        alone = [client.chat.completions.create(messages=messages, seed=5 + i, **fields) for i in range(3)]
        expected = [answer.choices[0].message.content for answer in alone]
        if stream:
            found = ["", "", ""]
            ends: list[int] = []
            chunks = list(
                client.chat.completions.create(
                    messages=messages, n=3, seed=5, stream=True, stream_options={"include_usage": True}, **fields
                )
            )
            assert len({chunk.id for chunk in chunks}) == 1
            for chunk in chunks[:-1]:
                (choice,) = chunk.choices
                found[choice.index] += choice.delta.content or ""
                ends += [choice.index] if choice.finish_reason == "length" else []
            assert sorted(ends) == [0, 1, 2]
            counts = chunks[-1].usage
        else:
            answer = client.chat.completions.create(messages=messages, n=3, seed=5, **fields)
            assert [choice.index for choice in answer.choices] == [0, 1, 2]
            found = [choice.message.content or "" for choice in answer.choices]
            counts = answer.usage
    assert found == expected
    assert counts is not None
    assert alone[0].usage is not None
    assert (counts.prompt_tokens, counts.completion_tokens) == (alone[0].usage.prompt_tokens, 36)
    assert counts.total_tokens == counts.prompt_tokens + 36


def test_choices_of_a_completion(served: Served) -> None:
    fields = {"prompt": "def main(", "temperature": 0, "max_tokens": 6, "logprobs": 1, "include_stats": True}
    one = httpx.post(f"{served.v1}/completions", json=fields).json()["choices"][0]
    answer = httpx.post(f"{served.v1}/completions", json=fields | {"n": 2}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert [stats["generation_tokens"] for stats in answer["stats"]] == [6, 6]
    for choice in answer["choices"]:
        assert (choice["text"], choice["logprobs"]["tokens"]) == (one["text"], one["logprobs"]["tokens"])


def test_more_choices_than_may_wait() -> None:
    """None of them runs if not all may wait. To wait for room that never comes is no advice."""
    endless = {"prompt": "x = ", "max_tokens": 3900, "ignore_eos": True, "stream": True}
    with serve(load_demo_pair, GenerationOptions(num_draft_tokens=2), max_waiting=1, concurrency=2) as served:
        url = f"{served.v1}/completions"
        with httpx.stream("POST", url, json=endless, timeout=60) as other:
            lines = other.iter_lines()
            assert next(lines)
            answer = httpx.post(url, json={"prompt": "x", "n": 3, "max_tokens": 4}, timeout=60)
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        eventually(lambda: served.service.worker.running == served.service.worker.waiting == 0)
        answer = httpx.post(url, json={"prompt": "x", "n": 4, "max_tokens": 4}, timeout=60)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
        assert "at most 3 answers run and wait here" in answer.json()["error"]["message"]
        fields = {"prompt": "x", "n": 2, "max_tokens": 4}
        assert httpx.post(f"{served.v1}/completions", json=fields, timeout=60).status_code == 200


def test_an_error_ends_all_choices(served: Served) -> None:
    fields = {"prompt": "x = ", "n": 3, "max_tokens": 4, "temperature": 0, "num_draft_tokens": 2000}
    assert httpx.post(f"{served.v1}/completions", json=fields).status_code == 400
    eventually(lambda: served.service.worker.running == served.service.worker.waiting == 0)


def test_the_concurrency_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    assert server.main(["--port", "0", "--decode-concurrency", "0"]) == 1
    assert "--decode-concurrency must be at least 1, found 0" in capsys.readouterr().err
