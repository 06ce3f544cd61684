"""For the commands that tests run: they start as they do for users, who have no PyTorch, and in half the time."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
