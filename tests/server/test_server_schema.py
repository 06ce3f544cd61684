"""Random requests, made from the server's own OpenAPI description."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from support.serving import Served, post, serve

import mlx_mtp
from mlx_mtp import DEMO_PAIR, GenerationOptions

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    options = GenerationOptions(num_draft_tokens=2, max_tokens=8)
    with serve(lambda: mlx_mtp.load(DEMO_PAIR, max_context=256), options) as found:
        yield found


USUAL: dict[str, tuple[str, Any]] = {
    "/v1/chat/completions": ("messages", [{"role": "user", "content": "def f("}]),
    "/v1/completions": ("prompt", "def f("),
    "/v1/responses": ("input", "def f("),
    "/v1/messages": ("messages", [{"role": "user", "content": "def f("}]),
}


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("path", USUAL)
def test_random_requests(served: Served, path: str, mode: GenerationMode) -> None:
    """The description allows some requests and not others. A request that it allows can still be refused."""
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operation = schema[path]["POST"]

    @settings(max_examples=20, derandomize=True, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            # Most allowed requests are refused for another reason, and nothing is generated. These changes avoid that.
            case.body["model"] = "pair"
            name, value = USUAL[path]
            case.body |= {name: value} if next(turns) % 2 else {}
            for name in ("logit_bias", "regex", "grammar", "top_logprobs", "ignore_eos", "min_tokens"):
                case.body.pop(name, None)
        answer = case.call_and_validate(checks=CHECKS, timeout=60)
        statuses.append(answer.status_code)

    statuses: list[int] = []
    turns = count()
    check()
    if mode is GenerationMode.POSITIVE:
        assert statuses.count(200) > 4


def test_the_server_is_well_afterwards(served: Served) -> None:
    body = {"prompt": "def f(", "max_tokens": 4, "temperature": 0}
    answer = post(f"{served.v1}/completions", json=body)
    assert answer.json()["choices"][0]["finish_reason"] == "length"
