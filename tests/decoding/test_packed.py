"""Rounds of several streams with one verify pass: each text, and its state, is what it is alone."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.streams import LONG, SHORT, Models, assert_same_state
from support.tiny import VARIANTS, random_tokens

import mlx_mtp
from mlx_mtp import Sampling
from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.draft_length import Choice
from mlx_mtp.decoding.packed import packed_round as round_of_all
from mlx_mtp.decoding.report import RoundReport
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.errors import OptionError
from mlx_mtp.gemma4.kv_cache import Cache, KVQuantization

PROMPTS = [SHORT, LONG, random_tokens(3, seed=7), random_tokens(90, seed=8)]
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0, top_k=64, seed=3),
    Sampling(temperature=0.8, acceptance="coupled", seed=4),
    Sampling(repetition_penalty=1.3, presence_penalty=0.2),
]
OPTIONS: list[dict[str, Any]] = [
    {"sampling": SAMPLINGS[0]},
    {"sampling": SAMPLINGS[1], "kv_quantization": KVQuantization(8, 32, 50)},
    {"sampling": SAMPLINGS[2], "logprobs": 2},
    {"sampling": SAMPLINGS[3]},
]


def started(models: Any, count: int) -> list[Stream]:
    """Return streams with different prompts and options that have read their prompts. Some compile their drafts."""
    target, drafter = models
    rounds = CompiledRounds()
    streams = []
    for index in range(count):
        compiled = rounds if index % 2 else None
        streams.append(Stream(target, drafter, max_draft_tokens=8, rounds=compiled, **OPTIONS[index % len(OPTIONS)]))
        streams[-1].prefill(PROMPTS[index % len(PROMPTS)], 64)
    return streams


def packed_round(
    streams: list[Stream],
    choices: list[Choice],
    stop_ids: frozenset[int] = frozenset(),
    compiled: CompiledRounds | None = None,
) -> list[RoundReport]:
    """Run a round in which no stream fails."""
    reports = []
    for result in round_of_all(streams, choices, [stop_ids] * len(streams), compiled):
        if isinstance(result, Exception):
            raise result
        reports.append(result)
    return reports


def random_choices(streams: list[Stream], rng: np.random.Generator) -> list[Choice]:
    """Return rounds of 0 to 8 draft tokens. Some are copied from the beginning of the text."""
    choices = []
    for stream in streams:
        k = min(int(rng.integers(9)), stream.longest_draft())
        copied = stream.tokens[:k] if k and rng.random() < 0.2 else None
        choices.append(Choice(k, ahead=False, copied=copied))
    return choices


@pytest.mark.parametrize(("variant", "count"), [*((variant, 5) for variant in VARIANTS), ("e2b", 2)])
def test_each_stream_is_what_it_is_alone(tiny_models: Models, variant: str, count: int) -> None:
    """The same rounds give the same tokens, log probabilities and bits. Streams leave one after the other.

    Half of the passes are compiled.
    """
    compiled = CompiledRounds(always=True)
    together, alone = (started(tiny_models(variant), count) for _ in range(2))
    rng = np.random.default_rng(count)
    for number in range(12):
        first = number // 5 if count > 2 else 0
        choices = random_choices(together[first:], rng)
        reports = packed_round(together[first:], choices, compiled=compiled if number % 2 else None)
        for stream, choice, report in zip(alone[first:], choices, reports, strict=True):
            assert stream.round(choice.k, copied=choice.copied) == report
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.tokens == theirs.tokens
        assert len(ours.tokens) > len(SHORT)
        assert mx.array_equal(ours.state.hidden, theirs.state.hidden)
        for mine, other in zip(ours.cache.arrays(), theirs.cache.arrays(), strict=True):
            assert mx.array_equal(mine, other)


def test_the_state_is_that_of_a_fresh_pass(tiny_models: Models) -> None:
    target, drafter = tiny_models("31b")
    streams = [Stream(target, drafter, max_draft_tokens=4) for _ in PROMPTS]
    for stream, prompt in zip(streams, PROMPTS, strict=True):
        stream.prefill(prompt, 64)
    for number in range(20):
        packed_round(streams, [Choice((number + i) % 5, ahead=False) for i in range(len(streams))])
    for stream in streams:
        assert_same_state(stream, target, stream.tokens[:-1])


def test_a_stop_token_ends_one_stream(tiny_models: Models) -> None:
    streams = started(tiny_models("e2b"), 3)
    alone = started(tiny_models("e2b"), 3)
    plain = alone[0].round(0).tokens
    reports = packed_round(streams, [Choice(3, ahead=False)] * 3, frozenset(plain))
    assert reports[0].tokens == plain
    packed_round(streams[1:], [Choice(2, ahead=False)] * 2)


def test_one_host_read_for_each_stream(tiny_models: Models) -> None:
    """All reports are there when the first is read. Log probabilities are a second read."""
    for report in packed_round(started(tiny_models("12b"), 4), [Choice(2, ahead=False)] * 4):
        assert report.host_reads == (1 if report.logprobs is None else 2)


def test_draft_tokens_need_a_drafter(tiny_models: Models) -> None:
    target, _ = tiny_models("e2b")
    streams = started((target, None), 2)
    with pytest.raises(OptionError, match="without a drafter"):
        packed_round(streams, [Choice(0, ahead=False), Choice(1, ahead=False)])


def test_mapped_tables(tmp_path: Path, tiny_pair: Any) -> None:
    """The pass waits for the draft tokens of all streams."""
    with mlx_mtp.load(tiny_pair("e2b") / "target", None, per_layer_embeddings="mapped") as model:
        target = model.parts.target
        together, alone = (started((target, None), 3) for _ in range(2))
        for _ in range(5):
            reports = packed_round(together, [Choice(0, ahead=False)] * 3)
            assert [report.tokens for report in reports] == [stream.round(0).tokens for stream in alone]


@pytest.mark.in_place
@pytest.mark.parametrize("ks", [(0, 0, 0), (3, 2, 0)])
def test_a_round_copies_no_buffer(tiny_models: Models, ks: tuple[int, ...]) -> None:
    """The peak of a round does not grow with the buffers of the streams."""
    target, drafter = tiny_models("31b")
    choices = [Choice(k, ahead=False) for k in ks]
    peaks, sizes = [], []
    for capacity in (1024, 32 * 1024):
        streams = [Stream(target, drafter, max_draft_tokens=3) for _ in ks]
        for stream, prompt in zip(streams, PROMPTS, strict=False):
            stream.cache = Cache(target.config, target.dtype, max_block=4, capacity=capacity)
            stream.prefill(prompt, 64)
        for _ in range(3):
            packed_round(streams, choices)
        active = mx.get_active_memory()
        mx.reset_peak_memory()
        for _ in range(5):
            packed_round(streams, choices)
        peaks.append(mx.get_peak_memory() - active)
        sizes.append(sum(buffer.nbytes for stream in streams for buffer in stream.cache.arrays()))
    assert sizes[1] > sizes[0] + 50e6
    assert peaks[1] < peaks[0] + 1e6
