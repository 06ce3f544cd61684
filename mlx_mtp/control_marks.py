"""Control tokens of Gemma 4 that a model writes where they mean nothing: they never reach the content of an answer."""

import re

from .tool_calls import CALL_END, CALL_START, STRING_MARK, beginning_at_end

_CHANNEL_END = "<channel|>"
# How a thought begins whose first token, `<|channel>`, the model left out.
_THOUGHT = "thought\n"
_ROLES = ("model", "user", "system", "tool")
_MARKS = (
    *(f"<|turn>{role}{end}" for role in _ROLES for end in ("\n", "")),
    *("<|turn>", "<turn|>", f"<|channel>{_THOUGHT}", "<|channel>", _CHANNEL_END, "<|think|>"),
    *(CALL_START, CALL_END, "<|tool_response>", "<tool_response|>", "<|tool>", "<tool|>", STRING_MARK),
)
_ANY_MARK = re.compile("|".join(map(re.escape, sorted(_MARKS, key=len, reverse=True))))


class ControlMarks:
    """Takes the marks of control tokens out of a text that comes in pieces cut anywhere.

    A mark of a string becomes a quotation mark, every other one nothing. Text before a lone `<channel|>` that begins
    like a thought is one.
    """

    def __init__(self) -> None:
        self._held = ""
        # Whether all of the text so far is held, as it may be a thought without its first mark.
        self._may_be_thought = True

    def add(self, text: str, *, is_last: bool = False) -> tuple[str, str]:
        """The content and the thought that this text makes known. After the last text nothing is held back."""
        self._held += text
        thought = self._take_thought(is_last) if self._may_be_thought else ""
        if self._may_be_thought:
            return "", ""
        held = 0 if is_last else max(beginning_at_end(self._held, mark) for mark in _MARKS)
        ready, self._held = self._held[: len(self._held) - held], self._held[len(self._held) - held :]
        return _ANY_MARK.sub(lambda mark: '"' if mark[0] == STRING_MARK else "", ready), thought

    def _take_thought(self, is_last: bool) -> str:
        """The thought at the beginning, once its end is there. All stays held while there may be one."""
        begins = self._held.startswith(_THOUGHT) or _THOUGHT.startswith(self._held)
        end = self._held.find(_CHANNEL_END)
        self._may_be_thought = begins and end < 0 and not is_last
        if not self._held.startswith(_THOUGHT) or end < 0:
            return ""
        thought = self._held[len(_THOUGHT) : end]
        self._held = self._held[end + len(_CHANNEL_END) :]
        return thought
