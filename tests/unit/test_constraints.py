"""The pins in constraints.txt are complete, and they agree with the bounds in pyproject.toml."""

import tomllib
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name
from support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# The extras of constraints.txt. `cuda` and `peers` have no pins.
EXTRAS = ("grammar", "server", "plot", "test", "dev")


def pins() -> dict[NormalizedName, str]:
    """Return the versions of constraints.txt for this system, by the packages' names."""
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    found = {}
    for requirement in map(Requirement, lines):
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        if applies(requirement):
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


def applies(requirement: Requirement, extras: frozenset[str] = frozenset()) -> bool:
    """Check whether a requirement is for this system, and for no extra or one of the given extras."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def own_requirements() -> list[Requirement]:
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in EXTRAS)]
    found = [Requirement(text) for texts in lists for text in texts]
    return [requirement for requirement in found if applies(requirement) and requirement.name != "mlx-mtp"]


def needed(requirements: list[Requirement]) -> set[NormalizedName]:
    """Return the names of the requirements, and of all that these need, as far as they are installed."""
    waiting = [(canonicalize_name(found.name), frozenset(found.extras)) for found in requirements]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        try:
            texts = requires(name) or []
        except PackageNotFoundError:
            continue
        found = [requirement for requirement in map(Requirement, texts) if applies(requirement, extras)]
        new = {(canonicalize_name(r.name), frozenset(r.extras)) for r in found} - seen
        seen |= new
        waiting += new
    return {name for name, _ in seen}


def test_every_needed_package_has_a_pin() -> None:
    names = needed(own_requirements())
    assert {"mlx", "transformers", "markupsafe"} <= names
    assert names <= pins().keys(), names - pins().keys()


def test_pins_are_within_the_bounds() -> None:
    pinned = pins()
    for requirement in own_requirements():
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} does not allow {version}"
