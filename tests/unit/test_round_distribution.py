"""Two tokens from the stream's own rounds have the joint distribution of plain sampling: chi-square tests.

Target and drafter look up their logits by the last token, so the exact distribution is known. Everything else is the
real code: random keys, drafting, acceptance, and the state for the next round. Streams that differ only in their seed
run side by side. The significance is 1e-4.
"""

from collections.abc import Callable, Sequence
from copy import copy
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from numpy.typing import NDArray
from support.caches import LAYER_TYPES
from support.distributions import Array, Tables, chi_square, make_tables

from mlx_mtp.checkpoints.config import LayerConfig, RopeConfig, TextConfig
from mlx_mtp.decoding.draft_length import Choice
from mlx_mtp.decoding.packed import packed_round
from mlx_mtp.decoding.round import Verified, round_steps
from mlx_mtp.decoding.sampling import position_key
from mlx_mtp.decoding.state import RoundState
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.gemma4.drafter import Candidates, DraftContext, Drafter, DraftStep
from mlx_mtp.gemma4.kv_cache import Cache
from mlx_mtp.gemma4.target import Target, TargetOutput

SEEDS = 20_000
PAIRS = 1_500

Draw = Callable[[mx.array, mx.array], mx.array]


class TableTarget(Target):
    """A target that looks up the logits of the next token by the last token, [vocab, vocab]."""

    def __init__(self, table: Array) -> None:
        layers = [LayerConfig(layer_type, 2, 1, False, True, index, 4) for index, layer_type in enumerate(LAYER_TYPES)]
        rope = {layer.layer_type: RopeConfig(1e4, 1.0) for layer in layers}
        size = len(table)
        super().__init__(TextConfig(size, 2, size, 1e-6, 8, 4096, None, tuple(layers), rope, 0, 0, 0, 0, 0))
        self.table = mx.array(table, mx.float32)
        # A token's embedding is one-hot.
        self.embed_tokens.weight = mx.eye(size)

    def __call__(self, tokens: mx.array, cache: Cache, logit_rows: int = 0, *_: Any, **__: Any) -> TargetOutput:
        logits = self.table[tokens]
        return TargetOutput(mx.zeros_like(logits), logits[:, tokens.shape[1] - logit_rows :])

    def packed(self, tokens: mx.array, _: Any, lengths: Sequence[int], between: Any = None) -> list[TargetOutput]:
        parts = mx.split(self.table[tokens], list(accumulate(lengths))[:-1], axis=1)
        return [TargetOutput(mx.zeros_like(logits), logits) for logits in parts]


class TableDrafter(Drafter):
    """A drafter that looks up its logits by the last token. `ids` are its candidates [vocab, candidates], or None."""

    def __init__(self, table: Array, ids: NDArray[np.int32] | None) -> None:
        nn.Module.__init__(self)
        self.table = mx.array(table, mx.float32)
        self.ids = None if ids is None else mx.array(ids)

    def draft_context(self, cache: Cache) -> DraftContext:
        return DraftContext({}, cache.offset)

    def __call__(self, embedding: mx.array, hidden: mx.array, context: DraftContext, _between: Any = None) -> DraftStep:
        return DraftStep(embedding, mx.zeros_like(hidden))

    def candidates(self, state: mx.array, allowed: mx.array | None = None) -> Candidates:
        token = mx.argmax(state[0], axis=-1)
        return Candidates(None if self.ids is None else self.ids[token], self.table[token])

    def _scores(self, states: mx.array) -> mx.array:
        return states

    def _candidates(self, state: mx.array, scores: mx.array, allowed: mx.array | None) -> Candidates:
        return self.candidates(state, allowed)


def by_noise(logits: mx.array, key: mx.array) -> mx.array:
    """Draw with Gumbel noise, as MLX does for one row without a batch."""
    return mx.argmax(logits + mx.random.gumbel(logits.shape, key=key), axis=-1)


def by_inverse(logits: mx.array, key: mx.array) -> mx.array:
    """Draw with the inverse of the distribution function, as MLX 0.32.4 does for a batch of one row."""
    if logits.ndim == 1:
        return by_noise(logits, key)
    chances = mx.cumsum(mx.softmax(logits, axis=-1), axis=-1)
    point = mx.random.uniform(shape=(1, 1), key=key) * chances[:, -1:]
    return (chances <= point).sum(axis=-1)


def two_tokens(
    tables: Tables,
    k: int,
    monkeypatch: pytest.MonkeyPatch,
    draw: Draw = by_noise,
    copied: list[int] | None = None,
) -> tuple[NDArray[np.int64], float]:
    """Return the two tokens after token 0 by seed, [seeds, 2], and the first round's mean number of accepted tokens.

    `draw` replaces `mx.random.categorical`, which `mx.vmap` refuses for a batch of rows. `copied` are k draft tokens to
    use instead of those of the drafter.
    """
    ids = None if tables.ids is None else tables.ids[:-1]
    target, drafter = TableTarget(tables.target[:-1]), TableDrafter(tables.drafter[:-1], ids)
    started = Stream(target, drafter, max_draft_tokens=k, sampling=tables.sampling)
    started.prefill([0, 0, 0], 8)
    started.state = started.state._replace(bonus=mx.zeros((1, 1), mx.int32))
    steps = round_steps(started.parts, started.cache, k)
    rules = started.parts.rules

    def play(state: RoundState) -> tuple[RoundState, Verified]:
        return steps.whole(state) if copied is None else steps.verify(state, rules.copied_draft(copied), None, None)

    def with_keys(keys: mx.array) -> RoundState:
        return started.state._replace(draw_key=keys[0], coin_key=keys[1])

    def two(keys: mx.array) -> tuple[mx.array, mx.array]:
        state, (first, _) = play(with_keys(keys))
        _, (second, _) = play(state)
        # If the first round emits one token, the second token comes from the next round.
        return mx.stack([first[0], mx.where(first[1] >= 0, first[1], second[0])]), (first >= 0).sum() - 1

    # A stream makes its keys from a seed in this way.
    keys = mx.vmap(mx.random.split)(mx.stack([mx.zeros(SEEDS, mx.uint32), mx.arange(SEEDS, dtype=mx.uint32)], axis=1))
    with monkeypatch.context() as patch:
        patch.setattr(mx.random, "categorical", lambda logits, key: draw(logits, key))
        tokens, accepted = mx.vmap(two)(keys)
        for seed in range(10):
            stream = copy(started)
            stream.cache = started.cache.over(started.cache.kv)
            stream.tokens = list(started.tokens)
            stream.state = with_keys(mx.random.split(mx.random.key(seed)))
            found = [token for _ in range(2) for token in stream.round(k, copied=copied).tokens]
            assert found[:2] == tokens[seed].tolist()
    return np.array(tokens, np.int64), float(accepted.mean())


def tables_after_token_0(drafter: str, vocab_size: int, candidates: int | None = None) -> Tables:
    """Return tables whose last row is the row of token 0. The first token is drawn from this row."""
    made = make_tables(drafter, vocab_size)
    target, logits = (np.vstack([table[:-1], table[:1]]) for table in (made.target, made.drafter))
    if candidates is None:
        return Tables(target, logits)
    rng = np.random.default_rng(candidates)
    ids = np.stack([rng.permutation(vocab_size)[:candidates] for _ in range(vocab_size + 1)]).astype(np.int32)
    return Tables(target, np.take_along_axis(logits, ids, axis=1), ids=ids)


@pytest.mark.parametrize("vocab_size", [2, 4])
@pytest.mark.parametrize("drafter", ["good", "bad"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_two_tokens_have_the_joint_distribution_of_plain_sampling(
    k: int, drafter: str, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two draft tokens use as many random numbers as the noise of two tokens. A shared key would make them equal."""
    tables = tables_after_token_0(drafter, vocab_size)
    tokens, accepted = two_tokens(tables, k, monkeypatch)
    misfit = chi_square(tokens, tables.expected(2), vocab_size)
    print(f"{drafter} drafter, {vocab_size} tokens, k = {k}: {misfit:.2f} of critical, {accepted:.2f} accepted")
    assert misfit < 1
    assert accepted > 0.1, "rounds without accepted drafts prove little"


@pytest.mark.parametrize("k", [1, 2, 3])
def test_with_candidates_of_the_drafter_and_draws_by_the_inverse(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = tables_after_token_0("good", 4, candidates=3)
    tokens, accepted = two_tokens(tables, k, monkeypatch, by_inverse)
    assert chi_square(tokens, tables.expected(2), 4) < 1
    assert accepted > 0.1


@pytest.mark.parametrize("copied", [[1], [2, 1], [3, 3, 0]])
def test_with_copied_tokens(copied: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    tables = tables_after_token_0("good", 4)
    tokens, accepted = two_tokens(tables, len(copied), monkeypatch, copied=copied)
    assert chi_square(tokens, tables.expected(2), 4) < 1
    assert accepted > 0.01


def test_two_streams_in_one_pass_are_independent() -> None:
    """Two tokens of each of two streams have the joint distribution of plain sampling, whatever the other draws."""
    tables = tables_after_token_0("good", 2)
    target, drafter = TableTarget(tables.target[:-1]), TableDrafter(tables.drafter[:-1], None)
    started = Stream(target, drafter, max_draft_tokens=2, sampling=tables.sampling)
    started.prefill([0, 0, 0], 8)
    found = []
    for seed in range(PAIRS):
        streams = [copy(started), copy(started)]
        for index, stream in enumerate(streams):
            stream.cache, stream.tokens = started.cache.over(started.cache.kv), []
            draw_key, coin_key = mx.random.split(mx.random.key(2 * seed + index))
            zero = mx.zeros((1, 1), mx.int32)
            stream.state = started.state._replace(bonus=zero, draw_key=draw_key, coin_key=coin_key)
            stream._in_flight = []
        while min(len(stream.tokens) for stream in streams) < 2:
            packed_round(streams, [Choice(2, ahead=False), Choice(1, ahead=False)], [frozenset(), frozenset()])
        found.append([token for stream in streams for token in stream.tokens[:2]])
    alone = tables.expected(2)
    assert chi_square(np.array(found, np.int64), np.outer(alone, alone).reshape(-1), 2) < 1


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_no_key_is_drawn_from_twice(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two draws from one key depend on each other, for any use of the key in MLX.

    The parts of one key that is split in two ways also depend on each other. Only XTC's coins are the same for drafter
    and target.
    """
    tables = tables_after_token_0("good", 4)
    target, drafter = TableTarget(tables.target[:-1]), TableDrafter(tables.drafter[:-1], None)
    stream = Stream(target, drafter, max_draft_tokens=k, sampling=tables.sampling)
    drawn: list[tuple[int, ...]] = []
    parts: dict[tuple[int, ...], set[int]] = {}
    split = mx.random.split

    def words(key: mx.array) -> tuple[int, ...]:
        return tuple(np.array(key).tolist())

    def record(name: str) -> Any:
        original = vars(mx.random)[name]

        def draw(*args: Any, key: mx.array, **options: Any) -> Any:
            drawn.append(words(key))
            return original(*args, key=key, **options)

        return draw

    def split_once(key: mx.array, num: int = 2) -> mx.array:
        parts.setdefault(words(key), set()).add(num)
        return split(key, num)

    stream.prefill([0, 0, 0], 8)
    coins = {words(position_key(stream.state.coin_key, mx.array(position))) for position in range(100)}
    for name in ("uniform", "categorical", "gumbel"):
        monkeypatch.setattr(mx.random, name, record(name))
    monkeypatch.setattr(mx.random, "split", split_once)
    for _ in range(6):
        stream.round(k)
    used = [key for key in drawn if key not in coins]
    assert len(used) == 6 * (k + 2)
    assert len(set(used)) == len(used)
    assert all(len(numbers) == 1 for numbers in parts.values())
    assert not set(used) & set(parts)
