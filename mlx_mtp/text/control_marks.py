"""Removal of Gemma 4's control tokens where they mean nothing. They never reach the content of an answer."""

import re

from .call_syntax import CALL_END, CALL_START, STRING_MARK, beginning_at_end

_CHANNEL_END = "<channel|>"
# A thought begins with this text if the model omits its first token, `<|channel>`.
_THOUGHT = "thought\n"
_ROLES = ("model", "user", "system", "tool")
_CALL_MARKS = (CALL_START, CALL_END, STRING_MARK)
_MARKS = (
    *(f"<|turn>{role}{end}" for role in _ROLES for end in ("\n", "")),
    *("<|turn>", "<turn|>", f"<|channel>{_THOUGHT}", "<|channel>", _CHANNEL_END, "<|think|>"),
    *("<|tool_response>", "<tool_response|>", "<|tool>", "<tool|>"),
    *_CALL_MARKS,
)
_ANY_MARK = re.compile("|".join(map(re.escape, sorted(_MARKS, key=len, reverse=True))))


class ControlMarks:
    """Filter that removes the marks of control tokens from text that arrives in pieces, cut anywhere.

    With `has_tools`, the filter also removes the marks of calls, because the remaining marks belong to no call. It
    replaces a string mark with a quotation mark and deletes every other mark. Without tools, a complete call is text,
    and a lone end mark of a call is deleted. Text before a lone `<channel|>` is a thought if it begins like a thought.
    """

    def __init__(self, *, has_tools: bool) -> None:
        self._has_tools = has_tools
        self._held = ""
        self._in_call = False
        # True while all text so far is held, because it may be a thought without its first mark.
        self._may_be_thought = True

    def add(self, text: str, *, is_last: bool = False) -> tuple[str, str]:
        """Add text, and return the content and the thought that become certain.

        After the last text, nothing is held back.
        """
        self._held += text
        thought = self._take_thought(is_last) if self._may_be_thought else ""
        if self._may_be_thought:
            return "", ""
        held = 0 if is_last else beginning_at_end(self._held, *_MARKS)
        ready, self._held = self._held[: len(self._held) - held], self._held[len(self._held) - held :]
        return _ANY_MARK.sub(self._replacement, ready), thought

    def _replacement(self, mark: re.Match[str]) -> str:
        if self._has_tools or mark[0] not in _CALL_MARKS:
            return '"' if mark[0] == STRING_MARK else ""
        is_lone = mark[0] == CALL_END and not self._in_call
        self._in_call = (self._in_call or mark[0] == CALL_START) and mark[0] != CALL_END
        return "" if is_lone else mark[0]

    def _take_thought(self, is_last: bool) -> str:
        """Take the thought at the start of the text when its end is there.

        All text stays held while it may be a thought.
        """
        begins = self._held.startswith(_THOUGHT) or _THOUGHT.startswith(self._held)
        end = self._held.find(_CHANNEL_END)
        self._may_be_thought = begins and end < 0 and not is_last
        if not self._held.startswith(_THOUGHT) or end < 0:
            return ""
        thought = self._held[len(_THOUGHT) : end]
        self._held = self._held[end + len(_CHANNEL_END) :]
        return thought
