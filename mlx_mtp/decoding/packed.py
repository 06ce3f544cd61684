"""Rounds of several streams with one verify pass: the weights are read once for all of them.

The rows of all streams stand one after the other in the pass. Projections, feed-forward blocks and the head see all
rows together. Each stream writes its own K/V cache and attends to it alone, and accepts draft tokens by its own rules.
So a text does not depend on its neighbours, up to the rounding of sums over more rows.
"""

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx

from mlx_mtp.gemma4.drafter import Draft, DraftInputs
from mlx_mtp.gemma4.kv_cache import KVState
from mlx_mtp.gemma4.target import TargetOutput

from .compiled import CompiledRounds
from .constraints import RowMasks
from .draft_length import Choice
from .report import RoundReport
from .round import Drafted, needed_drafter, tokens_to_verify
from .stream import Stream


def packed_round(
    streams: Sequence[Stream],
    choices: Sequence[Choice],
    stop_ids: Sequence[frozenset[int]],
    compiled: CompiledRounds | None = None,
) -> list[RoundReport | Exception]:
    """Run one round of each stream, and return their reports. See `Stream.round`.

    After a token of `stop_ids[i]`, stream i must not continue. See `dispatch_packed` for the other parameters, and for
    what raises an exception. An exception of a stream takes the place of its report.
    """
    errors = dispatch_packed(streams, choices, compiled)
    return [error or finish(stream, stops) for stream, error, stops in zip(streams, errors, stop_ids, strict=True)]


def dispatch_packed(
    streams: Sequence[Stream], choices: Sequence[Choice], compiled: CompiledRounds | None = None
) -> list[Exception | None]:
    """Give one round of each stream to the device, in one pass, without waiting for the reports.

    Choice i has the number of draft tokens of stream i, and the tokens if they are copied. All streams have the same
    target, which is not exact. If `compiled` is given, the parts of the pass between its attentions are compiled. A
    round may be dispatched while another one is in flight, if `can_go_ahead` allows it for each stream.

    If the host's part in a stream's round raises an exception, it is returned in the place of the stream. The stream
    must not continue. The other streams have their round. Raises what the pass over all rows raises.
    """
    errors, reports = build_packed(streams, choices, compiled)
    states = [stream.state for stream, error in zip(streams, errors, strict=True) if error is None]
    if reports:
        streams[0].parts.target.async_evaluate(reports, states)
    return errors


def build_packed(
    streams: Sequence[Stream], choices: Sequence[Choice], compiled: CompiledRounds | None = None
) -> tuple[list[Exception | None], list[mx.array]]:
    """Build the graph of a round of each stream, as `dispatch_packed` does. Return the exceptions and the reports.

    Only the host's part is evaluated. The caches of the pass end with this function, because they must not exist when
    the round is evaluated. They would force MLX to copy buffers.
    """
    rounds = [_Round(*each) for each in zip(streams, choices, strict=True)]
    _draft(rounds, compiled)
    reports = _accept([each for each in rounds if each.error is None], compiled)
    return [each.take_error() for each in rounds], reports


def finish(stream: Stream, stop_ids: frozenset[int]) -> RoundReport | Exception:
    """Wait for the report of a stream's first round in flight. Return an exception of the host's part in its place."""
    try:
        return stream.finish(stop_ids)
    except Exception as error:
        return error


class _Round:
    """The round of one stream in a packed pass. After an exception, it takes no further step."""

    def __init__(self, stream: Stream, choice: Choice) -> None:
        self.stream = stream
        self._choice = choice
        self.error: Exception | None = None
        self._masks: RowMasks | None = None
        self._drafted: Drafted | None = None

    def run(self, step: Callable[[], None]) -> None:
        """Take a step, unless a step before it has failed."""
        if self.error is None:
            try:
                step()
            except Exception as error:
                self.error = error

    @property
    def uses_drafter(self) -> bool:
        """Whether the drafter drafts for this round."""
        return bool(self._choice.k) and not self._choice.copied

    def draft(self) -> None:
        """Draft the tokens, or take the copied ones."""
        self._drafted = self.stream.draft(self._choice.k, self._choice.copied or [])

    def prepare(self, inputs: list[DraftInputs]) -> None:
        """Add the inputs of the drafter for this round."""
        given, self._masks = self.stream.draft_inputs(self._choice.k)
        inputs.append(given._replace(allow=None if self._masks is None else self._allow))

    def take(self, draft: Draft) -> None:
        """Take a draft that was made together with those of other streams."""
        self._drafted = self.stream.drafted(draft, self._masks)

    def _allow(self, token: mx.array) -> mx.array | None:
        """Return the mask of the guide after a token. After an exception, there is none: the stream is dropped."""
        found: list[mx.array | None] = [None]
        if self._masks is not None:
            masks = self._masks
            self.run(lambda: found.append(masks(token)))
        return found[-1]

    def accept(self, kv: KVState, output: TargetOutput, reports: list[mx.array]) -> None:
        """Accept draft tokens by the output of the pass, and add the report to `reports`."""
        reports.append(self.stream.accept(self.drafted, kv, output))

    @property
    def drafted(self) -> Drafted:
        """The draft."""
        assert self._drafted is not None
        return self._drafted

    def take_error(self) -> Exception | None:
        """Return the exception, if there was one, and forget it.

        It keeps alive the frames where it was raised, and they this object.
        """
        error, self.error = self.error, None
        return error


def _draft(rounds: Sequence[_Round], compiled: CompiledRounds | None) -> None:
    """Draft the tokens of all rounds. The drafter runs once a step for all that still draft."""
    together = [each for each in rounds if each.uses_drafter]
    if len(together) < 2:
        together = []
    for each in rounds:
        if each not in together:
            each.run(each.draft)
    inputs: list[DraftInputs] = []
    for each in together:
        each.run(partial(each.prepare, inputs))
    together = [each for each in together if each.error is None]
    if not together:
        return
    parts = together[0].stream.parts
    drafter = needed_drafter(parts, inputs[0].k)
    between = None if compiled is None else compiled.between(drafter, len(inputs))
    for each, draft in zip(together, drafter.draft_together(parts.target, inputs, between), strict=True):
        each.run(partial(each.take, draft))


def _accept(rounds: Sequence[_Round], compiled: CompiledRounds | None) -> list[mx.array]:
    """Verify all drafts in one pass, accept draft tokens and replace the states. Return the reports."""
    if not rounds:
        return []
    caches = [each.stream.cache.over(each.stream.state.kv) for each in rounds]
    tokens = [tokens_to_verify(each.stream.state, each.drafted.draft) for each in rounds]
    target = rounds[0].stream.parts.target
    lengths = [each.shape[1] for each in tokens]
    between = None if compiled is None else compiled.between(target, sum(lengths))
    outputs = target.packed(mx.concatenate(tokens, axis=1), caches, lengths, between)
    reports: list[mx.array] = []
    for each, cache, output in zip(rounds, caches, outputs, strict=True):
        each.run(partial(each.accept, cache.kv, output, reports))
    return reports
