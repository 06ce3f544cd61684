"""Small Markov tables with a known distribution of tokens, and the chi-square test against this distribution."""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_mtp.decoding.sampling import Sampling

# The standard normal quantile of 1 - 1e-4.
Z = 3.719


Array = NDArray[np.float64]


@dataclass(frozen=True)
class Tables:
    """Logits by last token, [vocab + 1, vocab]. The last row is for the start. `ids` are the drafter's candidates."""

    target: Array
    drafter: Array
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1))
    ids: NDArray[np.int32] | None = None

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary."""
        return len(self.target[0])

    def log_probabilities(self, logits: Array) -> mx.array:
        """Return log probabilities without and with XTC, [2, vocab + 1, candidates]."""
        rows = mx.array(logits, dtype=mx.float32)
        return mx.stack([self.sampling.log_probabilities(rows, mx.full(len(logits), coin)) for coin in (1.0, -1.0)])

    def expected(self, tokens: int) -> Array:
        """Return the probability of every sequence of `tokens` tokens under plain sampling."""
        without, applied = np.exp(np.array(self.log_probabilities(self.target), np.float64))
        xtc = self.sampling.xtc_probability
        table = (1 - xtc) * without + xtc * applied
        table /= table.sum(axis=1, keepdims=True)
        chance: Array = table[-1]
        for _ in range(tokens - 1):
            chance = chance[..., None] * table[:-1]
        return chance.reshape(-1)


def chi_square(tokens: NDArray[np.int64], expected: Array, vocab_size: int) -> float:
    """Return Pearson's statistic divided by its critical value. Above 1, the tokens do not fit the distribution."""
    index = tokens @ vocab_size ** np.arange(tokens.shape[1] - 1, -1, -1)
    observed, expected = np.bincount(index, minlength=expected.size), expected * len(tokens)
    if observed[expected == 0].any():
        return np.inf
    large = expected >= 5
    observed, expected = (np.append(x[large], x[~large].sum()) for x in (observed, expected))
    if expected[-1] < 5:
        observed, expected = (np.append(x[:-2], x[-2:].sum()) for x in (observed, expected))
    freedom = expected.size - 1
    spread = 2 / (9 * freedom)  # Wilson and Hilferty's approximation of the quantile.
    critical = freedom * (1 - spread + Z * spread**0.5) ** 3
    return float(((observed - expected) ** 2 / expected).sum() / critical)


def random_logits(vocab_size: int, seed: int, concentration: float = 1.0) -> Array:
    """Return random logits, [vocab + 1, vocab]."""
    rng = np.random.default_rng(seed)
    return np.log(rng.dirichlet(np.full(vocab_size, concentration), size=vocab_size + 1) + 1e-4)


def make_tables(drafter: str, vocab_size: int, sampling: Sampling | None = None) -> Tables:
    """Return random tables with a drafter of the given kind."""
    target = random_logits(vocab_size, seed=vocab_size)
    other = random_logits(vocab_size, seed=vocab_size + 50, concentration=0.5)
    logits = {
        "good": np.log(0.7 * np.exp(target) + 0.3 * np.exp(other)),
        "bad": other,
        "opposite": target[:, ::-1].copy(),
        # The drafter is nearly sure of the target's least likely token.
        "adversarial": np.log(np.eye(vocab_size)[target.argmin(axis=1)] * 0.97 + 0.03 / vocab_size),
        "identical": target,
    }[drafter]
    return Tables(target, logits, sampling or Sampling(temperature=1))
