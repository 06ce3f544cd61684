"""The options of one generation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from mlx_mtp.decoding.constraints import compile_grammar
from mlx_mtp.decoding.rules import LogitsProcessor
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.gemma4.kv_cache import KVQuantization

from .errors import OptionError

DEFAULT_MAX_TOKENS = 256
DEFAULT_PREFILL_STEP = 512
# Far beyond what is ever accepted; the buffers of a longer draft would take the memory.
LARGEST_DRAFT = 1024
# As in mlx-lm.
DEFAULT_KV_GROUP_SIZE = 64
DEFAULT_QUANTIZED_KV_START = 5000
KV_BITS = (4, 8)
# Those that MLX has kernels for.
KV_GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate. `num_draft_tokens`, of a round, is "auto" by default: as many as make most tokens per second, by
    what rounds cost on this machine (see `Model.calibrate`) and by what was accepted so far. 0 decodes plainly.

    Greedy tokens do not depend on it; sampled ones keep their distribution, and do not depend on it either with
    `Sampling(acceptance="coupled")`. With block verification a seed gives the same text for the same number, or for
    "auto" on the same machine as long as the measurement is kept.

    The text ends before the first of the `stop` strings, wherever tokens or blocks break it. `ignore_eos` goes on after
    the model's own stop tokens; before `min_tokens` there can be none. `logits_processors` are called as by mlx-lm, for
    every row of a verify pass with the tokens before it; the drafter does not know of them. `logprobs` is the number of
    most likely tokens reported with each token's log probability.

    With one of `json_schema`, `regex` and `grammar` (see `guide.compile_grammar`) the answer is always in that
    language: up to its end, where the text stops, or a beginning of it where `max_tokens` cut it short.

    `enable_thinking` lets the answer begin with a thought, and is the switch of the chat template for messages.
    `thinking_budget` is the most tokens of a thought, after which it is closed and the answer begins.

    With `reuse_prompt`, what the prompt has in common with earlier ones of the same model is not read again, and it is
    kept for later ones (see `Model.prompt_cache`). An exact model reads every prompt, as sums round by their order.

    With `kv_bits`, 8 or 4, the K/V of full-attention layers are quantized in groups of `kv_group_size` values (32, 64
    or 128, dividing the head size) as soon as there are `quantized_kv_start` tokens. That may change the text, but what
    was said of `num_draft_tokens` still holds.

    Raises OptionError for a value out of range, and for options that contradict each other.
    """

    max_tokens: int = DEFAULT_MAX_TOKENS
    sampling: Sampling = field(default_factory=Sampling)
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logits_processors: Sequence[LogitsProcessor] = ()
    logprobs: int | None = None
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    enable_thinking: bool = False
    thinking_budget: int | None = None
    num_draft_tokens: int | Literal["auto"] = "auto"
    prefill_step_size: int = DEFAULT_PREFILL_STEP
    reuse_prompt: bool = True
    kv_bits: int | None = None
    kv_group_size: int = DEFAULT_KV_GROUP_SIZE
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START

    def __post_init__(self) -> None:
        for name, choices in (("kv_bits", (None, *KV_BITS)), ("kv_group_size", KV_GROUP_SIZES)):
            value = getattr(self, name)
            # Of the type as well: 8.0 equals 8, but MLX takes no float.
            if not any(type(value) is type(choice) and value == choice for choice in choices):
                *most, last = [choice for choice in choices if choice is not None]
                raise OptionError(f"{name} must be {', '.join(map(str, most))} or {last}, found {value!r}")
        least = dict.fromkeys(
            ["min_tokens", "logprobs", "thinking_budget", "num_draft_tokens", "quantized_kv_start"], 0
        )
        least |= {"max_tokens": 1, "prefill_step_size": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if name == "num_draft_tokens" and value == "auto":
                continue
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
                raise OptionError(f"{name} must be an integer of at least {minimum}, found {value!r}")
        if self.num_draft_tokens != "auto" and self.num_draft_tokens > LARGEST_DRAFT:
            raise OptionError(f"num_draft_tokens must be at most {LARGEST_DRAFT}, found {self.num_draft_tokens}")
        if self.min_tokens > self.max_tokens:
            raise OptionError(f"min_tokens is {self.min_tokens}, more than the max_tokens of {self.max_tokens}")
        if "" in self.stop_strings:
            raise OptionError("stop holds an empty string")
        if self.thinking_budget is not None and not self.enable_thinking:
            raise OptionError("thinking_budget is given, but enable_thinking is not")
        if self.compiled_grammar() is not None and (self.ignore_eos or self.min_tokens):
            name = "ignore_eos" if self.ignore_eos else "min_tokens"
            raise OptionError(f"{name} contradicts a json_schema, regex or grammar, which says where the answer ends")

    def compiled_grammar(self) -> str | None:
        """What the answer is constrained to, in llguidance's form; None if to nothing."""
        return compile_grammar(json_schema=self.json_schema, regex=self.regex, grammar=self.grammar)

    @property
    def kv_quantization(self) -> KVQuantization | None:
        return (
            None if self.kv_bits is None else KVQuantization(self.kv_bits, self.kv_group_size, self.quantized_kv_start)
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class OptionChanges(TypedDict, total=False):
    """The fields of `GenerationOptions`, as keyword arguments of the methods that generate."""

    max_tokens: int
    sampling: Sampling
    stop: str | Sequence[str]
    ignore_eos: bool
    min_tokens: int
    logits_processors: Sequence[LogitsProcessor]
    logprobs: int | None
    json_schema: str | Mapping[str, Any] | None
    regex: str | None
    grammar: str | None
    enable_thinking: bool
    thinking_budget: int | None
    num_draft_tokens: int | Literal["auto"]
    prefill_step_size: int
    reuse_prompt: bool
    kv_bits: int | None
    kv_group_size: int
    quantized_kv_start: int
