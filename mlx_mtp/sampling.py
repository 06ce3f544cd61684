"""From logits to the distribution tokens are drawn from, and drawing with explicit random keys.

The filters are mlx-lm's, in mlx-lm's order: top-p, min-p, XTC, top-k, then temperature. Target and drafter go through
the same ones, so that a drafter that agrees with the target is accepted whatever the options are.
"""

import math
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from .errors import OptionError

AcceptanceRule = Literal["block", "coupled"]
ACCEPTANCE_RULES: tuple[AcceptanceRule, ...] = ("block", "coupled")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The defaults decode greedily; with `temperature` 0 nothing else matters.

    `top_k` 0, `top_p` 1, `min_p` 0 and `xtc_probability` 0 leave the distribution as it is. The same seed gives the
    same tokens; with `acceptance` "coupled" it does whatever is drafted, with "block" for the same number of draft
    tokens.

    Raises OptionError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    seed: int = 0
    acceptance: AcceptanceRule = "block"

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0.0, math.inf),
            "top_k": (0, math.inf),
            "top_p": (0.0, 1.0),
            "min_p": (0.0, 1.0),
            "xtc_probability": (0.0, 1.0),
            "xtc_threshold": (0.0, 0.5),
            "seed": (0, 2**64 - 1),
        }
        for name, (low, high) in ranges.items():
            value = vars(self)[name]
            whole = name in ("top_k", "seed")
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise OptionError(f"{name} must be {'an integer' if whole else 'a number'}, found {value!r}")
            if not low <= value <= high or value == math.inf:
                raise OptionError(f"{name} must be {_range(low, high)}, found {value}")
        if self.top_p == 0:
            raise OptionError("top_p must be above 0, found 0: no token would be left")
        if self.acceptance not in ACCEPTANCE_RULES:
            raise OptionError(f"acceptance must be one of {', '.join(ACCEPTANCE_RULES)}, found {self.acceptance!r}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def log_probabilities(self, logits: mx.array, coins: mx.array) -> mx.array:
        """Log of the distribution each row of logits [rows, candidates] is drawn from, float32; -inf where excluded.

        `coins`, uniform [rows], decide whether XTC applies to a row; see `uniform`.
        """
        from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

        x = _normalize(logits.astype(mx.float32))
        if self.top_p < 1:
            x = apply_top_p(x, self.top_p)
        if self.min_p > 0:
            x = apply_min_p(x, self.min_p)
        if self.xtc_probability > 0:
            x = self._exclude_top_choices(x, coins)
        if 0 < self.top_k < x.shape[-1]:
            x = apply_top_k(x, self.top_k)
        return _normalize(x / self.temperature)

    def _exclude_top_choices(self, x: mx.array, coins: mx.array) -> mx.array:
        """XTC as in mlx-lm, with given coins: drop all tokens above the threshold but the least likely of them."""
        probabilities = mx.softmax(x, axis=-1)
        above = probabilities > self.xtc_threshold
        least = mx.where(above, probabilities, mx.inf).min(axis=-1, keepdims=True)
        applies = coins[:, None] < self.xtc_probability
        return mx.where(applies & (probabilities > least), -mx.inf, x)


def position_key(key: mx.array, position: mx.array) -> mx.array:
    """A random key for a position, from a stream's key; computed on the device."""
    # Words of a key made by splitting are far apart between seeds, so neighbouring seeds do not share keys.
    return key + mx.stack([mx.zeros_like(position), position]).astype(mx.uint32)


def uniform(key: mx.array, first_position: mx.array, rows: int) -> mx.array:
    """A number in [0, 1) by position, [rows]."""
    return mx.stack([mx.random.uniform(key=position_key(key, first_position + row)) for row in range(rows)])


def gumbel(key: mx.array, first_position: mx.array, rows: int, vocab_size: int) -> mx.array:
    """Gumbel noise by position and token, [rows, vocab_size]: added to log probabilities, it makes an argmax a draw."""
    keys = [position_key(key, first_position + row) for row in range(rows)]
    return mx.stack([mx.random.gumbel((vocab_size,), key=key) for key in keys])


def _normalize(x: mx.array) -> mx.array:
    return x - mx.logsumexp(x, axis=-1, keepdims=True)


def _range(low: float, high: float) -> str:
    return f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
