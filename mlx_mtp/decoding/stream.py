"""The stream of rounds of one text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx

from mlx_mtp.errors import OptionError
from mlx_mtp.gemma4.drafter import Draft, Drafter, DraftInputs
from mlx_mtp.gemma4.kv_cache import KVQuantization, KVState
from mlx_mtp.gemma4.target import Target, TargetOutput

from .compiled import CompiledRounds
from .constraints import Guide, RowMasks
from .host import Host
from .prefill import Progress, PromptReader
from .prompt_cache import CacheEntry, KVFormat, ReusedPrefix
from .prompt_media import PromptMedia
from .report import RoundReport
from .round import (
    Drafted,
    RoundParts,
    Steps,
    Verified,
    choose_row,
    draft_inputs,
    draft_tokens,
    end_round,
    round_steps,
    token_logprobs,
)
from .rules import LogitsProcessor, TokenRules
from .sampling import Sampling
from .state import RoundState


def check_logprobs(logprobs: int | None, vocab_size: int) -> None:
    """Check the number of log probabilities against the size of the vocabulary.

    Raises OptionError if `logprobs` is larger than the vocabulary.
    """
    if logprobs is not None and logprobs > vocab_size:
        raise OptionError(f"logprobs is {logprobs}, more than the vocabulary of {vocab_size}")


class _InFlight(NamedTuple):
    """A round of k draft tokens that was dispatched, and whose report was not read yet.

    `ahead` tells whether it was dispatched before the report of the round before it. `reads` counts the host reads of
    the dispatch. `copied` tells whether the draft tokens were copied from the text.
    """

    k: int
    verified: Verified
    ahead: bool
    reads: int
    copied: bool


class Stream:
    """One text during decoding: its tokens on the host, its `state` on the device, and its K/V cache.

    After `prefill`, the cache holds exactly the K/V of all tokens except the last one, which is the bonus token. If
    `rounds` is given, rounds without logits processors are compiled. `exact` is for a target that `make_exact` has
    changed. `snapshot_every` is that of `PromptReader`. `media` are the media in the prompt.

    Raises OptionError if the options do not fit the target.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        *,
        max_draft_tokens: int,
        sampling: Sampling | None = None,
        processors: Sequence[LogitsProcessor] = (),
        guide: Guide | None = None,
        logprobs: int | None = None,
        rounds: CompiledRounds | None = None,
        exact: bool = False,
        snapshot_every: int | None = None,
        kv_quantization: KVQuantization | None = None,
        media: PromptMedia | None = None,
    ) -> None:
        check_logprobs(logprobs, target.config.vocab_size)
        sampling = sampling or Sampling()
        rules = TokenRules(target, sampling, processors)
        self.parts = RoundParts(target, drafter, rules, logprobs)
        self.host = Host(guide, has_processors=bool(processors))
        # Logits processors are Python functions that run on the host in each round. Nothing can be compiled.
        self._rounds = None if processors else rounds
        self._key = repr(replace(sampling, seed=0)), logprobs, max_draft_tokens, guide is not None
        self._exact = exact
        self.media = media or PromptMedia()
        self._reader = PromptReader(target, snapshot_every, self.media)
        # One round, or two if the second was dispatched ahead.
        self._in_flight: list[_InFlight] = []
        # This list holds all tokens so far, including the prompt. The last token is the bonus token.
        self.tokens: list[int] = []
        self.cache = target.make_cache(max_draft_tokens + 1, kv_quantization)
        draw_key, coin_key = mx.random.split(mx.random.key(sampling.seed))
        self._state = RoundState(
            bonus=mx.zeros((1, 1), mx.int32),
            hidden=mx.zeros((1, 1, target.config.hidden_size), target.dtype),
            window=mx.full((rules.penalties.context_size,), -1, mx.int32),
            draw_key=draw_key,
            coin_key=coin_key,
            kv=KVState.none(),
        )

    @property
    def state(self) -> RoundState:
        """All arrays of the text. Do not hold another reference to them, because MLX then copies the buffers."""
        return self._state._replace(kv=self.cache.kv)

    @state.setter
    def state(self, state: RoundState) -> None:
        self.cache.kv = state.kv
        self._state = state._replace(kv=KVState.none())

    @property
    def kv_format(self) -> KVFormat:
        """The K/V format of the cache entries that this stream can resume from."""
        return KVFormat(self.cache.max_block, self.cache.quantization)

    def resume(self, reused: ReusedPrefix) -> None:
        """Start with the K/V of an earlier stream. Call this method before all others."""
        self._reader.resume(self.cache, reused)
        self.tokens = reused.entry.tokens[: reused.length]

    def cache_entry(self) -> CacheEntry | None:
        """Return the K/V for later streams, or None if a failure left nothing usable.

        They end before the bonus token, at the last chunk that was read, or, after a failure, at the last snapshot. If
        this stream goes on, its next write copies the buffers.
        """
        return self._reader.cache_entry(self.cache, self.tokens, self.kv_format)

    def prefill(self, prompt: list[int], step_size: int, on_progress: Progress | None = None) -> RoundReport:
        """Read the prompt in chunks of at most `step_size` tokens and choose the first token after it.

        After `resume`, only the rest of the prompt is read. If `on_progress` raises an exception, the prefill stops
        between two chunks.
        """
        return self.choose_first(self.read(prompt, step_size, on_progress))

    def read(self, prompt: list[int], step_size: int, on_progress: Progress | None = None) -> mx.array:
        """Read the prompt and choose nothing. Return the logits after its last token, [1, vocab]."""
        while (logits := self.read_chunk(prompt, step_size, on_progress)) is None:
            pass
        return logits

    def read_chunk(self, prompt: list[int], step_size: int, on_progress: Progress | None = None) -> mx.array | None:
        """Read the next chunk of the prompt. Return the logits after the last token, [1, vocab], or None before."""
        if len(self.tokens) < len(prompt):
            self.tokens = list(prompt)
        last = self._reader.read_chunk(self.cache, prompt, step_size, on_progress)
        if last is None:
            return None
        logits, hidden = last
        self._state = self._state._replace(hidden=hidden)
        return logits

    def choose_first(self, logits: mx.array) -> RoundReport:
        """Choose the first token after the prompt from the logits after its last token, [1, vocab]."""
        window = [-1] * self._state.window.size + self.tokens
        self._state = self._state._replace(window=mx.array(window[len(self.tokens) :], mx.int32))
        masks = self.host.first_mask(self._state.bonus)
        no_draft = draft_tokens(self.parts, self.cache, self.state, 0)
        chosen = self.parts.rules.accept(
            self.state, no_draft, logits, masks, self.host.text(self.tokens), ahead=0
        ).tokens
        self._state = choose_row(self._state, self._state.hidden, chosen, mx.array(0))
        logprobs = token_logprobs(self.parts, logits, chosen)
        self.parts.target.evaluate(self._state.bonus, self._state.window)
        tokens = self.host.wait_for(chosen)
        self._append(tokens)
        return RoundReport(tokens, 0, 0, self.host.logprobs(logprobs, self.parts.logprobs, 1), self.host.reads)

    def round(self, k: int, stop_ids: frozenset[int] = frozenset(), *, copied: list[int] | None = None) -> RoundReport:
        """Draft k tokens, verify them in one pass, and emit the accepted tokens and one more token.

        If `copied` tokens are given, they are the draft tokens (see `dispatch`).

        With k = 0, this is plain decoding. A round has one evaluation and one host read. If log probabilities are
        reported, they are a second read. If the masks of a guide depend on the draft tokens, the guide reads these
        tokens one by one. With mapped per-layer embeddings, the host reads the draft before the target verifies it. A
        stop token ends the round early: no token after it is emitted, and the stream must not continue.

        Raises OptionError if there are draft tokens but no drafter.
        """
        self.dispatch(k, copied)
        return self.finish(stop_ids)

    def dispatch(self, k: int, copied: list[int] | None = None) -> None:
        """Give a round of k draft tokens to the device, without waiting for its report.

        `copied` are tokens of the text to use as draft tokens. The first k of them count, before the first one that the
        guide forbids. If they are absent, the drafter drafts.

        A second round may be dispatched ahead of the report of the first if `can_go_ahead` allows it.

        Raises OptionError if there are draft tokens but no drafter.
        """
        reads = self.host.reads
        with self.parts.target.undisturbed():
            k, is_copied, verified = self._advance(k, copied or [])
            self.parts.target.async_evaluate(verified, self.state)
            self._note_dispatch(k, verified, self.host.reads - reads, copied=is_copied)

    def draft(self, k: int, copied: list[int]) -> Drafted:
        """Make room for a round, and draft its tokens, or take the copied ones that the guide allows.

        Raises OptionError if there are draft tokens but no drafter.
        """
        reads = self.host.reads
        masks = None
        if copied:
            copied, masks = self.host.cut(copied[:k])
            k = len(copied)
        self._reserve(k)
        if copied:
            draft = self.parts.rules.copied_draft(copied)
        else:
            draft, masks = self.host.draft(self.parts, self.cache, self.state, self._steps(k), k)
        return Drafted(draft, masks, copied, self.host.reads - reads)

    def draft_inputs(self, k: int) -> tuple[DraftInputs, RowMasks | None]:
        """Make room for a round whose k tokens are drafted together with those of other streams.

        Return the inputs of the drafter, and the masks of a guide, for `drafted`. The inputs hold K/V views.

        Raises OptionError if there is no drafter.
        """
        self._reserve(k)
        masks = self.host.masks(k)
        return draft_inputs(self.parts, self.cache, self.state, k, masks), masks

    def drafted(self, draft: Draft, masks: RowMasks | None) -> Drafted:
        """Return a draft that was made together with those of other streams."""
        reads = self.host.reads
        rows = None if masks is None else self.host.stack(masks, draft, self.state)
        return Drafted(draft, rows, [], self.host.reads - reads)

    def accept(self, drafted: Drafted, kv: KVState, output: TargetOutput) -> mx.array:
        """Accept draft tokens by the output of a pass over several streams, which has written its rows to `kv`.

        Nothing is evaluated. Return the report of the round. `finish` reads it.
        """
        state = self._state._replace(kv=kv)
        text = self.host.text(self.tokens)
        self.state, verified = end_round(self.parts, state, drafted.draft, output, drafted.masks, text)
        self._note_dispatch(drafted.draft.tokens.shape[1], verified, drafted.reads, copied=bool(drafted.copied))
        return verified.report

    def finish(self, stop_ids: frozenset[int] = frozenset()) -> RoundReport:
        """Wait for the report of the first round in flight, and emit its tokens.

        After a stop token, the stream must not continue, and a round that was dispatched ahead is to be discarded.
        """
        k, verified, ahead, reads, copied = self._in_flight.pop(0)
        self.cache.in_flight -= k + 1
        before = self.host.reads
        # After the last round in flight, the next one finds all its buffers at rest, and writes them in place.
        self.parts.target.evaluate(verified, [] if self._in_flight else self.state)
        emitted = [token for token in self.host.wait_for(verified.report) if token >= 0]
        tokens = up_to_stop(emitted, stop_ids)
        self.cache.length += len(tokens)
        self._append(tokens)
        logprobs = self.host.logprobs(verified.logprobs, self.parts.logprobs, len(tokens))
        return RoundReport(tokens, k, len(emitted) - 1, logprobs, self.host.reads - before + reads, ahead, copied)

    @property
    def in_flight(self) -> list[int]:
        """The numbers of draft tokens of the rounds in flight."""
        return [each.k for each in self._in_flight]

    def discard(self) -> None:
        """Wait for the rounds in flight and forget them. Do not decode after this call.

        Their rows stay behind the last position. The device holds the buffers of a round until its end, so they could
        neither be freed nor written in place before.
        """
        if self._in_flight:
            self.parts.target.evaluate([each.verified for each in self._in_flight], self.state)
        self._in_flight.clear()
        self.cache.in_flight = 0
        self.cache.set_length(self.cache.length)

    def _advance(self, k: int, copied: list[int]) -> tuple[int, bool, Verified]:
        """Run a round and replace the state. Only the host's part is evaluated.

        Return its number of draft tokens, whether they are copied, and its report.
        """
        target = self.parts.target
        if not copied and self.host.guide is None and target.mapped is None:
            self._reserve(k)
            steps = self._steps(k)
            self.state, verified = steps.whole(self.state)
            self._announce(steps, k)
            return k, False, verified
        draft, masks, copied, _ = self.draft(k, copied)
        if copied:
            per_layer_rows = target.read_per_layer_rows([self.tokens[-1], *copied])
        else:
            per_layer_rows = self.host.per_layer_rows(target, self.tokens[-1], draft)
        k = draft.tokens.shape[1]
        steps = self._steps(k)
        self.state, verified = steps.verify(self.state, draft, masks, per_layer_rows)
        self._announce(steps, k)
        return k, bool(copied), verified

    def _announce(self, steps: Steps, k: int) -> None:
        """Announce the pass of a round, unless the target did it itself. The evaluation must follow at once."""
        if steps.is_compiled:
            self.parts.target.announce(self.cache, k + 1)

    def _note_dispatch(self, k: int, verified: Verified, reads: int, *, copied: bool) -> None:
        self._in_flight.append(_InFlight(k, verified, bool(self._in_flight), reads, copied))
        self.cache.in_flight += k + 1

    def _reserve(self, k: int) -> None:
        assert k < self.cache.max_block, "more draft tokens than the stream was made for"
        self.cache.reserve(k + 1)

    def _steps(self, k: int) -> Steps:
        if self._rounds is None:
            return round_steps(self.parts, self.cache, k, self.host.text(self.tokens))
        return self._rounds.steps(self.parts, self.cache, k, self._key)

    def longest_draft(self) -> int:
        """Return the largest number of draft tokens for the next round.

        All rows of a round lie on one side of the position where K/V quantization begins. An exact round sees no more
        K/V rows than a plain round does.
        """
        most = self.cache.longest_pass(self.cache.max_block) - 1
        return min(most, self.cache.rows_for(1) - self.cache.length - 1) if self._exact else most

    def _append(self, tokens: list[int]) -> None:
        self.tokens += tokens
        self.host.note(tokens)


def can_go_ahead(stream: Stream, k: int, following: int) -> bool:
    """Return whether a round of `following` draft tokens can be dispatched ahead of the report of a round of k.

    The host has no part in it. Its shape is the same for every number of draft tokens that are accepted now, so that
    its K/V rows, and with them its bits, are those of a round that waits.
    """
    if stream.host.has_part or stream.parts.target.mapped is not None:
        return False
    return stream.cache.is_uniform(2, k + 1 + following + 1)


def up_to_stop(tokens: list[int], stop_ids: frozenset[int]) -> list[int]:
    """Return the tokens up to the first stop token, or all tokens if there is none."""
    stop = next((index for index, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tokens[: stop + 1]
