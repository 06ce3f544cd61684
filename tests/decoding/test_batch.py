"""Generations that decode together: each text is what it is alone, and they share the time."""

import asyncio
import gc
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from support.tiny import VARIANTS, WINDOW, random_tokens

import mlx_mtp
from mlx_mtp import GenerationOptions, Sampling
from mlx_mtp.batch import Batch, Step
from mlx_mtp.decoding.calibration import RoundCosts
from mlx_mtp.decoding.draft_length import DraftPolicy
from mlx_mtp.decoding.report import RoundReport
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.decoding.text_loop import Decoding
from mlx_mtp.generation import Generation
from mlx_mtp.responses import whole

TinyPair = Callable[[str], Path]
TEXTS = 7


@pytest.fixture(scope="module")
def model(tiny_pair: TinyPair) -> mlx_mtp.Model:
    return mlx_mtp.load(tiny_pair("e2b") / "target")


def penalize_repeats(tokens: mx.array, logits: mx.array) -> mx.array:
    """Make the last token less likely."""
    return logits.at[:, tokens[-1]].add(-2.0)


# A text that is sampled by blocks depends on its draft lengths, which are then those that it has alone.
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.8, acceptance="coupled", seed=4),
    Sampling(repetition_penalty=1.3, presence_penalty=0.2),
    Sampling(temperature=1.0, top_k=40, acceptance="coupled", xtc_probability=0.3, xtc_threshold=0.05, seed=8),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=0.7, top_p=0.9, seed=5),
]
EXTRAS: list[dict[str, Any]] = [
    {},
    {"logprobs": 2},
    {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 30},
    {"regex": "[a-z ]{5,40}"},
    {"logits_processors": [penalize_repeats]},
    {"min_tokens": 8},
    {"stop": ["e", "th"]},
    {"enable_thinking": True, "thinking_budget": 4},
    {"copy_drafts": "off"},
    {"ignore_eos": True, "reuse_prompt": False},
]


def random_case(rng: np.random.Generator) -> tuple[list[int], GenerationOptions]:
    """Return a prompt, and options of any kind."""
    prompt = random_tokens(int(rng.integers(2, 4 * WINDOW)), seed=int(rng.integers(1000)))
    lengths = rng.choice(np.array(["auto", 0, 1, 3, 8], dtype=object))
    sampling = SAMPLINGS[rng.integers(len(SAMPLINGS))]
    changes = EXTRAS[rng.integers(len(EXTRAS))]
    most = max(8, int(rng.integers(30)))
    return prompt, GenerationOptions(max_tokens=most, num_draft_tokens=lengths, sampling=sampling, **changes)


def seen(result: mlx_mtp.GenerationResult) -> tuple[Any, ...]:
    """Return what must not depend on other texts."""
    last = result.last
    figures = last.finish_reason, last.stop_string, last.prompt_tokens, last.generation_tokens, last.logprobs
    return result.tokens, result.text, result.thought, figures


def history(model: mlx_mtp.Model, rng: np.random.Generator) -> int:
    """Let texts of any options join, leave and be cancelled between turns. Each is what it is alone.

    Return the number of rounds of all texts.
    """
    cases = [random_case(rng) for _ in range(TEXTS)]
    alone = [model.generate(prompt, options) for prompt, options in cases]
    batch = Batch()
    found: dict[int, list[mlx_mtp.GenerationResponse]] = {}
    names: dict[int, int] = {}
    following = deque(range(TEXTS))
    most = int(rng.integers(2, 9))
    while following or batch.generations:
        if following and len(batch.generations) < most and rng.random() < 0.3:
            number = following.popleft()
            prompt, options = cases[number]
            generation = model.begin(prompt, options, None, lambda: None)
            names[id(generation)], found[number] = number, []
            batch.add(generation)
        for step in batch.turn() if batch.generations else ():
            assert step.error is None
            found[names[id(step.generation)]] += step.responses
        if batch.generations and rng.random() < 0.02:
            batch.remove(batch.generations[rng.integers(len(batch.generations))])
    for number, responses in found.items():
        tokens = [each.token for each in responses]
        assert tokens == alone[number].tokens[: len(tokens)]
        if responses and responses[-1].finish_reason:
            assert seen(whole(responses)) == seen(alone[number])
    return sum(responses[-1].stats.rounds for responses in found.values() if responses)


@pytest.mark.parametrize(("variant", "bits"), [*((variant, None) for variant in VARIANTS), ("e2b", 4)])
def test_each_text_is_what_it_is_alone(variant: str, bits: int | None, tiny_pair: TinyPair) -> None:
    """Activations are float32."""
    model = mlx_mtp.load(tiny_pair(variant) / "target")
    if bits is not None:
        assert model.drafter is not None
        for module in (model.target, model.drafter):
            nn.quantize(module, group_size=64, bits=bits)
    rng = np.random.default_rng(VARIANTS.index(variant) + (bits or 0))
    assert history(model, rng) + history(model, rng) > 50


def test_a_seed_gives_the_same_text_beside_others(model: mlx_mtp.Model) -> None:
    """Sampling by blocks with automatic draft lengths, whose rounds are dispatched ahead if the text is alone."""
    prompts = [random_tokens(12, seed=seed) for seed in range(3)]
    options = GenerationOptions(max_tokens=40, sampling=Sampling(temperature=1.0, seed=9), ignore_eos=True)
    alone = [model.generate(prompt, options) for prompt in prompts]
    assert all(result.last.stats.rounds_ahead > 3 for result in alone)
    assert [seen(result) for result in model.generate_batch(prompts, options)] == list(map(seen, alone))


@pytest.mark.parametrize("ahead", [True, False])
def test_passes_of_several_texts_go_ahead_where_this_costs_less(
    model: mlx_mtp.Model, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    shared = RoundCosts.shared
    monkeypatch.setattr(RoundCosts, "shared", lambda *args: shared(*args)._replace(ahead=ahead))
    prompts = [random_tokens(12, seed=seed) for seed in range(3)]
    options: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "copy_drafts": "off", "reuse_prompt": False}
    batch = Batch([model.begin(prompt, GenerationOptions(**options), None, lambda: None) for prompt in prompts])
    while any(each.is_reading for each in batch.generations):
        batch.turn()
    # A text that was read first may have a round of its own in flight, which ends in the first turn.
    batch.turn()
    before, *_, after = ([step.responses[-1].stats.rounds_ahead for step in batch.turn()] for _ in range(4))
    assert [end - start for start, end in zip(before, after, strict=True)] == [3 if ahead else 0] * len(prompts)
    batch.close()


def test_a_text_that_must_wait_lets_all_wait(model: mlx_mtp.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = RoundCosts.shared
    monkeypatch.setattr(RoundCosts, "shared", lambda *args: shared(*args)._replace(ahead=True))
    free: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True, "copy_drafts": "off"}
    options = [GenerationOptions(**free), GenerationOptions(**free, logits_processors=[penalize_repeats])]
    batch = Batch([model.begin(random_tokens(9), each, None, lambda: None) for each in options])
    while any(each.is_reading for each in batch.generations):
        batch.turn()
    for _ in range(4):
        batch.turn()
        assert not any(each.decoding.stream.in_flight for each in batch.generations)
    batch.close()


class Counting(DraftPolicy):
    """A policy whose choices tell how many reports it has seen. All its rounds may be dispatched ahead."""

    def __init__(self) -> None:
        super().__init__(0, ahead=True)

    def update(self, report: RoundReport, seconds: float | None) -> None:
        self.k = (self.k + 1) % 5


@pytest.mark.parametrize("joins", [1, 2, 5])
@pytest.mark.parametrize("leaves", [1, 2, 4])
@pytest.mark.parametrize("ahead", ["", "1", "01", "0011"])
def test_a_text_that_others_join_has_the_rounds_that_it_has_alone(
    model: mlx_mtp.Model, joins: int, leaves: int, ahead: str
) -> None:
    """The rounds of a seeded text are chosen after as many reports, also that in flight when another text joins.

    `ahead` tells which rounds with other texts dispatch the round after them, again and again.
    """
    prompt = random_tokens(12, seed=3)

    def started() -> Decoding:
        stream = Stream(model.target, model.drafter, max_draft_tokens=8)
        decoding = Decoding(
            stream,
            prompt,
            max_tokens=60,
            policy=Counting(),
            stop_ids=frozenset(),
            prefill_step_size=64,
            keeps_lengths=True,
        )
        decoding.read_chunk()
        return decoding

    alone, joined = started(), started()
    expected = [alone.round().drafted for _ in range(joins + leaves + 4)]
    found = [joined.round().drafted for _ in range(joins)]
    settled = joined.settle()
    found += [] if settled is None else [settled.drafted]
    for number in range(leaves):
        if not joined.stream.in_flight:
            joined.stream.dispatch(joined.option().choice.k)
        following = joined.following()
        if following is not None and ahead and ahead[number % len(ahead)] == "1":
            joined.stream.dispatch(following.choice.k)
        report = joined.stream.finish()
        joined.take(report)
        found.append(report.drafted)
    found += [joined.round().drafted for _ in range(len(expected) - len(found))]
    assert found == expected
    alone.end()
    joined.end()


def test_responses_come_round_by_round(model: mlx_mtp.Model) -> None:
    """The texts advance together, and a text that ends makes room for the next one."""
    prompts = [random_tokens(9, seed=seed) for seed in range(4)]
    order = [
        index
        for index, _ in model.stream_generate_batch(
            prompts, concurrency=2, max_tokens=6, num_draft_tokens=0, ignore_eos=True
        )
    ]
    assert sorted(order) == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 6
    assert set(order[:10]) == {0, 1}
    assert order[-1] in (2, 3)


def test_a_closed_batch_keeps_the_prompts(model: mlx_mtp.Model) -> None:
    """All texts end when the generator is closed, and their K/V are there for the next ones."""
    prompts = [random_tokens(30, seed=seed) for seed in (21, 22)]
    responses = model.stream_generate_batch(prompts, max_tokens=40, ignore_eos=True)
    assert len(list(islice(responses, 6))) == 6
    responses.close()
    assert [model.generate(prompt, max_tokens=1).last.cached_tokens for prompt in prompts] == [29, 29]


@pytest.mark.parametrize(
    ("prompts", "changes", "error", "message"),
    [
        ("one text", {}, mlx_mtp.PromptError, "prompts must be a list of prompts, found str"),
        (None, {}, mlx_mtp.PromptError, "prompts must be a list of prompts, found NoneType"),
        ([2, 9], {}, mlx_mtp.PromptError, r"prompts\[0\] must be text, token ids or messages, found 2"),
        ([{"role": "user", "content": "x"}], {}, mlx_mtp.PromptError, r"prompts\[0\] must be text, token ids or mess"),
        ([[2, 9]], {"options": [None]}, mlx_mtp.OptionError, r"options\[0\] must be GenerationOptions, found None"),
        ([[2, 9], []], {}, mlx_mtp.PromptError, r"prompts\[1\]: the prompt is empty"),
        ([[2, 9]], {"num_draft_tokens": -1}, mlx_mtp.OptionError, "num_draft_tokens must be an integer of at least 0"),
        ([[2, 9]], {"logprobs": 10**6}, mlx_mtp.OptionError, r"prompts\[0\]: logprobs is 1000000"),
        ([[2, 9]], {"concurrency": 0}, mlx_mtp.OptionError, "concurrency must be an integer of at least 1, found 0"),
        ([[2, 9]], {"options": []}, mlx_mtp.OptionError, "there are 1 prompts, but options for 0"),
    ],
)
def test_bad_batches_are_refused_at_once(
    model: mlx_mtp.Model, prompts: Any, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model.stream_generate_batch(prompts, **changes)


def test_no_prompts_are_no_results(model: mlx_mtp.Model) -> None:
    assert model.generate_batch([]) == []
    assert [len(result.tokens) for result in model.generate_batch(iter([[2, 9]]), max_tokens=3, ignore_eos=True)] == [3]


def test_texts_that_have_ended_take_no_memory(model: mlx_mtp.Model) -> None:
    """The peak of a list of prompts is that of the texts that decode together."""
    options: dict[str, Any] = {"max_tokens": 3, "num_draft_tokens": 0, "reuse_prompt": False, "ignore_eos": True}

    def peak(count: int) -> int:
        gc.collect()
        before, most = mx.get_active_memory(), 0
        prompts = [random_tokens(60, seed=seed) for seed in range(count)]
        for _ in model.stream_generate_batch(prompts, concurrency=2, **options):
            most = max(most, mx.get_active_memory() - before)
        return most

    assert peak(16) < 1.5 * peak(4)


def fail_after(count: int) -> Callable[[mx.array, mx.array], mx.array]:
    """Return a processor that raises an exception at its n-th call."""
    calls = iter(range(count))

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        if next(calls, None) is None:
            raise RuntimeError("the processor failed")
        return logits

    return process


def run(batch: Batch) -> Iterator[Step]:
    """Yield the steps of all turns."""
    while batch.generations:
        yield from batch.turn()


def generation(model: mlx_mtp.Model, prompt: list[int], **changes: Any) -> Generation:
    prepared = model.prepare(prompt)
    return Generation(model, prepared.tokens, GenerationOptions(**changes), None, lambda: None, prepared.media)


@pytest.mark.parametrize("k", [0, 3])
def test_a_failure_ends_one_text_only(model: mlx_mtp.Model, k: int) -> None:
    """A processor raises in the middle of a round of three texts."""
    prompts = [random_tokens(20, seed=seed) for seed in (31, 32, 33)]
    options: dict[str, Any] = {"max_tokens": 12, "num_draft_tokens": k, "ignore_eos": True}
    texts = [generation(model, prompt, **options) for prompt in prompts]
    texts[1] = generation(model, prompts[1], logits_processors=[fail_after(2 * k + 3)], **options)
    tokens: dict[int, list[int]] = {id(each): [] for each in texts}
    errors = []
    for step in run(Batch(texts)):
        tokens[id(step.generation)] += [response.token for response in step.responses]
        if step.error is not None:
            errors.append((step.generation is texts[1], str(step.error)))
    assert errors == [(True, "the processor failed")]
    for text, prompt in zip(texts, prompts, strict=True):
        alone = model.generate(prompt, **options).tokens
        assert tokens[id(text)] == (alone if text is not texts[1] else alone[: len(tokens[id(text)])])
    assert 0 < len(tokens[id(texts[1])]) < 12


def test_a_failure_of_the_library_call_is_raised(model: mlx_mtp.Model) -> None:
    options = [GenerationOptions(max_tokens=9), GenerationOptions(max_tokens=9, logits_processors=[fail_after(4)])]
    with pytest.raises(RuntimeError, match="the processor failed"):
        model.generate_batch([random_tokens(20, seed=seed) for seed in (1, 2)], options)


def test_a_failed_pass_ends_all_texts_and_the_next_one_runs(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"max_tokens": 9, "num_draft_tokens": 0, "ignore_eos": True}
    prompts = [random_tokens(20, seed=seed) for seed in (1, 2)]

    def fail(*_: Any) -> Any:
        raise RuntimeError("the device failed")

    with mlx_mtp.load(tiny_pair("e2b") / "target") as model:

        async def both() -> list[Any]:
            asked = (model.agenerate(prompt, **options) for prompt in prompts)
            return await asyncio.gather(*asked, return_exceptions=True)

        with monkeypatch.context() as patch:
            patch.setattr(type(model.target), "packed", fail)
            assert [str(error) for error in asyncio.run(both())] == ["the device failed"] * 2
        assert [len(result.tokens) for result in asyncio.run(both())] == [9, 9]


def test_an_exact_model_decodes_one_after_the_other(tiny_pair: TinyPair) -> None:
    model = mlx_mtp.load(tiny_pair("12b") / "target", exact=True)
    prompts = [random_tokens(9, seed=seed) for seed in (1, 2)]
    order = [index for index, _ in model.stream_generate_batch(prompts, max_tokens=4, ignore_eos=True)]
    assert order == [0] * 4 + [1] * 4


class Scripted:
    """A generation of known lengths, for which a clock runs instead of a device."""

    def __init__(self, name: str, chunks: int, log: list[str], clock: SimpleNamespace) -> None:
        self.name = name
        self.unread = chunks
        self.is_held = False
        self.left = 40
        self.stream = SimpleNamespace(in_flight=[])
        self.decoding = SimpleNamespace(stop_ids=frozenset())
        self._log = log
        self._clock = clock

    @property
    def is_reading(self) -> bool:
        return self.unread > 0

    @property
    def is_ended(self) -> bool:
        return not self.left

    def read_chunk(self) -> Iterator[Any]:
        self._log.append(self.name)
        self._clock.now += 1.0
        self.unread -= 1
        return iter(())

    def round(self) -> Iterator[Any]:
        self._log.append(self.name.upper())
        self._clock.now += 0.25
        self.left -= 1
        return iter(())

    def share(self, other: Any) -> None: ...

    def pause(self) -> None: ...

    def close(self) -> None: ...


def scripted_turns(monkeypatch: pytest.MonkeyPatch, turns: int, **chunks: int) -> str:
    """Return the names of the turns: small letters for chunks, which take a second, capitals for rounds of 1/4 s."""
    clock, log = SimpleNamespace(now=0.0), list[str]()
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    batch = Batch(Scripted(name, count, log, clock) for name, count in chunks.items())  # type: ignore[misc]
    for _ in range(turns):
        batch.turn()
    return "".join(log)


def test_rounds_keep_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each chunk of a prompt, the running text has rounds for as long as the chunk took."""
    assert scripted_turns(monkeypatch, 13, a=1, b=9) == "abAAAAbAAAAbA"


def test_short_prompts_come_first_and_long_ones_are_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fourth chunk belongs to the prompt that has waited longest."""
    assert scripted_turns(monkeypatch, 3, a=9, b=3, c=5) == "bbb"
    assert scripted_turns(monkeypatch, 8, a=9, c=7) == "cccaccca"


def limit_for(model: mlx_mtp.Model, prompts: list[list[int]], **options: Any) -> int:
    """Return the bytes that are in use when these texts are as long as they may become."""
    texts = [generation(model, prompt, **options) for prompt in prompts]
    gc.collect()
    work = max(each.work for each in texts) + sum(each.memory.more_work for each in texts[1:])
    return mx.get_active_memory() + sum(each.memory.kept for each in texts) + work


def test_a_text_waits_for_memory(tiny_pair: TinyPair, caplog: pytest.LogCaptureFixture) -> None:
    """With room for one text and a half, the second one follows the first. A text that can never fit is refused."""
    options: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "reuse_prompt": False}
    prompts = [random_tokens(600, seed=seed) for seed in (1, 2)]
    with mlx_mtp.load(tiny_pair("31b") / "target") as model:
        alone = [model.generate(prompt, **options).tokens for prompt in prompts]
        one, two = (limit_for(model, prompts[:count], **options) for count in (1, 2))
        running: list[int] = []

        async def answer(index: int) -> list[int]:
            tokens = []
            async for response in model.astream_generate(prompts[index], **options):
                running.append(model.worker().running)
                tokens.append(response.token)
            return tokens

        async def both() -> list[list[int]]:
            return list(await asyncio.gather(answer(0), answer(1)))

        model.memory_limit = (one + two) // 2
        with caplog.at_level("INFO", logger="mlx_mtp"):
            assert asyncio.run(both()) == alone
        assert max(running) == 1
        waits = [record.getMessage() for record in caplog.records if "waits: with it" in record.getMessage()]
        assert len(waits) == 1
        assert waits[0].startswith("a text of 640 tokens waits: with it, ")
        model.memory_limit = None
        assert asyncio.run(both()) == alone
        assert max(running) == 2
        model.memory_limit = one // 2
        with pytest.raises(mlx_mtp.PromptError, match="prompt and max_tokens are 640 tokens, with which"):
            asyncio.run(answer(0))


def test_texts_that_begin_at_the_same_time_fit_together(model: mlx_mtp.Model) -> None:
    """Their buffers take memory when they are first written, and count before."""
    options: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "reuse_prompt": False, "num_draft_tokens": 0}
    prompts = [random_tokens(4, seed=seed) for seed in range(8)]
    model.generate(prompts[0], **options)
    model.prompt_cache.clear()
    model.memory_limit = (limit_for(model, prompts[:3], **options) + limit_for(model, prompts[:4], **options)) // 2
    running: list[int] = []

    async def answer(prompt: list[int]) -> None:
        async for _ in model.astream_generate(prompt, **options):
            running.append(model.worker().running)

    async def all_of_them() -> None:
        await asyncio.gather(*map(answer, prompts))

    try:
        asyncio.run(all_of_them())
    finally:
        model.memory_limit = None
    assert max(running) == 3


@pytest.mark.parametrize("variant", ["e2b", "31b"])
def test_a_common_beginning_is_read_once(variant: str, tiny_pair: TinyPair) -> None:
    """Of five prompts with a common beginning of 300 tokens, one reads it, up to a border of chunks of 64 tokens."""
    beginning = random_tokens(300, seed=1)
    prompts = [beginning + random_tokens(20 + seed, seed=seed) for seed in range(2, 6)] + [beginning]
    options: dict[str, Any] = {"max_tokens": 8, "prefill_step_size": 64, "ignore_eos": True}
    with mlx_mtp.load(tiny_pair(variant) / "target") as model:
        alone = [model.generate(prompt, reuse_prompt=False, **options) for prompt in prompts]
        results = model.generate_batch(prompts, **options)
        assert [result.tokens for result in results] == [result.tokens for result in alone]
        first, *others = [result.last.cached_tokens for result in results]
        assert first == 0
        assert all(cached >= 256 for cached in others)
        # Without the prompt cache, each prompt is read.
        model.prompt_cache.clear()
        results = model.generate_batch(prompts, reuse_prompt=False, **options)
        assert [result.last.cached_tokens for result in results] == [0] * 5


def test_a_beginning_whose_reader_leaves_is_read_by_the_next(model: mlx_mtp.Model) -> None:
    model.prompt_cache.clear()
    beginning = random_tokens(300, seed=11)
    texts = [
        generation(model, [*beginning, 20 + index], max_tokens=4, prefill_step_size=64, ignore_eos=True)
        for index in range(3)
    ]
    batch = Batch(texts)
    batch.turn()
    batch.turn()
    batch.remove(texts[0])
    cached = {id(step.generation): step.responses[0].cached_tokens for step in run(batch) if step.responses}
    assert [cached[id(text)] for text in texts[1:]] == [128, 256]


def test_a_beginning_whose_reader_leaves_before_its_first_chunk(model: mlx_mtp.Model) -> None:
    model.prompt_cache.clear()
    beginning = random_tokens(300, seed=12)
    first = generation(model, random_tokens(200, seed=13), max_tokens=2, prefill_step_size=64, ignore_eos=True)
    texts = [
        generation(model, [*beginning, 20 + index], max_tokens=4, prefill_step_size=64, ignore_eos=True)
        for index in range(2)
    ]
    batch = Batch([first, *texts])
    batch.turn()
    batch.remove(texts[0])
    ended = [step.generation for step in run(batch) if step.generation.is_ended]
    assert ended == [first, texts[1]]


def test_a_processor_that_raises_no_ordinary_exception(tiny_pair: TinyPair) -> None:
    """All texts end with it, and the thread goes on."""

    def leave(tokens: mx.array, logits: mx.array) -> mx.array:
        if tokens.size > 5:
            raise SystemExit("enough")
        return logits

    with mlx_mtp.load(tiny_pair("e2b") / "target") as model:
        options: dict[str, Any] = {"max_tokens": 8, "num_draft_tokens": 0, "ignore_eos": True}

        async def all_three() -> list[str]:
            ends = []
            for processors in ([], [leave], []):
                ends.append(asyncio.create_task(model.agenerate([5, 6, 7], logits_processors=processors, **options)))
            await asyncio.wait(ends)
            return [type(task.exception()).__name__ for task in ends]

        # asyncio hands SystemExit on to its caller at once.
        with pytest.raises(SystemExit, match="enough"):
            asyncio.run(all_three())
        assert len(asyncio.run(model.agenerate([5, 6, 7], **options)).tokens) == 8


def test_earlier_prompts_give_way(tiny_pair: TinyPair) -> None:
    """The prompt cache shrinks where its texts leave no room for a text."""
    options: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True}
    with mlx_mtp.load(tiny_pair("31b") / "target") as model:
        for seed in range(4):
            model.generate(random_tokens(600, seed=seed), **options)
        before = len(model.prompt_cache.entries)
        model.memory_limit = limit_for(model, [random_tokens(600, seed=9)], **options) - model.prompt_cache.nbytes // 2
        assert len(asyncio.run(model.agenerate(random_tokens(600, seed=9), **options)).tokens) == 40
        assert 0 < len(model.prompt_cache.entries) < before + 1
