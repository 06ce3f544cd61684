"""Penalties, logit bias, stop strings and stop tokens: the same text with and without the drafter."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors
from support.commands import run
from support.tiny import WINDOW, random_tokens

import mlx_mtp
from mlx_mtp.decoding.sampling import Penalties
from mlx_mtp.gemma4.kv_cache import Cache
from mlx_mtp.options import OptionChanges

TinyPair = Callable[[str], Path]
PROMPT = random_tokens(2 * WINDOW, seed=5)
TOKENS = 20

PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.7, "repetition_context_size": 5},
    {"presence_penalty": 2.0, "presence_context_size": 100},
    {"frequency_penalty": 1.0, "frequency_context_size": 40},
    {"logit_bias": {100: 3.0, 200: -100.0, 300: 1.0}},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": -0.3, "logit_bias": {90: 2.0}},
]


@pytest.fixture(scope="module", params=["e2b", "31b"])
def model(tiny_pair: TinyPair, request: pytest.FixtureRequest) -> mlx_mtp.Model:
    return mlx_mtp.load(tiny_pair(request.param) / "target")


def generate(model: mlx_mtp.Model, k: int, **options: Any) -> mlx_mtp.GenerationResult:
    return model.generate(PROMPT, num_draft_tokens=k, **{"max_tokens": TOKENS, "ignore_eos": True} | options)


@pytest.fixture(scope="module")
def unchanged(model: mlx_mtp.Model) -> list[int]:
    """The greedy text without other options."""
    return generate(model, 0).tokens


def reference(model: mlx_mtp.Model, options: dict[str, Any]) -> list[int]:
    """Decode greedily with mlx-lm's processors. Each token comes from a fresh pass over the whole text."""
    processors = make_logits_processors(**options)
    tokens = list(PROMPT)
    for _ in range(TOKENS):
        cache = Cache(model.config.text, mx.float32, max_block=1)
        logits = model.target.soft_cap(model.target(mx.array([tokens]), cache, logit_rows=1).logits[0])
        for processor in processors:
            logits = processor(mx.array(tokens), logits)
        tokens.append(int(mx.argmax(logits)))
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("options", PENALTIES, ids=lambda options: "+".join(options))
def test_penalties_are_mlx_lms_with_and_without_drafts(
    model: mlx_mtp.Model, unchanged: list[int], options: dict[str, Any]
) -> None:
    expected = reference(model, options)
    assert expected != unchanged, "the penalty changes nothing: the test proves nothing"
    for k in (0, 4):
        assert generate(model, k, sampling=mlx_mtp.Sampling(**options)).tokens == expected


@pytest.mark.parametrize("candidates", [None, [[5, 0, 3], [0, 1, 2], [7, 6, 0]]])
def test_penalties_by_hand(candidates: list[list[int]] | None) -> None:
    """The contexts are shorter than the window. The padding is no token, and not token 0 either."""
    sampling = mlx_mtp.Sampling(
        repetition_penalty=2.0, repetition_context_size=4, presence_penalty=0.5, presence_context_size=2,
        frequency_penalty=0.25, frequency_context_size=3, logit_bias={3: 1.5},
    )  # fmt: skip
    penalties = Penalties(sampling, 8)
    contexts = [[-1, -1, -1, 3], [-1, 5, 5, 1], [0, 7, 0, 7]]
    logits = np.array([[1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 0.5, 4.0]] * 3)
    expected = logits.copy()
    for row, context in enumerate(contexts):
        for token in range(8):
            value = expected[row, token] + (1.5 if token == 3 else 0)
            if token in context:
                value = value / 2 if value > 0 else value * 2
            value -= 0.5 * (token in context[-2:]) + 0.25 * context[-3:].count(token)
            expected[row, token] = value
    ids = None if candidates is None else mx.array(candidates)
    given = logits if candidates is None else np.take_along_axis(logits, np.array(candidates), axis=1)
    wanted = expected if candidates is None else np.take_along_axis(expected, np.array(candidates), axis=1)
    found = penalties(mx.array(given, mx.float32), mx.array(contexts), ids)
    np.testing.assert_allclose(np.array(found), wanted, rtol=1e-6)


def test_penalties_when_sampling_do_not_depend_on_drafts(model: mlx_mtp.Model) -> None:
    options: dict[str, Any] = {"temperature": 0.3, "seed": 3, "acceptance": "coupled"}
    plain = generate(model, 0, sampling=mlx_mtp.Sampling(**options)).tokens
    for penalties in PENALTIES[::2]:
        sampling = mlx_mtp.Sampling(**options, **penalties)
        expected = generate(model, 0, sampling=sampling).tokens
        assert expected != plain
        assert generate(model, 3, sampling=sampling).tokens == expected


def test_a_banned_token_never_appears(model: mlx_mtp.Model) -> None:
    """The token appears neither greedily nor sampled, in any row of a block."""
    banned = set(generate(model, 0).tokens[:10])
    for temperature in (0.0, 1.0):
        sampling = mlx_mtp.Sampling(temperature=temperature, logit_bias=dict.fromkeys(banned, -1e9))
        assert not banned & set(generate(model, 4, sampling=sampling).tokens)


def test_logits_processors_see_each_rows_own_tokens(model: mlx_mtp.Model) -> None:
    """The processor forbids the last three tokens and depends on the length. The text equals mlx-lm's plain loop."""

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        bias = 5.0 if tokens.size % 2 else 0.0
        return logits.at[:, tokens[-3:]].add(-100.0).at[:, 60].add(bias)

    tokens = list(PROMPT)
    for _ in range(TOKENS):
        cache = Cache(model.config.text, mx.float32, max_block=1)
        logits = model.target.soft_cap(model.target(mx.array([tokens]), cache, logit_rows=1).logits[0])
        tokens.append(int(mx.argmax(process(mx.array(tokens), logits))))
    for k in (0, 4):
        result = generate(model, k, logits_processors=[process])
        assert result.tokens == tokens[len(PROMPT) :]
        assert result.last.stats.processed_rows == 1 + result.last.stats.rounds + result.last.stats.drafted
    assert generate(model, 4).last.stats.processed_rows == 0


def test_a_processor_of_the_wrong_shape(model: mlx_mtp.Model) -> None:
    with pytest.raises(mlx_mtp.OptionError, match=r"must return logits \[1, 512\], found \[512\]"):
        next(model.stream_generate(PROMPT, logits_processors=[lambda _, logits: logits[0]]))
    with pytest.raises(mlx_mtp.OptionError, match=r"must return logits \[1, 512\], found NoneType"):
        next(model.stream_generate(PROMPT, logits_processors=[lambda *_: None]))  # type: ignore[list-item]


def test_min_tokens(model: mlx_mtp.Model) -> None:
    plain = generate(model, 0).tokens
    model.tokenizer.add_eos_token(str(plain[5]))
    try:
        stopped = model.generate(PROMPT, max_tokens=TOKENS, num_draft_tokens=0)
        assert stopped.last.generation_tokens == plain.index(plain[5]) + 1
        expected = model.generate(PROMPT, max_tokens=TOKENS, num_draft_tokens=0, min_tokens=15)
        assert plain[5] not in expected.tokens[:15]
        assert model.generate(PROMPT, max_tokens=TOKENS, num_draft_tokens=4, min_tokens=15).tokens == expected.tokens
    finally:
        model.tokenizer.eos_token_ids.discard(plain[5])


def test_logprobs_are_the_targets_own(model: mlx_mtp.Model) -> None:
    """They do not depend on the options or on drafts."""
    sampling = mlx_mtp.Sampling(temperature=0.7, top_k=10, presence_penalty=1.0, acceptance="coupled")
    for k in (0, 3):
        options: dict[str, Any] = {"num_draft_tokens": k, "max_tokens": TOKENS, "ignore_eos": True, "logprobs": 4}
        responses = list(model.stream_generate(PROMPT, sampling=sampling, **options))
        tokens = [response.token for response in responses]
        cache = Cache(model.config.text, mx.float32, max_block=1)
        output = model.target(mx.array([PROMPT + tokens]), cache, logit_rows=TOKENS + 1)
        logits = model.target.soft_cap(output.logits[0, :-1])
        values = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        for row, response in zip(values, responses, strict=True):
            assert response.logprobs is not None
            assert response.logprobs.token == pytest.approx(row[response.token].item(), abs=1e-3)
            best = mx.sort(row)[::-1][:4].tolist()
            assert [p for _, p in response.logprobs.top] == pytest.approx(best, abs=1e-3)
            assert [row[i].item() for i, _ in response.logprobs.top] == pytest.approx(best, abs=1e-3)
    assert responses[0].logprobs != responses[1].logprobs
    assert generate(model, 3).last.logprobs is None


def test_penalties_keep_the_drafter_useful() -> None:
    """Penalties reach the drafter as well. The demo pair has 2.1 tokens per round. 1.0 means no help."""
    model = mlx_mtp.load(mlx_mtp.DEMO_PAIR)
    sampling = mlx_mtp.Sampling(presence_penalty=1.5)
    stats = model.generate(
        "def read_config(path):\n    ", max_tokens=80, num_draft_tokens=3, sampling=sampling
    ).last.stats
    assert stats.acceptance_length is not None
    assert stats.acceptance_length > 1.5


def test_stop_strings_wherever_tokens_and_blocks_break(model: mlx_mtp.Model) -> None:
    generate_40 = partial(generate, model, max_tokens=40)
    text = generate_40(0).text
    assert len(text) > 60
    for start, length in ((10, 1), (15, 2), (20, 5), (31, 9), (40, 3)):
        stop = text[start : start + length]
        expected = text[: text.index(stop)]
        for k in (0, 3):
            result = generate_40(k, stop=stop)
            assert result.text == expected
            assert result.last.finish_reason == "stop"
    several = generate_40(3, stop=[text[40:44], text[20:24], "not in the text at all"])
    assert several.text == text[: min(text.index(text[40:44]), text.index(text[20:24]))]
    # Text that only begins like a stop string is not lost, also at the end.
    almost = generate_40(3, stop=[text[-4:] + "?", text[30:34] + "?!"])
    assert almost.text == text
    assert almost.last.finish_reason == "length"


def test_stop_tokens_and_ignore_eos(model: mlx_mtp.Model) -> None:
    """The text continues after a stop token only with ignore_eos."""
    token = generate(model, 0).tokens[15]
    model.tokenizer.add_eos_token(str(token))
    try:
        for k in (0, 4):
            result = model.generate(PROMPT, max_tokens=TOKENS, num_draft_tokens=k)
            assert result.last.finish_reason == "stop"
            assert result.tokens == generate(model, 0).tokens[: result.last.generation_tokens]
            assert result.tokens.index(token) == len(result.tokens) - 1
            assert len(generate(model, k).tokens) == TOKENS
    finally:
        model.tokenizer.eos_token_ids.discard(token)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 1e-46}, "top_p must be at least 1e-06, found 1e-46"),
        ({"temperature": 1e-39}, "temperature must be at least 1e-06, found 1e-39"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, found 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty must be finite, found inf"),
        ({"frequency_context_size": 0}, "frequency_context_size must be at least 1, found 0"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias must map token ids to finite numbers, found 'a': 1.0"),
        ({"logit_bias": {5: float("inf")}}, "logit_bias must map token ids to finite numbers, found 5: inf"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias must map token ids to finite numbers, found 5: nan"),
        ({"logit_bias": {5: 1e39}}, r"logit_bias of token 5 must be finite in float32, found 1e\+39"),
        ({"logit_bias": {5: -(10**50)}}, r"logit_bias of token 5 must be finite in float32, found -10{50}$"),
    ],
)
def test_penalties_and_extremes_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(mlx_mtp.OptionError, match=message):
        mlx_mtp.Sampling(**options)


def test_options_are_checked_before_anything_is_generated(model: mlx_mtp.Model) -> None:
    with pytest.raises(mlx_mtp.OptionError, match="logit_bias names token 512, the vocabulary has 512"):
        model.stream_generate(PROMPT, sampling=mlx_mtp.Sampling(logit_bias={512: 1.0}))
    with pytest.raises(mlx_mtp.OptionError, match="stop holds an empty string"):
        model.stream_generate(PROMPT, stop=["a", ""])
    with pytest.raises(mlx_mtp.OptionError, match="min_tokens is 5, more than the max_tokens of 4"):
        model.stream_generate(PROMPT, min_tokens=5, max_tokens=4)
    with pytest.raises(mlx_mtp.OptionError, match="logprobs is 513, more than the vocabulary of 512"):
        model.stream_generate(PROMPT, logprobs=513)
    with pytest.raises(TypeError, match="max_token"):
        model.stream_generate(PROMPT, max_token=3)  # type: ignore[call-arg]


def test_the_command_line_takes_them_all(tiny_pair: TinyPair) -> None:
    def report_of(*args: str) -> dict[str, Any]:
        options = ("-m", "40", "--json", "--ignore-eos", "--seed", "7", "--num-draft-tokens", "3", *args)
        result = run("generate", "--model", tiny_pair("e2b") / "target", "-p", "hello", *options)
        report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
        return report

    sampled = ("--temp", "1", "--top-k", "20", "--top-p", "0.9", "--min-p", "0.01", "--acceptance", "coupled")
    xtc = ("--xtc-probability", "0.5", "--xtc-threshold", "0.05")
    penalties = ("--repetition-penalty", "1.2", "--presence-penalty", "0.5", "--frequency-penalty", "0.1")
    sizes = ("--repetition-context-size", "10", "--presence-context-size", "30", "--frequency-context-size", "30")
    every = (*sampled, *xtc, *penalties, *sizes, "--logit-bias", '{"100": 2}')
    drafted, plain = (
        report_of(*every, "--logprobs", "2"),
        report_of(*every, "--num-draft-tokens", "0", "--min-tokens", "10"),
    )
    assert [entry["token"] for entry in drafted["logprobs"]] == drafted["tokens"]
    assert all(entry["logprob"] <= entry["top"][0][1] and len(entry["top"]) == 2 for entry in drafted["logprobs"])
    assert plain["logprobs"] == []
    assert drafted["tokens"] == plain["tokens"]
    assert drafted["drafted"] > plain["drafted"] == 0
    stop = drafted["text"][10:12]
    stopped = report_of(*every, "--stop", stop)
    assert stopped["text"] == drafted["text"][: drafted["text"].index(stop)]
    assert stopped["finish_reason"] == "stop"


def test_keyword_options_are_the_fields_of_the_options() -> None:
    expected = {name: field.type for name, field in mlx_mtp.GenerationOptions.__dataclass_fields__.items()}
    assert expected == OptionChanges.__annotations__
