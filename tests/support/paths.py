"""Paths of the repository and of the files for tests."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
# The configs of the published models: one folder per model, with the drafter's config in the subfolder `drafter`.
PUBLISHED = Path(__file__).parent / "published"
# A folder that makes the module `torch` impossible to import.
WITHOUT_TORCH = Path(__file__).parent / "without_torch"
