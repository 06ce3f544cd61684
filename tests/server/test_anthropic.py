"""Anthropic's API with its official client."""

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any, Literal

import anthropic
import httpx
import mlx.core as mx
import pytest
from anthropic.types import ErrorResponse, Message, MessageTokensCount, RawMessageStreamEvent
from pydantic import BaseModel, TypeAdapter
from support.chat_templates import TEMPLATES
from support.serving import Served, post, serve

import mlx_mtp
from mlx_mtp import DEMO_PAIR, GenerationOptions, Model, Sampling
from mlx_mtp.errors import BusyError, ClosedError, MTPError
from mlx_mtp.server.anthropic_answers import MessagesWriter
from mlx_mtp.server.anthropic_errors import anthropic_error
from mlx_mtp.server.anthropic_requests import MessagesRequest
from mlx_mtp.server.openai_requests import Task
from mlx_mtp.server.service import api_error

KEY = "sesame"
Q = '<|"|>'
USER: Any = {"role": "user", "content": "Is it cold?"}
WEATHER: Any = {
    "name": "weather",
    "description": "Now.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}}},
}


class Script:
    """A logits processor that makes the model write a given text. Without a text, the model chooses freely."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._start: int | None = None
        self._delay = 0.0
        self.tokenizer: Any = None

    def say(self, text: str, delay: float = 0) -> None:
        self._tokens = self.tokenizer.encode(f"{text}<turn|>", add_special_tokens=False) if text else []
        self._start, self._delay = None, delay

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if not self._tokens:
            return logits
        if self._start is None:
            self._start = tokens.size
            time.sleep(self._delay)
        token = self._tokens[min(tokens.size - self._start, len(self._tokens) - 1)]
        return mx.full(logits.shape, -1e9, logits.dtype).at[:, token].add(2e9)


script = Script()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo pair with a long context and a template like Google's, which shows thoughts between calls."""
    found = tmp_path_factory.mktemp("pair") / "demo"
    copytree(DEMO_PAIR, found)
    (found / "chat_template.jinja").write_text(TEMPLATES["summer"])
    for file in (found / "config.json", found / "drafter" / "config.json"):
        config = json.loads(file.read_text())
        config["text_config"]["max_position_embeddings"] = 20_000
        file.write_text(json.dumps(config))
    return found


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    options = GenerationOptions(
        num_draft_tokens=2, max_tokens=64, logits_processors=[script], sampling=Sampling(temperature=0)
    )
    with serve(lambda: mlx_mtp.load(folder), options, keep_alive=0.1, api_key=KEY, max_body_bytes=300_000) as found:
        script.tokenizer = found.service.model.tokenizer
        yield found


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    yield
    script.say("")


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key=KEY, max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    """Return the same pair, loaded on this thread."""
    return mlx_mtp.load(folder)


def check(kind: Any, data: Any) -> Any:
    """Return the data as the client's own type. Every field has its type, and no field is unknown."""
    found = TypeAdapter(kind).validate_python(data, strict=True)
    assert_no_extras(found)
    return found


def assert_no_extras(value: Any) -> None:
    if isinstance(value, BaseModel):
        assert not value.model_extra, f"{type(value).__name__} has no {value.model_extra}"
        for name in type(value).model_fields:
            assert_no_extras(getattr(value, name))
    elif isinstance(value, list):
        for item in value:
            assert_no_extras(item)


def create(client: anthropic.Anthropic, say: str = "", **options: Any) -> Message:
    script.say(say)
    asked: Any = {"model": "claude-haiku", "max_tokens": 120, "messages": [USER]} | options
    found: Message = check(Message, client.messages.with_raw_response.create(**asked).http_response.json())
    return found


def stream(client: anthropic.Anthropic, say: str = "", **options: Any) -> Message:
    """Check each event of a stream. Return the message that the client makes of the events."""
    script.say(say)
    asked: Any = {"model": "claude-haiku", "max_tokens": 120, "messages": [USER]} | options
    kinds = []
    with client.messages.with_streaming_response.create(**asked, stream=True) as raw:
        for line in raw.iter_lines():
            if line.startswith("data: ") and line != 'data: {"type": "ping"}':
                kinds.append(check(RawMessageStreamEvent, json.loads(line.removeprefix("data: "))).type)
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert kinds.count("content_block_start") == kinds.count("content_block_stop")
    script.say(say)
    with client.messages.stream(**asked) as events:
        return Message.model_validate(
            events.get_final_message().model_dump(exclude={"content": {"__all__": {"parsed_output"}}})
        )


def plain(message: Message) -> dict[str, Any]:
    """Return the content of a message, without the numbers that differ between requests."""
    found = message.model_dump(
        exclude={"id": True, "usage": {"cache_read_input_tokens", "input_tokens", "service_tier"}}
    )
    for block in found["content"]:
        block.pop("id", None)
    return found


CALL = f"<|tool_call>call:weather{{city:{Q}Oslo{Q},days:[1,{{a:null}}]}}<tool_call|>"
SHORT_CALL = "<|tool_call>call:weather{}<tool_call|>"
THOUGHT = {"type": "thinking", "thinking": "Let me see.\n", "signature": "bWx4LW10cA=="}
THOUGHTS: Any = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
ANSWERS: list[tuple[str, Any, list[dict[str, Any]], str, str | None]] = [
    ("Yes: so cold.", {}, [{"type": "text", "text": "Yes: so cold."}], "end_turn", None),
    ("Yes: so cold.", {"max_tokens": 3}, [{"type": "text", "text": "Yes:"}], "max_tokens", None),
    ("Yes: so cold.", {"stop_sequences": ["", ": ", "so"]}, [{"type": "text", "text": "Yes"}], "stop_sequence", ": "),
    ("", {"max_tokens": 0}, [], "max_tokens", None),
    (
        f"<|channel>thought\nLet me see.\n<channel|>I look.{CALL}{SHORT_CALL}",
        THOUGHTS | {"tools": [WEATHER], "stop_sequences": ["Oslo"]},
        [
            THOUGHT,
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "name": "weather", "input": {"city": "Oslo", "days": [1, {"a": None}]}},
            {"type": "tool_use", "name": "weather", "input": {}},
        ],
        "tool_use",
        None,
    ),
    # Without tools, no text is parsed as a call. A call without arguments is a call.
    (f"I look.{SHORT_CALL}", {"tools": [WEATHER]}, [
        {"type": "text", "text": "I look."}, {"type": "tool_use", "name": "weather", "input": {}}
    ], "tool_use", None),
]  # fmt: skip


@pytest.mark.parametrize(("say", "options", "content", "reason", "stop"), ANSWERS)
def test_an_answer_is_the_same_whole_and_streamed(
    client: anthropic.Anthropic, say: str, options: Any, content: Any, reason: str, stop: str | None
) -> None:
    whole, streamed = create(client, say, **options), stream(client, say, **options)
    assert [{k: v for k, v in block.items() if v is not None} for block in plain(whole)["content"]] == content
    assert (whole.stop_reason, whole.stop_sequence, whole.model) == (reason, stop, "pair")
    assert plain(streamed) == plain(whole)


def test_arguments_that_are_no_object_are_kept_as_they_are(client: anthropic.Anthropic) -> None:
    """The end of the text cuts the call. Its text is returned unchanged."""
    options: Any = {"tools": [WEATHER], "max_tokens": 13}
    whole, streamed = create(client, CALL, **options), stream(client, CALL, **options)
    (call,) = whole.content
    assert call.type == "tool_use"
    assert (call.input, whole.stop_reason) == ({"INVALID_JSON": '{"city":"'}, "max_tokens")
    assert plain(streamed) == plain(whole)
    answer = [
        {"role": "assistant", "content": [call.model_dump(exclude_none=True)]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "cut", "is_error": True}],
        },
    ]
    prompt: Any = task(messages=[USER, *answer]).prompt
    (calling, result) = prompt[1:]
    assert calling["tool_calls"][0]["function"]["arguments"] == '{"city":"'
    assert result["content"] == "Error: cut"


def task(**fields: Any) -> Task:
    return MessagesRequest.model_validate({"messages": [USER]} | fields).task(GenerationOptions())


def text(words: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": words} | fields


def use(id_: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": id_, "name": "weather", "input": arguments}


def result(id_: str, content: Any = "1 C", **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": id_, "content": content} | fields


def call(id_: str, **arguments: Any) -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": "weather", "arguments": arguments}}


def answered(id_: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": id_, "name": "weather"}


CACHED = {"cache_control": {"type": "ephemeral"}}
CALLED: Any = {"role": "assistant", "content": [use("t1", city="Oslo")]}
MODEL_CALLED: Any = {"role": "assistant", "content": "", "tool_calls": [call("t1", city="Oslo")]}
MESSAGES: list[tuple[Any, Any]] = [
    # Blocks and consecutive messages of one role become one message, with each block on a line of its own.
    (
        [{"role": "user", "content": [text("a", **CACHED), text("b")]}, {"role": "user", "content": "c"}],
        [{"role": "user", "content": "a\nb\nc"}],
    ),
    # The assistant's text is unchanged.
    (
        [
            USER,
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "One.\n", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}},
                text("It "),
            ]},
            {"role": "assistant", "content": [text("is."), use("t1", z=1, a=[None])]},
            {"role": "user", "content": [text("Now?"), result("t1", [text("1 C"), text("dry", **CACHED)])]},
        ],
        [
            USER,
            {"role": "assistant", "content": "It is.", "reasoning_content": "One.",
             "tool_calls": [call("t1", z=1, a=[None])]},
            answered("t1", "1 C\ndry"),
            {"role": "user", "content": "Now?"},
        ],
    ),
    (
        [USER, CALLED, {"role": "user", "content": [result("t1", "no such city", is_error=True)]}],
        [USER, MODEL_CALLED, answered("t1", "Error: no such city")],
    ),
    ([USER, CALLED, {"role": "user", "content": [result("t1", None)]}], [USER, MODEL_CALLED, answered("t1", "")]),
    # Leading system messages become part of the system prompt. Later system messages stay at their places.
    (
        [{"role": "system", "content": "Be brief."}, USER, {"role": "system", "content": [text("It rains.")]}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Is it cold?\n<system-reminder>\nIt rains.\n</system-reminder>"},
        ],
    ),
    # These blocks can be read as text.
    (
        [{"role": "user", "content": [
            {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "d"}},
            {"type": "document", "source": {"type": "content", "content": [text("e")]}},
            {"type": "search_result", "title": "S", "source": "s.txt", "content": [text("f")]},
        ]}],
        [{"role": "user", "content": "T\nd\ne\nS (s.txt)\nf"}],
    ),
    # The beginning of the answer is empty.
    ([USER, {"role": "assistant", "content": ""}], [USER]),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "expected"), MESSAGES)
def test_messages_become_those_of_the_chat_template(messages: Any, expected: Any) -> None:
    assert task(messages=messages).prompt == expected


def test_the_system_prompt() -> None:
    expected = [{"role": "system", "content": "a\nb"}, USER]
    billing = text("x-anthropic-billing-header: cc_version=1; cch=0f3;")
    assert task(system=[billing, text("a", **CACHED), text("b")]).prompt == expected
    assert task(system="a\nb").prompt == expected


def test_options_reach_the_generation(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = task(
            max_tokens=7,
            stop_sequences=["x", ""],
            temperature=0.5,
            top_k=3,
            top_p=0.5,
            seed=4,
            thinking={"type": "enabled", "budget_tokens": 9, "display": "omitted"},
            tools=[WEATHER, {"type": "web_search_20250305", "name": "web_search", "max_uses": 2}],
        )
    assert found.options.sampling == Sampling(temperature=0.5, top_k=3, top_p=0.5, seed=4)
    assert (found.options.max_tokens, found.options.stop_strings) == (7, ("x",))
    assert (found.options.enable_thinking, found.options.thinking_budget) == (True, 9)
    assert [tool["function"]["name"] for tool in found.tools or []] == ["weather"]
    assert "web_search_20250305" in caplog.text
    assert not task(thinking={"type": "disabled"}).options.enable_thinking
    for kind in ("adaptive", "between_tools"):
        assert task(thinking={"type": kind}).options.enable_thinking
    assert task(tools=[WEATHER]).options.grammar is None
    assert task(tools=[WEATHER], tool_choice={"type": "none"}).tools is None


def test_fields_of_other_services_are_accepted(client: anthropic.Anthropic) -> None:
    fields: dict[str, Any] = {
        "metadata": {"user_id": "u"}, "service_tier": "auto", "context_management": {"edits": []}, "speed": "fast",
        "inference_geo": "us", "output_config": {"effort": "max"}, "container": None, "betas": ["x-2026"],
        "cache_control": {"type": "ephemeral"}, "a_field_of_tomorrow": [{"x": 1}],
    }  # fmt: skip
    assert plain(create(client, "Yes.", extra_body=fields)) == plain(create(client, "Yes."))
    answer = client.messages.with_raw_response.create(model="any", max_tokens=1, messages=[USER], extra_body=fields)
    assert answer.headers["x-mlx-mtp-ignored"] == "a_field_of_tomorrow"


def test_tools_are_called_as_chosen(client: anthropic.Anthropic) -> None:
    tools: Any = [WEATHER, {"name": "clock", "input_schema": {"type": "object", "properties": {}}}]
    for choice, names in (({"type": "any"}, {"weather", "clock"}), ({"type": "tool", "name": "clock"}, {"clock"})):
        answer = create(client, tools=tools, tool_choice=choice | {"disable_parallel_tool_use": True})
        (found,) = answer.content
        assert found.type == "tool_use"
        assert found.name in names
        assert answer.stop_reason == "tool_use"


class Report(BaseModel):
    cold: bool
    place: Literal["in", "out"]


def test_structured_output(client: anthropic.Anthropic) -> None:
    answer = client.messages.parse(model="any", max_tokens=200, messages=[USER], output_format=Report)
    assert isinstance(answer.parsed_output, Report)
    older = {"type": "json_schema", "schema": {"enum": ["mild"]}}
    assert create(client, extra_body={"output_format": older}).content[0].text == '"mild"'  # type: ignore[union-attr]


def test_an_answer_that_has_begun_goes_on(client: anthropic.Anthropic, model: Model) -> None:
    begun = [USER, {"role": "assistant", "content": "def cold("}]
    prompt = model.encode([USER]) + list(model.tokenizer.encode("def cold(", add_special_tokens=False))
    expected = model.generate(prompt, num_draft_tokens=2, max_tokens=9)
    answer = create(client, messages=begun, max_tokens=9)
    assert answer.content[0].text == expected.text  # type: ignore[union-attr]
    assert answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) == len(prompt)


COUNTED: list[dict[str, Any]] = [
    {},
    {"system": [text("Be brief."), text("Be kind.")], **THOUGHTS},
    {"tools": [WEATHER], "messages": [USER, CALLED, {"role": "user", "content": [result("t1")]}]},
    {"messages": [USER, {"role": "assistant", "content": "It is"}]},
]


@pytest.mark.parametrize("options", COUNTED)
def test_tokens_are_counted_as_they_are_read(client: anthropic.Anthropic, options: Any) -> None:
    usage = create(client, "Yes.", **options).usage
    asked = {"model": "any", "messages": [USER]} | options
    counted = client.messages.with_raw_response.count_tokens(**asked).http_response.json()
    found = check(MessageTokensCount, counted).input_tokens
    assert found == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    again = create(client, "Yes.", **options).usage
    assert (again.input_tokens, again.cache_read_input_tokens) == (1, found - 1)


def test_async_client(served: Served) -> None:
    async def ask() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=served.url, auth_token=KEY, max_retries=0) as client:
            asked: Any = {"model": "any", "max_tokens": 9, "messages": [USER]}
            whole = await client.messages.create(**asked)
            async with client.messages.stream(**asked) as events:
                parts = [part async for part in events.text_stream]
            counted = await client.messages.count_tokens(model="any", messages=[USER])
            assert counted.input_tokens > 5
            return [whole.content[0].text, "".join(parts)]

    whole, streamed = asyncio.run(ask())
    assert whole == streamed != ""


def test_a_stream_says_that_it_lives(served: Served) -> None:
    """Pings arrive while the prompt is read, and while a call is held back until its end."""
    headers = {"x-api-key": KEY}
    body = {"model": "any", "max_tokens": 99, "messages": [USER], "tools": [WEATHER], "stream": True}
    script.say(f"<|tool_call>call:weather{{city:{Q}{'Oslo ' * 9}{Q}}}<tool_call|>", delay=0.4)
    answer = post(f"{served.v1}/messages?beta=true", json=body, headers=headers)
    kinds = [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event: ")]
    assert kinds[0] == "ping"
    assert "ping" in kinds[kinds.index("content_block_start") : kinds.index("content_block_delta")]
    assert kinds[-1] == "message_stop"


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aaaa"}}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "aa"}}
BEGUN = [USER, {"role": "assistant", "content": "It is"}]
BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages: "),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role: "),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'messages[0].content[0].text'"),
    ({"messages": [{"role": "user", "content": [text("x"), IMAGE]}]}, "messages[0].content[1]: found image, but "),
    (
        {"messages": [{"role": "user", "content": [PDF]}]},
        "messages[0].content[0]: expected a document of type text or content, found base64",
    ),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages: there must be one of the user"),
    ({"messages": [USER, {"role": "user", "content": [result("t9")]}]}, "messages[1].content[0].tool_use_id is 't9': "),
    (
        {"messages": [USER, CALLED, {"role": "user", "content": [result("t1"), result("t1")]}]},
        "messages[2].content[1].tool_use_id is 't1': its call has a result already",
    ),
    ({"messages": [USER, CALLED]}, "messages[1].content[0]: an answer can be continued after text only"),
    ({"messages": BEGUN} | THOUGHTS, "thinking contradicts the last message"),
    (
        {"messages": BEGUN, "tools": [WEATHER], "tool_choice": {"type": "any"}},
        "tool_choice contradicts the last message",
    ),
    ({"tools": [WEATHER, WEATHER], "tool_choice": {"type": "any"}}, "tools must have names of their own"),
    ({"tools": [{"input_schema": {}}]}, "tools[0].name must be 1 to 128 of "),
    ({"tools": [{"name": "a b"}]}, "tools[0].name must be "),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice is of type tool"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "w"}}, "tool_choice names 'w'"),
    ({"max_tokens": "5"}, "max_tokens: "),
    ({"temperature": -1}, "temperature: "),
    ({"mcp_servers": [{"url": "http://x"}]}, "'mcp_servers' is"),
    ({"container": "c1"}, "'container' is"),
    ({"thinking": {"type": "maybe"}}, "thinking.type: "),
    (
        {"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
        "output_config.format: it is strict, but not cannot be followed",
    ),
    ({"messages": [{"role": "user", "content": "x " * 30_000}]}, "prompt is too long: the prompt has "),
]


@pytest.mark.parametrize(("body", "message"), BAD)
def test_errors(served: Served, body: Any, message: str) -> None:
    asked = {"model": "any", "max_tokens": 5, "messages": [USER]} | body
    answer = post(f"{served.v1}/messages", json=asked, headers={"x-api-key": KEY})
    assert answer.status_code == 400
    found = check(ErrorResponse, answer.json())
    assert found.error.type == "invalid_request_error"
    assert message in found.error.message
    assert found.request_id == answer.headers["request-id"]


def test_errors_of_all_statuses(served: Served, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.AuthenticationError, match="x-api-key") as refused:
        client.with_options(api_key="wrong").messages.create(model="any", max_tokens=1, messages=[USER])
    check(ErrorResponse, refused.value.body)
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        client.messages.batches.list()
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        client.models.retrieve("other")
    large = post(f"{served.v1}/messages", content=b"x" * 400_000, headers={"x-api-key": KEY})
    assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")
    wrong = httpx.get(f"{served.v1}/messages", headers={"x-api-key": KEY})
    assert (wrong.status_code, wrong.json()["type"], "POST" in wrong.headers["allow"]) == (405, "error", True)
    assert httpx.head(f"{served.v1}/messages", headers={"x-api-key": KEY}).content == b""
    for error, kind in ((BusyError("full"), "rate_limit_error"), (ClosedError("over"), "overloaded_error")):
        assert anthropic_error(api_error(error).body())["error"]["type"] == kind


def test_a_failure_in_a_stream(client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Iterator[str]:
        raise MTPError("out of order")

    asked: Any = {"model": "any", "max_tokens": 9, "messages": [USER]}
    with monkeypatch.context() as patch:
        patch.setattr(MessagesWriter, "end", fail)
        with (
            pytest.raises(anthropic.APIStatusError, match="out of order"),
            client.messages.stream(**asked) as all_,
        ):
            all_.until_done()


def test_either_header_holds_the_key(served: Served) -> None:
    url = f"{served.v1}/models"
    for headers, status in (
        ({"x-api-key": KEY}, 200),
        ({"Authorization": f"Bearer {KEY}"}, 200),
        ({"Authorization": f"Bearer {KEY}", "x-api-key": "other"}, 200),
        ({"x-api-key": f"Bearer {KEY}"}, 401),
        ({"Authorization": KEY}, 401),
    ):
        assert httpx.get(url, headers=headers).status_code == status


def test_models(served: Served, client: anthropic.Anthropic) -> None:
    (found,) = client.models.list()
    assert found == client.models.retrieve("pair")
    assert (found.id, found.display_name, found.max_input_tokens) == ("pair", "pair", 20_000)
    others = httpx.get(f"{served.v1}/models", headers={"x-api-key": KEY}).json()
    own = {"id": "pair", "object": "model", "created": 0, "owned_by": "mlx-mtp"}
    kinds = {"input_modalities": ["text"], "output_modalities": ["text"]}
    assert others == {"object": "list", "data": [own | {"architecture": kinds}]}


class Conversation:
    """A client that sends the whole conversation with each request, as agents do. It records the tokens read."""

    def __init__(self, client: anthropic.Anthropic, **options: Any) -> None:
        self._client = client
        self._options: Any = {"model": "claude-sonnet", "max_tokens": 400} | options
        self.messages: list[Any] = []
        # For each request: the prompt's tokens, and the tokens of them that were read before.
        self.read: list[tuple[int, int]] = []

    def ask(self, content: Any, say: str) -> list[str]:
        """Send a user message. Return the ids of the calls in the answer."""
        self.messages.append({"role": "user", "content": content})
        script.say(say)
        with self._client.beta.messages.stream(messages=self.messages, **self._options) as events:
            answer = events.get_final_message()
        cached = answer.usage.cache_read_input_tokens or 0
        self.read.append((answer.usage.input_tokens + cached, cached))
        print(f"request {len(self.read)}: {cached} of {answer.usage.input_tokens + cached} tokens were read before")
        blocks = [block.model_dump(exclude_none=True, exclude={"parsed_output"}) for block in answer.content]
        self.messages.append({"role": "assistant", "content": blocks})
        return [block["id"] for block in blocks if block["type"] == "tool_use"]


def calling(name: str, **arguments: str) -> str:
    return f"<|tool_call>call:{name}{{{','.join(f'{k}:{Q}{v}{Q}' for k, v in arguments.items())}}}<tool_call|>"


# This many tokens at a prompt's end may be read again: its last token, and tokens of rolled-back drafts.
FEW = 12


def test_a_conversation_with_tools_is_read_once(client: anthropic.Anthropic) -> None:
    """The client returns thoughts, text and calls exactly as the model wrote them, so they are not read again.

    With the user's next question, the thoughts of the exchange before leave the prompt. Later text is read again.
    """
    tool: Any = {"name": "read", "input_schema": {"type": "object", "properties": {"file": {"type": "string"}}}}
    talk = Conversation(client, system="You read files. " * 20, tools=[tool], **THOUGHTS)
    begin = "<|channel>thought\n"
    (first,) = talk.ask(
        "Why does it fail?", f"{begin}I read the test.\n<channel|>I look.\n{calling('read', file='a.py')}"
    )
    # After a result, the template has opened the thought.
    many = calling("read", file="b.py") + calling("read", file="c.py")
    second, third = talk.ask([result(first, "x = 1\n" * 30)], f"It needs others.\n<channel|>{many}")
    results = [result(second, "y = 2\n" * 30), result(third, "no such file", is_error=True)]
    (fourth,) = talk.ask(results, f"One more.\n<channel|>{calling('read', file='d.py')}")
    talk.ask([result(fourth, "z")], "I know.\n<channel|>It is y.")
    talk.ask("And then?", f"{begin}Easy.\n<channel|>Then z.")
    talk.ask("Thanks.", "")
    prompts, cached = zip(*talk.read, strict=True)
    for turn in range(1, 4):
        # The whole earlier prompt is reused, and its answer except for the last token.
        assert cached[turn] >= prompts[turn - 1] + 10
        assert cached[turn] > prompts[turn] - 260
    # The reuse ends at the first thought, which is no longer in the prompt.
    assert cached[4] >= prompts[0] - FEW
    assert cached[5] >= prompts[4] - FEW


def agent_tools() -> list[Any]:
    """Return a dozen tools as coding agents declare them."""
    nested = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "path": {"description": "An absolute path.", "type": "string", "minLength": 1},
            "edits": {
                "type": "array",
                "maxItems": 9,
                "items": {
                    "type": "object",
                    "properties": {
                        "old": {"type": "string"},
                        "new": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                        "line": {"type": "integer", "exclusiveMinimum": 0, "maximum": 9007199254740991},
                    },
                    "required": ["old"],
                    "additionalProperties": False,
                },
            },
            "mode": {"enum": ["fast", "safe"], "default": "safe", "type": "string"},
            "metadata": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {}},
            "url": {"type": "string", "format": "uri"},
            "kind": {"const": "file"},
        },
        "required": ["path"],
        "additionalProperties": False,
    }
    names = "Bash Edit Fetch Glob Grep List Note Plan Read Search Task mcp__files_and_more__write_several"
    tools = [
        {"name": name, "description": f"{name}: see the manual.", "input_schema": nested} for name in names.split()
    ]
    tools[-1]["cache_control"] = {"type": "ephemeral"}
    return [*tools, {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}]


def test_a_coding_agent_is_served(client: anthropic.Anthropic) -> None:
    """The session has all fields of such programs, reminders between the messages, and two models."""
    kept = {"type": "ephemeral"}
    system: Any = [
        text("x-anthropic-billing-header: cc_version=1.0; cc_entrypoint=cli; cch=00000;"),
        text("You are an agent.", cache_control=kept),
        text("\nYou help with code.\n" * 40, cache_control=kept),
    ]
    options: Any = {
        "system": system,
        "tools": agent_tools(),
        "thinking": {"type": "adaptive"},
        "metadata": {"user_id": json.dumps({"device_id": "0f", "session_id": "1"})},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "betas": ["claude-code-20250219", "interleaved-thinking-2025-05-14", "context-management-2025-06-27"],
    }
    talk = Conversation(client, **options)
    asked = [
        text("<system-reminder>\nToday is Friday.\n</system-reminder>\n"),
        text("List the files.", cache_control=kept),
    ]
    talk.messages += [{"role": "user", "content": asked}, {"role": "system", "content": "There are two agents."}]
    (first,) = talk.ask([], f"<|channel>thought\nA listing.\n<channel|>I list.{calling('Bash', command='ls')}")
    # With each request, the cache mark moves on and the billing header changes.
    del asked[1]["cache_control"]
    system[0]["text"] = system[0]["text"].replace("00000", "12345")
    (second,) = talk.ask(
        [result(first, "a.py", is_error=False, cache_control=kept)], "So.\n<channel|>" + calling("Read", path="a.py")
    )
    talk.ask([result(second, [text("1  x = 1")]), text("<system-reminder>\nBe brief.\n</system-reminder>")], "It is x.")
    prompts, cached = zip(*talk.read, strict=True)
    assert cached[1] >= prompts[0] + 10
    assert cached[2] >= prompts[0] - FEW
    # A small task for a small model comes in between.
    small = create(
        client, "Files", model="claude-haiku", system="A title in two words.", messages=[USER], max_tokens=32
    )
    assert small.stop_reason == "end_turn"
    counted = client.beta.messages.count_tokens(
        model="any", messages=talk.messages[:3], system=system, tools=options["tools"]
    )
    assert counted.input_tokens > 1000
