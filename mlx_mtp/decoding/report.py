"""The reports of a round and of a generation to the host."""

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

from mlx_mtp.gemma4.disk_table import EmbeddingStats

# Reports write this value for the log probability of a token with probability zero. JSON has no infinity.
LOWEST_LOGPROB = -9999.0


class Logprobs(NamedTuple):
    """Natural log probabilities of a token and of the most likely tokens.

    They come from the target itself, before any option.
    """

    token: float
    top: list[tuple[int, float]]


class RoundReport(NamedTuple):
    """The result of one round: the emitted tokens, and the numbers of drafted and accepted tokens.

    The last of `tokens` is the target's own choice, unless a stop token cut the round short. `logprobs` has one item
    per token. It is None if log probabilities were not requested. `host_reads` counts how often the round waited for
    the device. `ahead` tells whether the round was dispatched before the report of the round before it. `copied` tells
    whether the draft tokens were copied from the text.
    """

    tokens: list[int]
    drafted: int
    accepted: int
    logprobs: list[Logprobs] | None
    host_reads: int
    ahead: bool = False
    copied: bool = False


class Copied(NamedTuple):
    """Counts of the rounds whose draft tokens were copied from the text.

    They include the rounds that measure the costs of copies. Their tokens are made up.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    def plus(self, rounds: int, drafted: int, accepted: int) -> "Copied":
        """Return these counts and more."""
        return Copied(self.rounds + rounds, self.drafted + drafted, self.accepted + accepted)


@dataclass
class Stats:
    """Counts over the rounds of one generation.

    `drafted` and `accepted` count the draft tokens of the drafter and the copied ones, and `copied` only the latter.
    The counts by position are those of the drafter.

    The token that prefill yields belongs to no round. `host_reads` counts how often a round waited for the device. A
    round waits once, but more often with guides, log probabilities and mapped per-layer embeddings. `processed_rows`
    counts the rows for which a Python logits processor was called. A processor may read from the device too.
    `rounds_ahead` counts the rounds that were dispatched before the report of the round before them.
    `embeddings` counts the rows of mapped per-layer embeddings. It includes the rows of the prompt, and the rows that
    other streams read in the meantime.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    host_reads: int = 0
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    processed_rows: int = 0
    embeddings: EmbeddingStats | None = None
    copied: Copied = field(default_factory=Copied)
    # The device decides it. The same text has other counts in another run.
    rounds_ahead: int = field(default=0, compare=False)

    def add(
        self, drafted: int, accepted: int, host_reads: int = 1, *, ahead: bool = False, copied: bool = False
    ) -> None:
        """Add the counts of one round."""
        self.rounds += 1
        self.rounds_ahead += ahead
        self.host_reads += host_reads
        self.drafted += drafted
        self.accepted += accepted
        if copied:
            self.copied = self.copied.plus(1, drafted, accepted)
            return
        missing = [0] * (drafted - len(self.drafted_at))
        self.drafted_at += missing
        self.accepted_at += missing
        for position in range(drafted):
            self.drafted_at[position] += 1
            self.accepted_at[position] += position < accepted

    def merge(self, other: "Stats") -> None:
        """Add the counts of another generation."""
        self.rounds += other.rounds
        self.rounds_ahead += other.rounds_ahead
        self.host_reads += other.host_reads
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.processed_rows += other.processed_rows
        self.copied = self.copied.plus(*other.copied)
        if other.embeddings is not None:
            self.embeddings = (self.embeddings or EmbeddingStats()).plus(other.embeddings)
        self.drafted_at = _sums(self.drafted_at, other.drafted_at)
        self.accepted_at = _sums(self.accepted_at, other.accepted_at)

    @property
    def acceptance_length(self) -> float | None:
        """Mean number of tokens per round: the accepted draft tokens plus the target's own token.

        The value is 1.0 for plain decoding, and None before the first round.
        """
        return (self.accepted + self.rounds) / self.rounds if self.rounds else None

    @property
    def acceptance_by_position(self) -> list[float]:
        """Acceptance rate at each draft position.

        The rate is the share of accepted tokens over the rounds that drafted that far.
        """
        return [a / d for a, d in zip(self.accepted_at, self.drafted_at, strict=True)]


def _sums(first: list[int], second: list[int]) -> list[int]:
    return [a + b for a, b in zip_longest(first, second, fillvalue=0)]
