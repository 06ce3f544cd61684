"""Constraints on the next token: a grammar for the answer, and a token limit for the thought before it.

The host follows both, token by token, for both drafter and target. The drafter therefore works for a constrained text
as well as for any other text. llguidance provides the grammars. It needs only NumPy, compiles a schema in about a
millisecond, and rolls rejected tokens back in less than a microsecond.
"""

from collections.abc import Iterable
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mtp.errors import DraftError, OptionError

if TYPE_CHECKING:
    from llguidance import LLMatcher

# A mask has one bit per token of the vocabulary, in words of 32 bits, lowest bit first. The bit is set if the token is
# allowed.
Mask = npt.NDArray[np.int32]

_NOTHING_LEFT = "the other options exclude every token that the grammar allows"


class Channel(NamedTuple):
    """The tokens around a thought: `start`, `header` tokens that name the channel, the thought, and `end`."""

    start: int
    header: int
    end: int


def error_reason(message: str) -> str:
    """Return the line of a report of llguidance that states the error.

    The report shows the place in the source below its first line.
    """
    lines = message.strip().splitlines()
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])


class _Phase(Enum):
    START = auto()
    THOUGHT = auto()
    ANSWER = auto()
    ENDED = auto()


class _State(NamedTuple):
    phase: _Phase
    # `thought` counts the tokens since the channel's start. `matched` counts the tokens that the matcher has consumed.
    thought: int = 0
    matched: int = 0


class Guide:
    """A guide that follows one text and determines which tokens may come next.

    The answer follows the grammar of `matcher`, if there is one, up to a stop token. If `channel` is given, one thought
    may come before the answer. The thought has at most `thought_budget` tokens after the channel's name. Then the
    channel is closed. If a prompt ends inside the channel, `thought` is the number of tokens since the channel was
    opened. Masks exclude `suppressed` tokens.
    """

    def __init__(
        self,
        vocab_size: int,
        stop_ids: Iterable[int],
        *,
        matcher: "LLMatcher | None" = None,
        channel: Channel | None = None,
        thought_budget: int | None = None,
        thought: int | None = None,
        suppressed: Iterable[int] = (),
    ) -> None:
        self.vocab_size = vocab_size
        self._stop_ids = frozenset(stop_ids)
        self._matcher = matcher
        self._channel = channel
        self._limit = None if channel is None or thought_budget is None else channel.header + thought_budget
        self._unsuppressed = ~self._only(suppressed)
        # This list holds the state at the start and after each token, so that `rollback` can return to it.
        self._states = [_State(_Phase.START) if thought is None else _State(_Phase.THOUGHT, thought)]

    def mask(self) -> Mask | None:
        """Return the mask of the tokens that may come next, or None if all tokens may.

        Raises OptionError if the grammar cannot continue. It is then too complex, can never end, or allows only
        suppressed tokens.
        """
        mask = self._followed()
        if mask is None:
            return None
        mask = mask & self._unsuppressed
        if not mask.any():
            raise OptionError(_NOTHING_LEFT)
        return mask

    def _followed(self) -> Mask | None:
        """Return the mask of the tokens with which the text can continue, including suppressed tokens.

        The mask is None if all tokens are allowed.
        """
        state = self._states[-1]
        if state.phase is _Phase.THOUGHT:
            assert self._channel is not None
            if self._limit is not None and state.thought >= self._limit:
                return self._only([self._channel.end])
            # A second channel cannot open inside this channel, so the masks stay the same when this channel closes.
            return ~self._only([self._channel.start, *(self._stop_ids if self._matcher is not None else ())])
        if state.phase is _Phase.ENDED:
            return None
        may_think = state.phase is _Phase.START and self._channel is not None
        if self._matcher is not None:
            mask = self._match(self._matcher)
            return mask | self._only([self._channel.start]) if may_think and self._channel else mask
        return None if may_think or self._channel is None else ~self._only([self._channel.start])

    def fixed_masks(self, rows: int) -> list[Mask | None] | None:
        """Return the masks of the next `rows` tokens if they do not depend on these tokens.

        Otherwise, the result is None.
        """
        state = self._states[-1]
        if self._matcher is not None or state.phase is _Phase.START:
            return None
        if state.phase is _Phase.THOUGHT and self._limit is not None and state.thought + rows > self._limit:
            return None
        return [self.mask()] * rows

    def masks_along(self, tokens: Iterable[int]) -> list[Mask | None]:
        """Return the mask of the next token, and the mask after each of these tokens before one that is not allowed.

        The guide stays where it is.

        Raises OptionError if the grammar cannot continue after one of the tokens.
        """
        masks = [self.mask()]
        for token in tokens:
            mask = masks[-1]
            if mask is not None and not mask[token // 32] >> token % 32 & 1:
                break
            self.consume(token)
            masks.append(self.mask())
        self.rollback(len(masks) - 1)
        return masks

    def consume(self, token: int) -> None:
        """Advance by one token.

        Raises OptionError if the grammar does not allow the token.
        """
        state = self._states[-1]
        if state.phase is _Phase.THOUGHT:
            assert self._channel is not None
            state = state._replace(thought=state.thought + 1)
            if token == self._channel.end:
                state = state._replace(phase=_Phase.ANSWER)
            elif token in self._stop_ids:
                state = state._replace(phase=_Phase.ENDED)
        elif state.phase is _Phase.START and self._channel is not None and token == self._channel.start:
            state = state._replace(phase=_Phase.THOUGHT)
        elif state.phase is not _Phase.ENDED:
            is_stop = token in self._stop_ids
            if self._matcher is not None:
                # The matcher never consumes stop tokens: its rollback counts some of them, but not all.
                if not (self._matcher.is_accepting() if is_stop else self._matcher.consume_token(token)):
                    raise OptionError(_NOTHING_LEFT)
                state = state._replace(matched=state.matched + (not is_stop))
            state = state._replace(phase=_Phase.ENDED if is_stop else _Phase.ANSWER)
        self._states.append(state)

    def rollback(self, count: int) -> None:
        """Forget the last `count` tokens."""
        kept = len(self._states) - count
        if self._matcher is not None:
            self._matcher.rollback(self._states[-1].matched - self._states[kept - 1].matched)
        del self._states[kept:]

    def _match(self, matcher: "LLMatcher") -> Mask:
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        masks = allocate_token_bitmask(1, self.vocab_size)
        fill_next_token_bitmask(matcher, masks)
        if matcher.is_error() or not masks.any():
            raise OptionError(f"the grammar allows no token here: {error_reason(matcher.get_error() or 'a dead end')}")
        mask: Mask = masks[0]
        return mask

    def _only(self, tokens: Iterable[int]) -> Mask:
        mask = np.zeros((self.vocab_size + 31) // 32, np.uint32)
        for token in tokens:
            mask[token // 32] |= np.uint32(1 << token % 32)
        return mask.view(np.int32)


class RowMasks:
    """The masks of the rows of one round, requested row by row."""

    def __init__(self, guide: Guide, rows: int) -> None:
        self._guide = guide
        self._count = rows
        self._fixed = guide.fixed_masks(rows)
        self._rows: list[mx.array | None] = []
        self.host_reads = 0

    def __call__(self, token: mx.array) -> mx.array | None:
        """Return the mask of the next row, which comes after `token`, int32 [1, 1].

        The mask is bool [1, vocab], or None if all tokens are allowed. At the first row, the guide has already consumed
        the token. Later tokens are read from the device, unless no mask depends on them.
        """
        index = len(self._rows)
        if self._fixed is None:
            if index:
                self.host_reads += 1
                self._guide.consume(int(token.item()))  # type: ignore[arg-type]
            mask = self._guide.mask()
        else:
            # `stack` raises an error for rows beyond the end of the round.
            mask = self._fixed[index] if index < self._count else None
        self._rows.append(None if mask is None else unpack(mask, self._guide.vocab_size))
        return self._rows[-1]

    def stack(self) -> mx.array | None:
        """Return the masks of all rows, bool [rows, vocab], or None if no row has a mask.

        The guide returns to its state before the first row.

        Raises DraftError if the drafter did not request the mask of each row. The masks would then apply to wrong rows.
        """
        if self._fixed is None:
            self._guide.rollback(len(self._rows) - 1)
        if len(self._rows) != self._count:
            # The round itself requests the mask of the last row.
            raise DraftError(
                "a drafter under a guide must ask for the mask of each draft token: "
                f"expected {self._count - 1}, found {len(self._rows) - 1}"
            )
        return stack_masks(self._rows, self._guide.vocab_size)


def stack_masks(rows: list[mx.array | None], vocab_size: int) -> mx.array | None:
    """Return the masks of rows, bool [1, vocab], as bool [rows, vocab], or None if no row has a mask."""
    if all(row is None for row in rows):
        return None
    free = mx.ones((1, vocab_size), mx.bool_)
    return mx.concatenate([free if row is None else row for row in rows])


def unpack(mask: Mask, vocab_size: int) -> mx.array:
    """Return a mask as bool [1, vocab]."""
    bits = (mx.array(mask.view(np.uint32))[:, None] >> mx.arange(32, dtype=mx.uint32)) & 1
    return bits.reshape(1, -1)[:, :vocab_size].astype(mx.bool_)
