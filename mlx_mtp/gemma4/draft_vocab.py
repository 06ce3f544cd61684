"""A smaller vocabulary for a drafter with a dense head, whose rows are most of what a draft step reads.

Nothing is lost: a token that cannot be drafted is still the target's to say.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mtp.checkpoints.config import DrafterConfig
from mlx_mtp.errors import OptionError

from .drafter import Drafter

Ids = npt.NDArray[np.int32]


def check_draft_vocab(config: DrafterConfig, size: int) -> None:
    """Raise OptionError unless this drafter's vocabulary can be cut to `size` tokens."""
    if config.num_centroids:
        raise OptionError(
            f"{config.path}: --draft-vocab needs a dense head, found one with centroids, which is as cheap"
        )
    if config.draft_vocab_size:
        raise OptionError(
            f"{config.path}: --draft-vocab was given before: found draft_vocab_size {config.draft_vocab_size}"
        )
    if not 1 <= size < config.text.vocab_size:
        raise OptionError(f"--draft-vocab must be from 1 to {config.text.vocab_size - 1}, found {size}")


def choose_ids(texts: Iterable[Sequence[int]], kept: Collection[int], vocab_size: int, size: int) -> Ids:
    """The ids of the `size` most useful tokens, in order: those `kept`, then those most frequent in texts of token ids,
    then the first ones, whose order in a BPE vocabulary is that of their use."""
    counts = np.zeros(vocab_size, np.int64)
    for text in texts:
        counts += np.bincount(np.asarray(text, np.int64), minlength=vocab_size)
    counts[list(kept)] = np.iinfo(np.int64).max
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


def prune(drafter: Drafter, ids: Ids) -> None:
    """Leave only these rows of a drafter's head, quantized or not."""
    drafter.config = replace(drafter.config, draft_vocab_size=len(ids))
    chosen = mx.array(ids)
    head = drafter.model.embed_tokens
    head.update({name: rows[chosen] for name, rows in head.parameters().items()})
    drafter.draft_vocab_ids = chosen
