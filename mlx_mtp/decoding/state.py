"""The arrays of one text between two rounds."""

from typing import NamedTuple

import mlx.core as mx

from mlx_mtp.gemma4.kv_cache import KVState


class RoundState(NamedTuple):
    """Every array that a round reads and replaces. `mx.compile` takes and returns it as it is.

    `bonus`, int32 [1, 1], is the last emitted token, whose K/V are not in the cache yet. `hidden`, [1, 1, hidden_size],
    is the target's hidden state that chose it. `window`, int32 [n], holds the last tokens, which penalties look at: the
    bonus token last, -1 where the text is shorter. `draw_key` and `coin_key`, uint32 [2], are the random keys of the
    text; they stay as they are. `kv` holds the K/V of all tokens but the bonus token.
    """

    bonus: mx.array
    hidden: mx.array
    window: mx.array
    draw_key: mx.array
    coin_key: mx.array
    kv: KVState
