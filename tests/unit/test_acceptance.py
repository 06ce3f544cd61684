"""Acceptance against tables made by hand."""

import mlx.core as mx
import pytest

from mlx_mtp.decoding.acceptance import accept_matching


@pytest.mark.parametrize(
    ("drafted", "choices", "emitted"),
    [
        ([3, 1, 2], [3, 1, 2, 0], [3, 1, 2, 0]),
        ([3, 1, 2], [3, 1, 0, 2], [3, 1, 0]),
        ([3, 1, 2], [3, 0, 2, 1], [3, 0]),
        ([3, 1, 2], [0, 1, 2, 3], [0]),
        ([3], [3, 3], [3, 3]),
        ([3], [1, 3], [1]),
        ([], [2], [2]),
    ],
)
def test_emits_the_matching_prefix_and_one_more(drafted: list[int], choices: list[int], emitted: list[int]) -> None:
    logits = (mx.arange(4)[None] == mx.array(choices)[:, None]).astype(mx.float32)
    result = accept_matching(mx.array([drafted], mx.int32), logits)
    accepted = int(result.accepted)
    assert accepted == len(emitted) - 1
    assert result.tokens[: accepted + 1].tolist() == emitted
