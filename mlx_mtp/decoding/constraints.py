"""What the next token may be: a grammar over the answer, and a limit on the thought before it.

Both are followed on the host, token by token, by drafter and target alike, so that a constrained text is drafted as
well as any other. Grammars are llguidance's, which needs no more than NumPy, compiles a schema in about a millisecond
and rolls rejected tokens back in less than a microsecond.
"""

import json
from collections.abc import Iterable, Mapping
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mtp.errors import DraftError, OptionError

if TYPE_CHECKING:
    from llguidance import LLMatcher

# One bit per token of the vocabulary, set where the token is allowed, in words of 32 bits, lowest first.
Mask = npt.NDArray[np.int32]

_NOTHING_LEFT = "the other options exclude every token that the grammar allows"
# What may stand between the tokens of JSON: without a bound, a model that loops on blanks never ends.
JSON_WHITESPACE = r" |\n{1,2}[ \t]{0,40}"


class Channel(NamedTuple):
    """The tokens around a thought: `start`, `header` tokens that name the channel, the thought, `end`."""

    start: int
    header: int
    end: int


def compile_grammar(
    *, json_schema: str | Mapping[str, Any] | None = None, regex: str | None = None, grammar: str | None = None
) -> str | None:
    """The one of these that is given, in llguidance's own form; None if none is.

    `json_schema` is a JSON Schema, as text or as what it parses to; `regex` is in the syntax of Rust's regex crate and
    must match the whole answer; `grammar` is in llguidance's variant of Lark or in llama.cpp's GBNF.

    Raises OptionError if more than one is given, if it is invalid or asks for what llguidance cannot do, and if
    llguidance is not installed.
    """
    given = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if not names:
        return None
    if len(names) > 1:
        raise OptionError(f"only one of json_schema, regex and grammar can be given, found {' and '.join(names)}")
    matcher = _matcher_class(names[0])
    from llguidance.gbnf_to_lark import any_to_lark

    if json_schema is not None:
        source = matcher.grammar_from_json_schema(
            _read_schema(json_schema), defaults={"whitespace_pattern": JSON_WHITESPACE}
        )
    elif regex is not None:
        source = matcher.grammar_from_regex(regex)
    else:
        assert grammar is not None
        try:
            source = matcher.grammar_from_lark(any_to_lark(grammar))
        except Exception as error:  # The converter raises Exception itself.
            raise OptionError(f"grammar is neither Lark, with a rule start, nor GBNF: {error}") from None
    problem = _problem(source)
    if problem is not None:
        raise OptionError(f"{names[0]} cannot be followed: {problem}")
    return source


def schema_problem(schema: bool | Mapping[str, Any]) -> str | None:
    """Why no grammar follows a JSON Schema in full; None if one does. Raises OptionError without llguidance."""
    return _problem(_matcher_class("json_schema").grammar_from_json_schema(json.dumps(schema)))


def lark_problem(grammar: str) -> str | None:
    """Why a grammar in llguidance's variant of Lark cannot be followed; None if it can. Raises OptionError without
    llguidance."""
    return _problem(_matcher_class("grammar").grammar_from_lark(grammar))


def _matcher_class(option: str) -> "type[LLMatcher]":
    """Raises OptionError, which says which option needs llguidance, if it is not installed."""
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise OptionError(f"{option} needs llguidance: pip install 'mlx-mtp[grammar]'") from None
    return LLMatcher


def _problem(source: str) -> str | None:
    """Why a grammar in llguidance's own form cannot be followed."""
    failed, messages = _matcher_class("grammar").validate_grammar_with_warnings(source)
    if not failed:
        # Special tokens are looked up later, in the model's tokenizer.
        messages = [message for message in messages if not message.startswith("no tokenizer - can't validate <")]
    # A warning tells of a part that would not be followed, which is refused too.
    return _reason(messages[0]) if failed or messages else None


def _read_schema(schema: str | Mapping[str, Any]) -> str:
    try:
        content = json.loads(schema) if isinstance(schema, str) else schema
        if isinstance(content, bool | Mapping):
            return json.dumps(content)
    except (ValueError, TypeError, RecursionError) as error:
        raise OptionError(f"json_schema is not JSON: {error}") from None
    raise OptionError(f"json_schema must be a JSON object, found {type(content).__name__}")


def _reason(message: str) -> str:
    """One line of llguidance's report, which shows the place in the source below the first line."""
    lines = message.strip().splitlines()
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])


class _Phase(Enum):
    START = auto()
    THOUGHT = auto()
    ANSWER = auto()
    ENDED = auto()


class _State(NamedTuple):
    phase: _Phase
    # Tokens since the channel's start, and tokens the matcher has consumed.
    thought: int = 0
    matched: int = 0


class Guide:
    """Follows one text and says which tokens may come next.

    The answer follows `matcher`'s grammar, if there is one, up to a stop token. Before it, if `channel` is given, there
    may be one thought, of at most `thought_budget` tokens after the channel's name; then the channel is closed.
    `thought` is the number of tokens since the channel was opened, for a prompt that ends inside it. Masks leave
    `suppressed` tokens out.
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
        # A state for the text so far and for each of its beginnings, to go back to.
        self._states = [_State(_Phase.START) if thought is None else _State(_Phase.THOUGHT, thought)]

    def mask(self) -> Mask | None:
        """The tokens that may come next; None if all may.

        Raises OptionError if the grammar cannot go on: it is then too complex, can never end, or allows suppressed
        tokens alone.
        """
        mask = self._followed()
        if mask is None:
            return None
        mask = mask & self._unsuppressed
        if not mask.any():
            raise OptionError(_NOTHING_LEFT)
        return mask

    def _followed(self) -> Mask | None:
        """The tokens by which the text can go on, suppressed ones among them; None for all."""
        state = self._states[-1]
        if state.phase is _Phase.THOUGHT:
            assert self._channel is not None
            if self._limit is not None and state.thought >= self._limit:
                return self._only([self._channel.end])
            # Without a second channel inside, masks stay the same when this one is closed.
            return ~self._only([self._channel.start, *(self._stop_ids if self._matcher is not None else ())])
        if state.phase is _Phase.ENDED:
            return None
        may_think = state.phase is _Phase.START and self._channel is not None
        if self._matcher is not None:
            mask = self._match(self._matcher)
            return mask | self._only([self._channel.start]) if may_think and self._channel else mask
        return None if may_think or self._channel is None else ~self._only([self._channel.start])

    def fixed_masks(self, rows: int) -> list[Mask | None] | None:
        """The masks of the next tokens, if they are the same whatever those tokens are; None if they are not."""
        state = self._states[-1]
        if self._matcher is not None or state.phase is _Phase.START:
            return None
        if state.phase is _Phase.THOUGHT and self._limit is not None and state.thought + rows > self._limit:
            return None
        return [self.mask()] * rows

    def consume(self, token: int) -> None:
        """Go on by one token. Raises OptionError if the grammar does not allow it."""
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
                # The matcher is not told of stop tokens: some it counts when rolling back, some it does not.
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
            raise OptionError(f"the grammar allows no token here: {_reason(matcher.get_error() or 'a dead end')}")
        mask: Mask = masks[0]
        return mask

    def _only(self, tokens: Iterable[int]) -> Mask:
        mask = np.zeros((self.vocab_size + 31) // 32, np.uint32)
        for token in tokens:
            mask[token // 32] |= np.uint32(1 << token % 32)
        return mask.view(np.int32)


class RowMasks:
    """The masks of the rows of one round, for each row that is asked for in turn."""

    def __init__(self, guide: Guide, rows: int) -> None:
        self._guide = guide
        self._count = rows
        self._fixed = guide.fixed_masks(rows)
        self._rows: list[mx.array | None] = []
        self.host_reads = 0

    def __call__(self, token: mx.array) -> mx.array | None:
        """Which tokens may follow this one, int32 [1, 1], at the next row: bool [1, vocab], None if all may.

        At the first row the guide has seen the token. Later ones are read from the device, unless no mask depends on
        them.
        """
        index = len(self._rows)
        if self._fixed is None:
            if index:
                self.host_reads += 1
                self._guide.consume(int(token.item()))  # type: ignore[arg-type]
            mask = self._guide.mask()
        else:
            # `stack` refuses rows beyond those of the round.
            mask = self._fixed[index] if index < self._count else None
        self._rows.append(None if mask is None else _unpack(mask, self._guide.vocab_size))
        return self._rows[-1]

    def stack(self) -> mx.array | None:
        """All rows, bool [rows, vocab], None if none is masked. The guide is where it was before the first again.

        Raises DraftError if the drafter did not ask for each row: the masks would stand at other rows than theirs.
        """
        if self._fixed is None:
            self._guide.rollback(len(self._rows) - 1)
        if len(self._rows) != self._count:
            # The last row is asked for by the round itself.
            raise DraftError(
                "a drafter under a guide must ask for the mask of each draft token: "
                f"expected {self._count - 1}, found {len(self._rows) - 1}"
            )
        if all(row is None for row in self._rows):
            return None
        free = mx.ones((1, self._guide.vocab_size), mx.bool_)
        return mx.concatenate([free if row is None else row for row in self._rows])


def _unpack(mask: Mask, vocab_size: int) -> mx.array:
    bits = (mx.array(mask.view(np.uint32))[:, None] >> mx.arange(32, dtype=mx.uint32)) & 1
    return bits.reshape(1, -1)[:, :vocab_size].astype(mx.bool_)
