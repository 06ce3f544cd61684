"""Popular client libraries use the server: chats, streams, tools, and answers in a given form."""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import agents
import instructor
import litellm
import openai
import pytest
from instructor.core import IncompleteOutputException
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from support.scripted import ScriptedGeneration, ScriptedModel, load_demo_pair
from support.serving import Served, serve
from support.tool_syntax import render

from mlx_mtp import GenerationOptions, Model

QUESTION = "def read_config(path):"


# A small model would write further fields until it is cut.
class Place(BaseModel, extra="forbid"):
    """Where it is."""

    street: Literal["High Street", "Mill Lane"]
    number: int = Field(ge=1, le=99)
    note: str | None = Field(default=None, max_length=6)


class Visit(BaseModel, extra="forbid"):
    place: Place
    others: list[Place] = Field(min_length=1, max_length=2)
    code: str = Field(pattern=r"^[A-Z]{2}\d{3}$")
    minutes: float = Field(gt=0, lt=100)


MILL: Any = {"street": "Mill Lane", "number": 7, "note": None}
VISIT: Any = {"place": MILL, "others": [MILL | {"note": "x"}], "code": "AB123", "minutes": 5}
VISIT_TEXT = json.dumps(VISIT)


class SaysInTurn:
    """A model that writes the next of several texts in each generation."""

    def __init__(self, model: Model, texts: list[str]) -> None:
        self._model = model
        self.texts = texts
        self.prompts: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def begin(self, prompt: Any, *others: Any, **options: Any) -> ScriptedGeneration:
        self.prompts.append(self._model.tokenizer.decode(prompt.tokens))
        return ScriptedModel(self._model, self.texts.pop(0)).begin(prompt, *others, **options)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(load_demo_pair, GenerationOptions(num_draft_tokens=3, max_tokens=400)) as found:
        yield found


@pytest.fixture
def says(served: Served, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SaysInTurn]:
    def say(*texts: str) -> SaysInTurn:
        model = SaysInTurn(load_of(served), list(texts))
        monkeypatch.setattr(served.service, "model", model)
        return model

    return say


def load_of(served: Served) -> Model:
    model = served.service.model
    return model._model if isinstance(model, SaysInTurn) else model


def called(name: str, **arguments: Any) -> str:
    """Return a call as the model writes it."""
    return f"<|tool_call>call:{name}{render(dict(sorted(arguments.items())))}<tool_call|>"


@contextmanager
def openai_client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.v1, api_key="any", max_retries=0) as client:
        yield client


def test_openai_parses_answers_and_calls(served: Served, says: Callable[..., SaysInTurn]) -> None:
    messages: Any = [{"role": "user", "content": QUESTION}]
    tool = openai.pydantic_function_tool(Visit, name="visit")
    with openai_client(served) as client:
        answer = client.chat.completions.parse(model="pair", messages=messages, response_format=Visit)
        assert isinstance(answer.choices[0].message.parsed, Visit)
        messages += [answer.choices[0].message.model_dump(), messages[0]]
        forced = client.chat.completions.parse(model="pair", messages=messages, tools=[tool], tool_choice="required")
        call = forced.choices[0].message.tool_calls
        assert call is not None
        assert isinstance(call[0].function.parsed_arguments, Visit)
        result: Any = {"role": "tool", "tool_call_id": call[0].id, "content": "done"}
        messages += [forced.choices[0].message.model_dump(), result]
        with client.chat.completions.stream(
            model="pair", messages=messages, tools=[tool], response_format=Visit, max_tokens=300
        ) as stream:
            final = stream.get_final_completion()
        message = final.choices[0].message
        assert isinstance(message.parsed, Visit) or message.tool_calls
        parsed = client.responses.parse(model="pair", input=QUESTION, text_format=Visit)
        assert isinstance(parsed.output_parsed, Visit)
        says("Let me see.<|tool_call>call:f{}<tool_call|>", "Done.")
        tools: Any = [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}]
        with client.responses.stream(model="pair", input=QUESTION, tools=tools) as events:
            first = events.get_final_response()
        output: Any = [item.model_dump() for item in first.output]
        output += [{"type": "function_call_output", "call_id": output[-1]["call_id"], "output": "ok"}]
        second = client.responses.create(model="pair", input=[*messages[:1], *output], tools=tools)
        assert second.output_text == "Done."


def litellm_options(served: Served) -> Any:
    return {"model": "openai/pair", "api_base": served.v1, "api_key": "any", "max_retries": 0}


def test_litellm(served: Served, says: Callable[..., SaysInTurn]) -> None:
    messages: Any = [{"role": "user", "content": QUESTION}]
    options = litellm_options(served) | {"temperature": 0, "max_tokens": 12}
    whole = litellm.completion(messages=messages, **options).choices[0].message.content
    chunks = litellm.completion(messages=messages, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole != ""
    structured = litellm.completion(messages=messages, response_format=Visit, **(options | {"max_tokens": 200}))
    assert Visit.model_validate_json(structured.choices[0].message.content)
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": Place.model_json_schema()}}]
    model = says("So: " + called("f", street="Mill Lane", number=7), "Done.")
    asked = litellm.completion(messages=messages, tools=tools, **options).choices[0].message
    messages += [asked, {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": "a mill"}]
    final = litellm.completion(messages=messages, tools=tools, **options)
    assert final.choices[0].message.content == "Done."
    assert (
        'So: <|tool_call>call:f{number:7,street:<|"|>Mill Lane<|"|>}<tool_call|><|tool_response>' in model.prompts[-1]
    )


@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_openai_agents(served: Served, says: Callable[..., SaysInTurn], kind: str) -> None:
    agents.set_tracing_disabled(True)
    seen: list[str] = []

    @agents.function_tool
    def look_up(place: Place, days: int = 1) -> str:
        """Look it up."""
        seen.append(place.street)
        return "sunny"

    async def run() -> Any:
        async with openai.AsyncOpenAI(base_url=served.v1, api_key="any", max_retries=0) as client:
            form: Any = agents.OpenAIChatCompletionsModel if kind == "chat" else agents.OpenAIResponsesModel
            agent = agents.Agent(
                name="a",
                instructions="Answer.",
                tools=[look_up],
                output_type=Visit,
                model=form(model="pair", openai_client=client),
            )
            script = called("look_up", days=2, place=MILL)
            says(script, VISIT_TEXT)
            first = (await agents.Runner.run(agent, QUESTION)).final_output
            says(script, VISIT_TEXT)
            streamed = agents.Runner.run_streamed(agent, QUESTION)
            events = [event.type async for event in streamed.stream_events()]
            assert "raw_response_event" in events
            return first, streamed.final_output

    first, second = asyncio.run(run())
    assert first == second == Visit.model_validate(VISIT)
    assert seen == ["Mill Lane", "Mill Lane"]


@pytest.mark.parametrize("kind", ["chat", "responses"])
@pytest.mark.parametrize("output", [ToolOutput, NativeOutput, PromptedOutput])
def test_pydantic_ai(served: Served, says: Callable[..., SaysInTurn], kind: str, output: Any) -> None:
    form: Any = OpenAIChatModel if kind == "chat" else OpenAIResponsesModel
    model = form("pair", provider=OpenAIProvider(base_url=served.v1, api_key="any"))
    agent: Agent[None, Visit] = Agent(model, output_type=output(Visit), instructions="Answer.")

    @agent.tool_plain
    def look_up(street: str) -> str:
        """Look it up."""
        return f"{street}: sunny"

    answer = called("final_result", **VISIT) if output is ToolOutput else VISIT_TEXT
    script = says(called("look_up", street="Mill Lane"), answer)
    result = agent.run_sync(QUESTION)
    assert result.output == Visit.model_validate(VISIT)
    assert "Mill Lane: sunny" in script.prompts[-1]

    async def streamed() -> Visit:
        async with agent.run_stream(QUESTION) as stream:
            return await stream.get_output()

    says(called("look_up", street="Mill Lane"), answer)
    assert asyncio.run(streamed()) == result.output


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS_STRICT])
def test_instructor(served: Served, mode: Any) -> None:
    with openai_client(served) as client:
        patched = instructor.from_openai(client, mode=mode)
        messages: Any = [{"role": "user", "content": QUESTION}]
        for seed in range(1, 6):
            # A small model can write blanks until it is cut.
            with suppress(IncompleteOutputException):
                options: Any = {"model": "pair", "temperature": 1, "seed": seed, "max_retries": 0}
                assert patched.chat.completions.create(messages=messages, response_model=Visit, **options).place.number
                return
    raise AssertionError("no answer ended")
