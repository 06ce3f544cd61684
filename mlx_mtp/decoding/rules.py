"""Token choice under the options of one text: at each draft step and at each verified row."""

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_mtp.errors import OptionError
from mlx_mtp.gemma4.drafter import Candidates, Choose, Draft, choose_best
from mlx_mtp.gemma4.target import Target

from .acceptance import Acceptance, accept_block, accept_matching
from .sampling import Penalties, Sampling, gumbel, position_key, uniform
from .state import RoundState

# The signature is that of mlx-lm: (all tokens so far, logits [1, vocab]) -> logits [1, vocab].
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


class TokenRules:
    """The sampling options and penalties of one text, for both drafter and target, and its logits processors.

    Only the target uses the processors.

    All randomness comes from the keys of the state and the position of a token. No random state advances, so the number
    of accepted draft tokens does not matter.

    Raises OptionError if a biased token is not in the vocabulary.
    """

    def __init__(self, target: Target, sampling: Sampling, processors: Sequence[LogitsProcessor] = ()) -> None:
        self.sampling = sampling
        self.processors = processors
        self.penalties = Penalties(sampling, target.config.vocab_size)
        self.target = target

    def drafter_choice(self, state: RoundState, k: int) -> Choose:
        """Return the function that chooses the drafter's token at each of k draft steps.

        The function applies the sampling options and penalties of the target.
        """
        choose = choose_best if self.sampling.is_greedy else self._sampled_choice(state, k)
        if not self.penalties.is_active:
            return choose
        window = state.window[None]

        def choose_penalized(step: int, candidates: Candidates) -> tuple[mx.array, mx.array | None]:
            nonlocal window
            ids, logits = candidates
            choice = choose(step, Candidates(ids, self.penalties(logits, window, ids)))
            token = choice[0] if ids is None else mx.take_along_axis(ids, choice[0], axis=-1)
            window = mx.concatenate([window, token.astype(mx.int32)], axis=1)[:, 1:]
            return choice

        return choose_penalized

    def _sampled_choice(self, state: RoundState, k: int) -> Choose:
        sampling, first = self.sampling, state.kv.offset + 1
        coins = uniform(state.coin_key, first, k)
        if sampling.acceptance == "coupled":
            noise = gumbel(state.draw_key, first, k, self.target.config.vocab_size)
        else:
            keys = mx.random.split(round_keys(state.draw_key, first)[0], k)

        def choose(step: int, candidates: Candidates) -> tuple[mx.array, mx.array | None]:
            drawn_from = sampling.log_probabilities(candidates.logits, coins[step : step + 1])
            if sampling.acceptance == "block":
                return mx.random.categorical(drawn_from, key=keys[step])[:, None], drawn_from
            shared = noise[step] if candidates.ids is None else noise[step][candidates.ids.squeeze(0)]
            return mx.argmax(drawn_from + shared, axis=-1, keepdims=True), None

        return choose

    def copied_draft(self, tokens: list[int]) -> Draft:
        """Return a draft of copied tokens. Their distribution has all of its mass on each token."""
        draft = Draft(mx.array([tokens], mx.int32))
        if self.sampling.is_greedy or self.sampling.acceptance == "coupled":
            return draft
        return Draft(draft.tokens, draft.tokens.T, mx.zeros((len(tokens), 1)))

    def accept(
        self,
        state: RoundState,
        draft: Draft,
        logits: mx.array,
        masks: mx.array | None = None,
        text: mx.array | None = None,
        *,
        ahead: int = 1,
    ) -> Acceptance:
        """Decide which of k draft tokens the target accepts, and which tokens it emits.

        `logits` [k + 1, vocab] are the target's. Row 0 is for position offset + `ahead`. `masks`, bool [k + 1, vocab],
        mark the tokens that a guide allows. `text`, int32 [n], holds all tokens so far. Only logits processors need it.

        Raises OptionError if a processor does not return logits of the same shape.
        """
        first = state.kv.offset + ahead
        logits = self._processed(state, draft.tokens.squeeze(0), logits, text)
        if masks is not None:
            logits = mx.where(masks, logits, -mx.inf)
        if self.sampling.is_greedy:
            return accept_matching(draft.tokens, logits)
        rows, vocab_size = logits.shape
        log_probabilities = self.sampling.log_probabilities(logits, uniform(state.coin_key, first, rows))
        if self.sampling.acceptance == "coupled":
            noise = gumbel(state.draw_key, first, rows, vocab_size)
            return accept_matching(draft.tokens, log_probabilities + noise)
        return accept_block(draft, log_probabilities, round_keys(state.draw_key, first)[1])

    def _processed(self, state: RoundState, drafted: mx.array, logits: mx.array, text: mx.array | None) -> mx.array:
        """Return the target's logits [rows, vocab] after soft cap, suppressed tokens, penalties and processors."""
        if self.sampling.is_greedy and not self.penalties.is_active and not self.processors:
            # The soft cap does not change the order of the logits.
            return self.target.without_suppressed(logits)
        size = self.penalties.context_size
        tokens = mx.concatenate([state.window, drafted])
        windows = mx.stack([tokens[row : row + size] for row in range(logits.shape[0])])
        own = self.target.without_suppressed(self.target.soft_cap(logits))
        penalized = self.penalties(own, windows)
        if not self.processors:
            return penalized
        assert text is not None, "logits processors need the tokens so far"
        return self._call_processors(penalized, mx.concatenate([text, drafted]))

    def _call_processors(self, logits: mx.array, tokens: mx.array) -> mx.array:
        """Pass each row, [1, vocab], through the processors with the tokens that precede it."""
        rows = []
        for index in range(logits.shape[0]):
            row = logits[index : index + 1]
            before = tokens[: tokens.size - logits.shape[0] + 1 + index]
            for processor in self.processors:
                processed = processor(before, row)
                if not isinstance(processed, mx.array) or processed.shape != row.shape:
                    found = list(processed.shape) if isinstance(processed, mx.array) else type(processed).__name__
                    raise OptionError(f"a logits processor must return logits {list(row.shape)}, found {found}")
                row = processed
            rows.append(row)
        return mx.concatenate(rows)


def round_keys(key: mx.array, first: mx.array) -> mx.array:
    """Return the keys for drafting and for accepting in one round, uint32 [2, 2].

    `first` is the first position that the round decides on.
    """
    return mx.random.split(position_key(key, first))
