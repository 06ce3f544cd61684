"""Hide PyTorch from the commands that tests run: users do not have it, and the start takes half the time."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
