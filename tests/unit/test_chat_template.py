"""Conversations with tool calls in each published template, and tool declarations that a model can use."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from support.chat_templates import TEMPLATES

import mlx_mtp
from mlx_mtp.errors import PromptError
from mlx_mtp.text.chat_template import render_conversation
from mlx_mtp.text.conversation import canonical_messages
from mlx_mtp.text.tokenizer import encode_chat, load_tokenizer
from mlx_mtp.text.tool_schemas import usable_tools

Messages = list[dict[str, Any]]
Q = '<|"|>'
USER = {"role": "user", "content": "Look it up."}


def call(id_: str, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: dict[str, Any], text: Any = None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "tool_calls": list(calls), **fields}


def result(id_: str, text: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "content": text}


def answered(name: str, text: str) -> str:
    return f"<|tool_response>response:{name}{{value:{Q}{text}{Q}}}<tool_response|>"


def said(text: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


@cache
def parse(template: str) -> Template:
    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def rendered(template: str, messages: Messages, tools: Any = None, **switches: Any) -> str:
    """Return the rendered conversation after the user's first message, up to the model's next turn."""
    parsed = parse(TEMPLATES.get(template, template))

    def render(messages: Messages, tools: Any) -> str:
        return parsed.render(messages=messages, tools=tools, add_generation_prompt=True, bos_token="<bos>", **switches)

    text = render_conversation(messages, render, tools)
    beginning = "<|turn>user\nLook it up.<turn|>\n"
    assert beginning in text
    return text.partition(beginning)[2]


@pytest.mark.parametrize("template", TEMPLATES)
def test_text_stands_before_its_calls_and_the_turn_goes_on_after_the_results(template: str) -> None:
    messages = [
        USER,
        calling(
            call("1", "find", '{"name": "a\\nb", "deep": {"x": [1, true]}}'), call("2", "time", ""), text="First, \n"
        ),
        result("2", "noon"),
        result("1", "here"),
        calling(call("3", "find", '{"name": "c"}'), text="Then"),
        result("3", "there"),
    ]
    first = (
        f"<|tool_call>call:find{{deep:{{x:[1,true]}},name:{Q}a\nb{Q}}}<tool_call|><|tool_call>call:time{{}}<tool_call|>"
    )
    assert rendered(template, messages) == (
        f"<|turn>model\nFirst, \n{first}{answered('time', 'noon')}{answered('find', 'here')}"
        f"Then<|tool_call>call:find{{name:{Q}c{Q}}}<tool_call|>{answered('find', 'there')}"
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("answer", ["It is there.", None])
def test_the_turn_is_closed_before_the_user_goes_on(template: str, answer: str | None) -> None:
    messages = [USER, calling(call("1", "f", "{}")), result("1", "ok")]
    messages += [{"role": "assistant", "content": answer}] if answer else []
    messages += [{"role": "user", "content": "Thanks."}]
    prompt = "<|turn>model\n" + ("<|channel>thought\n<channel|>" if template == "autumn" else "")
    assert rendered(template, messages) == (
        f"<|turn>model\n<|tool_call>call:f{{}}<tool_call|>{answered('f', 'ok')}{answer or ''}<turn|>\n"
        f"<|turn>user\nThanks.<turn|>\n{prompt}"
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ('{"a": null, "b": [null, {"c": null}], "d": "null"}', f"{{a:null,b:[null,{{c:null}}],d:{Q}null{Q}}}"),
        # Arguments that are cut by a limit, malformed, or JSON but no object stay unchanged.
        ('{"a": "x', '{"a": "x'),
        ("{a:1}{b:2", "{a:1}{b:2"),
        ("ls -l", "{ls -l}"),
        ("[1, 2]", "{[1, 2]}"),
        ('{"a": "\ue0001;"}', f"{{a:{Q}\ue0001;{Q}}}"),
    ],
)
def test_arguments_are_shown_as_they_were(template: str, arguments: str, written: str) -> None:
    messages = [USER, calling(call("1", "f", arguments), text="So"), result("1", "Error: not valid")]
    assert rendered(template, messages) == (
        f"<|turn>model\nSo<|tool_call>call:f{written}<tool_call|>{answered('f', 'Error: not valid')}"
    )


@pytest.mark.parametrize("template", ["spring", "summer", "autumn"])
def test_thoughts_stand_before_text_and_calls(template: str) -> None:
    messages = [
        USER,
        calling(call("1", "f", "{}"), text="One", reasoning_content="hm"),
        result("1", "ok"),
        calling(call("2", "f", "{}"), reasoning_content="so"),
        result("2", "ok"),
    ]
    called = f"<|tool_call>call:f{{}}<tool_call|>{answered('f', 'ok')}"
    thought = "" if template == "spring" else "<|channel>thought\n"
    assert rendered(template, messages, enable_thinking=True) == (
        f"<|turn>model\n<|channel>thought\nhm\n<channel|>One{called}<|channel>thought\nso\n<channel|>{called}{thought}"
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("ids", [("", ""), (None, None), ("1", "1")])
def test_results_without_ids_of_their_own_are_those_of_the_calls_in_turn(template: str, ids: tuple[Any, Any]) -> None:
    calls = [call(ids[0], "f", "{}"), call(ids[1], "g", "{}")]
    for each in calls:
        if each["id"] is None:
            del each["id"]
    results = [{"role": "tool", "content": text} for text in ("one", "two")]
    if ids[0] is not None:
        results = [found | {"tool_call_id": id_} for found, id_ in zip(results, ids, strict=True)]
    assert rendered(template, [USER, calling(*calls, text="So"), *results]) == (
        "<|turn>model\nSo<|tool_call>call:f{}<tool_call|><|tool_call>call:g{}<tool_call|>"
        f"{answered('f', 'one')}{answered('g', 'two')}"
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_text_and_the_calls_after_it_are_one_answer(template: str) -> None:
    messages = [USER, {"role": "assistant", "content": "So"}, calling(call("1", "f", "{}")), result("1", "ok")]
    assert rendered(template, messages) == f"<|turn>model\nSo<|tool_call>call:f{{}}<tool_call|>{answered('f', 'ok')}"


F, G = call("1", "f", '{"x": 1}'), call("2", "g", "{}")
CALL_F, CALL_G = "<|tool_call>call:f{x:1}<tool_call|>", "<|tool_call>call:g{}<tool_call|>"
THOUGHT = "<|channel>thought\nhm\n<channel|>"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    ("messages", "written"),
    [
        ([said("One"), calling(F, reasoning_content="hm")], f"{THOUGHT}One{CALL_F}"),
        ([said("One"), calling(F, reasoning="hm")], f"{THOUGHT}One{CALL_F}"),
        ([said(None, reasoning="hm"), calling(F)], f"{THOUGHT}{CALL_F}"),
        ([said("One."), calling(F, text="Two.")], f"One.\n\nTwo.{CALL_F}"),
        ([said("One."), said(" \n"), said("Two."), calling(F)], f"One.\n\nTwo.{CALL_F}"),
        ([said([{"type": "text", "text": "One "}, {"type": "text", "text": "two"}]), calling(F)], f"One two{CALL_F}"),
        ([calling(F, text=[{"type": "text", "text": "One "}])], f"One {CALL_F}"),
        ([calling(F, text=[])], CALL_F),
        ([calling(F), said("Then.")], f"Then.{CALL_F}"),
    ],
)
def test_messages_of_one_turn_are_one_answer(template: str, messages: Messages, written: str) -> None:
    if template == "launch":
        written = written.removeprefix(THOUGHT)
    assert rendered(template, [USER, *messages, result("1", "ok")]) == (f"<|turn>model\n{written}{answered('f', 'ok')}")


@pytest.mark.parametrize("template", TEMPLATES)
def test_thoughts_of_one_turn_are_one_thought(template: str) -> None:
    messages = [USER, calling(F, reasoning_content="a"), calling(G, reasoning="b"), result("1", "F"), result("2", "G")]
    thought = "" if template == "launch" else "<|channel>thought\na\n\nb\n<channel|>"
    assert rendered(template, messages) == (
        f"<|turn>model\n{thought}{CALL_F}{CALL_G}{answered('f', 'F')}{answered('g', 'G')}"
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("calls", [[], [calling(F), result("1", "ok")]])
@pytest.mark.parametrize(
    ("answers", "written"),
    [
        ([said("Done."), said("Really.")], "Done.\n\nReally."),
        ([said("Done.")], "Done."),
        ([said("")], ""),
        ([said(None, reasoning="hm")], ""),
    ],
)
@pytest.mark.parametrize("goes_on", [True, False])
def test_answers_in_a_row_are_one_and_end_the_turn(
    template: str, calls: Messages, answers: Messages, written: str, goes_on: bool
) -> None:
    if template in ("summer", "autumn") and "reasoning" in answers[0] and not goes_on:
        written = THOUGHT
    before = f"{CALL_F}{answered('f', 'ok')}" if calls else ""
    user = "<|turn>user\nThanks.<turn|>\n" if goes_on else ""
    prompt = "<|turn>model\n" + ("<|channel>thought\n<channel|>" if template == "autumn" else "")
    messages = [USER, *calls, *answers, *([{"role": "user", "content": "Thanks."}] if goes_on else [])]
    assert rendered(template, messages) == f"<|turn>model\n{before}{written}<turn|>\n{user}{prompt}"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "messages",
    [
        [calling(F, G), result("2", "G"), result("1", "F")],
        [calling(F), calling(G), result("2", "G"), result("1", "F")],
        # Some ids are unknown or missing. The result is matched by name, or else to a remaining call.
        [calling(F, G), result("zz", "G"), result("1", "F")],
        [calling(F, G), {"role": "tool", "content": "G", "name": "g"}, {"role": "tool", "content": "F", "name": "f"}],
        [calling(F, G), result("", "G") | {"name": "g"}, result("", "F")],
        # Other messages came in between.
        [calling(F, G), {"role": "system", "content": ""}, result("2", "G"), result("1", "F")],
        [calling(F, G), result("2", "G"), said(None), result("1", "F")],
    ],
)
def test_results_are_those_of_their_calls(template: str, messages: Messages) -> None:
    text = rendered(template, [USER, *messages])
    assert text.startswith(f"<|turn>model\n{CALL_F}{CALL_G}{answered('g', 'G')}{answered('f', 'F')}")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_result_after_the_user_stands_behind_its_call(template: str) -> None:
    messages = [USER, calling(F), {"role": "user", "content": "Wait."}, result("1", "ok")]
    assert rendered(template, messages).startswith(
        f"<|turn>model\n{CALL_F}{answered('f', 'ok')}<turn|>\n<|turn>user\nWait.<turn|>\n<|turn>model\n"
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_messages_around_a_late_result_are_one_answer(template: str) -> None:
    messages = [USER, calling(F), {"role": "user", "content": "Wait."}, said("One"), result("1", "ok"), said("Two")]
    assert rendered(template, messages).startswith(
        f"<|turn>model\n{CALL_F}{answered('f', 'ok')}<turn|>\n<|turn>user\nWait.<turn|>\n"
        "<|turn>model\nOne\n\nTwo<turn|>\n<|turn>model\n"
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_id_is_that_of_the_latest_call(template: str) -> None:
    messages = [USER, calling(F), USER, calling(call("1", "g", "{}"), text="So"), result("1", "G")]
    assert rendered(template, messages).endswith(f"So{CALL_G}{answered('g', 'G')}")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"b": None, "a": ["ü"]}, '{"b": null, "a": ["ü"]}'),
        ([{"a": 1}], '[{"a": 1}]'),
        (["a", "b"], '["a", "b"]'),
        ([], "[]"),
        (None, "null"),
        (1.5, "1.5"),
        ([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], "a b"),
    ],
)
def test_results_of_other_types_are_text(template: str, content: Any, text: str) -> None:
    messages = [USER, calling(F), {"role": "tool", "tool_call_id": "1", "content": content}]
    assert rendered(template, messages) == f"<|turn>model\n{CALL_F}{answered('f', text)}"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    ("arguments", "written"),
    [([1, None], "{[1, null]}"), (5, "{5}"), ((True,), "{[true]}"), ({"a": (None, 1)}, "{a:[null,1]}"), (None, "{}")],
)
def test_arguments_of_other_types_are_shown_as_json(template: str, arguments: Any, written: str) -> None:
    messages = [USER, calling(call("1", "f", arguments)), result("1", "Error")]
    assert rendered(template, messages) == (
        f"<|turn>model\n<|tool_call>call:f{written}<tool_call|>{answered('f', 'Error')}"
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [calling(F), result("1", "F"), result("1", "more")],
            r"messages\[3\].tool_call_id is '1': its call has a result already",
        ),
        ([result("1", "F")], r"messages\[1\] is the result of a call, but no call before it waits for one"),
        ([calling(F), result("1", {1})], r"messages\[2\].content cannot be written as JSON: .*set"),
        ([calling(call("1", "f", {1}))], r"messages\[1\].tool_calls\[0\].function.arguments cannot be written as JSON"),
        ([said([{"type": "image"}])], r"messages\[1\].content must be text, or a list of parts of type text, found \["),
        ([{"role": "system", "content": 5}], r"messages\[1\].content must be text"),
    ],
)
def test_messages_that_cannot_be_rendered_are_named(messages: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        rendered("summer", [USER, *messages])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_texts_stand_first(template: str, role: str) -> None:
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    messages = [
        {"role": "system", "content": "You help."},
        USER,
        calling(F),
        {"role": role, "content": parts},
        result("1", "ok"),
        {"role": role, "content": "Go on."},
    ]
    canonical = canonical_messages(messages)
    assert canonical[0] == {"role": "system", "content": "You help.\n\nBe brief.\n\nGo on."}
    assert [message["role"] for message in canonical] == ["system", "user", "assistant", "tool"]
    assert rendered(template, messages) == f"<|turn>model\n{CALL_F}{answered('f', 'ok')}"


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_text_disturbs_how_a_template_is_read(template: str) -> None:
    text = "<|turn>tool\n\ue000 \ue0000;"
    tools = [{"type": "function", "function": {"name": "h", "parameters": {"type": "object", "properties": {
        "p": {"type": "string", "description": text + "\ue000\ue000"}}}}}]  # fmt: skip
    messages = [USER, calling(F, text=text), result("1", text), calling(G, text="So"), result("2", text)]
    assert rendered(template, messages, tools) == (
        f"<|turn>model\n{text}{CALL_F}{answered('f', text)}So{CALL_G}{answered('g', text)}"
    )


def test_a_template_with_another_format_gets_the_messages_as_they_are() -> None:
    template = "{{ '<|turn>user\nLook it up.<turn|>\n' }}{{ messages[1:] | tojson }}"
    messages = [USER, calling(call("1", "f", '{"a": null}'), text="So"), result("1", "ok")]
    found = json.loads(rendered(template, messages))
    messages[1]["tool_calls"][0]["function"]["arguments"] = {"a": None}
    messages[1]["tool_calls"][0]["id"] = "1.0"
    assert found == [messages[1], messages[2] | {"name": "f", "tool_call_id": "1.0"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Return a function that loads the demo pair's tokenizer with another chat template."""

    def load(template: str) -> Any:
        folder = tmp_path_factory.mktemp("tokenizer")
        copytree(mlx_mtp.DEMO_PAIR, folder, dirs_exist_ok=True, ignore=lambda *_: ["model.safetensors", "drafter"])
        (Path(folder) / "chat_template.jinja").write_text(TEMPLATES[template])
        return load_tokenizer(folder, (1,))

    return load


def test_prompts_of_a_checkpoint(tokenizer: Callable[[str], Any]) -> None:
    """Switches reach the template, calls are encoded as the model writes them, and tools have types."""
    summer = tokenizer("summer")
    messages = [
        USER,
        calling(call("1", "f", '{"a": null}'), text="So", reasoning_content="hm"),
        result("1", "ok"),
        USER,
    ]
    parameters = {"type": "object", "properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    text = summer.decode(encode_chat(summer, messages, tools=tools, template_options={"preserve_thinking": True}))
    assert text.count("<bos>") == 1
    assert (
        f"<|tool>declaration:f{{parameters:{{a:{{description:{Q}{Q},nullable:true,type:{Q}STRING{Q}}}}}}}<tool|>"
        in text
    )
    assert "<|channel>thought\nhm\n<channel|>So<|tool_call>call:f{a:null}<tool_call|>" in text
    assert "hm" not in summer.decode(encode_chat(summer, messages, tools=tools))
    with pytest.raises(PromptError, match="tokenize is no switch of a chat template"):
        encode_chat(summer, messages, template_options={"tokenize": False})
    with pytest.raises(PromptError, match="add_generation_prompt must be true"):
        encode_chat(summer, messages, template_options={"add_generation_prompt": False})


PARAMETERS: list[tuple[Any, Any]] = [
    ({"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}, {"type": "integer", "nullable": True}),
    ({"type": ["null", "array"], "items": {"$ref": "#/$defs/Size"}}, {"type": "array", "nullable": True, "items": {
        "type": "object", "description": "How large.", "properties": {"w": {"type": "number"}}, "required": ["w"]}}),
    ({"$ref": "#/$defs/Size", "description": "This one."}, {"type": "object", "description": "This one.",
        "properties": {"w": {"type": "number"}}, "required": ["w"]}),
    ({"enum": ["a", "b"]}, {"type": "string", "enum": ["a", "b"]}),
    ({"enum": [1, 2, None], "title": "N"}, {"type": "integer", "nullable": True, "description": "One of 1, 2."}),
    ({"const": "left"}, {"type": "string", "enum": ["left"]}),
    ({"oneOf": [{"const": "x"}, {"enum": ["y", "z"]}]}, {"type": "string", "enum": ["x", "y", "z"]}),
    ({"anyOf": [{"type": "integer"}, {"type": "string"}], "description": "Id."},
        {"type": "string", "description": "Id. string or integer."}),
    ({"anyOf": [{"properties": {"k": {"const": "a"}, "p": {"type": "string"}}, "required": ["p", "k"]},
                {"type": "object", "properties": {"k": {"const": "b"}}, "required": ["k"]}]},
        {"type": "object", "properties": {"k": {"type": "string", "enum": ["a", "b"]}, "p": {"type": "string"}},
         "required": ["k"]}),
    ({"allOf": [{"$ref": "#/$defs/Size"}, {"properties": {"h": {"type": "number"}}, "required": ["h"]}]},
        {"type": "object", "description": "How large.",
         "properties": {"h": {"type": "number"}, "w": {"type": "number"}}, "required": ["h", "w"]}),
    ({"properties": {"x": {}}}, {"type": "object", "properties": {"x": {"type": "string"}}, "required": []}),
    ({"items": True}, {"type": "array"}),
    (True, {"type": "string"}),
    ({"$ref": "#/$defs/Missing"}, {"type": "string"}),
    ({"$ref": "#/$defs/Tree"}, {"type": "object", "required": [], "properties": {
        "left": {"type": "object", "nullable": True}, "more": {"type": "array", "items": {"type": "object"}}}}),
]  # fmt: skip
DEFINITIONS = {
    "Size": {
        "type": "object", "description": "How large.", "additionalProperties": False,
        "properties": {"w": {"type": "number", "minimum": 0}}, "required": ["w"],
    },
    "Tree": {"type": "object", "properties": {
        "left": {"anyOf": [{"$ref": "#/$defs/Tree"}, {"type": "null"}]},
        "more": {"type": "array", "items": {"$ref": "#/$defs/Tree"}}}},
}  # fmt: skip


def declared(schema: Any) -> Any:
    parameters = {"properties": {"p": schema}, "$defs": DEFINITIONS}
    tool = usable_tools([{"type": "function", "function": {"name": "f", "parameters": parameters}}])[0]
    found = tool["function"]["parameters"]
    assert found["type"] == "object"
    return found["properties"]["p"]


@pytest.mark.parametrize(("schema", "expected"), PARAMETERS, ids=lambda value: str(value)[:40])
def test_parameters_have_a_type_that_templates_can_write(schema: Any, expected: Any) -> None:
    assert declared(schema) == expected


def declaration(template: str, properties: dict[str, Any]) -> str:
    """Return the text that a template writes for the parameters of a tool."""
    parameters = {"type": "object", "properties": properties}
    tools = usable_tools([{"type": "function", "function": {"name": "f", "parameters": parameters}}])

    def render(messages: Messages, tools: Any) -> str:
        return parse(template).render(messages=messages, tools=tools, bos_token="")

    return render_conversation([USER], render, tools).partition("parameters:{")[2].partition("}}<tool|>")[0]


def text_parameter(template: str, name: str) -> str:
    empty = "" if template == "launch" else f"description:{Q}{Q},"
    return f"{name}:{{{empty}type:{Q}STRING{Q}}}"


@pytest.mark.parametrize("template", TEMPLATES)
def test_parameters_may_be_named_like_keywords(template: str) -> None:
    names = ["description", "descriptions", "nullable", "properties", "required", "type", "type_id"]
    inner = {name: {"type": "string"} for name in names}
    written = ",".join(text_parameter(template, name) for name in names)
    found = declaration(TEMPLATES[template], {**inner, "ways": {"type": "array", "items": {"properties": inner}}})
    items = f"{{properties:{{{written}}},required:[],type:{Q}OBJECT{Q}}}"
    assert found == f"{written},ways:{{items:{items},type:{Q}ARRAY{Q}}}"


@pytest.mark.parametrize("template", TEMPLATES)
def test_objects_and_arrays_need_no_description(template: str) -> None:
    point = {"type": "object", "properties": {"x": {"type": "string"}}}
    found = declaration(TEMPLATES[template], {"at": point, "named": {**point, "description": "Where."}})
    at = f"properties:{{{text_parameter(template, 'x')}}},type:{Q}OBJECT{Q}"
    assert found == f"at:{{{at}}},named:{{description:{Q}Where.{Q},{at}}}"


@pytest.mark.parametrize("template", TEMPLATES)
def test_items_of_items_are_no_data(template: str) -> None:
    cube: dict[str, Any] = {"type": "string"}
    for _ in range(3):
        cube = {"type": "array", "items": cube}
    schema = {**cube, "description": "All."}
    inner = f"{{type:{Q}STRING{Q}}}"
    for _ in range(2):
        inner = f"{{items:{inner},type:{Q}ARRAY{Q}}}"
    assert (
        declaration(TEMPLATES[template], {"cube": schema})
        == f"cube:{{description:{Q}All.{Q},items:{inner},type:{Q}ARRAY{Q}}}"
    )


def test_a_template_with_another_format_gets_the_tools_as_they_are() -> None:
    template = "parameters:{{ tools[0]['function']['parameters']['properties'] | tojson }}{{ '}}' }}<tool|>"
    properties = {"type": {"type": "array", "items": {"type": "array", "items": {"type": "string"}}}}
    assert json.loads("{" + declaration(template, properties)) == properties


def test_tools_without_parameters_stay_as_they_are() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {"parameters": {}}}, {}]
    assert usable_tools(tools) == tools


NAMES = st.sampled_from(["string", "integer", "null", "object", "array", "weird"])
SCHEMAS = st.recursive(
    st.booleans()
    | st.fixed_dictionaries({}, optional={"type": NAMES | st.lists(NAMES, max_size=3), "const": st.none()}),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "type": NAMES,
            "properties": st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
            "required": st.lists(st.sampled_from("ab"), max_size=2),
            "items": inner,
            "anyOf": st.lists(inner, max_size=3),
            "allOf": st.lists(inner, max_size=2),
            "enum": st.lists(st.none() | st.integers() | st.text(max_size=2) | st.just({}), max_size=3),
            "$ref": st.sampled_from(["#", "#/properties/p", "#/$defs/Tree", "#/nowhere", "other.json"]),
        },
    ),
    max_leaves=12,
)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(SCHEMAS)
def test_any_schema_is_written_with_types(schema: Any) -> None:
    def check(part: Any) -> None:
        assert part["type"] in ("string", "object", "array", "number", "integer", "boolean")
        assert part.keys() <= {"type", "description", "nullable", "enum", "properties", "required", "items"}
        for inner in [*part.get("properties", {}).values(), *([part["items"]] if "items" in part else [])]:
            check(inner)

    check(declared(schema))
