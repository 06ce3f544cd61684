"""A smaller vocabulary for a drafter with a dense head.

The rows of this head are most of the data that a draft step reads. No output is lost: the target can still choose a
token that cannot be drafted.
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
    """Check that the vocabulary of a drafter can be cut to `size` tokens.

    Raises OptionError if it cannot.
    """
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
    """Return the ids of the `size` most useful tokens, in ascending order.

    The `kept` tokens are chosen first, then the most frequent tokens in `texts` of token ids, then the lowest ids. In a
    BPE vocabulary, tokens are in order of their use.
    """
    counts = np.zeros(vocab_size, np.int64)
    for text in texts:
        counts += np.bincount(np.asarray(text, np.int64), minlength=vocab_size)
    counts[list(kept)] = np.iinfo(np.int64).max
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


def prune(drafter: Drafter, ids: Ids) -> None:
    """Keep only the rows of these ids in a drafter's head, quantized or not."""
    drafter.config = replace(drafter.config, draft_vocab_size=len(ids))
    chosen = mx.array(ids)
    head = drafter.model.embed_tokens
    head.update({name: rows[chosen] for name, rows in head.parameters().items()})
    drafter.draft_vocab_ids = chosen
