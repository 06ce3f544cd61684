"""The arrays of one text between two rounds."""

from typing import NamedTuple

import mlx.core as mx

from mlx_mtp.gemma4.kv_cache import KVState


class RoundState(NamedTuple):
    """All arrays that a round reads and replaces.

    `mx.compile` accepts and returns this tuple directly. `bonus`, int32 [1, 1], is the last emitted token. Its K/V are
    not in the cache yet. `hidden`, [1, 1, hidden_size], is the target's hidden state that produced the bonus token.
    `window`, int32 [n], holds the last n tokens, which the penalties read. The bonus token is last, and -1 marks places
    before the start of the text. `draw_key` and `coin_key`, uint32 [2], are the random keys of the text. They never
    change. `kv` holds the K/V of all tokens except the bonus token.
    """

    bonus: mx.array
    hidden: mx.array
    window: mx.array
    draw_key: mx.array
    coin_key: mx.array
    kv: KVState
