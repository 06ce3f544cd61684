"""The options of one generation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from mlx_mtp.decoding.draft_length import LARGEST_COPY
from mlx_mtp.decoding.rules import LogitsProcessor
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.gemma4.kv_cache import KVQuantization
from mlx_mtp.grammars.compiler import compile_grammar

from .errors import OptionError

DEFAULT_MAX_TOKENS = 256
DEFAULT_PREFILL_STEP = 512
# No target accepts this many draft tokens in a round. A longer draft would only fill the memory with its buffers.
LARGEST_DRAFT = 1024
# The defaults of mlx-lm.
DEFAULT_KV_GROUP_SIZE = 64
DEFAULT_QUANTIZED_KV_START = 5000
KV_BITS = (4, 8)
# The group sizes that MLX has kernels for.
KV_GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class GenerationOptions:
    """The options of one generation. Their values are checked when the object is made.

    `num_draft_tokens` is the number of draft tokens in a round; 0 decodes plainly. "auto", the default, chooses the
    number that gives the most tokens per second. The choice uses the cost of rounds on this machine and the acceptance
    so far. If the cost is not known, the first rounds measure it (see `Model.calibrate`).

    Greedy tokens do not depend on this number. Sampled tokens keep their distribution. With
    `Sampling(acceptance="coupled")`, sampled tokens do not depend on the number either. With block verification, a seed
    gives the same text for the same number. With "auto", it gives the same text on the same machine as long as the
    measurement is kept.

    With `copy_drafts="auto"` and automatic `num_draft_tokens`, a round may copy up to 31 draft tokens from the prompt
    or the answer so far, where its last tokens occurred before and this is the fastest. It needs no drafter. An exact
    model copies at most 7 tokens.

    The text ends before the first of the `stop` strings, even if the string spans several tokens or rounds. With
    `ignore_eos`, the text continues after the model's own stop tokens. Stop tokens cannot occur before `min_tokens`.
    `logits_processors` are called as in mlx-lm: for every row of a verify pass, with the tokens before that row. The
    drafter does not use them. `logprobs` is the number of most likely tokens that are reported with the log probability
    of each token.

    At most one of `json_schema`, `regex` and `grammar` may be given (see `grammars/compiler.py`). The answer is then
    always in that language, and the text stops at the answer's end. If `max_tokens` cuts the answer short, it is the
    beginning of a valid answer.

    With `enable_thinking`, the answer may begin with a thought. For messages, it is also the switch of the chat
    template. `thinking_budget` is the largest number of tokens in a thought. After that number, the thought is closed
    and the answer begins.

    With `reuse_prompt`, the model does not read again the beginning that a prompt shares with an earlier prompt. It
    keeps the prompt's K/V for later prompts (see `Model.prompt_cache`). An exact model reads every prompt, because the
    rounding of sums depends on their order.

    With `kv_bits` (8 or 4), the K/V of full-attention layers are quantized as soon as there are `quantized_kv_start`
    tokens. Each group has `kv_group_size` values: 32, 64 or 128, a divisor of the head size. Quantization may change
    the text, but the statements about `num_draft_tokens` stay true.

    Raises OptionError if a value is out of range, or if options contradict each other.
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
    copy_drafts: Literal["auto", "off"] = "auto"
    prefill_step_size: int = DEFAULT_PREFILL_STEP
    reuse_prompt: bool = True
    kv_bits: int | None = None
    kv_group_size: int = DEFAULT_KV_GROUP_SIZE
    quantized_kv_start: int = DEFAULT_QUANTIZED_KV_START

    def __post_init__(self) -> None:
        for name, choices in (("kv_bits", (None, *KV_BITS)), ("kv_group_size", KV_GROUP_SIZES)):
            value = getattr(self, name)
            # The type must match as well: 8.0 equals 8, but MLX accepts no float.
            if not any(type(value) is type(choice) and value == choice for choice in choices):
                *most, last = [choice for choice in choices if choice is not None]
                raise OptionError(f"{name} must be {', '.join(map(str, most))} or {last}, found {value!r}")
        if self.copy_drafts not in ("auto", "off"):
            raise OptionError(f"copy_drafts must be auto or off, found {self.copy_drafts!r}")
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
        """Return the constraint on the answer in llguidance's form, or None if there is no constraint."""
        return compile_grammar(json_schema=self.json_schema, regex=self.regex, grammar=self.grammar)

    @property
    def longest_draft(self) -> int:
        """The largest number of draft tokens for which the texts of these options make room.

        With one number, the order of K/V rows and the rounding of sums are the same for all draft lengths.
        """
        return LARGEST_COPY if self.num_draft_tokens == "auto" else max(self.num_draft_tokens, LARGEST_COPY)

    @property
    def kv_quantization(self) -> KVQuantization | None:
        """The K/V quantization of these options; None if K/V are not quantized."""
        return (
            None if self.kv_bits is None else KVQuantization(self.kv_bits, self.kv_group_size, self.quantized_kv_start)
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, also if `stop` is a single string."""
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
    copy_drafts: Literal["auto", "off"]
    prefill_step_size: int
    reuse_prompt: bool
    kv_bits: int | None
    kv_group_size: int
    quantized_kv_start: int
