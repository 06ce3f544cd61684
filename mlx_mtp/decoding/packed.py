"""Rounds of several streams with one verify pass: the weights are read once for all of them.

The rows of all streams stand one after the other in the pass. Projections, feed-forward blocks and the head see all
rows together. Each stream writes its own K/V cache and attends to it alone, and accepts draft tokens by its own rules.
So a text does not depend on its neighbours, up to the rounding of sums over more rows.
"""

from collections.abc import Sequence

import mlx.core as mx

from mlx_mtp.gemma4.target import Target

from .draft_length import Choice
from .report import RoundReport
from .round import Drafted, tokens_to_verify
from .stream import Stream


def packed_round(
    streams: Sequence[Stream], choices: Sequence[Choice], stop_ids: frozenset[int] = frozenset()
) -> list[RoundReport]:
    """Run one round of each stream, and return their reports. See `Stream.round`.

    Choice i has the number of draft tokens of stream i, and the tokens if they are copied. All streams have the same
    target, which is not exact, and none has a round in flight. After a stop token, a stream must not continue.

    Raises OptionError if there are draft tokens but no drafter.
    """
    drafts = [stream.draft(each.k, each.copied or []) for stream, each in zip(streams, choices, strict=True)]
    reports = _verify(streams[0].parts.target, streams, drafts)
    mx.eval(reports, [stream.state for stream in streams])
    return [stream.finish(stop_ids) for stream in streams]


def _verify(target: Target, streams: Sequence[Stream], drafts: Sequence[Drafted]) -> list[mx.array]:
    """Verify all drafts in one pass and replace the states. Return the reports. Nothing is evaluated.

    This is a separate function because its caches must not exist when the round is evaluated. They would force MLX to
    copy buffers.
    """
    caches = [stream.cache.over(stream.state.kv) for stream in streams]
    tokens = [tokens_to_verify(stream.state, each.draft) for stream, each in zip(streams, drafts, strict=True)]
    outputs = target.packed(mx.concatenate(tokens, axis=1), caches, [each.shape[1] for each in tokens])
    verified = zip(streams, drafts, caches, outputs, strict=True)
    return [stream.accept(drafted, cache.kv, output) for stream, drafted, cache, output in verified]
