"""Copies from a text: the longest match, compared with a search of all places, and the shares of right copies."""

import time

import numpy as np
import pytest

from mlx_mtp.decoding.copy_index import SHORTEST_MATCH, CopyIndex, CopyStatistics


def longest(text: list[int]) -> int:
    """Return the length of the longest earlier match of the end of a text, by a search of all places."""
    best = 0
    for place in range(1, len(text)):
        length = 0
        while length < place and text[place - 1 - length] == text[-1 - length]:
            length += 1
        best = max(best, length)
    return best if best >= SHORTEST_MATCH else 0


@pytest.mark.parametrize("seed", range(12))
def test_the_match_is_the_longest(seed: int) -> None:
    """The texts have few places of each pair, so that the search looks at all of them."""
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 6, 40).tolist()
    for _ in range(6):
        start = rng.integers(0, len(text) - 20)
        text += text[start : start + 20] + rng.integers(0, 6, 4).tolist()
    index = CopyIndex()
    for count, token in enumerate(text, start=1):
        index.append(token)
        assert min(index.match, 64) == min(longest(text[:count]), 64)
        if index.match:
            copied = index.copy(3)
            matched = text[:count][-index.match :] + copied[:1]
            assert any(text[i : i + len(matched)] == matched for i in range(count - len(matched) + 1))


def test_tokens_added_at_once_give_the_match_of_the_last_one() -> None:
    text = [1, 2, 3, 4, 5, 1, 2, 3, 9, 1, 2, 3]
    for start in range(len(text)):
        index, one_by_one = CopyIndex(text[:start]), CopyIndex()
        index.extend(text[start:])
        for token in text:
            one_by_one.append(token)
        assert (index.match, index.copy(4)) == (one_by_one.match, one_by_one.copy(4)) == (3, [9, 1, 2, 3])


def test_without_a_match_nothing_is_copied() -> None:
    for text in ([], [1], [1, 2, 3], [1, 2, 3, 2]):
        index = CopyIndex(text)
        assert (index.match, index.copy(5)) == (0, [])


def test_a_copy_that_reaches_the_end_repeats_itself() -> None:
    index = CopyIndex([7, 1, 2, 3, 1, 2, 3])
    assert index.match == 3
    assert index.copy(7) == [1, 2, 3, 1, 2, 3, 1]


def test_a_longer_match_wins_over_a_later_one() -> None:
    index = CopyIndex([1, 2, 3, 4, 8, 3, 4, 9, 1, 2, 3, 4])
    assert (index.match, index.copy(2)) == (4, [8, 3])


def test_the_time_of_a_token_does_not_grow() -> None:
    """Texts with the most places of a pair and the longest matches: each takes seconds if a token costs its length."""
    index = CopyIndex([5] * 1_000_000)
    assert index.match == 64
    index.append(5)
    assert index.match == 65
    began = time.perf_counter()
    period = [1, 2] * 20_000
    for token in period:
        index.append(token)
        index.append(int(token == 1) + 3)
    print(f"{(time.perf_counter() - began) / len(period) / 2 * 1e6:.1f} us a token")


def test_shares_come_from_the_prior_and_then_from_the_text() -> None:
    statistics = CopyStatistics()
    shares = [statistics.share(match) for match in (2, 3, 4, 8, 16, 64, 500)]
    assert shares == sorted(shares)
    assert shares[-1] == shares[-2] < 0.9
    for _ in range(100):
        statistics.add(5, is_right=False)
    assert statistics.share(4) < shares[2] / 3
    assert statistics.share(8) == shares[3]
    for _ in range(100):
        statistics.add(4, is_right=True)
    assert statistics.share(5) > 0.97


def test_a_text_with_few_misses_is_known_after_a_few_tokens() -> None:
    statistics = CopyStatistics()
    long = statistics.share(16)
    for _ in range(12):
        statistics.add(2, is_right=True)
    assert 1 - statistics.share(16) < (1 - long) / 2
    # As many misses as the prior expects leave a text where it was, and more of them do not lower other groups.
    for _ in range(300):
        statistics.add(2, is_right=False)
    assert statistics.share(16) == pytest.approx(long)


def test_expected_tokens() -> None:
    statistics = CopyStatistics()
    one, two = statistics.share(3), statistics.share(4)
    assert statistics.expected_tokens(3, (1, 2)) == pytest.approx([1 + one, 1 + one + one * two])


@pytest.mark.parametrize("seed", range(4))
def test_the_beginning_of_a_text_has_the_index_of_a_new_text(seed: int) -> None:
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 5, 120).tolist()
    index = CopyIndex(text)
    for shared in (0, 1, 2, 3, 60, 119, 120):
        for rest in ([], [9], text[3:40]):
            other = text[:shared] + rest
            begun, fresh = index.beginning_of(other), CopyIndex(other)
            begun.extend(other[len(begun) :])
            for token in [*other[-3:], *text[20:40]]:
                assert (begun.match, begun.copy(5)) == (fresh.match, fresh.copy(5))
                begun.append(token)
                fresh.append(token)
    assert (index.match, index.copy(9)) == (CopyIndex(text).match, CopyIndex(text).copy(9))
