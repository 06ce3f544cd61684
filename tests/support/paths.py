"""Where the repository is, and what it holds for the tests."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
# The configs of the published models, each in a folder of its name, with the drafter's in the subfolder `drafter`.
PUBLISHED = Path(__file__).parent / "published"
# A folder with a module `torch` that cannot be imported.
WITHOUT_TORCH = Path(__file__).parent / "without_torch"
