"""Decoding of a text that the target is told: the rounds are real, and only the choice of tokens is given."""

import time
from typing import Any

import mlx.core as mx

from mlx_mtp.decoding.acceptance import Acceptance
from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.report import Stats
from mlx_mtp.decoding.rules import TokenRules
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.decoding.state import RoundState
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.decoding.text_loop import decode
from mlx_mtp.gemma4.drafter import Draft
from mlx_mtp.gemma4.target import Target
from mlx_mtp.model import Model
from mlx_mtp.options import GenerationOptions


class KnownText(TokenRules):
    """Greedy rules by which the target always chooses the next token of a known text, with any weights."""

    def __init__(self, target: Target, text: list[int]) -> None:
        super().__init__(target, Sampling())
        self._text = mx.array(text, mx.int32)

    def accept(self, state: RoundState, draft: Draft, logits: mx.array, *others: Any, ahead: int = 1) -> Acceptance:
        """Accept the draft tokens that are the next ones of the text."""
        rows, vocab_size = logits.shape
        tokens = self._text[state.kv.offset + ahead + mx.arange(rows)]
        is_next = tokens[:, None] == mx.arange(vocab_size)
        return super().accept(state, draft, mx.where(is_next, mx.inf, logits), *others, ahead=ahead)


def decode_told(
    model: Model,
    prompt: list[int],
    answer: list[int],
    options: GenerationOptions,
    rounds: CompiledRounds,
) -> tuple[float, Stats]:
    """Decode an answer that the target is told. Return the tokens per second after the first token, and the counts.

    `rounds` belong to this text.
    """
    parts, length = model.parts, options.num_draft_tokens
    stream = Stream(
        parts.target,
        parts.drafter,
        max_draft_tokens=options.longest_draft,
        rounds=rounds,
        exact=model.exact,
        kv_quantization=options.kv_quantization,
    )
    text = prompt + answer
    stream.parts = stream.parts._replace(rules=KnownText(parts.target, text))
    policy = parts.costs.policy(
        None if length == "auto" else length,
        options.sampling,
        options.kv_quantization,
        len(prompt),
        copies=options.copy_drafts == "auto",
    )
    decoded = decode(
        stream,
        prompt,
        max_tokens=len(answer),
        num_draft_tokens=policy,
        stop_ids=frozenset(),
        prefill_step_size=options.prefill_step_size,
    )
    next(decoded)
    began = time.perf_counter()
    stats = Stats()
    for each in decoded:
        stats.add(each.drafted, each.accepted, each.host_reads, ahead=each.ahead, copied=each.copied)
    seconds = time.perf_counter() - began
    assert stream.tokens == text, "another text than the told one"
    return (len(answer) - 1) / seconds, stats
