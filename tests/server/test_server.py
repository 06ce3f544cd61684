"""The server with popular clients: both kinds of OpenAI's client, and LangChain's client."""

import asyncio
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from typing import Annotated, Any, Literal

import httpx
import jsonschema
import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, Field, SecretStr
from support.scripted import ScriptedModel, load_demo_pair
from support.serving import Served, post, serve

import mlx_mtp
from mlx_mtp import GenerationOptions, Model, Sampling
from mlx_mtp.decoding.report import Logprobs

K = 3
PROMPT = "def read_config(path):"
MESSAGES: Any = [{"role": "user", "content": PROMPT}]
WEATHER = {
    "type": "object",
    "properties": {"in-unit": {"type": "string", "enum": ["C", "F"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["days", "in-unit"],
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}},
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    options = GenerationOptions(num_draft_tokens=K, max_tokens=48)
    with serve(load_demo_pair, options, keep_alive=0.2) as found:
        yield found


@pytest.fixture(scope="module")
def model() -> Model:
    """Return the same pair, loaded on this thread."""
    return load_demo_pair()


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.v1, api_key="any", max_retries=0) as found:
        yield found


def library(model: Model, prompt: Any = MESSAGES, **options: Any) -> mlx_mtp.GenerationResult:
    return model.generate(prompt, num_draft_tokens=K, **{"max_tokens": 48} | options)


def chat(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(model="pair", **{"messages": MESSAGES, "temperature": 0} | options)


def joined(chunks: Any) -> dict[str, Any]:
    """Return the joined content of all chunks of a chat stream."""
    found: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}, "finish": None, "usage": None, "logprobs": []}
    for chunk in chunks:
        found["usage"] = chunk.usage or found["usage"]
        for choice in chunk.choices:
            found["content"] += choice.delta.content or ""
            found["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            found["finish"] = choice.finish_reason or found["finish"]
            found["logprobs"] += choice.logprobs.content if choice.logprobs else []
            for call in choice.delta.tool_calls or []:
                own = found["calls"].setdefault(call.index, {"arguments": ""})
                own |= {"id": call.id, "name": call.function.name} if call.id else {}
                own["arguments"] += call.function.arguments or ""
    return found


def test_models_and_health(client: openai.OpenAI, served: Served) -> None:
    assert [found.id for found in client.models.list()] == ["pair"]
    assert client.models.retrieve("pair").owned_by == "mlx-mtp"
    assert httpx.get(f"{served.url}/health").json()["status"] == "ok"
    page = httpx.get(served.url)
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_chat_is_the_librarys_greedy_text(client: openai.OpenAI, model: Model) -> None:
    expected = library(model)
    answer = chat(client)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.last.finish_reason
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.last.prompt_tokens, len(expected.tokens))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    details = usage.completion_tokens_details
    assert details.accepted_prediction_tokens == expected.last.stats.accepted > 0
    assert details.rejected_prediction_tokens == expected.last.stats.drafted - expected.last.stats.accepted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1, "seed": 5},
        {"stop": ["return", "\n\n"]},
        {"max_tokens": 5},
        {"max_completion_tokens": 5, "logprobs": True, "top_logprobs": 2},
        {"temperature": 0.7, "top_p": 0.9, "seed": -3, "presence_penalty": 0.5, "extra_body": {"top_k": 20}},
    ],
)
def test_a_stream_says_what_the_whole_does(client: openai.OpenAI, options: Any) -> None:
    whole = chat(client, **options)
    parts = joined(chat(client, stream=True, stream_options={"include_usage": True}, **options))
    choice = whole.choices[0]
    assert parts["content"] == choice.message.content
    assert parts["finish"] == choice.finish_reason
    assert parts["usage"].completion_tokens == whole.usage.completion_tokens
    assert parts["logprobs"] == (choice.logprobs.content if choice.logprobs else [])


def test_sampling_options_reach_the_library(client: openai.OpenAI, model: Model) -> None:
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=11, frequency_penalty=0.2, logit_bias={40: -3.0})
    own = {"top_k": 20}
    answer = chat(
        client, temperature=0.8, top_p=0.9, seed=11, frequency_penalty=0.2, logit_bias={"40": -3}, extra_body=own
    )
    assert answer.choices[0].message.content == library(model, sampling=sampling).text


def test_a_stop_string_ends_the_text(client: openai.OpenAI, model: Model) -> None:
    whole = library(model).text
    stop = whole[8:11]
    answer = chat(client, stop=stop)
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_logprobs(client: openai.OpenAI, model: Model) -> None:
    expected = model.generate(MESSAGES, num_draft_tokens=K, max_tokens=6, logprobs=2)
    found = chat(client, max_tokens=6, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert "".join(token.token for token in found) == expected.text
    assert bytes(byte for token in found for byte in token.bytes).decode() == expected.text
    responses = list(model.stream_generate(MESSAGES, num_draft_tokens=K, max_tokens=6, logprobs=2))
    for token, response in zip(found, responses, strict=True):
        assert response.logprobs is not None
        assert token.logprob == pytest.approx(response.logprobs.token, abs=1e-4)
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(
            [value for _, value in response.logprobs.top], abs=1e-4
        )


def test_a_conversation_is_read_once(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "Write Python."}, {"role": "user", "content": "def add(a, b):" * 9}]
    first = chat(client, messages=messages, max_tokens=20)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "x = "},
    ]
    second = chat(client, messages=messages, max_tokens=20)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1


def test_content_may_come_in_parts(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": PROMPT[:7]}, {"type": "text", "text": PROMPT[7:]}]
    assert (
        chat(client, messages=[{"role": "user", "content": parts}]).choices[0].message
        == chat(client).choices[0].message
    )


def test_completions(client: openai.OpenAI, model: Model) -> None:
    expected = library(model, PROMPT, max_tokens=20)
    options: Any = {"model": "pair", "max_tokens": 20, "temperature": 0}
    for prompt in (PROMPT, [PROMPT], model.encode(PROMPT), [model.encode(PROMPT)]):
        answer = client.completions.create(prompt=prompt, **options)
        assert answer.choices[0].text == expected.text
        assert answer.choices[0].finish_reason == "length"
    chunks = list(client.completions.create(prompt=PROMPT, stream=True, logprobs=1, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    whole = client.completions.create(prompt=PROMPT, logprobs=1, **options).choices[0].logprobs
    assert whole is not None
    assert whole.tokens is not None
    assert "".join(whole.tokens) == expected.text
    assert whole.text_offset == [len("".join(whole.tokens[:index])) for index in range(20)]
    streamed = [chunk.choices[0].logprobs for chunk in chunks]
    assert [offset for part in streamed if part for offset in part.text_offset or []] == whole.text_offset
    assert [value for part in streamed if part for value in part.token_logprobs or []] == whole.token_logprobs


def test_responses(client: openai.OpenAI, model: Model) -> None:
    expected = library(model, max_tokens=10)
    answer = client.responses.create(model="pair", input=PROMPT, temperature=0, max_output_tokens=10)
    assert answer.output_text == expected.text
    assert (answer.status, answer.incomplete_details and answer.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert answer.usage is not None
    assert answer.usage.output_tokens == 10
    text, kinds, numbers = "", [], []
    with client.responses.stream(model="pair", input=PROMPT, temperature=0, max_output_tokens=10) as stream:
        for event in stream:
            kinds.append(event.type)
            numbers.append(event.sequence_number)
            text += event.delta if event.type == "response.output_text.delta" else ""
    assert text == expected.text
    assert numbers == sorted(set(numbers))
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.incomplete"
    assert kinds.index("response.output_item.added") < kinds.index("response.content_part.added")
    assert kinds.index("response.output_text.done") < kinds.index("response.output_item.done")


def test_responses_take_instructions_and_items(client: openai.OpenAI, model: Model) -> None:
    messages = [
        {"role": "system", "content": "Write Python."},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": PROMPT},
    ]
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "y", "annotations": []}]},
        {"role": "user", "content": PROMPT},
    ]
    answer = client.responses.create(
        model="pair", instructions="Write Python.", input=items, temperature=0, max_output_tokens=10
    )
    assert answer.output_text == library(model, messages, max_tokens=10).text


def test_async_client(served: Served, model: Model) -> None:
    async def ask() -> tuple[str, str, str, str]:
        async with openai.AsyncOpenAI(base_url=served.v1, api_key="any", max_retries=0) as client:
            options: Any = {"model": "pair", "temperature": 0}
            whole = await client.chat.completions.create(messages=MESSAGES, **options)
            stream = await client.chat.completions.create(messages=MESSAGES, stream=True, **options)
            parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            text = await client.completions.create(prompt=PROMPT, max_tokens=8, **options)
            answer = await client.responses.create(input=PROMPT, **options)
            return whole.choices[0].message.content or "", "".join(parts), text.choices[0].text, answer.output_text

    whole, streamed, text, answer = asyncio.run(ask())
    assert whole == streamed == answer == library(model).text
    assert text == library(model, PROMPT, max_tokens=8).text


def test_langchain(served: Served, model: Model) -> None:
    llm = ChatOpenAI(base_url=served.v1, api_key=SecretStr("any"), model="pair", temperature=0, max_retries=0)
    assert llm.invoke(PROMPT).content == library(model).text
    assert "".join(str(chunk.content) for chunk in llm.stream(PROMPT)) == library(model).text
    bound = llm.bind_tools(TOOLS, tool_choice="get_weather")
    answer = bound.invoke(PROMPT)
    call = answer.tool_calls[0]
    jsonschema.validate(call["args"], WEATHER)
    result = ToolMessage(content="mild", tool_call_id=call["id"])
    assert isinstance(llm.bind_tools(TOOLS).invoke([HumanMessage(PROMPT), answer, result]).content, str)


def test_a_required_tool_is_called_and_its_result_is_read(client: openai.OpenAI, model: Model) -> None:
    options: Any = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "get_weather"}}}
    whole = chat(client, **options)
    message = whole.choices[0].message
    assert (whole.choices[0].finish_reason, message.content) == ("tool_calls", None)
    (call,) = message.tool_calls
    assert call.function.name == "get_weather"
    jsonschema.validate(json.loads(call.function.arguments), WEATHER)
    parts = joined(chat(client, stream=True, **options))
    assert parts["finish"] == "tool_calls"
    assert parts["calls"][0]["arguments"] == call.function.arguments
    history: Any = [*MESSAGES, message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "mild"}]
    second = chat(client, messages=history, tools=TOOLS)
    rendered: Any = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"function": {"name": "get_weather", "arguments": json.loads(call.function.arguments)}},
            ],
        },
        {"role": "tool", "name": "get_weather", "content": "mild"},
    ]
    prompt = model.encode(rendered, tools=TOOLS)
    assert "response:get_weather" in model.tokenizer.decode(prompt)
    assert second.usage.prompt_tokens == len(prompt)
    assert second.choices[0].message.content == library(model, prompt).text


def test_responses_call_tools(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    options: Any = {"model": "pair", "tools": tools, "tool_choice": "required", "temperature": 0}
    answer = client.responses.create(input=PROMPT, parallel_tool_calls=False, **options)
    (call,) = answer.output
    assert call.type == "function_call"
    with client.responses.stream(input=PROMPT, parallel_tool_calls=False, **options) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "response.function_call_arguments.delta")
        last = stream.get_final_response()
    assert deltas == call.arguments
    assert last.output[0].type == "function_call"
    assert (last.output[0].name, last.output[0].arguments) == (call.name, call.arguments)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "mild"}
    items: Any = [{"role": "user", "content": PROMPT}, call.model_dump(exclude_none=True), result]
    after = client.responses.create(model="pair", input=items, tools=tools, temperature=0)
    assert after.usage is not None
    assert answer.usage is not None
    assert after.usage.input_tokens > answer.usage.input_tokens


class Animal(BaseModel):
    """A model as people write it. OpenAI's client turns each of its parts into a keyword of a JSON Schema."""

    kind: Literal["cat"]
    lives: int = Field(ge=1, le=9, description="Left.")
    born: date
    parent: "Animal | None" = None


class Robot(BaseModel):
    kind: Literal["robot"]
    model: str = Field(pattern="^[A-Z]{2}$")


class Adopt(BaseModel):
    pet: Animal | Robot
    tags: list[Literal["a", "b"]] = Field(min_length=1, max_length=2)


def test_strict_tools_of_pydantic_models(client: openai.OpenAI) -> None:
    """The calls follow recursive references, bounds, patterns and formats."""
    tools: Any = [openai.pydantic_function_tool(Adopt)]
    assert tools[0]["function"]["strict"] is True
    for seed in range(3):
        answer: Any = client.chat.completions.parse(
            model="pair", messages=MESSAGES, tools=tools, tool_choice="required", seed=seed, max_tokens=400
        )
        if answer.choices[0].finish_reason == "tool_calls":
            for call in answer.choices[0].message.tool_calls:
                assert isinstance(call.function.parsed_arguments, Adopt)
            return
    raise AssertionError("no answer ended")


def test_strict_output_of_pydantic_models(client: openai.OpenAI) -> None:
    class Chip(BaseModel):
        kind: Literal["chip"]
        volts: float = Field(ge=0, le=5)

    class Pets(BaseModel):
        first: Annotated[Chip | Robot, Field(discriminator="kind")]
        count: int = Field(gt=0, lt=4)

    for seed in range(3):
        more: Any = {"text_format": Pets, "max_output_tokens": 400, "extra_body": {"seed": seed}}
        answer = client.responses.parse(model="pair", input=PROMPT, **more)
        if answer.status == "completed":
            assert isinstance(answer.output_parsed, Pets)
            return
    raise AssertionError("no answer ended")


LOOSE = {
    "type": "object",
    "properties": {"m": {"propertyNames": {"pattern": "a"}}, "s": {"type": "array", "uniqueItems": True}},
    "required": ["m", "s"],
}


def test_what_is_not_enforced_is_named(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    header = "x-mlx-mtp-not-enforced"
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": LOOSE}}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "o", "schema": LOOSE}}
    request: Any = {"messages": MESSAGES, "max_tokens": 2}
    with caplog.at_level("WARNING"):
        for body, expected in (
            ({"response_format": wanted}, "response_format.m: propertyNames, response_format.s: uniqueItems"),
            ({"tools": [tool], "tool_choice": "required"}, "f.m: propertyNames, f.s: uniqueItems"),
            ({"tools": [tool]}, None),
        ):
            for stream in (False, True):
                caplog.clear()
                answer = post(f"{served.v1}/chat/completions", json=request | body | {"stream": stream})
                assert answer.status_code == 200, answer.text
                assert answer.headers.get(header) == expected
                logged = [found for found in caplog.messages if "not enforced" in found]
                assert len(logged) == (expected is not None)
                assert all(expected in found for found in logged if expected)
    name = {"type": "object", "properties": {"é\r\nx: y": {"not": {}}}}
    body = request | {"response_format": {"type": "json_schema", "json_schema": {"name": "o", "schema": name}}}
    answer = post(f"{served.v1}/chat/completions", json=body)
    assert answer.headers[header] == "response_format.%C3%A9%0D%0Ax: y: not"
    strict: Any = [{"type": "function", "function": tool["function"] | {"strict": True}}]
    for body, message in (
        (
            {"response_format": wanted | {"json_schema": {"name": "o", "schema": LOOSE, "strict": True}}},
            "response_format: it is strict, but propertyNames cannot be followed, at m",
        ),
        ({"tools": strict}, "tools: parameters of f: it is strict, but uniqueItems cannot be followed, at s"),
    ):
        answer = post(f"{served.v1}/chat/completions", json=request | body)
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)
    text = {"format": {"type": "json_schema", "name": "o", "schema": LOOSE, "strict": True}}
    answer = post(f"{served.v1}/responses", json={"input": "x", "text": text})
    message = "text.format: it is strict, but propertyNames cannot be followed, at m"
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)


def test_tools_beside_a_response_format(client: openai.OpenAI, model: Model) -> None:
    """The model chooses between a call and JSON by the schema. No other answer is possible."""
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    (start,) = model.encode("<|tool_call>")[-1:]
    strict: Any = [{"type": "function", "function": tool["function"] | {"strict": True}} for tool in TOOLS]
    for bias, tools in ((-100, TOOLS), (100, TOOLS), (100, strict)):
        options: Any = {"tools": tools, "logit_bias": {str(start): bias}, "parallel_tool_calls": False}
        options["max_tokens"] = 100
        whole = chat(client, response_format=wanted, **options)
        message = whole.choices[0].message
        if bias < 0:
            assert whole.choices[0].finish_reason == "stop"
            jsonschema.validate(json.loads(message.content), SCHEMA)
            assert message.tool_calls is None
        else:
            assert whole.choices[0].finish_reason == "tool_calls"
            assert message.content is None
            (call,) = message.tool_calls
            jsonschema.validate(
                json.loads(call.function.arguments), {"get_weather": WEATHER, "stop": {}}[call.function.name]
            )
        parts = joined(chat(client, response_format=wanted, stream=True, **options))
        assert parts["content"] == (message.content or "")
        assert len(parts["calls"]) == len(message.tool_calls or [])
    required = chat(client, response_format=wanted, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert required.choices[0].message.tool_calls
    free = chat(client, response_format=wanted, tools=TOOLS, tool_choice="none")
    jsonschema.validate(json.loads(free.choices[0].message.content), SCHEMA)
    text: Any = {"format": {"type": "json_object"}}
    flat: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    answer = client.responses.create(model="pair", input=PROMPT, tools=flat, text=text, max_output_tokens=4)
    assert answer.output_text.startswith("{") or answer.output[0].type == "function_call"


def test_a_call_that_is_cut_says_length(client: openai.OpenAI) -> None:
    """The call has begun with its name, but its arguments are incomplete."""
    options: Any = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "get_weather"}}}
    length = chat(client, **options).usage.completion_tokens - 3
    whole = chat(client, max_tokens=length, **options)
    (call,) = whole.choices[0].message.tool_calls
    assert (whole.choices[0].finish_reason, call.function.name) == ("length", "get_weather")
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        json.loads(call.function.arguments)
    parts = joined(chat(client, stream=True, max_tokens=length, **options))
    assert (parts["finish"], parts["calls"][0]["arguments"]) == ("length", call.function.arguments)
    flat: Any = [{"type": "function", **TOOLS[0]["function"]}]
    answer = client.responses.create(
        model="pair",
        input=PROMPT,
        temperature=0,
        max_output_tokens=max(16, length),
        tool_choice="required",
        tools=flat,
    )
    assert (answer.status, answer.output[0].type) == ("incomplete", "function_call")


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
def test_usage_is_null_until_the_end_where_it_is_asked_for(served: Served, path: str, options: Any) -> None:
    given = {"messages": MESSAGES} if path == "chat/completions" else {"prompt": PROMPT}
    body = {"stream": True, "max_tokens": 4, "temperature": 0} | given | options
    lines = post(f"{served.v1}/{path}", json=body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert len(chunks) > 2
    if not options:
        assert not any("usage" in chunk for chunk in chunks)
        return
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 4)


class Person(BaseModel):
    adult: bool
    kind: str


SCHEMA = {
    "type": "object",
    "properties": {"adult": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
    "required": ["adult", "kind"],
    "additionalProperties": False,
}


def test_structured_output(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    text = chat(client, response_format=wanted).choices[0].message.content
    jsonschema.validate(json.loads(text), SCHEMA)
    assert joined(chat(client, response_format=wanted, stream=True))["content"] == text
    answer = client.responses.create(
        model="pair",
        input=PROMPT,
        temperature=0,
        text={"format": {"type": "json_schema", "name": "p", "schema": SCHEMA}},
    )
    assert answer.output_text == text
    loose = chat(client, response_format={"type": "json_object"}, max_tokens=200, extra_body={"regex": None})
    if loose.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(loose.choices[0].message.content), dict)
    assert loose.choices[0].message.content.startswith("{")


@contextmanager
def scripted(
    served: Served, monkeypatch: pytest.MonkeyPatch, text: str, logprobs: Logprobs | None = None
) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(served.service, "model", ScriptedModel(served.service.model, text, logprobs))
        yield


def test_text_thoughts_and_several_calls(
    served: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    quote = '<|"|>'
    first = f"<|tool_call>call:get_weather{{in-unit:{quote}C{quote},days:2,o:{{l:[1,{quote}x{quote}]}}}}<tool_call|>"
    script = f"<|channel>thought\nLet me see.<channel|>Wait. {first}<|tool_call>call:stop{{}}<tool_call|>"
    expected = [("get_weather", {"in-unit": "C", "days": 2, "o": {"l": [1, "x"]}}), ("stop", {})]
    flat: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    with scripted(served, monkeypatch, script):
        whole = chat(client, tools=TOOLS)
        parts = joined(chat(client, tools=TOOLS, stream=True, stream_options={"include_usage": True}))
        answer = client.responses.create(model="pair", input=PROMPT, tools=flat)
        without = chat(client).choices[0].message
    message = whole.choices[0].message
    assert (message.content, message.reasoning_content) == ("Wait. ", "Let me see.")
    assert [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls] == expected
    assert whole.choices[0].finish_reason == parts["finish"] == "tool_calls"
    assert (parts["content"], parts["reasoning"]) == ("Wait. ", "Let me see.")
    assert [(call["name"], json.loads(call["arguments"])) for call in parts["calls"].values()] == expected
    assert parts["usage"].completion_tokens_details.reasoning_tokens > 3
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call", "function_call"]
    # Without tools, no text is parsed as a call.
    assert (without.content, without.tool_calls) == (script.partition("<channel|>")[2], None)


def test_logprobs_of_responses_are_the_same_in_every_event(client: openai.OpenAI) -> None:
    options: Any = {"model": "pair", "input": PROMPT, "temperature": 0, "max_output_tokens": 6, "top_logprobs": 2}
    options["include"] = ["message.output_text.logprobs"]
    (message,) = client.responses.create(**options).output
    assert message.type == "message"
    (content,) = message.content
    assert content.type == "output_text"
    expected = [(found.token, found.logprob) for found in content.logprobs or []]
    assert len(expected) == 6
    events = list(client.responses.create(stream=True, **options))
    deltas = [found for event in events if event.type == "response.output_text.delta" for found in event.logprobs]
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    for parts in (deltas, done.logprobs):
        assert [(part.token, part.logprob) for part in parts] == expected
        assert all(len(part.top_logprobs or []) == 2 for part in parts)


def test_log_probabilities_that_json_lacks_are_clamped(
    served: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's API gives an impossible token the value -9999. JSON has no minus infinity."""
    options: Any = {"max_tokens": 4, "logprobs": True, "top_logprobs": 1}
    with scripted(served, monkeypatch, "x = 1", Logprobs(-math.inf, [(40, -math.inf)])):
        whole = chat(client, **options).choices[0].logprobs.content
        streamed = joined(chat(client, stream=True, **options))["logprobs"]
        text = client.completions.create(model="pair", prompt="x", logprobs=1).choices[0].logprobs
    for found in (whole, streamed):
        assert {token.logprob for token in found} == {token.top_logprobs[0].logprob for token in found} == {-9999.0}
    assert text is not None
    assert set(text.token_logprobs or []) == {-9999.0}


def test_thinking_reaches_the_template(client: openai.OpenAI) -> None:
    plain = chat(client, max_tokens=1).usage.prompt_tokens
    for options in (
        {"reasoning_effort": "low"},
        {"extra_body": {"enable_thinking": True}},
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}, "thinking_budget": 3}},
    ):
        assert chat(client, max_tokens=1, **options).usage.prompt_tokens > plain
    assert chat(client, max_tokens=1, reasoning_effort="none").usage.prompt_tokens == plain


def test_thinking_can_be_turned_off(client: openai.OpenAI) -> None:
    with serve(load_demo_pair, GenerationOptions(enable_thinking=True, thinking_budget=5, max_tokens=1)) as thinking:
        body = {"messages": MESSAGES}
        url = f"{thinking.v1}/chat/completions"
        tokens = [
            post(url, json=body | more).json()["usage"]["prompt_tokens"] for more in ({}, {"reasoning_effort": "none"})
        ]
    assert tokens[0] > tokens[1] == chat(client, max_tokens=1).usage.prompt_tokens


def test_stats_on_demand(client: openai.OpenAI, model: Model) -> None:
    responses = list(model.stream_generate(MESSAGES, num_draft_tokens=K, max_tokens=48))
    chunks = list(chat(client, stream=True, extra_body={"include_stats": True}))
    stats = [chunk.stats for chunk in chunks if getattr(chunk, "stats", None)]
    assert [found["from_draft"] for found in stats[:-1]] == [response.from_draft for response in responses]
    assert stats[-1]["accepted"] == responses[-1].stats.accepted
    assert not any(hasattr(chunk, "stats") for chunk in chat(client, stream=True))


def test_copies_on_demand(served: Served, client: openai.OpenAI) -> None:
    before = metrics(served)
    body = {"copy_drafts": "auto", "num_draft_tokens": "auto", "include_stats": True, "ignore_eos": True}
    question: Any = [{"role": "user", "content": "def first(value):\n    return value\n\n\n" * 3}]
    chunks = list(chat(client, stream=True, messages=question, max_tokens=120, extra_body=body))
    stats = [chunk.stats for chunk in chunks if getattr(chunk, "stats", None)]
    copied = stats[-1]["copied"]
    assert sum(found["from_copy"] for found in stats[:-1]) == copied["accepted"] > 10
    assert all(found["from_draft"] for found in stats[:-1] if found["from_copy"])
    after = metrics(served)
    for name, key in (("copied_draft_tokens", "drafted"), ("accepted_copied_draft_tokens", "accepted")):
        assert after[f"mlx_mtp_{name}_total"] - before.get(f"mlx_mtp_{name}_total", 0) == copied[key]


BAD_BODIES: list[tuple[str, Any, str | None, str]] = [
    ("chat/completions", {}, "messages", "missing_required_parameter"),
    ("chat/completions", {"messages": []}, "messages", "invalid_value"),
    ("chat/completions", {"messages": "hi"}, "messages", "invalid_value"),
    ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0]", "invalid_value"),
    ("chat/completions", {"max_tokens": "5"}, "max_tokens", "invalid_value"),
    ("chat/completions", {"max_tokens": 0}, "max_tokens", "invalid_value"),
    ("chat/completions", {"max_tokens": True}, "max_tokens", "invalid_value"),
    ("chat/completions", {"temperature": -1}, "temperature", "invalid_value"),
    ("chat/completions", {"top_p": 2}, "top_p", "invalid_value"),
    ("chat/completions", {"n": 0}, "n", "invalid_value"),
    ("chat/completions", {"n": 129}, "n", "invalid_value"),
    ("chat/completions", {"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ("chat/completions", {"stop": [1]}, "stop[0]", "invalid_value"),
    ("chat/completions", {"temprature": 1}, "temprature", "unknown_parameter"),
    ("chat/completions", {"max_token": 5}, "max_token", "unknown_parameter"),
    ("chat/completions", {"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
    ("chat/completions", {"mirostat": 2}, "mirostat", "unsupported_parameter"),
    ("chat/completions", {"typical_p": 0.5}, "typical_p", "unsupported_parameter"),
    ("chat/completions", {"dynatemp_range": 1}, "dynatemp_range", "unsupported_parameter"),
    ("chat/completions", {"stop_token_ids": [5]}, "stop_token_ids", "unsupported_parameter"),
    ("chat/completions", {"add_generation_prompt": False}, "add_generation_prompt", "unsupported_parameter"),
    ("chat/completions", {"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
    ("chat/completions", {"input": "x"}, "input", "unsupported_parameter"),
    ("chat/completions", {"repeat_penalty": -1}, "repeat_penalty", "invalid_value"),
    ("chat/completions", {"max_tokens": 2.5}, "max_tokens", "invalid_value"),
    ("chat/completions", {"top_k": -2}, "top_k", "invalid_value"),
    ("chat/completions", {"thinking": {"type": "loud"}}, "thinking.type", "invalid_value"),
    ("chat/completions", {"reasoning": {"exclude": True}}, "reasoning.exclude", "invalid_value"),
    (
        "chat/completions",
        {"chat_template_kwargs": {"tokenize": False}},
        None,
        "invalid_value",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "assistant", "content": None, "audio": {"id": "a"}}]},
        "messages[0].audio",
        "invalid_value",
    ),
    ("chat/completions", {"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    ("chat/completions", {"logit_bias": {"99999999": 1}}, "logit_bias", "invalid_value"),
    ("chat/completions", {"num_draft_tokens": -1}, "num_draft_tokens", "invalid_value"),
    ("chat/completions", {"copy_drafts": "on"}, "copy_drafts", "invalid_value"),
    ("chat/completions", {"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ("chat/completions", {"tools": [{"type": "function", "function": {"name": "a b"}}]}, None, "invalid_value"),
    ("chat/completions", {"tools": TOOLS, "regex": "a", "tool_choice": "required"}, None, "invalid_value"),
    ("chat/completions", {"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
    (
        "chat/completions",
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"not": {}}, "strict": True},
            }
        },
        "response_format",
        "invalid_value",
    ),
    ("chat/completions", {"regex": "("}, "regex", "invalid_value"),
    (
        "chat/completions",
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"$ref": "file:///etc/passwd"}},
            }
        },
        "response_format",
        "invalid_value",
    ),
    (
        "chat/completions",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
            ]
        },
        "messages[0].content[0].image_url.url",
        "invalid_value",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]},
        "messages",
        "invalid_value",
    ),
    (
        "chat/completions",
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]},
                {"role": "tool", "content": "x", "tool_call_id": "c"},
                {"role": "tool", "content": "y", "tool_call_id": "c"},
            ]
        },
        "messages",
        "invalid_value",
    ),
    ("chat/completions", {"messages": [{"role": "user", "content": "x " * 5000}]}, None, "context_length_exceeded"),
    ("completions", {"prompt": ["a", "b"]}, "prompt", "invalid_value"),
    ("completions", {"prompt": ""}, None, "invalid_value"),
    ("completions", {"prompt": [-1]}, None, "invalid_value"),
    ("completions", {"prompt": "a", "suffix": "b"}, "suffix", "unsupported_parameter"),
    ("completions", {"prompt": "a", "max_new_tokens": 0}, "max_new_tokens", "invalid_value"),
    ("completions", {"prompt": "a", "echo": True}, "echo", "unsupported_parameter"),
    ("completions", {"prompt": "a", "best_of": 2}, "best_of", "unsupported_parameter"),
    ("completions", {"prompt": "a", "tools": TOOLS}, "tools", "unsupported_parameter"),
    ("responses", {"input": []}, "input", "invalid_value"),
    ("responses", {"input": [{"type": "computer_call"}]}, "input[0].type", "invalid_value"),
    ("responses", {"input": "x", "previous_response_id": "r"}, "previous_response_id", "unsupported_parameter"),
    ("responses", {"input": "x", "background": True}, "background", "unsupported_parameter"),
    ("responses", {"input": "x", "response_format": {"type": "text"}}, "response_format", "unsupported_parameter"),
    ("responses", {"input": "x", "tools": [{"type": "function"}]}, "tools[0].name", "missing_required_parameter"),
    (
        "responses",
        {"input": "x", "tool_choice": "required", "tools": [{"type": "mcp"}]},
        "tool_choice",
        "invalid_value",
    ),
    (
        "responses",
        {"input": "x", "tool_choice": {"type": "web_search"}, "tools": [{"type": "web_search"}]},
        "tool_choice",
        "invalid_value",
    ),
]


@pytest.mark.parametrize(("path", "body", "param", "code"), BAD_BODIES)
def test_bad_bodies(served: Served, path: str, body: Any, param: str | None, code: str) -> None:
    given = {"messages": MESSAGES, "max_tokens": 2} if body and path == "chat/completions" else {}
    for stream in (False, True):
        answer = post(f"{served.v1}/{path}", json=given | body | ({"stream": True} if stream else {}))
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (400, "invalid_request_error", code), error
        assert param is None or error["param"] == param, error
        assert error["message"]


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"", {}, 400),
        (b"[]", {}, 400),
        (b'"text"', {}, 400),
        (b"\xff\xfe", {}, 400),
        (b'{"messages": NaN}', {}, 400),
        (b"[" * 200_000, {}, 400),
        (b'{"messages":' * 50_000, {}, 400),
        (json.dumps({"messages": MESSAGES}).encode(), {"content-type": "text/plain"}, 400),
        (b"x" * 32_000_001, {}, 413),
    ],
)
def test_bodies_that_are_none(served: Served, content: bytes, headers: dict[str, str], status: int) -> None:
    answer = post(
        f"{served.v1}/chat/completions", content=content, headers={"content-type": "application/json"} | headers
    )
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_a_huge_body_without_a_length_is_cut_off(served: Served) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(400):
            yield b" " * 100_000

    answer = post(f"{served.v1}/chat/completions", content=endless(), headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_other_paths_models_and_methods(served: Served, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'other' is not here: this server has 'pair'") as found:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert found.value.code == "model_not_found"
    for method, path, status in (
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v2/models", 404),
        ("GET", "/chat", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
    ):
        answer = httpx.request(method, f"{served.url}{path}")
        assert (answer.status_code, set(answer.json())) == (status, {"error"})


def test_other_hosts_and_origins_are_refused(served: Served) -> None:
    with serve(load_demo_pair, allowed_hosts=("127.0.0.1",)) as local:
        body = {"messages": MESSAGES, "max_tokens": 1}
        refused = post(f"{local.v1}/chat/completions", json=body, headers={"Host": "evil.example"})
        assert refused.status_code == 400
        assert post(f"{local.v1}/chat/completions", json=body).status_code == 200
    answer = httpx.get(f"{served.v1}/models", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    asked = {"Origin": "http://app.example", "Access-Control-Request-Method": "POST"}
    with serve(load_demo_pair, allowed_origins=("http://app.example",), api_key="k") as open_to_app:
        answer = httpx.options(f"{open_to_app.v1}/chat/completions", headers=asked)
        assert answer.headers["access-control-allow-origin"] == "http://app.example"
        refused = httpx.options(f"{open_to_app.v1}/chat/completions", headers=asked | {"Origin": "http://evil.example"})
        assert "access-control-allow-origin" not in refused.headers


def test_api_key() -> None:
    with serve(load_demo_pair, api_key="s3cret") as found:
        for key in ("x", "wrong", "s3cre", "s3crets", "schlüssel"):
            answer = httpx.get(f"{found.v1}/models", headers={b"Authorization": f"Bearer {key}".encode()})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{found.v1}/models").status_code == 401
        assert httpx.get(f"{found.url}/metrics").status_code == 401
        assert post(f"{found.v1}/chat/completions", content=b"{").status_code == 401
        assert httpx.get(f"{found.url}/health").status_code == 200
        with openai.OpenAI(base_url=found.v1, api_key="s3cret") as client:
            assert [model.id for model in client.models.list()] == ["pair"]


def test_prompt_limit() -> None:
    with serve(load_demo_pair, max_prompt_tokens=20) as found:
        for words, status in ((2, 200), (40, 400)):
            body = {"messages": [{"role": "user", "content": "x " * words}], "max_tokens": 1}
            assert post(f"{found.v1}/chat/completions", json=body).status_code == status


def metrics(served: Served) -> dict[str, float]:
    families = text_string_to_metric_families(httpx.get(f"{served.url}/metrics").text)
    return {
        s.name + ("." + s.labels["end"] if "end" in s.labels else ""): s.value
        for family in families
        for s in family.samples
    }


def test_metrics(served: Served, client: openai.OpenAI) -> None:
    before = metrics(served)
    usage = chat(client).usage
    after = metrics(served)

    def grown(name: str) -> float:
        return after[f"mlx_mtp_{name}"] - before.get(f"mlx_mtp_{name}", 0)

    assert grown("prompt_tokens_total") == usage.prompt_tokens
    assert grown("generation_tokens_total") == usage.completion_tokens
    details = usage.completion_tokens_details
    assert grown("accepted_draft_tokens_total") == details.accepted_prediction_tokens
    assert grown("draft_tokens_total") == details.accepted_prediction_tokens + details.rejected_prediction_tokens
    assert grown("generation_seconds_count") == grown("time_to_first_token_seconds_count") == 1
    assert after["mlx_mtp_acceptance_length"] > 1
    assert after["mlx_mtp_tokens_per_second"] > 0
    assert after["mlx_mtp_memory_active_bytes"] > 1e6
    assert after["mlx_mtp_requests_running"] == after["mlx_mtp_requests_waiting"] == 0


@pytest.mark.parametrize(
    ("script", "content", "thought", "call"),
    [
        ("thought\nhm<channel|>Hi", "Hi", "hm", None),
        ("<|channel>thought\nhm<channel|>Hi<channel|><channel|>", "Hi", "hm", None),
        ("<|turn>model\nHi", "Hi", None, None),
        ("<tool_call|>", "", None, None),
        ("Yes<tool_call|> and no", "Yes and no", None, None),
        # A call in an unclosed thought is a call. In a closed thought it is part of the thought.
        ("<|channel>thought\nGo.<|tool_call>call:stop{}<tool_call|>", None, "Go.", "stop"),
        ("<|channel>thought\nA <|tool_call>call:stop{} b.<channel|>No.", "No.", "A <|tool_call>call:stop{} b.", None),
    ],
)
def test_control_tokens_never_reach_the_content(
    served: Served,
    client: openai.OpenAI,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    content: str | None,
    thought: str | None,
    call: str | None,
) -> None:
    with scripted(served, monkeypatch, script):
        message = chat(client, tools=TOOLS).choices[0].message
        parts = joined(chat(client, tools=TOOLS, stream=True))
    assert (message.content, getattr(message, "reasoning_content", None)) == (content, thought)
    assert [found.function.name for found in message.tool_calls or []] == ([call] if call else [])
    assert (parts["content"], parts["reasoning"] or None) == (content or "", thought)
    assert [found["name"] for found in parts["calls"].values()] == ([call] if call else [])


def test_a_call_that_is_badly_written(served: Served, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool's schema helps to read it. An ambiguous call is passed on unchanged and counted."""
    run: Any = {"type": "object", "properties": {"command": {"type": "string"}, "note": {"type": "string"}}}
    tools: Any = [{"type": "function", "function": {"name": "run", "parameters": run}}]
    flat: Any = [{"type": "function", **tools[0]["function"]}]
    before = metrics(served)["mlx_mtp_unreadable_tool_calls_total"]
    script = "So:<|tool_call>call:run{command:\"echo a, note: b\",note:'x'}<tool_call|>Then."
    with scripted(served, monkeypatch, script):
        message = chat(client, tools=tools).choices[0].message
        answer = client.responses.create(model="pair", input=PROMPT, tools=flat)
        events = list(client.responses.create(model="pair", input=PROMPT, tools=flat, stream=True))
    expected = {"command": "echo a, note: b", "note": "x"}
    assert (message.content, json.loads(message.tool_calls[0].function.arguments)) == ("So:Then.", expected)
    outputs: list[Any] = [answer.output, events[-1].response.output]  # type: ignore[union-attr]
    for output in outputs:
        assert [item.type for item in output] == ["message", "function_call", "message"]
        assert json.loads(output[1].arguments) == expected
    assert metrics(served)["mlx_mtp_unreadable_tool_calls_total"] == before
    with scripted(served, monkeypatch, "<|tool_call>call:run{command:`ls`,,}{<tool_call|>"):
        message = chat(client, tools=tools).choices[0].message
    assert message.tool_calls[0].function.arguments == '{"command":`ls`,,}{'
    assert metrics(served)["mlx_mtp_unreadable_tool_calls_total"] == before + 1
