"""Sampling: penalties, filters and random keys, from logits to the distribution of the next token.

The filters and their order are those of mlx-lm: top-p, min-p, XTC, top-k, then temperature. Target and drafter use the
same filters. A drafter that agrees with the target is therefore accepted under all options.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import mlx.core as mx
import numpy as np

from mlx_mtp.checkpoints.config import SamplingDefaults
from mlx_mtp.errors import OptionError

AcceptanceRule = Literal["block", "coupled"]
# This is the smallest temperature above 0, and the smallest top_p. Below it, only the rounding of float32 is left.
SMALLEST = 1e-6
# Numbers beyond these limits are infinite or zero in float32.
_LARGEST = float(np.finfo(np.float32).max)
_LEAST = float(np.finfo(np.float32).tiny)
ACCEPTANCE_RULES: tuple[AcceptanceRule, ...] = ("block", "coupled")


@dataclass(frozen=True)
class Sampling:
    """Sampling options of one text. The defaults decode greedily.

    `logit_bias` and the penalties act on the logits first, as in mlx-lm. A bias of -inf excludes its token.
    `repetition_penalty` divides (1 is no penalty). The other penalties subtract (0 is no penalty). Each penalty applies
    to the tokens among the last `..._context_size` tokens, including the prompt. Bias and penalties apply to greedy
    decoding too.

    `top_k` 0, `top_p` 1, `min_p` 0 and `xtc_probability` 0 do not change the distribution. The same seed gives the same
    tokens. With `acceptance` "coupled", this is true for any draft tokens. With "block", it is true for the same number
    of draft tokens and the same `max_tokens`.

    Raises OptionError if a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    seed: int = 0
    acceptance: AcceptanceRule = "block"
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    presence_context_size: int = 20
    frequency_penalty: float = 0.0
    frequency_context_size: int = 20

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0.0, math.inf),
            "top_k": (0, math.inf),
            "top_p": (0.0, 1.0),
            "min_p": (0.0, 1.0),
            "xtc_probability": (0.0, 1.0),
            "xtc_threshold": (0.0, 0.5),
            "seed": (0, 2**64 - 1),
            "repetition_penalty": (0.0, math.inf),
            "presence_penalty": (-math.inf, math.inf),
            "frequency_penalty": (-math.inf, math.inf),
            "repetition_context_size": (1, math.inf),
            "presence_context_size": (1, math.inf),
            "frequency_context_size": (1, math.inf),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            whole = isinstance(_default(name), int)
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise OptionError(f"{name} must be {'an integer' if whole else 'a number'}, found {value!r}")
            if not low <= value <= high or value in (-math.inf, math.inf):
                raise OptionError(f"{name} must be {_range(low, high)}, found {_shown(value)}")
            if not whole and abs(value) > _LARGEST:
                raise OptionError(f"{name} must be finite in float32, found {_shown(value)}")
        if self.repetition_penalty < _LEAST:
            raise OptionError(f"repetition_penalty must be above 0, found {self.repetition_penalty:g}")
        if 0 < self.temperature < SMALLEST or self.top_p < SMALLEST:
            name = "top_p" if self.top_p < SMALLEST else "temperature"
            raise OptionError(f"{name} must be at least {SMALLEST:g}, found {getattr(self, name):g}")
        for token, bias in self.logit_bias.items():
            is_valid = isinstance(token, int) and isinstance(bias, int | float) and bias < math.inf
            if isinstance(token, bool) or isinstance(bias, bool) or not is_valid:
                raise OptionError(f"logit_bias must map token ids to finite numbers, found {token!r}: {bias!r}")
            if bias != -math.inf and abs(bias) > _LARGEST:
                raise OptionError(
                    f"logit_bias of token {_shown(token)} must be finite in float32, found {_shown(bias)}"
                )
        if self.acceptance not in ACCEPTANCE_RULES:
            raise OptionError(f"acceptance must be one of {', '.join(ACCEPTANCE_RULES)}, found {self.acceptance!r}")

    @property
    def is_greedy(self) -> bool:
        """True if the temperature is 0."""
        return self.temperature == 0

    @property
    def depends_on_lengths(self) -> bool:
        """True if the tokens of a seed depend on the draft lengths. Their distribution never does."""
        return not self.is_greedy and self.acceptance == "block"

    def within(self, max_context: int) -> "Sampling":
        """Return a copy for texts of at most `max_context` tokens.

        The penalties of the copy read at most `max_context` tokens.
        """
        names = ("repetition_context_size", "presence_context_size", "frequency_context_size")
        return replace(self, **{name: min(getattr(self, name), max_context) for name in names})

    def log_probabilities(self, logits: mx.array, coins: mx.array) -> mx.array:
        """Return the log probabilities that tokens are drawn from, float32 [rows, candidates].

        `logits` is [rows, candidates]. The result is -inf for excluded candidates. `coins`, uniform [rows], decide
        whether XTC applies to a row (see `uniform`).
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
        """Apply XTC as in mlx-lm, but with given coins.

        XTC drops all tokens above the threshold except the least likely of them.
        """
        probabilities = mx.softmax(x, axis=-1)
        above = probabilities > self.xtc_threshold
        least = mx.where(above, probabilities, mx.inf).min(axis=-1, keepdims=True)
        applies = coins[:, None] < self.xtc_probability
        return mx.where(applies & (probabilities > least), -mx.inf, x)


def default_sampling(defaults: SamplingDefaults, max_context: int) -> Sampling:
    """Return the sampling defaults of a checkpoint as options.

    The repetition penalty applies to the whole text, as in transformers.
    """
    temperature, top_p = defaults.temperature, max(defaults.top_p, SMALLEST)
    chosen = Sampling(
        temperature=max(temperature, SMALLEST) if temperature else 0.0,
        top_k=defaults.top_k,
        top_p=top_p,
        min_p=defaults.min_p,
        repetition_penalty=defaults.repetition_penalty,
    )
    return chosen if defaults.repetition_penalty == 1 else replace(chosen, repetition_context_size=max_context)


class Penalties:
    """Logit bias and penalties of one `Sampling` for one vocabulary, on the device.

    `context_size` is the number of preceding tokens that the penalties read.

    Raises OptionError if a biased token is not in the vocabulary.
    """

    def __init__(self, sampling: Sampling, vocab_size: int) -> None:
        self.sampling = sampling
        self.vocab_size = vocab_size
        outside = [token for token in sampling.logit_bias if not 0 <= token < vocab_size]
        if outside:
            raise OptionError(f"logit_bias names token {_shown(outside[0])}, the vocabulary has {vocab_size}")
        sizes = {
            "repetition": sampling.repetition_context_size if sampling.repetition_penalty != 1 else 0,
            "presence": sampling.presence_context_size if sampling.presence_penalty else 0,
            "frequency": sampling.frequency_context_size if sampling.frequency_penalty else 0,
        }
        self._sizes = {name: size for name, size in sizes.items() if size}
        self.context_size = max(sizes.values())
        self.is_active = bool(self._sizes or sampling.logit_bias)

    def __call__(self, logits: mx.array, contexts: mx.array, ids: mx.array | None = None) -> mx.array:
        """Return the logits [rows, candidates] after bias and penalties.

        `contexts`, int32 [rows, context_size], holds the tokens before each row. The newest token is last, and -1 marks
        a place without a token. `ids`, [rows, candidates], holds the token ids of the candidates. None means the whole
        vocabulary.
        """
        if not self.is_active:
            return logits
        logits = logits.astype(mx.float32)
        if self.sampling.logit_bias:
            tokens, values = mx.array([*self.sampling.logit_bias]), mx.array([*self.sampling.logit_bias.values()])
            bias = mx.zeros(self.vocab_size).at[tokens].add(values)
            logits = logits + (bias if ids is None else bias[ids])
        for name, size in self._sizes.items():
            counts = self._counts(contexts[:, -size:])
            if ids is not None:
                counts = mx.take_along_axis(counts, ids, axis=-1)
            logits = self._penalize(name, logits, counts)
        return logits

    def _penalize(self, name: str, logits: mx.array, counts: mx.array) -> mx.array:
        if name == "repetition":
            penalty = self.sampling.repetition_penalty
            return mx.where(counts > 0, mx.where(logits < 0, logits * penalty, logits / penalty), logits)
        if name == "presence":
            return logits - self.sampling.presence_penalty * (counts > 0)
        return logits - self.sampling.frequency_penalty * counts

    def _counts(self, contexts: mx.array) -> mx.array:
        """Count how often each token occurs in each row's context, [rows, vocab_size]."""
        rows = mx.arange(contexts.shape[0])[:, None]
        real = contexts >= 0
        counts = mx.zeros((contexts.shape[0], self.vocab_size))
        return counts.at[rows, mx.where(real, contexts, 0)].add(real.astype(mx.float32))


def position_key(key: mx.array, position: mx.array) -> mx.array:
    """Return the random key for a position, computed on the device from the key of a stream."""
    # The words of keys made by `mx.random.split` are far apart for different seeds. Neighbouring seeds therefore do not
    # share keys.
    return key + mx.stack([mx.zeros_like(position), position]).astype(mx.uint32)


def uniform(key: mx.array, first_position: mx.array, rows: int) -> mx.array:
    """Return one random number in [0, 1) per position, [rows]."""
    return mx.stack([mx.random.uniform(key=position_key(key, first_position + row)) for row in range(rows)])


def gumbel(key: mx.array, first_position: mx.array, rows: int, vocab_size: int) -> mx.array:
    """Return Gumbel noise per position and token, [rows, vocab_size].

    The argmax over log probabilities plus this noise is a random draw from their distribution.
    """
    keys = [position_key(key, first_position + row) for row in range(rows)]
    return mx.stack([mx.random.gumbel((vocab_size,), key=key) for key in keys])


def _normalize(x: mx.array) -> mx.array:
    return x - mx.logsumexp(x, axis=-1, keepdims=True)


def _default(name: str) -> object:
    return Sampling.__dataclass_fields__[name].default


def _shown(value: float) -> str:
    """Format a number for an error message. Give only the size of an integer that has hundreds of digits."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return str(value)


def _range(low: float, high: float) -> str:
    if math.isinf(low):
        return "finite"
    return f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
