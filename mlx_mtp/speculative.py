"""The round (draft, verify, accept, advance) and the one decode loop over token ids."""

import threading
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, NamedTuple

import mlx.core as mx

from .acceptance import Acceptance, Draft, accept_block, accept_matching
from .cache import Cache, KVQuantization
from .config import TextConfig
from .draft_length import DraftLength
from .drafter import Candidates, Choose, Drafter, choose_best
from .embeddings import EmbeddingStats, PerLayerRows
from .errors import ContextLengthError, OptionError, PromptError
from .gemma4 import Target
from .guide import Guide, RowMasks
from .prompt_cache import Entry, Kind, Reused, Snapshot
from .sampling import Penalties, Sampling, gumbel, position_key, uniform

# Called during prefill with (tokens done, tokens in all).
Progress = Callable[[int, int], None]
# As in mlx-lm: (all tokens so far, logits [1, vocab]) -> logits [1, vocab].
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]

# What a compiled round was made for, and the round.
Shape = tuple[int, int, int, int, KVQuantization | None, int | None, str, bool]
Function = Callable[["Stream"], "Verified"]
# Bounds a chunk of the prompt by the bytes of a layer's attention scores, and the least rows of one all the same.
_SCORE_BYTES = 1 << 29
_LEAST_CHUNK = 32
# How many compiled rounds each thread keeps.
_COMPILED_ROUNDS = 64


class Logprobs(NamedTuple):
    """Natural log of the target's own probability, before any option, of a token and of the most likely ones."""

    token: float
    top: list[tuple[int, float]]


class Round(NamedTuple):
    """What one round emitted, and how many of its draft tokens the target accepted.

    The last of `tokens` is the target's own choice unless a stop cut the round short. `logprobs`, if asked for, are
    those of the tokens. `host_reads` is how often the round waited for a value.
    """

    tokens: list[int]
    drafted: int
    accepted: int
    logprobs: list[Logprobs] | None
    host_reads: int


class Verified(NamedTuple):
    """A round before it is read: `report` is int32 [k + 2], the number accepted and the tokens to emit; `hidden` the
    target's states at the rows verified, [1, k + 1, hidden_size]."""

    report: mx.array
    hidden: mx.array
    logprobs: mx.array


@dataclass
class Stats:
    """Counts over the rounds of one generation. The token that prefill yields belongs to no round.

    `host_reads` is how often a round waited for a value: once, but for guides, log probabilities and mapped per-layer
    embeddings. `processed_rows` counts the rows a logits processor in Python was called for, which may read from the
    device too. `embeddings`, of mapped ones, counts their rows, those of the prompt included and of other
    streams meanwhile.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    host_reads: int = 0
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    processed_rows: int = 0
    embeddings: EmbeddingStats | None = None

    def add(self, drafted: int, accepted: int, host_reads: int = 1) -> None:
        self.rounds += 1
        self.host_reads += host_reads
        self.drafted += drafted
        self.accepted += accepted
        missing = [0] * (drafted - len(self.drafted_at))
        self.drafted_at += missing
        self.accepted_at += missing
        for position in range(drafted):
            self.drafted_at[position] += 1
            self.accepted_at[position] += position < accepted

    def merge(self, other: "Stats") -> None:
        """Add another generation's counts."""
        self.rounds += other.rounds
        self.host_reads += other.host_reads
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.processed_rows += other.processed_rows
        if other.embeddings is not None:
            self.embeddings = (self.embeddings or EmbeddingStats()).plus(other.embeddings)
        self.drafted_at = _sums(self.drafted_at, other.drafted_at)
        self.accepted_at = _sums(self.accepted_at, other.accepted_at)

    @property
    def acceptance_length(self) -> float | None:
        """Mean number of tokens a round yields: accepted draft tokens plus the target's own. 1.0 is plain decoding.

        None before the first round.
        """
        return (self.accepted + self.rounds) / self.rounds if self.rounds else None

    @property
    def acceptance_by_position(self) -> list[float]:
        """Per draft position, the share of rounds drafting that far in which the token there was accepted."""
        return [a / d for a, d in zip(self.accepted_at, self.drafted_at, strict=True)]


def _sums(left: list[int], right: list[int]) -> list[int]:
    return [a + b for a, b in zip_longest(left, right, fillvalue=0)]


class _Functions(threading.local):
    """Rounds by shape, of this thread alone; None for a shape that came once.

    What `mx.compile` returns must stay on one thread (MLX 0.32.2 to 0.32.4). Each thread that calls it keeps the graph,
    by the address of the Python function, and when the function is gone only one of them forgets it. The others keep
    its weights in memory, and use the graph for the next function that has this address.
    """

    def __init__(self) -> None:
        self.by_shape: dict[Shape, Function | None] = {}


class Rounds:
    """Compiled rounds, shared by the streams of one target and drafter, whose weights must stay as they are.

    A round is compiled by its shape: the number of draft tokens, the K/V rows it looks at, whether they are quantized,
    and the options that make it. `traces` has the shape of every trace there was. With Python processors nothing is
    compiled, for they take part in the round on the host. A shape is compiled when it comes a second time or, if
    `always`, the first. Where the host reads the draft in between, for the rows of mapped per-layer embeddings or for a
    guide, drafting and verifying are compiled apart; under a guide, verifying alone.
    """

    def __init__(self, *, always: bool = False) -> None:
        self.always = always
        self.traces: list[Shape] = []
        self._functions = _Functions()

    def run(self, stream: "Stream", k: int) -> Verified:
        cache, options = stream.cache, repr(replace(stream.sampling, seed=0))
        # From where on does not matter once they are.
        kv = cache.quantization._replace(start=0) if cache.quantization and cache.is_quantized else None
        is_guided = stream.guide is not None
        shape = (k, cache.visible, cache.capacity, cache.max_block, kv, stream.logprobs, options, is_guided)
        functions = self._functions.by_shape
        is_new = shape not in functions and not self.always
        function = functions.pop(shape, None)
        if is_new:
            # It may be the last: near the end of a text, fewer tokens are drafted.
            verified = stream._advance(k)
        else:
            function = function or self._compile(stream, k, shape)
            verified = function(stream)
        functions[shape] = function
        if len(functions) > _COMPILED_ROUNDS:
            functions.pop(next(iter(functions)))
        return verified

    def _compile(self, stream: "Stream", k: int, shape: Shape) -> Function:
        blank, traces, is_guided = stream._copy_without_arrays(), self.traces, stream.guide is not None
        is_apart = is_guided or stream.target.mapped is not None

        def traced_stream(arrays: list[mx.array]) -> Stream:
            traced = blank._copy_without_arrays()
            traced._set_arrays(arrays)
            return traced

        def trace_draft(arrays: list[mx.array]) -> Draft:
            return traced_stream(arrays)._draft(k)[0]

        def trace(
            arrays: list[mx.array], draft: Any = (), masks: mx.array | None = None, rows: PerLayerRows | None = None
        ) -> tuple[Verified, list[mx.array]]:
            traces.append(shape)
            traced = traced_stream(arrays)
            verified = traced._verify(Draft(*draft), masks, rows) if is_apart else traced._advance(k)
            return verified, traced._take_arrays()

        compiled, compiled_draft = mx.compile(trace), mx.compile(trace_draft)

        def run(stream: Stream) -> Verified:
            apart: list[Any] = []
            if is_apart:
                draft, masks = Draft(mx.zeros((1, 0), mx.int32)), None
                if is_guided:
                    draft, masks = stream._draft(k)
                elif k:
                    # Only read there, so that the stream keeps its arrays.
                    draft = Draft(*compiled_draft(stream._arrays()))
                apart = [tuple(draft), masks, stream._read_rows(draft)]
            (report, hidden, logprobs), arrays = compiled(stream._take_arrays(), *apart)
            stream._set_arrays(arrays)
            return Verified(report, hidden, logprobs)

        return run


def check_logprobs(logprobs: int | None, vocab_size: int) -> None:
    """Raises OptionError for more than there are tokens."""
    if logprobs is not None and logprobs > vocab_size:
        raise OptionError(f"logprobs is {logprobs}, more than the vocabulary of {vocab_size}")


class Stream:
    """The state of one sequence: K/V cache, bonus token (emitted, not yet in the cache) and the hidden state behind it.

    After `prefill`, the cache always holds exactly the prompt and the emitted tokens but the last, which is the bonus
    token. With `rounds`, rounds are compiled. `exact` is for a target that went through `make_exact`. While the prompt
    is read, the sliding layers' rings are kept every `snapshot_every` tokens and at its end, for other prompts that
    begin alike; not at all if None.
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
        rounds: Rounds | None = None,
        exact: bool = False,
        snapshot_every: int | None = None,
        kv_quantization: KVQuantization | None = None,
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.processors = processors
        self.guide = guide
        self.rounds = rounds
        self.exact = exact
        check_logprobs(logprobs, target.config.vocab_size)
        self.logprobs = logprobs
        self.host_reads = 0
        # Those in the cache and, in the end, the bonus token.
        self.tokens: list[int] = []
        self.snapshot_every = snapshot_every
        self.snapshots: list[Snapshot] = []
        # While a chunk of the prompt is read, the rings hold neither what was nor what will be.
        self._is_reading = False
        # All tokens so far, for the processors; kept only if there are any.
        self._text = mx.zeros(0, mx.int32)
        self.sampling = sampling or Sampling()
        # All randomness comes from these and a position: nothing to advance, whatever is accepted.
        self._draw_key, self._coin_key = mx.random.split(mx.random.key(self.sampling.seed))
        self.cache = Cache(target.config, target.dtype, max_block=max_draft_tokens + 1, quantization=kv_quantization)
        self._penalties = Penalties(self.sampling, target.config.vocab_size)
        # The tokens the next one is penalized for, the bonus token last; -1 where the text is shorter.
        self._context = mx.full((self._penalties.context_size,), -1, mx.int32)
        self._bonus = mx.zeros((1, 1), mx.int32)
        # The same, known on the host.
        self._last = 0
        self._hidden = mx.zeros((1, 1, target.config.hidden_size), target.dtype)

    @property
    def kind(self) -> Kind:
        """Of the K/V this stream can go on from."""
        return Kind(self.cache.max_block, self.cache.quantization)

    def resume(self, reused: Reused) -> None:
        """Begin with what an earlier stream read; to be called before anything else."""
        entry, snapshot, length = reused
        self.cache.restore(entry.full, snapshot.rings, length)
        self.tokens = entry.tokens[:length]
        self.snapshots = [earlier for earlier in entry.snapshots if earlier.position <= length]

    def entry(self) -> Entry | None:
        """All that was read, for streams to come; this one must not go on. None if a failure left nothing usable."""
        live = self.cache.buffers("sliding_attention")
        length = self.cache.length
        snapshots = [s for s in self.snapshots if s.position < length]
        if not self._is_reading and live:
            snapshots.append(Snapshot(length, live))
        full = self.cache.buffers("full_attention")
        if not full or not snapshots:
            return None
        length = snapshots[-1].position
        return Entry(self.kind, self.tokens[:length], full, snapshots)

    def prefill(self, prompt: list[int], step_size: int, on_progress: Progress | None = None) -> Round:
        """Read the prompt in chunks of `step_size` tokens; the target's choice after it is the first token.

        After `resume`, only what is not read yet. What `on_progress` raises ends it between two chunks.
        """
        if self.processors:
            self._text = mx.array(prompt, mx.int32)
        self._remember(mx.array(prompt[-self._context.size :], mx.int32))
        return self._first(self.read(prompt, step_size, on_progress))

    def read(self, prompt: list[int], step_size: int, on_progress: Progress | None = None) -> mx.array:
        """The same without a choice: the logits after the prompt, [1, vocab]."""
        self.tokens = list(prompt)
        while (start := self.cache.length) < len(prompt):
            rows = self.cache.rows_for(step_size)
            size = chunk_size(self.target.config, rows, self.target.dtype.size, step_size)
            chunk = prompt[start : start + self.cache.longest_pass(size)]
            self._is_reading = True
            end = start + len(chunk)
            if end == len(prompt):
                logits = self._read_last(chunk)
            else:
                embedded = self.target.read_rows(chunk)
                self.target(mx.array([chunk], mx.int32), self.cache, hidden_rows=0, per_layer_rows=embedded)
                mx.eval(self.cache.arrays())
            self.cache.set_length(end)
            self._is_reading = False
            every = self.snapshot_every
            if every is not None and (end == len(prompt) or end // every > start // every):
                self.snapshots.append(Snapshot(end, self.cache.buffers("sliding_attention")))
            if on_progress is not None:
                on_progress(end, len(prompt))
        return logits

    def _read_last(self, chunk: list[int]) -> mx.array:
        """Read the last tokens of the prompt: the logits after them, [1, vocab]."""
        rows = self.target.read_rows(chunk)
        output = self.target(mx.array([chunk], mx.int32), self.cache, 1, hidden_rows=1, per_layer_rows=rows)
        self._hidden = output.hidden
        mx.eval(self._hidden, output.logits, self.cache.arrays())
        return output.logits[0]

    def _first(self, logits: mx.array) -> Round:
        """The target's choice after the prompt."""
        draft, masks = self._draft(0)
        self._bonus = self._accept(draft, masks, logits, 0).tokens[None]
        self._remember(self._bonus[0])
        logprobs = self._logprobs(logits, self._bonus[0])
        mx.eval(self._bonus, self._context)
        token = self._read(self._bonus[0])
        self._append(token)
        return Round(token, 0, 0, self._read_logprobs(logprobs, 1), self.host_reads)

    def round(self, k: int, stop_ids: frozenset[int] = frozenset()) -> Round:
        """Draft k tokens, verify them in one pass, emit those accepted and one more. k = 0 is plain decoding.

        One evaluation, one host read; under a guide, draft tokens are read one by one where its masks depend on them,
        and where per-layer embeddings are mapped, the draft is read before it is verified.
        A stop token ends the round early: nothing after it is emitted or kept.
        """
        assert k < self.cache.max_block, "more draft tokens than the stream was made for"
        length, context, reads = self.cache.length, self._context, self.host_reads
        self.cache.reserve(k + 1)
        compiles = self.rounds is not None and not self.processors
        verified = self.rounds.run(self, k) if self.rounds is not None and compiles else self._advance(k)
        mx.eval(verified, self._bonus, self._hidden, self._context, self.cache.arrays())
        count, *tokens = self._read(verified.report)
        tokens = tokens[: count + 1]
        self.cache.length = length + count + 1
        stop = next((i for i, token in enumerate(tokens) if token in stop_ids), count)
        if stop < count:
            tokens = tokens[: stop + 1]
            self._context = context
            self._select(verified.hidden, verified.report[1:], mx.array(stop))
            self.cache.set_length(length + stop + 1)
        self._append(tokens)
        logprobs = self._read_logprobs(verified.logprobs, len(tokens))
        return Round(tokens, k, count, logprobs, self.host_reads - reads)

    def longest_draft(self) -> int:
        """Most tokens that the next round can draft: its rows lie on one side of where K/V quantization begins, and an
        exact one looks at no more K/V rows than a plain one would."""
        most = self.cache.longest_pass(self.cache.max_block) - 1
        return min(most, self.cache.rows_for(1) - self.cache.length - 1) if self.exact else most

    def _advance(self, k: int) -> Verified:
        """The round as a function of the stream's arrays, which it replaces: nothing is evaluated."""
        draft, masks = self._draft(k)
        return self._verify(draft, masks, self._read_rows(draft))

    def _read_rows(self, draft: Draft) -> PerLayerRows | None:
        """What the verify pass needs of mapped per-layer embeddings: the draft's tokens must be known for that."""
        if self.target.mapped is None:
            return None
        drafted: list[int] = []
        if draft.tokens.size:
            # All of it: what is left would hold the K/V buffers, which could then not be updated in place.
            mx.eval(*(part for part in draft if part is not None))
            drafted = self._read(draft.tokens[0])
        return self.target.read_rows([self._last, *drafted])

    def _verify(self, draft: Draft, masks: mx.array | None, rows: PerLayerRows | None) -> Verified:
        """The rest of the round, from a draft and its per-layer rows, which are None unless they are mapped."""
        tokens = mx.concatenate([self._bonus, draft.tokens], axis=1) if draft.tokens.size else self._bonus
        output = self.target(tokens, self.cache, tokens.shape[1], per_layer_rows=rows)
        accepted, choices = self._accept(draft, masks, output.logits[0], 1)
        self._select(output.hidden, choices, accepted)
        self.cache.offset = self.cache.offset + accepted + 1
        report = mx.concatenate([accepted[None], choices])
        return Verified(report, output.hidden, self._logprobs(output.logits[0], choices))

    def _arrays(self) -> list[mx.array]:
        """Every array of the state."""
        return [self._bonus, self._hidden, self._context, self._draw_key, self._coin_key, *self.cache.arrays()]

    def _take_arrays(self) -> list[mx.array]:
        """The same; the stream is then without K/V buffers."""
        arrays = self._arrays()
        self.cache.take_arrays()
        return arrays

    def _set_arrays(self, arrays: list[mx.array]) -> None:
        self._bonus, self._hidden, self._context, self._draw_key, self._coin_key, *rest = arrays
        self.cache.set_arrays(rest)

    def _copy_without_arrays(self) -> "Stream":
        """What a compiled round is traced with: it must hold neither buffers nor the rounds that hold it."""
        copied = copy(self)
        copied.rounds = copied.guide = None
        copied.cache = copy(self.cache)
        copied.cache.take_arrays()
        return copied

    def _draft(self, k: int) -> tuple[Draft, mx.array | None]:
        """k draft tokens, and which tokens the guide allows at each row to verify, bool [k + 1, vocab], None for all.

        In a function of its own: a K/V view still referenced at evaluation would force a copy of the whole buffer.
        """
        masks = None if self.guide is None else RowMasks(self.guide, k + 1)
        draft, last = Draft(mx.zeros((1, 0), mx.int32)), self._bonus
        if k:
            if self.drafter is None:
                raise OptionError(f"{k} draft tokens asked for without a drafter")
            context = self.drafter.context(self.cache)
            draft = self.drafter.draft(self.target, self._bonus, self._hidden, context, k, self._choose(k), masks)
            last = draft.tokens[:, -1:]
        if masks is None:
            return draft, None
        masks(last)
        self.host_reads += masks.host_reads
        return draft, masks.stack()

    def _choose(self, k: int) -> Choose:
        """How the drafter draws in this round: under the same options as the target will."""
        choose = self._choose_sampled(k) if not self.sampling.is_greedy else choose_best
        if not self._penalties.is_active:
            return choose
        context = self._context[None]

        def choose_penalized(step: int, candidates: Candidates) -> tuple[mx.array, mx.array | None]:
            nonlocal context
            ids, logits = candidates
            choice = choose(step, Candidates(ids, self._penalties(logits, context, ids)))
            token = choice[0] if ids is None else mx.take_along_axis(ids, choice[0], axis=-1)
            context = mx.concatenate([context, token.astype(mx.int32)], axis=1)[:, 1:]
            return choice

        return choose_penalized

    def _choose_sampled(self, k: int) -> Choose:
        sampling, first = self.sampling, self.cache.offset + 1
        coins = uniform(self._coin_key, first, k)
        if sampling.acceptance == "coupled":
            noise = gumbel(self._draw_key, first, k, self.target.config.vocab_size)
        else:
            keys = mx.random.split(_round_keys(self._draw_key, first)[0], k)

        def choose(step: int, candidates: Candidates) -> tuple[mx.array, mx.array | None]:
            drawn_from = sampling.log_probabilities(candidates.logits, coins[step : step + 1])
            if sampling.acceptance == "block":
                return mx.random.categorical(drawn_from, key=keys[step])[:, None], drawn_from
            shared = noise[step] if candidates.ids is None else noise[step][candidates.ids[0]]
            return mx.argmax(drawn_from + shared, axis=-1, keepdims=True), None

        return choose

    def _accept(self, draft: Draft, masks: mx.array | None, logits: mx.array, ahead: int) -> Acceptance:
        """Decide on a draft by the target's logits [k + 1, vocab], whose first row is for position offset + `ahead`."""
        sampling, first = self.sampling, self.cache.offset + ahead
        rows, vocab_size = logits.shape
        if self._penalties.is_active or self.processors or not sampling.is_greedy:
            size = self._penalties.context_size
            text = mx.concatenate([self._context, draft.tokens[0]])
            contexts = mx.stack([text[row : row + size] for row in range(rows)])
            own = self.target.without_suppressed(self.target.soft_cap(logits))
            logits = self._process(self._penalties(own, contexts), draft.tokens[0])
        else:
            logits = self.target.without_suppressed(logits)
        if masks is not None:
            logits = mx.where(masks, logits, -mx.inf)
        if sampling.is_greedy:
            return accept_matching(draft.tokens, logits)
        coins = uniform(self._coin_key, first, rows)
        log_probabilities = sampling.log_probabilities(logits, coins)
        if sampling.acceptance == "coupled":
            noise = gumbel(self._draw_key, first, rows, vocab_size)
            return accept_matching(draft.tokens, log_probabilities + noise)
        return accept_block(draft, log_probabilities, _round_keys(self._draw_key, first)[1])

    def _process(self, logits: mx.array, drafted: mx.array) -> mx.array:
        """Pass each row, [vocab], through the processors with the tokens that precede it."""
        if not self.processors:
            return logits
        text = mx.concatenate([self._text, drafted])
        rows = []
        for index in range(logits.shape[0]):
            row, before = logits[index : index + 1], text[: self._text.size + index]
            for processor in self.processors:
                processed = processor(before, row)
                if not isinstance(processed, mx.array) or processed.shape != row.shape:
                    found = list(processed.shape) if isinstance(processed, mx.array) else type(processed).__name__
                    raise OptionError(f"a logits processor must return logits {list(row.shape)}, found {found}")
                row = processed
            rows.append(row)
        return mx.concatenate(rows)

    def _append(self, tokens: list[int]) -> None:
        """Take note of tokens emitted; the next round, the processors and the guide do, too."""
        self.tokens += tokens
        self._last = tokens[-1]
        if self.processors:
            self._text = mx.concatenate([self._text, mx.array(tokens, mx.int32)])
        if self.guide is not None:
            for token in tokens:
                self.guide.consume(token)

    def _logprobs(self, logits: mx.array, tokens: mx.array) -> mx.array:
        """Per row the token's log probability, then the ids and the log probabilities of the most likely: float32."""
        if self.logprobs is None:
            return mx.zeros(0)
        capped = self.target.without_suppressed(self.target.soft_cap(logits)).astype(mx.float32)
        values = capped - mx.logsumexp(capped, axis=-1, keepdims=True)
        # Stable order: the most likely first, equal ones by id.
        top = mx.argsort(-values, axis=-1)[:, : self.logprobs]
        own = mx.take_along_axis(values, tokens[:, None], axis=-1)
        # Ids are exact in float32 up to 2**24, more than any vocabulary.
        return mx.concatenate([own, top.astype(mx.float32), mx.take_along_axis(values, top, axis=-1)], axis=-1)

    def _read_logprobs(self, report: mx.array, count: int) -> list[Logprobs] | None:
        if self.logprobs is None:
            return None
        rows: list[list[float]] = self._read(report[:count])
        n = self.logprobs
        return [
            Logprobs(row[0], [(int(i), p) for i, p in zip(row[1 : n + 1], row[n + 1 :], strict=True)]) for row in rows
        ]

    def _read(self, report: mx.array) -> list[Any]:
        """The one place where values reach the host, but for the draft tokens that a guide looks at."""
        self.host_reads += 1
        values: list[Any] = report.tolist()  # type: ignore[assignment]
        return values

    def _select(self, hidden: mx.array, choices: mx.array, row: mx.array) -> None:
        """Make the target's choice at one verified row the bonus token."""
        self._bonus = choices[row].reshape(1, 1)
        self._hidden = mx.take(hidden, row[None], axis=1)
        if self._context.size:
            self._context = mx.slice(
                mx.concatenate([self._context, choices]), row[None] + 1, axes=(0,), slice_size=self._context.shape
            )

    def _remember(self, tokens: mx.array) -> None:
        """Append tokens to the context of penalties."""
        size = self._context.size
        self._context = mx.concatenate([self._context, tokens])[tokens.size :][:size]


def chunk_size(config: TextConfig, rows: int, itemsize: int, step_size: int) -> int:
    """Tokens of a prompt to read at once where `rows` rows of K/V are looked at: at most so many that their attention
    scores, which MLX keeps whole where it has no kernel for a head size, stay below a bound."""
    most = _SCORE_BYTES // (config.num_attention_heads * rows * itemsize)
    return min(step_size, max(_LEAST_CHUNK, most))


def _round_keys(key: mx.array, first: mx.array) -> mx.array:
    """Keys for drafting and for accepting in the round that decides on position `first`."""
    return mx.random.split(position_key(key, first))


def token_budget(prompt: list[int], max_tokens: int, max_context: int) -> int:
    """Most tokens that may follow a prompt: `max_tokens`, or what is left of the context.

    Raises PromptError for an empty prompt, ContextLengthError for one that leaves no room.
    """
    if not prompt:
        raise PromptError("the prompt is empty: expected at least one token")
    if len(prompt) >= max_context:
        raise ContextLengthError(
            f"the prompt has {len(prompt)} tokens, but the context holds {max_context} with the answer"
        )
    return min(max_tokens, max_context - len(prompt))


def decode(
    stream: Stream,
    prompt: list[int],
    *,
    max_tokens: int,
    num_draft_tokens: int | DraftLength,
    stop_ids: frozenset[int],
    prefill_step_size: int,
    on_prefill: Progress | None = None,
) -> Iterator[Round]:
    """Decode from a prompt of token ids; `num_draft_tokens` are drafted in a round, or as many as a policy says.

    The first item is what prefill yields (drafted = accepted = 0).

    Ends after a stop token, which is emitted, or after `max_tokens` (see `token_budget`).
    """
    first = stream.prefill(prompt, prefill_step_size, on_prefill)
    yield first
    last, left = first.tokens[-1], max_tokens - 1
    while left and last not in stop_ids:
        # A round yields up to k + 1 tokens: never draft more than may still be emitted.
        k = num_draft_tokens if isinstance(num_draft_tokens, int) else num_draft_tokens.k
        result = stream.round(min(k, left - 1, stream.longest_draft()), stop_ids)
        if isinstance(num_draft_tokens, DraftLength):
            num_draft_tokens.update(result.drafted, result.accepted)
        yield result
        last, left = result.tokens[-1], left - len(result.tokens)
