"""Copies: tokens that follow an earlier place of a text at which the text read as it reads at its end.

The idea is that of prompt lookup decoding (Saxena 2023) and of `prompt_lookup_num_tokens` in transformers. Here, the
match is the longest one, and each token of the text tells how often a match of its length was right.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import takewhile

# A match has at least this many tokens. Each pair of tokens has a list of its places.
SHORTEST_MATCH = 2
# A search looks at this many of the latest places of a pair, and compares this many tokens at each.
_MOST_PLACES = 32
_LONGEST_COMPARED = 64
# Matches are counted by their length, in groups that begin at these lengths. The shares are those of a prior: how often
# the token after a match is the copied one. They are below the shares of new source code with a similar file in its
# prompt. A text of edits has larger ones, and shows it by few misses: see CopyStatistics.
_LENGTHS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
_PRIOR = (0.38, 0.48, 0.56, 0.66, 0.70, 0.74, 0.76, 0.78, 0.80, 0.85)
# The weight of the prior of a group in tokens, and the share of the counts that is left after each further token.
_PRIOR_WEIGHT = 8.0
_MEMORY = 0.95
# The same for the misses of all groups together. This weight is a number of misses.
_MISSES_WEIGHT = 1.0
_MISSES_MEMORY = 0.97


class CopyIndex:
    """A text, and the earlier place whose tokens match the end of the text for the longest stretch.

    `match` is the number of matching tokens, or 0 if there are fewer than `SHORTEST_MATCH`. A token that continues the
    match takes constant time. Otherwise, a search takes a time with a constant bound: of the places of the last pair of
    tokens, it compares the latest 32, each for at most 64 tokens, and takes the latest of the longest matches. An index
    of 32,000 tokens takes 3 to 5 MB: the more different pairs, the more.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        # The place after the latest occurrence of each pair of tokens, and for each place the one before it.
        self._latest: dict[tuple[int, int], int] = {}
        self._earlier: list[int] = []
        self._source = 0
        self.match = 0
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens to the end of the text. Only the end of the last one is searched."""
        added = list(tokens)
        for token in added[:-1]:
            self._add(token)
        if len(added) > 1:
            self.match = 0
        for token in added[-1:]:
            self.append(token)

    def append(self, token: int) -> None:
        """Add a token to the end of the text."""
        continues = self.match and self._tokens[self._source] == token
        latest = self._add(token)
        if continues:
            self._source += 1
            self.match += 1
        else:
            self._source, self.match = self._longest(latest)

    def beginning_of(self, tokens: Sequence[int]) -> "CopyIndex":
        """Return an index of the tokens that this text and the beginning of `tokens` share, except the last token.

        This takes less than a fifth of the time of a new index, if little of this text is left out. It has no match
        before tokens are added.
        """
        pairs = zip(self._tokens, tokens[:-1], strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        found = CopyIndex()
        found._tokens, found._earlier = self._tokens[:shared], self._earlier[:shared]
        found._latest = self._latest.copy()
        for place in range(len(self._tokens), max(shared, SHORTEST_MATCH - 1), -1):
            pair = (self._tokens[place - 2], self._tokens[place - 1])
            found._latest[pair] = self._earlier[place - 1]
        return found

    def _add(self, token: int) -> int:
        """Add a token, and return the place after the earlier occurrence of the last pair of tokens, or 0."""
        self._tokens.append(token)
        place = len(self._tokens)
        latest = 0
        if place >= SHORTEST_MATCH:
            pair = (self._tokens[-2], token)
            latest = self._latest.get(pair, 0)
            self._latest[pair] = place
        self._earlier.append(latest)
        return latest

    def copy(self, count: int) -> list[int]:
        """Return the `count` tokens that follow the match, or an empty list without a match.

        If they reach the end of the text, they go on with themselves: the text then repeats with this period.
        """
        if not self.match:
            return []
        found = self._tokens[self._source : self._source + count]
        period = len(found)
        return [found[position % period] for position in range(count)]

    def _longest(self, place: int) -> tuple[int, int]:
        """Return the best place of the last pair of tokens, and its number of matching tokens."""
        best, longest = 0, 0
        for _ in range(_MOST_PLACES):
            if not place:
                break
            length = self._common(place)
            if length > longest:
                best, longest = place, length
            place = self._earlier[place - 1]
        return best, longest

    def _common(self, place: int) -> int:
        """Return how many tokens before a place equal the last tokens, at most 64 and at least the pair."""
        tokens, end = self._tokens, len(self._tokens)
        length = SHORTEST_MATCH
        limit = min(place, _LONGEST_COMPARED)
        while length < limit and tokens[place - 1 - length] == tokens[end - 1 - length]:
            length += 1
        return length


class CopyStatistics:
    """The share of tokens after a match that were the copied ones, by the length of the match.

    A prior stands in for the tokens that a text does not have yet. The misses that it expects are multiplied by a
    factor of this text, at most 1: the misses so far, after matches of any length, over those that the prior expected.
    So a text that repeats long stretches is known after a few short ones.
    """

    def __init__(self) -> None:
        self._right = [0.0] * len(_PRIOR)
        self._trials = [0.0] * len(_PRIOR)
        self._misses = self._expected_misses = _MISSES_WEIGHT

    def add(self, match: int, *, is_right: bool) -> None:
        """Count a token after a match of this length."""
        group = _group(match)
        self._right[group] = self._right[group] * _MEMORY + is_right
        self._trials[group] = self._trials[group] * _MEMORY + 1
        self._misses = _decayed(self._misses) + (not is_right)
        self._expected_misses = _decayed(self._expected_misses) + 1 - _PRIOR[group]

    def share(self, match: int) -> float:
        """Return the expected share of right tokens after a match of this length."""
        group = _group(match)
        factor = min(1.0, self._misses / self._expected_misses)
        prior = 1 - (1 - _PRIOR[group]) * factor
        return (self._right[group] + _PRIOR_WEIGHT * prior) / (self._trials[group] + _PRIOR_WEIGHT)

    def expected_tokens(self, match: int, counts: Sequence[int]) -> list[float]:
        """Return the expected number of tokens of a round that copies, for each of these rising numbers of tokens."""
        expected, reach, tokens = [], 1.0, 1.0
        for count in range(1, counts[-1] + 1):
            reach *= self.share(match + count - 1)
            tokens += reach
            if count in counts:
                expected.append(tokens)
        return expected


def _group(match: int) -> int:
    return bisect_right(_LENGTHS, match) - 1


def _decayed(misses: float) -> float:
    """Return misses with less weight for those of earlier tokens. The weight of the prior does not decay."""
    return _MISSES_WEIGHT + (misses - _MISSES_WEIGHT) * _MISSES_MEMORY
