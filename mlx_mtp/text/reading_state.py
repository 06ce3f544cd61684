"""State of a reading of tool call arguments: the place in the text, what is open there, and the JSON so far."""

from collections.abc import Iterator
from typing import NamedTuple

from .argument_schema import ANYTHING, ArgumentSchema


class Frame(NamedTuple):
    """Open object or list: its closing bracket, its schema, its parent, and the names that are given so far."""

    closer: str
    schema: ArgumentSchema
    parent: "Frame | None"
    given: frozenset[str] = frozenset()
    is_empty: bool = True

    @property
    def is_list(self) -> bool:
        """True for a list, false for an object or a call in parentheses."""
        return self.closer == "]"

    @property
    def missing(self) -> int:
        """Number of required properties that are not given."""
        return 0 if self.is_list else len(self.schema.required - self.given)

    @property
    def is_in_list(self) -> bool:
        """True for a list, and for everything within a list."""
        outer: Frame | None = self
        while outer is not None and not outer.is_list:
            outer = outer.parent
        return outer is not None

    def slips_of(self, name: str) -> int:
        """Return 1 if the schema has properties, but none of this name; else 0."""
        return int(bool(self.schema.names) and name not in self.schema.names)

    def is_known(self, name: str) -> bool:
        """Return whether an open object has a property of this name that is not given yet."""
        outer: Frame | None = self
        while outer is not None:
            if name in outer.schema.names and name not in outer.given:
                return True
            outer = outer.parent
        return False


class QuotedText(NamedTuple):
    """String within the arguments, with its quote, which is empty if it has no quotes."""

    start: int
    end: int
    quote: str
    schema: ArgumentSchema


class Output(NamedTuple):
    """JSON so far, as a linked list that starts with its last part."""

    part: "str | QuotedText"
    before: "Output | None"


class State(NamedTuple):
    """State of a reading.

    `step` tells the expected element: a key, a value, the end of a string, or the text after a value. `note` tells the
    element before it: "," before a key or an item, the quote of an open string, or "closed" after a value that cannot
    continue.
    """

    step: str
    at: int
    frame: Frame | None
    out: Output | None
    note: str = ""
    schema: ArgumentSchema = ANYTHING
    # These are the offset where the string begins, and the number of quotes inside it.
    start: int = 0
    quotes: int = 0
    # This is the number of missing or extra commas and braces in the whole reading.
    faults: int = 0
    # True if a part of the reading is not certain. If this is the best reading, there is no result.
    is_doubtful: bool = False

    def to(self, step: str, at: int, frame: Frame | None, out: Output | None, faults: int = 0) -> "State":
        """Return the next state, with `faults` more faults."""
        return State(step, at, frame, out, faults=self.faults + faults, is_doubtful=self.is_doubtful)

    def doubted(self, is_doubtful: bool = True) -> "State":
        """Return this state, with one more doubt if `is_doubtful`."""
        return self._replace(is_doubtful=self.is_doubtful or is_doubtful)

    def after_value(self, at: int, out: Output | None, note: str = "") -> "State":
        """Return the next state after a value that ends at `at`."""
        return self.to("after", at, self.frame, out)._replace(note=note)


# Each step has a number of slips, and the state after it.
Steps = Iterator[tuple[int, State]]
