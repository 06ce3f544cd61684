"""Count accepted draft tokens per round when sampling, by acceptance rule: block verification and two simpler rules.

    python scripts/measure.py rules

All rules keep the target's distribution. They differ in the number of draft tokens that they accept. Each rule decodes
the same prompts, beginnings of source files of Python's standard library, with the same seeds. The texts of the rules
soon differ, which adds noise. The last line of the output compares the first two rules without this noise: it gives
their expected number of accepted tokens on equal drafts.
"""

import argparse
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

import mlx_mtp
from mlx_mtp.decoding.acceptance import Acceptance, accept_matching
from mlx_mtp.decoding.report import Stats
from mlx_mtp.decoding.rules import TokenRules, round_keys
from mlx_mtp.decoding.sampling import Sampling, uniform
from mlx_mtp.decoding.state import RoundState
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.gemma4.drafter import Choose, Draft, choose_best
from mlx_mtp.gemma4.target import Target

from .pairs import add_generation, add_pair, decode_to_length, load_pair, mean_and_error, stdlib_prompts


class TokenByToken(TokenRules):
    """Rejection sampling (Leviathan et al. 2022, Chen et al. 2023) of each draft token alone, by u < p / q."""

    def accept(self, state: RoundState, draft: Draft, logits: mx.array, *others: Any, ahead: int = 1) -> Acceptance:
        k = draft.tokens.shape[1]
        if k == 0:
            return super().accept(state, draft, logits, *others, ahead=ahead)
        assert draft.log_probabilities is not None
        p, q = mx.exp(target_log_probabilities(self, state, logits, ahead)), mx.exp(draft.log_probabilities)
        if draft.ids is not None:
            q = mx.put_along_axis(mx.zeros((k, p.shape[-1])), draft.ids, q, axis=-1)
        p_of, q_of = (mx.take_along_axis(x[:k], draft.tokens.T, axis=-1)[:, 0] for x in (p, q))
        uniform_key, next_key = mx.random.split(round_keys(state.draw_key, state.kv.offset + ahead)[1])
        passes = mx.random.uniform(shape=(k,), key=uniform_key) < p_of / q_of
        accepted = mx.cumprod(passes.astype(mx.int32)).sum()
        residual = mx.maximum(p[accepted] - q[mx.minimum(accepted, k - 1)], 0)
        residual = mx.where((accepted < k) & (residual.sum() > 0), residual, p[accepted])
        following = mx.random.categorical(mx.log(residual), key=next_key).astype(mx.int32)
        tokens = mx.concatenate([draft.tokens[0], mx.zeros(1, mx.int32)])
        return Acceptance(accepted, mx.where(mx.arange(k + 1) == accepted, following, tokens))


class Block(TokenRules):
    """Block verification that also records the expected number of accepted tokens of two rules.

    `expected` has a pair for each draft of k tokens: block verification, then rejection sampling token by token.
    """

    def __init__(self, target: Target, sampling: Sampling, k: int) -> None:
        super().__init__(target, sampling)
        self.k = k
        self.expected: list[tuple[float, float]] = []

    def accept(self, state: RoundState, draft: Draft, logits: mx.array, *others: Any, ahead: int = 1) -> Acceptance:
        if draft.log_probabilities is not None and draft.tokens.shape[1] == self.k:
            target = target_log_probabilities(self, state, logits, ahead)
            p, q = np.exp(np.array(target)), np.exp(draft.log_probabilities)
            ids = np.arange(p.shape[-1])[None] if draft.ids is None else np.array(draft.ids)
            dense = np.zeros_like(p[:-1])
            np.put_along_axis(dense, ids, q, axis=-1)
            self.expected.append(expected_accepted(p, dense, np.array(draft.tokens[0])))
        return super().accept(state, draft, logits, *others, ahead=ahead)


def expected_accepted(p: np.ndarray, q: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """Return the expected number of accepted tokens of a draft: by block verification, and token by token."""
    k = len(tokens)
    ratios = (p[:k] / np.maximum(q, 1e-30))[range(k), tokens]
    passes, weight = [], 1.0
    for i, ratio in enumerate(ratios):
        weight = min(weight * ratio, 1.0)
        surplus = np.maximum(weight * p[i + 1] - q[i + 1], 0).sum() if i + 1 < k else weight
        room = surplus + 1 - weight if i + 1 < k else 1.0
        passes.append(surplus / room if room > 0 else 0.0)
    block = sum(1 - np.prod(1 - np.array(passes[i:])) for i in range(k))
    return float(block), float(np.cumprod(np.minimum(ratios, 1)).sum())


class SampleAndCompare(TokenRules):
    """Rule that drafts the most likely tokens, and accepts a token if the target draws an equal token."""

    def drafter_choice(self, state: RoundState, k: int) -> Choose:
        return choose_best

    def accept(self, state: RoundState, draft: Draft, logits: mx.array, *others: Any, ahead: int = 1) -> Acceptance:
        noise = mx.random.gumbel(logits.shape, key=round_keys(state.draw_key, state.kv.offset + ahead)[1])
        return accept_matching(draft.tokens, target_log_probabilities(self, state, logits, ahead) + noise)


RULES: dict[str, type[TokenRules]] = {
    "block verification": Block,
    "token by token": TokenByToken,
    "sample and compare": SampleAndCompare,
}


class Result(NamedTuple):
    """Figures of one rule, with one value per generation.

    `accepted` is the number of accepted draft tokens per round. `first` is the share of rounds that accept the first
    draft token. Only block verification fills `expected`, with one pair per round.
    """

    accepted: list[float]
    first: list[float]
    expected: list[tuple[float, float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pair(parser)
    add_generation(parser, max_tokens=100, prompt_tokens=250, prompts=8)
    parser.add_argument("--seeds", type=int, default=3, help="Seeds per prompt (%(default)s).")
    parser.add_argument("--temperature", type=float, default=1.0, help="Sampling temperature (%(default)s).")
    parser.add_argument("--top-k", type=int, default=64, help="Keep this many tokens (%(default)s).")
    parser.add_argument("--top-p", type=float, default=0.95, help="Keep this much probability (%(default)s).")


def run(args: argparse.Namespace) -> None:
    model = load_pair(args)
    prompts = stdlib_prompts(model, args)
    samplings = [
        Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=seed)
        for seed in range(args.seeds)
    ]
    results = {
        name: measure(model, rule, prompts, samplings, args.num_draft_tokens, args.max_tokens)
        for name, rule in RULES.items()
    }
    print_table(results, args.num_draft_tokens)


def measure(
    model: mlx_mtp.Model,
    rule: type[TokenRules],
    prompts: list[list[int]],
    samplings: list[Sampling],
    k: int,
    max_tokens: int,
) -> Result:
    result = Result([], [], [])
    for prompt in prompts:
        for sampling in samplings:
            stream = Stream(model.target, model.drafter, max_draft_tokens=k, sampling=sampling)
            rules = Block(model.target, sampling, k) if rule is Block else rule(model.target, sampling)
            stream.parts = stream.parts._replace(rules=rules)
            stats = generate(stream, prompt, k, min(max_tokens, model.max_context - len(prompt)))
            if isinstance(rules, Block):
                result.expected.extend(rules.expected)
            result.accepted.append(stats.accepted / stats.rounds)
            result.first.append(stats.acceptance_by_position[0])
    return result


def generate(stream: Stream, prompt: list[int], k: int, max_tokens: int) -> Stats:
    """Return the statistics of one generation, over its rounds of k draft tokens. Stop tokens do not end it."""
    stats = Stats()
    for result in decode_to_length(stream, prompt, max_tokens, k):
        if result.drafted == k:
            stats.add(result.drafted, result.accepted)
    return stats


def target_log_probabilities(rules: TokenRules, state: RoundState, logits: mx.array, ahead: int) -> mx.array:
    coins = uniform(state.coin_key, state.kv.offset + ahead, logits.shape[0])
    return rules.sampling.log_probabilities(rules.target.soft_cap(logits), coins)


def print_table(results: dict[str, Result], k: int) -> None:
    block = results["block verification"]
    print(f"accepted draft tokens per round of {k}, mean and standard error over {len(block.accepted)} generations")
    print(f"{'rule':<20} {'accepted':>16} {'first accepted':>16}")
    for rule, result in results.items():
        print(f"{rule:<20} {mean_and_error(result.accepted, 3):>16} {np.mean(result.first):>15.1%}")
    ours, theirs = np.array(block.expected).T
    gain = mean_and_error(ours - theirs, 3)
    print(f"on the same {len(ours)} drafts: block {ours.mean():.3f}, token by token {theirs.mean():.3f}, gain {gain}")
