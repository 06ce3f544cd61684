"""The leader's announcements, without followers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from support.tiny import load_target

from mlx_mtp.group.leader import Leader
from mlx_mtp.group.membership import Group


class _Recorder:
    """A group that keeps the messages to its followers."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def tell(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    def give_back(self) -> None:
        """Do nothing: no other model is loaded."""


def test_followers_free_what_the_leader_has_freed(tiny_pair: Callable[[str], Path]) -> None:
    target, _ = load_target(tiny_pair("31b") / "target")
    recorder = _Recorder()
    leader = Leader(cast(Group, recorder), target)
    cache, other = (leader.make_cache(target, 4, None) for _ in range(2))
    kept = cache.buffers("full_attention")
    assert [message["kind"] for message in recorder.messages] == ["cache", "cache", "keep"]
    del cache, kept
    leader.announce([other], [3])
    *_, freed, announced = recorder.messages
    assert freed["kind"] == "free"
    assert sorted(freed["numbers"]) == [recorder.messages[0]["number"], recorder.messages[2]["number"]]
    assert announced["caches"] == [(recorder.messages[1]["number"], 0, 0)]
    leader.announce([other], [1])
    assert [message["kind"] for message in recorder.messages].count("free") == 1
