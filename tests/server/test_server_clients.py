"""Requests as clients send them.

They have fields of other servers, fields that SDKs send back, items of tools that are not here, paths and hosts.
"""

import gzip
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Tool
from pydantic import TypeAdapter, ValidationError
from support.serving import Served, post, serve

import mlx_mtp
from mlx_mtp import DEMO_PAIR, GenerationOptions
from mlx_mtp.errors import OptionError
from mlx_mtp.grammars.compiler import lark_problem
from mlx_mtp.server.http_entry import local_hosts, plain_path
from mlx_mtp.server.openai_messages import chat_messages
from mlx_mtp.server.openai_requests import ChatRequest, CompletionRequest, ResponseRequest, field_names
from mlx_mtp.server.undeclared_fields import NEUTRAL, NO_EFFECT
from mlx_mtp.text.conversation import canonical_messages
from mlx_mtp.text.tool_schemas import usable_tools

ASKED = {"role": "user", "content": "def area(width):"}
CALL = {"id": "c1", "type": "function", "function": {"name": "measure", "arguments": '{"side": "left"}'}}
MEASURE = {
    "type": "function",
    "name": "measure",
    "parameters": {"type": "object", "properties": {"side": {"type": "string"}}, "required": ["side"]},
}

PICK = {"type": "object", "properties": {"side": {"enum": ["left", "right"]}}, "required": ["side"]}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    options = GenerationOptions(num_draft_tokens=2, max_tokens=6)
    with serve(lambda: mlx_mtp.load(DEMO_PAIR), options, allowed_hosts=local_hosts("127.0.0.1")) as found:
        yield found


def chat(served: Served, messages: Any = None, **fields: Any) -> httpx.Response:
    body = {"messages": messages or [ASKED], "temperature": 0} | fields
    return post(f"{served.v1}/chat/completions", json=body)


def respond(served: Served, items: Any, **fields: Any) -> httpx.Response:
    return post(f"{served.v1}/responses", json={"input": items, "temperature": 0} | fields)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def rendered(items: Any, **fields: Any) -> Any:
    """Return the messages that a request to /v1/responses makes for the template."""
    return ResponseRequest.model_validate({"input": items} | fields).task(GenerationOptions()).prompt


def options_of(**fields: Any) -> GenerationOptions:
    return ChatRequest.model_validate({"messages": [ASKED]} | fields).task(GenerationOptions()).options


def test_fields_without_effect_are_accepted_and_change_nothing(served: Served) -> None:
    plain = text_of(chat(served))
    given = {name: values[0] for name, values in NEUTRAL.items()} | {name: {"a": 1} for name in NO_EFFECT}
    answer = chat(served, **{name: value for name, value in given.items() if name not in field_names(ChatRequest)})
    assert text_of(answer) == plain
    assert "x-mlx-mtp-ignored" not in answer.headers
    for name, values in NEUTRAL.items():
        for value in values:
            assert options_of(**{name: value}) is not None
    body = {"input": "x", **{name: given[name] for name in given if name not in field_names(ResponseRequest)}}
    assert post(f"{served.v1}/responses", json=body).status_code == 200
    prompt = {"prompt": "x", **{name: given[name] for name in given if name not in field_names(CompletionRequest)}}
    assert post(f"{served.v1}/completions", json=prompt).status_code == 200


def test_an_unknown_field_is_accepted_and_named(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    answer = chat(served, **{"colour scheme": "dark", "line\nbreak": 1, "größe": 2})
    assert text_of(answer) == text_of(chat(served))
    assert answer.headers["x-mlx-mtp-ignored"] == "colour%20scheme, line%0Abreak, gr%C3%B6%C3%9Fe"
    assert "'colour scheme' of a request is ignored" in caplog.text
    many = chat(served, **{f"{index} of many": 1 for index in range(3000)})
    assert text_of(many) == text_of(answer)
    assert many.headers["x-mlx-mtp-ignored"].startswith("0%20of%20many, 1%20of%20many")
    streamed = chat(served, stream=True, paint="red")
    assert streamed.headers["x-mlx-mtp-ignored"] == "paint"
    misspelt = chat(served, temprature=0.5).json()["error"]
    assert misspelt["message"] == "unknown parameter: 'temprature': did you mean 'temperature'?"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_tokens": 9.0}, {"max_tokens": 9}),
        ({"max_tokens": -1}, {}),
        ({"max_completion_tokens": -1.0}, {}),
        ({"n_predict": 7}, {"max_tokens": 7}),
        ({"max_new_tokens": 8}, {"max_tokens": 8}),
        ({"max_new_tokens": 8, "max_tokens": 5}, {"max_tokens": 5}),
        ({"stop": ""}, {}),
        ({"stop": ["", "end"]}, {"stop": ["end"]}),
        ({"stop_sequences": ["halt"]}, {"stop": ["halt"]}),
        ({"top_logprobs": 0}, {}),
        ({"thinking": {"type": "disabled", "budget_tokens": 4}}, {}),
        ({"thinking": {"type": "enabled", "budget_tokens": 4}}, {"enable_thinking": True, "thinking_budget": 4}),
        ({"thinking": {"type": "adaptive"}}, {"enable_thinking": True}),
        ({"think": False}, {}),
        ({"think": "high"}, {"enable_thinking": True}),
        ({"think": "none"}, {}),
        ({"reasoning": {"effort": "low"}}, {"enable_thinking": True}),
        ({"reasoning": {"enabled": False}}, {}),
        ({"reasoning": {"max_tokens": 12}}, {"enable_thinking": True, "thinking_budget": 12}),
        ({"reasoning_effort": "minimal"}, {}),
        ({"enable_thinking": True, "thinking_budget": -1}, {"enable_thinking": True}),
    ],
)
def test_options_of_other_servers_are_read(given: dict[str, Any], expected: dict[str, Any]) -> None:
    found, usual = options_of(seed=1, **given), options_of(seed=1)
    for name in ("max_tokens", "stop", "enable_thinking", "thinking_budget"):
        assert getattr(found, name) == expected.get(name, getattr(usual, name)), name


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 12.0}, {"top_k": 12}),
        ({"seed": 42.0}, {"seed": 42}),
        ({"random_seed": 42}, {"seed": 42}),
        ({"repeat_penalty": 1.25}, {"repetition_penalty": 1.25}),
        ({"repeat_last_n": 64}, {"repetition_context_size": 64}),
        ({"repeat_last_n": -1}, {"repetition_context_size": 2**31}),
        ({"temperature": 1, "top_p": 0}, {"temperature": 0}),
        ({"temperature": 1e-9}, {"temperature": 0}),
        ({"logit_bias": []}, {"logit_bias": {}}),
        ({"min_p": None}, {"min_p": 0}),
    ],
)
def test_sampling_of_other_servers_is_read(given: dict[str, Any], expected: dict[str, Any]) -> None:
    found = options_of(**given).sampling
    assert {name: vars(found)[name] for name in expected} == expected


def test_the_token_limit_of_other_names_holds(served: Served) -> None:
    for path, body in (("completions", {"prompt": "x"}), ("responses", {"input": "x"})):
        for name in ("max_tokens", "n_predict"):
            answer = post(f"{served.v1}/{path}", json=body | {name: 3}).json()["usage"]
            assert answer.get("completion_tokens", answer.get("output_tokens")) == 3
    # The request has no limit of its own, so the server's limit applies.
    assert chat(served, max_tokens=-1).json()["usage"]["completion_tokens"] == 6


def test_an_empty_model_name_is_the_servers(served: Served) -> None:
    assert chat(served, model="").json()["model"] == "pair"


def test_switches_of_the_template_pass_through() -> None:
    asked = {
        "chat_template_kwargs": {"preserve_thinking": True, "enable_thinking": True, "add_generation_prompt": True}
    }
    task = ChatRequest.model_validate({"messages": [ASKED]} | asked).task(GenerationOptions())
    assert task.template_options == {"preserve_thinking": True, "add_generation_prompt": True}
    assert task.options.enable_thinking
    task = ResponseRequest.model_validate({"input": "x"} | asked).task(GenerationOptions())
    assert task.template_options == {"preserve_thinking": True, "add_generation_prompt": True}


EXTRAS: list[tuple[str, dict[str, Any]]] = [
    ("user", {"id": 3, "cache_control": {"type": "ephemeral"}, "content": [{"type": "text", "text": "x", "note": 1}]}),
    ("user", {"content": ["x"]}),
    ("user", {"content": [{"type": "text", "text": "x", "annotations": None, "logprobs": [], "cache_control": {}}]}),
    ("assistant", {"content": "x", "parsed": {"a": 1}, "refusal": None, "audio": None, "function_call": None}),
    ("assistant", {"content": "x", "annotations": [], "provider_specific_fields": {"citations": None}}),
    ("assistant", {"content": [{"type": "refusal", "refusal": "x"}]}),
    ("assistant", {"content": None, "refusal": "x"}),
]


@pytest.mark.parametrize(("role", "extras"), EXTRAS)
def test_messages_may_have_more(role: str, extras: dict[str, Any]) -> None:
    request = ChatRequest.model_validate({"messages": [{"role": role} | extras]})
    assert chat_messages(request.messages) == [{"role": role, "content": "x"}]


def test_thoughts_come_back_under_either_name() -> None:
    for name in ("reasoning", "reasoning_content"):
        message = {"role": "assistant", "content": "x", name: "hm", "reasoning_details": [{"type": "reasoning.text"}]}
        request = ChatRequest.model_validate({"messages": [message]})
        assert chat_messages(request.messages) == [{"role": "assistant", "content": "x", "reasoning_content": "hm"}]


def test_what_sdks_add_to_calls_is_no_error(served: Served) -> None:
    call: Any = CALL | {"index": 0, "extra": {}}
    call["function"] = CALL["function"] | {"parsed_arguments": {"side": "left"}}  # type: ignore[operator]
    tool = {"type": "function", "function": MEASURE | {"strict": None}, "cache_control": {}, "eager_input_streaming": 1}
    messages = [
        ASKED,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "7"},
    ]
    plain = [ASKED, {"role": "assistant", "tool_calls": [CALL]}, messages[2]]
    options: Any = {"tools": [tool]}
    found = chat(served, messages, **options)
    expected = chat(served, plain, tools=[{"type": "function", "function": MEASURE}])
    assert text_of(found) == text_of(expected)
    assert found.json()["usage"] | {"prompt_tokens_details": 0} == expected.json()["usage"] | {
        "prompt_tokens_details": 0
    }


def test_arguments_may_be_an_object_and_functions_may_be_of_old() -> None:
    own = CALL | {"function": {"name": "measure", "arguments": {"side": "left"}}}
    old = {"role": "assistant", "content": None, "function_call": {"name": "measure", "arguments": '{"side": "left"}'}}
    for messages in (
        [{"role": "assistant", "tool_calls": [own]}, {"role": "tool", "tool_call_id": "c1", "content": "7"}],
        [old, {"role": "function", "name": "measure", "content": "7"}],
    ):
        first, second = chat_messages(ChatRequest.model_validate({"messages": messages}).messages)
        assert first["tool_calls"][0]["function"] == {"name": "measure", "arguments": {"side": "left"}}
        assert (second["role"], second["name"], second["content"]) == ("tool", "measure", "7")


def test_developer_and_system_texts_are_one(served: Served) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Write "}, {"type": "text", "text": "Python."}]},
        ASKED,
        {"role": "assistant", "content": "pass"},
        {"role": "system", "content": "No comments."},
        ASKED,
    ]
    found = chat_messages(ChatRequest.model_validate({"messages": messages}).messages)
    system = {"role": "system", "content": "Be brief.\n\nWrite Python.\n\nNo comments."}
    assert found == [system, ASKED, {"role": "assistant", "content": "pass"}, ASKED]
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Write Python."}]},
        ASKED,
    ]
    assert rendered(items, instructions="Be brief.")[0]["content"] == "Be brief.\n\nWrite Python."
    one = respond(served, [ASKED], instructions="Be brief.\n\nWrite Python.").json()
    assert (
        respond(served, items, instructions="Be brief.").json()["usage"]["input_tokens"] == one["usage"]["input_tokens"]
    )


def test_items_of_one_turn_are_one_answer() -> None:
    thoughts = [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]} for text in "ab"]
    calls = [{"type": "function_call", "call_id": id_, "name": "measure", "arguments": "{}"} for id_ in "12"]
    outputs = [{"type": "function_call_output", "call_id": id_, "output": id_} for id_ in "21"]
    texts = [{"role": "assistant", "content": text} for text in ("One", "Two")]
    items = [ASKED, texts[0], thoughts[0], calls[0], thoughts[1], calls[1], texts[1], *outputs]
    asked, answer, *results = canonical_messages(rendered(items))
    assert asked == ASKED
    assert (answer["content"], answer["reasoning_content"]) == ("One\n\nTwo", "a\n\nb")
    ids = [call["id"] for call in answer["tool_calls"]]
    assert [(found["content"], found["tool_call_id"]) for found in results] == [("2", ids[1]), ("1", ids[0])]


OTHER_TOOLS: list[dict[str, Any]] = [
    {"type": "web_search", "external_web_access": False},
    {"type": "web_search_preview"},
    {"type": "namespace", "name": "crew", "description": "d", "tools": [MEASURE | {"name": "spawn"}]},
    {"type": "custom", "name": "patch", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
    {"type": "local_shell"},
    {"type": "mcp", "server_label": "l", "server_url": "https://example.com"},
    {"type": "file_search", "vector_store_ids": ["v"]},
    {"type": "computer_use_preview", "display_width": 1, "display_height": 1, "environment": "mac"},
    {"type": "image_generation"},
    {"type": "code_interpreter", "container": {"type": "auto"}},
    {"type": "tool_search"},
]


def test_tools_of_other_types_are_skipped(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    only = respond(served, "x", tools=[MEASURE])
    answer = respond(served, "x", tools=[*OTHER_TOOLS, MEASURE], client_metadata={"a": "b"})
    assert answer.status_code == 200, answer.text
    TypeAdapter(list[Tool]).validate_python(answer.json()["tools"], strict=True)
    assert answer.json()["usage"]["input_tokens"] == only.json()["usage"]["input_tokens"]
    assert [tool["name"] for tool in answer.json()["tools"]] == ["measure"]
    assert "tools.web_search, tools.web_search_preview" in answer.headers["x-mlx-mtp-ignored"]
    assert "'tools.namespace' of a request is ignored" in caplog.text
    assert respond(served, "x", tools=OTHER_TOOLS).status_code == 200
    for choice in ({"type": "custom", "name": "patch"}, {"type": "function", "name": "spawn"}, {"type": "mcp"}):
        refused = respond(served, "x", tools=[*OTHER_TOOLS, MEASURE], tool_choice=choice)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice")


def test_items_of_skipped_tools_are_skipped(served: Served) -> None:
    items = [
        ASKED,
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "q"}},
        {"type": "local_shell_call", "call_id": "s", "status": "completed", "action": {"type": "exec", "command": []}},
        {"type": "local_shell_call_output", "id": "s", "output": "o"},
        {"type": "custom_tool_call", "call_id": "p", "name": "patch", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "p", "output": "x"},
        {"type": "mcp_list_tools", "id": "m", "server_label": "l", "tools": []},
        {
            "type": "message",
            "role": "assistant",
            "id": "m",
            "status": "completed",
            "phase": "final_answer",
            "content": [],
        },
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        ASKED,
    ]
    expected = [ASKED, {"role": "assistant", "content": ""}, {"role": "assistant", "content": "No."}, ASKED]
    assert rendered(items) == expected
    answer = respond(served, items)
    assert answer.status_code == 200
    assert "input.custom_tool_call, input.custom_tool_call_output" in answer.headers["x-mlx-mtp-ignored"]


def test_calls_and_thoughts_in_items_are_one_answer() -> None:
    thought: dict[str, Any] = {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "s"}]}
    call = {"type": "function_call", "call_id": "c1", "name": "measure", "arguments": "{}", "status": "completed"}
    items = [
        ASKED,
        thought | {"content": [{"type": "reasoning_text", "text": "Which side?"}], "encrypted_content": None},
        call | {"namespace": "crew"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "7"}]},
        thought | {"content": None, "encrypted_content": "gAAA"},
        call | {"call_id": "c2"},
        call | {"call_id": "c3"},
        {"type": "function_call_output", "call_id": "c2", "output": "8"},
        {"type": "function_call_output", "call_id": "c3", "output": "9"},
        thought | {"content": [{"type": "reasoning_text", "text": "Now."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "9", "logprobs": []}]},
        thought | {"content": [{"type": "reasoning_text", "text": "Cut off."}]},
        ASKED,
        {"type": "message", "role": "assistant", "content": "Wait."},
        thought | {"content": [{"type": "reasoning_text", "text": "Once more."}]},
        call | {"call_id": "c4"},
    ]
    found = rendered(items)
    shape = [
        (message["role"], message["content"], message.get("reasoning_content"), len(message.get("tool_calls", [])))
        for message in found
    ]
    assert shape == [
        ("user", ASKED["content"], None, 0),
        ("assistant", "", "Which side?", 1),
        ("tool", "7", None, 0),
        ("assistant", "", None, 2),
        ("tool", "8", None, 0),
        ("tool", "9", None, 0),
        ("assistant", "9", "Now.", 0),
        ("user", ASKED["content"], None, 0),
        ("assistant", "Wait.", None, 0),
        ("assistant", "", "Once more.", 1),
    ]


@pytest.mark.parametrize("reference", [{"type": "item_reference", "id": "msg_7"}, {"id": "msg_7"}])
def test_a_reference_says_that_nothing_is_stored(served: Served, reference: dict[str, Any]) -> None:
    with (
        openai.OpenAI(base_url=served.v1, api_key="any", max_retries=0) as client,
        pytest.raises(
            openai.NotFoundError,
            match=r"Item with id 'msg_7' not found\. Items are not persisted when `store` is set to false",
        ) as found,
    ):
        client.responses.create(model="pair", input=[ASKED, reference])  # type: ignore[list-item]
    assert found.value.param == "input"


def test_fields_of_responses_that_sdks_send(served: Served) -> None:
    given: Any = {
        "include": ["reasoning.encrypted_content", "web_search_call.action.sources", "another.of.later"],
        "truncation": "auto",
        "store": True,
        "background": False,
        "conversation": None,
        "previous_response_id": None,
        "text": {"verbosity": "low", "format": {"type": "text"}},
        "reasoning": {"effort": "none", "summary": "auto", "generate_summary": None},
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "max_tool_calls": 3,
        "top_logprobs": 0,
        "stream_options": {"include_obfuscation": False},
        "metadata": {"a": "b"},
        "user": "u",
    }
    answer = respond(served, "x", **given)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["store"], body["truncation"], body["text"]["verbosity"]) == (False, "auto", "low")
    assert body["reasoning"] == {"effort": "none", "summary": "auto"}
    assert body["output"][0]["content"][0]["logprobs"] == []
    # Values of other services are accepted, but the client's types of an answer do not have them.
    odd: Any = {
        "reasoning": {"effort": "turbo", "summary": "long"},
        "text": {"verbosity": "some"},
        "metadata": {"a": 1},
    }
    other = respond(served, "x", **odd, stream_options=None)
    assert other.status_code == 200, other.text
    assert other.json()["reasoning"] == {"effort": None, "summary": None}
    assert (other.json()["text"]["verbosity"], other.json()["metadata"]) == (None, {})
    error = respond(served, "x", previous_response_id="resp_1").json()["error"]
    assert "no response is found, as `store` is always false here" in error["message"]


def test_our_own_answers_come_back(served: Served) -> None:
    tools = [{"type": "function", "function": {"name": "pick", "parameters": PICK}}]
    message = chat(served, tools=tools, tool_choice="required", max_tokens=60).json()["choices"][0]["message"]
    (call,) = message["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "7"}
    assert chat(served, [ASKED, message, result], tools=tools).status_code == 200
    output = respond(served, "x").json()["output"]
    assert respond(served, [ASKED, *output, ASKED]).status_code == 200


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/v1/models/pair", "/metrics", "/openapi.json"])
def test_head_is_answered_where_get_is(served: Served, path: str) -> None:
    head, get = httpx.head(f"{served.url}{path}"), httpx.get(f"{served.url}{path}")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    if path != "/metrics":
        assert head.headers["content-length"] == get.headers["content-length"] != "0"
    assert httpx.head(f"{served.v1}/chat/completions").status_code == 405


def test_paths_are_read_as_meant(served: Served) -> None:
    body = {"messages": [ASKED], "max_tokens": 1}
    for path in ("/v1/chat/completions/", "/v1//chat/completions", "//v1/chat//completions", "/chat/completions"):
        assert post(f"{served.url}{path}", json=body).status_code == 200, path
    assert post(f"{served.v1}/v1/chat/completions", json=body).status_code == 200
    for path in ("/v1/models/", "/models", "//v1//models//", "/v1/v1/models"):
        assert httpx.get(f"{served.url}{path}").json()["data"][0]["id"] == "pair", path
    assert httpx.get(f"{served.url}/models/pair/").json()["id"] == "pair"
    assert httpx.get(f"{served.url}/health/").json()["status"] == "ok"
    for path, plain in (("", "/"), ("//", "/"), ("/completions", "/v1/completions"), ("/modelsx", "/modelsx")):
        assert plain_path(path) == plain


def test_a_key_is_asked_for_on_every_spelling_of_a_path() -> None:
    with serve(lambda: mlx_mtp.load(DEMO_PAIR), api_key="k") as found:
        for path in ("/models", "//v1/models", "/v1/models/", "/metrics/", "//metrics"):
            assert httpx.get(f"{found.url}{path}").status_code == 401, path
            assert httpx.head(f"{found.url}{path}").status_code == 401, path
        for path in ("//", "/health/"):
            assert httpx.get(f"{found.url}{path}").status_code == 200, path


def test_this_machines_names_are_known(served: Served) -> None:
    own = socket.gethostname()
    for host in (
        "localhost:8080", "LocalHost.", "127.0.0.1:1", "[::1]:8080", "desk.local", "host.docker.internal:8080",
        "app.localhost:3000", own.upper(), f"{own.split('.')[0]}:80",
    ):  # fmt: skip
        assert httpx.get(f"{served.v1}/models", headers={"Host": host}).status_code == 200, host
    for host in (
        "evil.example",
        "local",
        "localhost.evil.example",
        "xlocalhost",
        "127.0.0.1.nip.io:8080",
        "[::2]",
        ".",
    ):
        answer = httpx.get(f"{served.v1}/models", headers={"Host": host})
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (400, "invalid_request_error", "unknown_host"), (
            host
        )
        assert repr(host) in error["message"]
        assert "--allowed-hosts" in error["message"]


def test_answers_have_an_id(served: Served) -> None:
    with openai.OpenAI(base_url=served.v1, api_key="any", max_retries=0) as client:
        ids = {client.chat.completions.create(model="pair", messages=[ASKED])._request_id for _ in range(2)}  # type: ignore[list-item]
        assert len(ids) == 2
        assert all(str(found).startswith("req_") for found in ids)
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(model="pair", messages=[])
        assert str(error.value.request_id).startswith("req_")


def test_the_page_of_fields_names_them_all() -> None:
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    named = {*NO_EFFECT, *NEUTRAL, *field_names(ChatRequest, CompletionRequest, ResponseRequest)}
    assert sorted(name for name in named if f"`{name}`" not in page) == []


def refused(served: Served, path: str, **body: Any) -> dict[str, Any]:
    """Send a request that is refused with 400. Return its error."""
    answer = post(f"{served.v1}/{path}", json=body)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.mark.parametrize("value", ["word", None, 7, [], [{}], True])
def test_a_value_that_is_no_object_is_named(served: Served, value: Any) -> None:
    for path, body, place in (
        ("responses", {"input": [ASKED, value]}, "input[1]"),
        ("responses", {"input": "x", "tools": [value]}, "tools[0]"),
        ("chat/completions", {"messages": [value]}, "messages[0]"),
        ("chat/completions", {"messages": [ASKED], "tools": [value]}, "tools[0]"),
    ):
        error = refused(served, path, **body)
        assert (error["param"], error["code"]) == (place, "invalid_value"), error
        assert "expected an object" in error["message"]
    for block in ([value], [{"type": "tool_result", "tool_use_id": "a", "content": [value]}]):
        error = refused(served, "messages", max_tokens=1, messages=[{"role": "user", "content": block}])
        assert "expected an object" in error["message"]


@pytest.mark.parametrize("choice", [7, [], True, {}, {"type": 5}, {"type": []}, {"type": "function"}])
@pytest.mark.parametrize("kind", [ChatRequest, ResponseRequest])
def test_an_odd_choice_of_a_tool_is_an_error(kind: type[ChatRequest | ResponseRequest], choice: Any) -> None:
    tool = {"type": "function", "function": MEASURE} if kind is ChatRequest else MEASURE
    with pytest.raises(ValidationError, match="tool_choice"):
        kind.model_validate({"messages": [ASKED], "input": "x", "tools": [tool], "tool_choice": choice})


@pytest.mark.parametrize("kind", ["poem", 5, [], {"a": 1}])
def test_an_item_of_no_known_type_is_named_in_plain_words(served: Served, kind: Any) -> None:
    error = refused(served, "responses", input=[ASKED, {"type": kind}])
    assert error["param"] == "input[1].type"
    assert error["message"].startswith("input[1].type: unknown item type")
    if isinstance(kind, str):
        assert repr(kind) in error["message"]


def test_a_compaction_is_skipped(served: Served) -> None:
    answer = respond(served, [ASKED, {"type": "compaction", "id": "cmp_1", "encrypted_content": "gAAA"}])
    assert answer.status_code == 200
    assert answer.headers["x-mlx-mtp-ignored"] == "input.compaction"


ARGUMENTS: list[tuple[dict[str, Any], Any]] = [
    ({"arguments": None}, {}),
    ({}, {}),
    ({"arguments": ""}, {}),
    ({"arguments": ["left", 2]}, '["left", 2]'),
    ({"arguments": 7.5}, "7.5"),
    ({"arguments": True}, "true"),
    ({"arguments": {"side": "größe"}}, {"side": "größe"}),
]


@pytest.mark.parametrize(("given", "expected"), ARGUMENTS)
def test_arguments_of_earlier_calls_are_read_as_they_are(given: dict[str, Any], expected: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "measure"} | given}
    result = {"role": "tool", "tool_call_id": "c1", "content": "7"}
    messages = [ASKED, {"role": "assistant", "tool_calls": [call]}, result]
    found = chat_messages(ChatRequest.model_validate({"messages": messages}).messages)
    assert found[1]["tool_calls"][0]["function"]["arguments"] == expected
    items = [
        ASKED,
        {"type": "function_call", "call_id": "c1", "name": "measure"} | given,
        {"type": "function_call_output", "call_id": "c1", "output": "7"},
    ]
    assert rendered(items) == found
    old = {"role": "assistant", "function_call": {"name": "measure"} | given}
    (found_old,) = chat_messages(ChatRequest.model_validate({"messages": [old]}).messages)
    assert found_old["tool_calls"][0]["function"]["arguments"] == expected


def test_arguments_that_are_no_object_are_served(served: Served) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "measure", "arguments": [1, 2]}}
    result = {"role": "tool", "tool_call_id": "c1", "content": "7"}
    assert chat(served, [ASKED, {"role": "assistant", "tool_calls": [call]}, result]).status_code == 200


THOUGHTS: list[tuple[dict[str, Any], str | None]] = [
    ({"type": "thinking", "thinking": "Hm.", "signature": "s"}, "Hm."),
    ({"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, "Hm."),
    ({"type": "reasoning", "text": "Hm."}, "Hm."),
    ({"type": "reasoning", "reasoning": "Hm."}, "Hm."),
    ({"type": "redacted_thinking", "data": "gAAA"}, None),
]


@pytest.mark.parametrize(("part", "thought"), THOUGHTS)
def test_a_thought_among_the_parts_is_no_text(part: dict[str, Any], thought: str | None) -> None:
    message = {"role": "assistant", "content": [part, {"type": "text", "text": "x"}]}
    expected: Any = {"role": "assistant", "content": "x"} | ({} if thought is None else {"reasoning_content": thought})
    assert chat_messages(ChatRequest.model_validate({"messages": [message]}).messages) == [expected]
    assert rendered([message]) == [expected]
    for kind, name in ((ChatRequest, "messages"), (ResponseRequest, "input")):
        with pytest.raises(ValidationError, match="a message of role user cannot hold a thought"):
            kind.model_validate({name: [message | {"role": "user"}]})


def test_custom_tools_of_chats_are_skipped_and_their_calls_are_read(served: Served) -> None:
    call = {"id": "p1", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"}}
    result = {"role": "tool", "tool_call_id": "p1", "content": "done"}
    custom = {"type": "custom", "custom": {"name": "patch", "format": {"type": "text"}}}
    messages = [ASKED, {"role": "assistant", "tool_calls": [call]}, result]
    found = chat_messages(ChatRequest.model_validate({"messages": messages}).messages)
    assert found[1]["tool_calls"][0]["function"] == {"name": "patch", "arguments": "*** Begin"}
    assert (found[2]["name"], found[2]["content"]) == ("patch", "done")
    function = {"type": "function", "function": MEASURE}
    answer = chat(served, messages, tools=[custom, function])
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-mlx-mtp-ignored"] == "tools.custom"
    usage = chat(served, messages, tools=[function]).json()["usage"]
    assert answer.json()["usage"]["prompt_tokens"] == usage["prompt_tokens"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("any", "required"),
        ({"type": "any"}, "required"),
        ({"type": "required"}, "required"),
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
    ],
)
def test_words_for_the_choice_of_tools(given: Any, expected: str) -> None:
    assert ChatRequest.model_validate({"messages": [ASKED], "tool_choice": given}).tool_choice == expected
    assert ResponseRequest.model_validate({"input": "x", "tool_choice": given}).tool_choice == expected


def named_function(name: str) -> dict[str, Any]:
    return {"name": name, "parameters": PICK}


ALLOWED = [{"type": "function", "function": {"name": "pick"}}]
NAMED = [{"type": "function", "name": "pick"}, {"type": "mcp", "server_label": "l"}]


def test_only_allowed_tools_are_called(served: Served) -> None:
    names = ("drop", "pick", "turn")
    tools = [{"type": "function", "function": named_function(name)} for name in names]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": ALLOWED}}
    for seed in range(3):
        answer = chat(served, tools=tools, tool_choice=choice, max_tokens=60, temperature=1, seed=seed)
        calls = answer.json()["choices"][0]["message"]["tool_calls"]
        assert {call["function"]["name"] for call in calls} == {"pick"}
    # The prompt always has all tools, so it does not depend on the allowed tools.
    every = chat(served, tools=tools).json()["usage"]["prompt_tokens"]
    assert answer.json()["usage"]["prompt_tokens"] == every
    flat = [{"type": "function", **named_function(name)} for name in names]
    asked = {"type": "allowed_tools", "mode": "required", "tools": NAMED}
    body = respond(served, "x", tools=flat, tool_choice=asked, max_output_tokens=60).json()
    assert {item["name"] for item in body["output"] if item["type"] == "function_call"} == {"pick"}
    assert body["tool_choice"] == asked


def form_of(choice: Any) -> GenerationOptions:
    tools = [{"type": "function", "function": named_function(name)} for name in ("drop", "pick")]
    return options_of(tools=tools, tool_choice=choice)


def test_allowed_tools_beside_text_are_held_to() -> None:
    grammar = form_of({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": ALLOWED}}).grammar
    assert grammar is not None
    assert "call:pick" in grammar
    assert "call:drop" not in grammar
    assert "start: TEXT?" in grammar
    # All tools are allowed, so no grammar is needed.
    both = [*ALLOWED, {"type": "function", "function": {"name": "drop"}}]
    assert form_of({"type": "allowed_tools", "mode": "auto", "tools": both}).grammar is None
    none = form_of({"type": "allowed_tools", "mode": "auto", "tools": []}).grammar
    assert none is not None
    assert "call:" not in none
    assert lark_problem(none) is None


@pytest.mark.parametrize(
    ("mode", "tools", "message"),
    [
        ("required", [{"type": "function", "name": "spin"}], "tool_choice allows 'spin', the tools are drop, pick"),
        ("auto", [{"type": "function", "name": "spin"}], "tool_choice allows 'spin', the tools are drop, pick"),
        ("required", [], "tool_choice requires a call, but allows no function"),
        ("required", [{"type": "mcp"}], "tool_choice requires a call, but allows no function"),
        ("auto", [{"type": "function", "name": 5}], "tool_choice: a function of allowed_tools needs a name"),
    ],
)
def test_wrong_allowed_tools_are_refused(mode: str, tools: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        form_of({"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}})


def test_an_empty_form_asks_for_none(served: Served) -> None:
    plain = text_of(chat(served))
    assert plain
    for name in ("grammar", "regex"):
        assert text_of(chat(served, **{name: ""})) == plain
    assert text_of(chat(served, grammar="", regex="[a-c]{3}")) in {
        a + b + c for a in "abc" for b in "abc" for c in "abc"
    }


ODD: list[Any] = [5, True, "word", [], [5], [[]], {}, {"a": 5}, [{"type": 5}], None]
KEYWORDS = (
    "type",
    "enum",
    "const",
    "properties",
    "required",
    "items",
    "anyOf",
    "allOf",
    "oneOf",
    "$ref",
    "description",
)


@pytest.mark.parametrize("keyword", [*KEYWORDS, "nullable", "format", "$defs"])
def test_odd_keywords_of_tools_are_rendered(keyword: str) -> None:
    for value in ODD:
        part = {keyword: value}
        for parameters in (
            part,
            {"properties": {"a": part}, "required": ["a"]},
            {"properties": {"a": {"type": "array", "items": part}, "b": {"anyOf": [part, part]}}},
            {"properties": {"a": {"properties": {"b": {}}, "allOf": [part], "type": "object", "required": ["b"]}}},
            {"$ref": "#/$defs/a", "$defs": {"a": part}},
        ):
            (tool,) = usable_tools([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
            found = tool["function"]["parameters"]
            assert found["type"] == "object"
            for inner in found.get("properties", {}).values():
                assert isinstance(inner["type"], str)


def test_tools_with_odd_schemas_are_served(served: Served) -> None:
    odd: list[dict[str, Any]] = [
        {"type": 5},
        {"properties": {"a": {"type": 5, "enum": 3, "required": 2}}},
        {"required": [[]]},
    ]
    for parameters in odd:
        function = {"name": "f", "parameters": parameters}
        answer = chat(served, tools=[{"type": "function", "function": function}])
        assert answer.status_code == 200, answer.text


def test_a_schema_that_leads_to_itself_is_refused_in_plain_words(served: Served) -> None:
    def asked(schema: dict[str, Any]) -> dict[str, Any]:
        named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return refused(served, "chat/completions", messages=[ASKED], response_format=named)

    assert asked({"$ref": "#"})["message"] == "response_format: no value satisfies the schema"
    circle = {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}
    error = asked({"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}, "$defs": circle})
    assert error["message"] == "response_format: $ref '#/$defs/a' leads to nothing but itself"
    assert error["param"] == "response_format"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": ""}, None),
        ("completions", {"prompt": "x", "regex": "a", "grammar": "start: /a/"}, None),
        ("chat/completions", {"messages": [ASKED], "logit_bias": {"x": 1}}, "logit_bias"),
        ("chat/completions", {"messages": None}, "messages"),
        ("responses", {"input": None}, "input"),
        ("responses", {"input": "x", "text": {"format": {"type": None}}}, "text.format"),
        (
            "responses",
            {"input": "x", "text": {"format": {"type": "json_schema", "name": "x", "schema": None}}},
            "text.format.schema",
        ),
        (
            "responses",
            {"input": [ASKED | {"content": [{"type": "input_text", "text": None}]}]},
            "input[0].content[0].text",
        ),
        ("responses", {"input": [ASKED | {"role": None}]}, "input[0].role"),
        (
            "chat/completions",
            {"messages": [ASKED | {"content": [{"type": "text", "text": None}]}]},
            "messages[0].content[0].text",
        ),
    ],
)
def test_an_error_names_a_field_once_or_none(
    served: Served, path: str, body: dict[str, Any], param: str | None
) -> None:
    assert refused(served, path, **body)["param"] == param


@pytest.mark.parametrize(
    ("content", "headers", "message"),
    [
        (b'{"messages": "gr\xf6\xdfe"}', {}, "not in UTF-8"),
        (b'{"messages":' * 50_000, {}, "nested too deep"),
        (b"[" * 50_000, {}, "nested too deep"),
        (gzip.compress(b'{"messages": []}'), {"content-encoding": "gzip"}, "encoded as 'gzip'"),
        (b"{", {}, "not JSON"),
        (b"\x00\x00", {}, "not JSON"),
        (b'["x"]', {}, "must be a JSON object"),
    ],
    ids=["latin-1", "deep object", "deep list", "gzip", "cut off", "zeros", "list"],
)
def test_a_body_that_cannot_be_read_says_why(
    served: Served, content: bytes, headers: dict[str, str], message: str
) -> None:
    for path in ("chat/completions", "responses", "completions"):
        sent = {"content-type": "application/json"} | headers
        answer = post(f"{served.v1}/{path}", content=content, headers=sent)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_json", None), error
        assert message in error["message"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [("top_K", "top_k"), ("N", "n"), ("Seed", "seed"), ("STOP", "stop"), ("Mirostat", "mirostat"), ("TTL", "ttl")],
)
def test_a_name_in_another_case_is_nearly_that_of_a_field(name: str, meant: str) -> None:
    many = {f"{index} of many": 1 for index in range(100)}
    with pytest.raises(ValidationError, match=f"unknown parameter: '{name}': did you mean '{meant}'"):
        ChatRequest.model_validate({"messages": [ASKED]} | many | {name: 1})


def test_no_depth_of_a_body_is_an_error_of_the_server(served: Served) -> None:
    sent = {"content-type": "application/json"}
    codes = set()
    with httpx.Client(timeout=60) as client:
        for depth in range(930, 996, 6):
            content = '{"messages": [{"role": "user", "content": "x"}], "mirostat": %s}' % ("[" * depth + "]" * depth)
            answer = client.post(f"{served.v1}/chat/completions", content=content.encode(), headers=sent)
            assert answer.status_code == 400, (depth, answer.text)
            codes.add(answer.json()["error"]["code"])
    assert codes == {"unsupported_parameter", "invalid_json"}
