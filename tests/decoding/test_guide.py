"""Constrained answers and thoughts: always in the language, and the same text with and without the drafter."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from support.commands import Finished, run
from support.streams import Scripted
from support.tiny import WINDOW, make_gemma_tokenizer, random_tokens

import mlx_mtp
from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.constraints import Channel, Guide
from mlx_mtp.decoding.report import Stats
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.decoding.text_loop import decode
from mlx_mtp.errors import DraftError
from mlx_mtp.gemma4.drafter import Draft, Drafter, DraftInputs, GivenDrafter
from mlx_mtp.gemma4.kv_cache import Cache
from mlx_mtp.gemma4.target import Target
from mlx_mtp.generate import main

TinyPair = Callable[[str], Path]
PROMPT = random_tokens(2 * WINDOW, seed=5)
CODE = "def read_config(path):\n    "
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 500},
        "tags": {"type": "array", "items": {"enum": ["alpha", "beta"]}, "maxItems": 3},
    },
    "required": ["name", "count", "tags"],
    "additionalProperties": False,
}
REGEX = r"([a-z]{1,6}, ){2,4}[0-9]{2}(\n|!)"
LARK = 'start: "(" item ("," " "? item){1,3} ")"\nitem: /[a-z]{1,5}/ | start\n'
GBNF = 'root ::= ("yes" | "no" | "maybe " [0-9] [0-9]) "." root?'
GRAMMARS: list[dict[str, Any]] = [{"json_schema": SCHEMA}, {"regex": REGEX}, {"grammar": LARK}, {"grammar": GBNF}]


def is_answer(text: str, grammar: dict[str, Any]) -> bool:
    if "json_schema" in grammar:
        jsonschema.validate(json.loads(text), grammar["json_schema"])
        return True
    language: Any = grammar.get("regex", grammar.get("grammar"))
    pattern = {REGEX: REGEX, GBNF: r"((yes|no|maybe [0-9][0-9])\.)+"}.get(language)
    if pattern is None:
        while re.search(r"\([a-z]+(, ?[a-z]+)+\)", text):
            text = re.sub(r"\([a-z]+(, ?[a-z]+)+\)", "x", text)
        return text == "x"
    return re.fullmatch(pattern, text) is not None


@pytest.fixture(scope="module", params=["e2b", "31b"])
def model(tiny_pair: TinyPair, request: pytest.FixtureRequest) -> mlx_mtp.Model:
    """A model with a centroid head, and one with a dense head."""
    return mlx_mtp.load(tiny_pair(request.param) / "target")


@pytest.fixture(scope="module")
def trained() -> mlx_mtp.Model:
    return mlx_mtp.load(mlx_mtp.DEMO_PAIR)


@pytest.mark.parametrize("grammar", GRAMMARS, ids=["json_schema", "regex", "lark", "gbnf"])
def test_an_answer_is_in_the_language_and_does_not_depend_on_drafts(
    model: mlx_mtp.Model, grammar: dict[str, Any]
) -> None:
    samplings = [mlx_mtp.Sampling()]
    samplings += [mlx_mtp.Sampling(temperature=1.0, seed=s, top_k=40, acceptance="coupled") for s in range(2)]
    ended = 0
    for sampling in samplings:
        # Greedy answers of a random model repeat themselves and seldom end. Sampled answers end.
        options = {**grammar, "sampling": sampling, "max_tokens": 40 if sampling.is_greedy else 90}
        plain = model.generate(PROMPT, num_draft_tokens=0, **options)
        for k in (1, 4) if sampling.is_greedy else (3,):
            assert model.generate(PROMPT, num_draft_tokens=k, **options).tokens == plain.tokens
        if plain.last.finish_reason == "stop":
            assert is_answer(plain.text, grammar)
            ended += 1
    assert ended, "no answer ended: the test proves nothing"


@pytest.mark.in_place
@pytest.mark.parametrize("options", [{"regex": "[a-z ]{200}"}, {"enable_thinking": True, "thinking_budget": 500}])
@pytest.mark.parametrize("k", [0, 3])
def test_compiled_passes_are_the_same_and_copy_no_buffer(
    model: mlx_mtp.Model, channel: Channel, k: int, options: dict[str, Any]
) -> None:
    """One grammar has masks that depend on the tokens before. The thinking budget has one mask for all rows."""
    sampling = mlx_mtp.Sampling(temperature=1.0, seed=3)
    peaks = []
    for capacity in (1024, 64 * 1024):
        rounds, texts = CompiledRounds(), []
        for shared in (None, rounds):
            chosen = mlx_mtp.GenerationOptions(**options)
            guide = model.parts.guides.guide(chosen, 0 if chosen.enable_thinking else None, frozenset({1}))
            stream = Stream(
                model.target, model.drafter, max_draft_tokens=3, sampling=sampling, guide=guide, rounds=shared
            )
            stream.cache = Cache(model.config.text, mx.float32, max_block=4, capacity=capacity)
            tokens = stream.prefill(PROMPT, 64).tokens
            for index in range(8):
                if index == 3:
                    active = mx.get_active_memory()
                    mx.reset_peak_memory()
                tokens += stream.round(k).tokens
            texts.append(tokens)
        peaks.append(mx.get_peak_memory() - active)
        assert texts[0] == texts[1]
        assert len(rounds.traces) == 1
    assert peaks[1] < peaks[0] + 1e6


def test_characters_made_of_bytes(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """In a vocabulary of Gemma's form, "本" is three tokens. A grammar applies inside such a character."""
    shutil.copytree(tiny_pair("e2b"), tmp_path, dirs_exist_ok=True)
    for folder in ("target", "target-assistant"):
        make_gemma_tokenizer(tmp_path / folder)
    model = mlx_mtp.load(tmp_path / "target")
    seen = ""
    for seed in range(3):
        sampling = mlx_mtp.Sampling(temperature=1.0, seed=seed)
        result = model.generate("the end", regex="[本é a]{8}", num_draft_tokens=4, sampling=sampling)
        assert re.fullmatch("[本é a]{8}", result.text)
        seen += result.text
        plain = model.generate("the end", regex="[本é a]{8}", num_draft_tokens=0)
        assert model.generate("the end", regex="[本é a]{8}", num_draft_tokens=4).tokens == plain.tokens
    assert "本" in seen


def test_greedy_text_of_the_trained_pair_and_the_drafters_use(trained: mlx_mtp.Model) -> None:
    """Without masks of its own, the drafter seldom drafts allowed tokens. The measured acceptance length is 2.8."""
    accepted = []
    for grammar in GRAMMARS[:3]:
        plain = trained.generate(CODE, num_draft_tokens=0, max_tokens=48, **grammar)
        for k in (1, 3, 6):
            result = trained.generate(CODE, num_draft_tokens=k, max_tokens=48, **grammar)
            assert result.tokens == plain.tokens
            if k == 3:
                accepted.append(result.last.stats.acceptance_length)
    assert np.mean([a for a in accepted if a]) > 2.0


def test_sampled_answers_are_in_the_language(model: mlx_mtp.Model) -> None:
    """Block verification draws from the difference of two masked distributions."""
    for seed in range(8):
        sampling = mlx_mtp.Sampling(temperature=1.0, seed=seed, top_k=64, top_p=0.95)
        result = model.generate(PROMPT, num_draft_tokens=4, sampling=sampling, regex=REGEX)
        assert re.fullmatch(REGEX, result.text)
        assert result.last.finish_reason == "stop"


def exact(model: mlx_mtp.Model, regex: str) -> dict[tuple[int, ...], float]:
    """Return each text of a small language with its probability: the target's, over the allowed tokens at each step."""
    stop_ids = frozenset(model.tokenizer.eos_token_ids)
    guide = model.parts.guides.guide(mlx_mtp.GenerationOptions(regex=regex), None, stop_ids)
    assert guide is not None
    result: dict[tuple[int, ...], float] = {}

    def extend(tokens: tuple[int, ...], probability: float) -> None:
        mask = guide.mask()
        assert mask is not None
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: guide.vocab_size].nonzero()[0]
        cache = Cache(model.config.text, mx.float32, max_block=1)
        logits = model.target.soft_cap(model.target(mx.array([[*PROMPT, *tokens]]), cache, logit_rows=1).logits[0, 0])
        weights = np.exp(np.array(logits, np.float64)[allowed])
        for token, weight in zip(allowed.tolist(), weights / weights.sum(), strict=True):
            text = (*tokens, token)
            if token in stop_ids:
                result[text] = probability * weight
            else:
                guide.consume(token)
                extend(text, probability * weight)
                guide.rollback(1)

    extend((), 1.0)
    return result


def test_sampled_answers_have_the_plain_distribution(model: mlx_mtp.Model) -> None:
    """Chi-square over all texts of a small language, at a significance of 1e-4. The masks on both sides add no bias."""
    draws, regex = 300, r"[ab][cd]e?"
    expected = exact(model, regex)
    assert len(expected) > 10
    assert sum(expected.values()) == pytest.approx(1)
    # The longest text is the first token and three more: two draft tokens and the one after them.
    options = mlx_mtp.GenerationOptions(regex=regex, num_draft_tokens=2)
    counts = Counter(
        tuple(model.generate(PROMPT, options, sampling=mlx_mtp.Sampling(temperature=1.0, seed=seed)).tokens)
        for seed in range(draws)
    )
    assert set(counts) <= set(expected)
    terms = [(counts[text], p * draws) for text, p in expected.items() if p * draws >= 5]
    found, mean = (sum(values) for values in zip(*terms, strict=True))
    terms.append((draws - found, draws - mean))
    chi_square = sum((found - mean) ** 2 / mean for found, mean in terms)
    freedom = len(terms) - 1
    # Wilson and Hilferty: the cube root is nearly normal. It exceeds 3.72 deviations above its mean once in 10,000.
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3


def random_schema(rng: np.random.Generator, depth: int = 0) -> dict[str, Any]:
    """Return a schema with a bound on everything, so that its answers are finite."""
    kind = rng.integers(0, 9 if depth < 2 else 5)
    if kind == 0:
        return {"type": "string", "minLength": int(rng.integers(0, 3)), "maxLength": int(rng.integers(3, 12))}
    if kind == 1:
        return {"type": "integer", "minimum": int(rng.integers(-50, 0)), "maximum": int(rng.integers(1, 5000))}
    if kind == 2:
        return {"enum": [["red", "green", "blue"], [1, 2, None], [True, "yes"]][rng.integers(0, 3)]}
    if kind == 3:
        return {"type": ["boolean", "null"]}
    if kind == 4:
        return {"type": "string", "pattern": "^[A-Z][a-z]{1,5}(-[0-9]{1,3})?$"}
    if kind == 5:
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": 1, "maxItems": 3}
    if kind == 6:
        return {"anyOf": [random_schema(rng, depth + 1), random_schema(rng, depth + 1)]}
    names = ["id", "name", "size", "kind of", "über", "list"][: int(rng.integers(1, 6))]
    properties = {name: random_schema(rng, depth + 1) for name in names}
    required = [name for name in names if rng.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def assert_schemas_hold(model: mlx_mtp.Model, seeds: range) -> None:
    words = ["import", "def", "class", "return", "self", "path", "the", "of", "a", "None", "#", "config"]
    for seed in seeds:
        rng = np.random.default_rng(seed)
        schema: dict[str, Any] = {"type": "object", "properties": {"value": random_schema(rng)}, "required": ["value"]}
        schema["additionalProperties"] = False
        prompt = " ".join(rng.choice(words, rng.integers(1, 12)))
        sampling = mlx_mtp.Sampling(temperature=float(rng.choice([0.0, 0.7, 1.0])), seed=seed, top_k=64, top_p=0.95)
        result = model.generate(prompt, json_schema=schema, max_tokens=1000, num_draft_tokens=3, sampling=sampling)
        assert result.last.finish_reason == "stop", (seed, result.text)
        jsonschema.validate(json.loads(result.text), schema)


def test_random_schemas(trained: mlx_mtp.Model) -> None:
    assert_schemas_hold(trained, range(20))


def test_an_answer_cut_short_is_a_beginning(trained: mlx_mtp.Model) -> None:
    whole = trained.generate(CODE, json_schema=SCHEMA, max_tokens=20)
    cut = trained.generate(CODE, json_schema=SCHEMA, max_tokens=10)
    assert cut.last.finish_reason == "length"
    assert whole.text.startswith(cut.text)


def test_other_options_hold_under_a_grammar(model: mlx_mtp.Model) -> None:
    """Penalties, bias and a processor choose among the allowed tokens, with and without drafts."""
    a, b = (model.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ab")

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        return logits.at[:, b].add(50.0 if tokens.size % 3 == 0 else -50.0)

    sampling = mlx_mtp.Sampling(frequency_penalty=2.0, repetition_penalty=1.3, logit_bias={a: 5.0, 300: 80.0})
    options: dict[str, Any] = {"regex": "[a-d]{30}", "sampling": sampling, "stop": "bdc"}
    options["logits_processors"] = [process]
    plain = model.generate(PROMPT, num_draft_tokens=0, **options)
    assert model.generate(PROMPT, num_draft_tokens=4, **options).text == plain.text
    assert {"a", "b"} < set(plain.text) <= set("abcd")


def test_options_that_leave_no_token(model: mlx_mtp.Model) -> None:
    def exclude_all(_: mx.array, logits: mx.array) -> mx.array:
        return mx.full(logits.shape, -mx.inf)

    with pytest.raises(mlx_mtp.OptionError, match="the other options exclude every token that the grammar allows"):
        model.generate(PROMPT, regex="[a-d]{30}", logits_processors=[exclude_all])


BUDGET = 7


@pytest.fixture(scope="module")
def channel(model: mlx_mtp.Model) -> Channel:
    vocabulary = model.tokenizer.get_vocab()
    header = len(model.tokenizer.encode("thought\n", add_special_tokens=False))
    return Channel(vocabulary["<|channel>"], header, vocabulary["<channel|>"])


def thinker(model: mlx_mtp.Model, channel: Channel, length: int) -> Callable[[mx.array, mx.array], mx.array]:
    """Return a processor that opens the channel, names it, and closes it after `length` tokens.

    A random model does not think without it.
    """
    header = model.tokenizer.encode("thought\n", add_special_tokens=False)
    script = {
        0: channel.start,
        **{1 + i: token for i, token in enumerate(header)},
        1 + len(header) + length: channel.end,
    }

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        index = tokens.size - len(PROMPT)
        if index < 1 + len(header) + length:
            logits = logits.at[:, channel.end].add(-1000.0)
        token = script.get(index)
        return logits if token is None else logits.at[:, token].add(2000.0)

    return process


@pytest.mark.parametrize("grammar", [{}, {"regex": "[a-z ]{5,9}"}], ids=["free", "regex"])
@pytest.mark.parametrize(("length", "expected"), [(3, 3), (BUDGET, BUDGET), (40, BUDGET)])
def test_a_thought_is_separate_and_within_its_budget(
    model: mlx_mtp.Model, channel: Channel, grammar: dict[str, Any], length: int, expected: int
) -> None:
    processors = [thinker(model, channel, length)]
    options: dict[str, Any] = {"max_tokens": 24, "enable_thinking": True, "logits_processors": processors}
    results = [
        model.generate(PROMPT, num_draft_tokens=k, thinking_budget=BUDGET, **options, **grammar) for k in (0, 1, 6)
    ]
    plain = results[0]
    assert all(result.tokens == plain.tokens for result in results)
    inside = plain.tokens[1 + channel.header : plain.tokens.index(channel.end)]
    assert len(inside) == expected
    assert plain.thought == model.tokenizer.decode(inside)
    answer = plain.tokens[plain.tokens.index(channel.end) + 1 :]
    stops = model.tokenizer.eos_token_ids
    assert plain.text == model.tokenizer.decode([token for token in answer if token not in stops])
    assert channel.start not in answer
    if grammar:
        assert re.fullmatch(grammar["regex"], plain.text)
        assert plain.last.finish_reason == "stop"


def decoded(model: mlx_mtp.Model, drafter: Drafter | None, guide: Guide, k: int) -> tuple[list[int], Stats]:
    """Decode greedily after a prompt that opens a thought. Return the tokens and the counts of the rounds."""
    stream = Stream(model.target, drafter, max_draft_tokens=k, guide=guide)
    prompt, tokens, stats = [*PROMPT, guide_channel(model).start], list[int](), Stats()
    for result in decode(stream, prompt, max_tokens=12, num_draft_tokens=k, stop_ids=frozenset(), prefill_step_size=64):
        tokens += result.tokens
        stats.add(result.drafted, result.accepted)
    return tokens, stats


def guide_channel(model: mlx_mtp.Model) -> Channel:
    vocabulary = model.tokenizer.get_vocab()
    return Channel(vocabulary["<|channel>"], 1, vocabulary["<channel|>"])


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_a_budget_holds_to_the_token_where_every_draft_is_accepted(model: mlx_mtp.Model, k: int) -> None:
    """The thought's last token has every place in its round. The draft is the plain text, so nothing is rejected."""
    channel = guide_channel(model)
    assert model.drafter is not None

    def guide(budget: int) -> Guide:
        return Guide(model.target.config.vocab_size, (), channel=channel, thought_budget=budget, thought=0)

    for budget in range(1, k + 2):
        plain, _ = decoded(model, None, guide(budget), 0)
        assert plain.index(channel.end) == channel.header + budget
        perfect = Scripted(model.drafter, [*PROMPT, channel.start], plain)
        tokens, stats = decoded(model, perfect, guide(budget), k)
        assert tokens == plain, f"a budget of {budget}"
        assert stats.accepted == stats.drafted


@pytest.mark.parametrize("asked", [0, 1, 3])
def test_a_drafter_that_does_not_ask_for_each_row_is_an_error(model: mlx_mtp.Model, asked: int) -> None:
    """The drafter's masks would apply to the wrong rows. With one request, its mask would apply to all rows."""

    class Silent(GivenDrafter):
        def draft(self, target: Target, inputs: DraftInputs) -> Draft:
            assert inputs.allow is not None
            for _ in range(asked):
                inputs.allow(inputs.token)
            return Draft(mx.full((1, 2), 40, mx.int32))

    channel = guide_channel(model)
    for thought in (0, 1):
        guide = Guide(model.target.config.vocab_size, (), channel=channel, thought_budget=9, thought=thought)
        with pytest.raises(DraftError, match=f"the mask of each draft token: expected 2, found {asked}"):
            decoded(model, Silent(lambda *_: Draft(mx.zeros((1, 0), mx.int32))), guide, 2)


def test_a_drafter_of_given_tokens_asks_for_each_row(model: mlx_mtp.Model) -> None:
    """Drafters that time and compare rounds also use given tokens."""
    channel = guide_channel(model)

    def guide() -> Guide:
        return Guide(model.target.config.vocab_size, (), channel=channel, thought_budget=4, thought=0)

    drafter = GivenDrafter(lambda token, k: Draft(mx.broadcast_to(token + 1, (1, k)).astype(mx.int32) % 512))
    assert decoded(model, drafter, guide(), 3)[0] == decoded(model, None, guide(), 0)[0]


def test_no_budget_leaves_a_thought_alone(model: mlx_mtp.Model, channel: Channel) -> None:
    for k in (0, 4):
        options: dict[str, Any] = {"max_tokens": 45, "num_draft_tokens": k, "ignore_eos": True}
        process = thinker(model, channel, 25)
        result = model.generate(PROMPT, enable_thinking=True, logits_processors=[process], **options)
        assert result.tokens.index(channel.end) == 1 + channel.header + 25
        assert result.text
        # Only the chat template enables thoughts. A thought is separated even if it is not enabled.
        assert model.generate(PROMPT, logits_processors=[process], **options).thought == result.thought


def test_a_prompt_that_ends_inside_a_thought(model: mlx_mtp.Model, channel: Channel) -> None:
    header = model.tokenizer.encode("thought\n", add_special_tokens=False)
    for opened, inside in (([], 0), (header, 0), ([*header, 40, 41], 2)):
        prompt = [*PROMPT, channel.start, *opened]
        result = model.generate(prompt, enable_thinking=True, thinking_budget=BUDGET, max_tokens=40, regex="[a-z]{8}")
        assert result.tokens.index(channel.end) == BUDGET + channel.header - len(opened)
        assert re.fullmatch("[a-z]{8}", result.text)
        if opened:
            # mlx-lm's detokenizer of this tokenizer drops a blank at the beginning.
            assert result.thought == model.tokenizer.decode(result.tokens[: BUDGET - inside]).removeprefix(" ")
    # The user's own text is not a thought. A closed thought in the prompt also does not count.
    turn = model.tokenizer.get_vocab()["<|turn>"]
    for prompt in ([*PROMPT, channel.start, turn, 40], [*PROMPT, channel.start, 40, channel.end]):
        assert model.generate(prompt, max_tokens=10, ignore_eos=True).thought == ""


def test_stop_strings_do_not_end_a_thought(model: mlx_mtp.Model, channel: Channel) -> None:
    processors = [thinker(model, channel, 10)]
    options: dict[str, Any] = {"logits_processors": processors, "max_tokens": 60, "ignore_eos": True}
    free = model.generate(PROMPT, **options)
    inside, answer = free.thought[4:6], free.text[10:13]
    assert model.generate(PROMPT, stop=answer, **options).text == free.text[: free.text.index(answer)]
    stopped = model.generate(PROMPT, stop=inside, **options)
    assert stopped.thought == free.thought
    assert stopped.text == free.text.partition(inside)[0]


def test_coupled_tokens_depend_on_no_draft_length_under_all_options_together(
    model: mlx_mtp.Model, channel: Channel
) -> None:
    sampling = mlx_mtp.Sampling(
        temperature=1.0, top_k=60, top_p=0.97, min_p=0.001, xtc_probability=0.5, xtc_threshold=0.05, seed=11,
        acceptance="coupled", logit_bias={300: 2.0}, repetition_penalty=1.1, presence_penalty=0.3,
        frequency_penalty=0.2,
    )  # fmt: skip
    options = mlx_mtp.GenerationOptions(
        max_tokens=48, sampling=sampling, regex="([a-z]{3,9} ){5,9}end", enable_thinking=True, thinking_budget=12,
        logits_processors=[thinker(model, channel, 20)], stop="zzz", logprobs=2,
    )  # fmt: skip
    plain = model.generate(PROMPT, options, num_draft_tokens=0)
    assert channel.end in plain.tokens
    assert plain.text
    for k in (1, 3, 6):
        assert model.generate(PROMPT, options, num_draft_tokens=k).tokens == plain.tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"json_schema": "{"}, "json_schema is not JSON: Expecting property name"),
        ({"json_schema": "[1]"}, "json_schema must be a JSON object, found list"),
        ({"json_schema": {"type": "objct"}}, "json_schema cannot be followed: Invalid type: objct"),
        ({"json_schema": {"not": {}}}, r"json_schema cannot be followed: Unimplemented keys: \[\"not\"\]"),
        ({"json_schema": {"type": "string", "pattern": "("}}, "json_schema cannot be followed: unclosed group"),
        ({"json_schema": {"a": {1, 2}}}, "json_schema is not JSON: Object of type set"),
        ({"regex": "[a-z"}, "regex cannot be followed: unclosed character class"),
        ({"regex": "(?=a)b"}, "regex cannot be followed: look-around"),
        ({"grammar": "start: foo"}, 'grammar cannot be followed: .*unknown name: "foo"'),
        ({"grammar": "root ::= foo"}, "grammar is neither Lark, with a rule start, nor GBNF: Rule 'foo' not found"),
        ({"regex": "a", "grammar": "b"}, "only one of json_schema, regex and grammar .* found regex and grammar"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos contradicts a json_schema, regex or grammar"),
        ({"regex": "a", "min_tokens": 3}, "min_tokens contradicts a json_schema, regex or grammar"),
        ({"thinking_budget": 4}, "thinking_budget is given, but enable_thinking is not"),
        ({"thinking_budget": -1, "enable_thinking": True}, "thinking_budget must be an integer of at least 0"),
    ],
)
def test_bad_options_are_refused_on_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(mlx_mtp.OptionError, match=message):
        mlx_mtp.GenerationOptions(**options)


def test_a_language_without_texts_is_refused_before_the_prompt_is_read(model: mlx_mtp.Model) -> None:
    with pytest.raises(mlx_mtp.OptionError, match="the grammar allows no token here"):
        model.stream_generate(PROMPT, grammar='start: start "a"')


def test_a_grammar_of_special_tokens(model: mlx_mtp.Model) -> None:
    """The model's tokenizer resolves them, and an unknown special token is an error."""
    result = model.generate(PROMPT, grammar='start: <|tool_call> "a" <tool_call|>', num_draft_tokens=3)
    assert result.text == "<|tool_call>a<tool_call|>"
    with pytest.raises(mlx_mtp.OptionError, match="unknown special token"):
        model.stream_generate(PROMPT, grammar='start: <|nope> "a"')


def test_without_llguidance_one_line_says_how_to_get_it() -> None:
    code = (
        "import sys; sys.modules['llguidance'] = None\n"
        "from mlx_mtp.generate import main; sys.exit(main(['--model', 'x', '-p', 'y', '--regex', 'a']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "error: regex needs llguidance: pip install 'mlx-mtp[grammar]'\n"


def generate(*args: object, code: int = 0) -> Finished:
    return run("generate", "--num-draft-tokens", "3", *args, code=code)


def test_the_command_line_answers_in_json(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    options = ("--model", mlx_mtp.DEMO_PAIR, "-p", CODE, "--json-schema", schema)
    result = generate(*options, "--temp", "1", "--seed", "4")
    jsonschema.validate(json.loads(result.stdout), SCHEMA)
    assert "Acceptance length: " in result.stderr
    cut = generate(*options, "-m", "5", "--seed", "4")
    assert "cut after 5 tokens: the answer may not be complete" in cut.stderr


def test_the_command_line_takes_regex_grammar_and_grammar_file(tiny_pair: TinyPair, tmp_path: Path) -> None:
    model = ("--model", tiny_pair("e2b") / "target", "-p", "hello", "--temp", "1", "--seed", "1")
    assert re.fullmatch("[0-9]{4}\n", generate(*model, "--regex", "[0-9]{4}").stdout)
    assert generate(*model, "--grammar", 'start: "yes" | "no"').stdout in ("yes\n", "no\n")
    (tmp_path / "answer.gbnf").write_text('root ::= "yes" | "no"')
    assert generate(*model, "--grammar-file", tmp_path / "answer.gbnf").stdout in ("yes\n", "no\n")


def test_the_command_line_refuses_bad_grammars_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error comes before the model is read: the model does not exist in these cases."""
    broken = tmp_path / "broken.json"
    broken.write_text('{"type": ')
    for args, message in (
        (["--json-schema", broken], f"error: {broken}: not JSON: Expecting value"),
        (["--json-schema", tmp_path / "absent"], f"error: {tmp_path / 'absent'}: cannot be read: "),
        (["--regex", "[a"], "error: regex cannot be followed: unclosed character class"),
        (["--grammar", "nonsense"], "error: grammar is neither Lark"),
        (["--thinking-budget", "3"], "error: thinking_budget is given, but enable_thinking is not"),
    ):
        result = generate("--model", "nowhere", "-p", "x", *args, code=1)
        assert result.stderr.startswith(message)
        assert len(result.stderr.splitlines()) == 1
    assert (
        "not allowed with argument"
        in generate("--model", "x", "-p", "x", "--regex", "a", "--grammar", "b", code=2).stderr
    )


def test_thinking_is_the_templates_switch(
    tiny_pair: TinyPair, switchless: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_pair("e2b") / "target"
    model = mlx_mtp.load(folder)
    messages = [{"role": "user", "content": "hello"}]
    off, on = model.encode(messages), model.encode(messages, enable_thinking=True)
    assert model.tokenizer.decode(off) == "<bos><|turn>user\nhello<turn|>\n<|turn>model\n"
    assert (
        model.tokenizer.decode(on)
        == "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nhello<turn|>\n<|turn>model\n"
    )
    for enabled, expected in ((False, off), (True, on)):
        result = model.generate(messages, max_tokens=20, enable_thinking=enabled)
        assert result.tokens == model.generate(expected, max_tokens=20).tokens
        assert result.last.prompt_tokens == len(expected)
    options = ("--model", folder, "-p", "hello", "-m", "20", "--json", "--temp", "0")
    report = json.loads(generate(*options, "--enable-thinking", "--thinking-budget", "5").stdout.splitlines()[-1])
    assert report["prompt_tokens"] == len(on)
    assert report["thought"] == ""
    without = ["--model", str(switchless), "--drafter", "none", "-p", "x", "--enable-thinking"]
    assert main(without) == 1
    assert main([*without, "--ignore-chat-template"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: thinking cannot be enabled: the chat template has no switch enable_thinking",
        "error: thinking needs a chat template: this model has none, or it is ignored",
    ]
