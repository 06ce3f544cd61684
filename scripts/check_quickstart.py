"""Run the README's first commands like a new user, in a fresh copy of the repository and a new virtual environment.

The first command needs no model, and no network except the package registry. The second command names a model. A fake
hub on loopback serves a small pair under that name: the trained pair beside the checkout if it exists, else a random
pair. All other parts are real: pip, the hub client, conversion and decoding.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from readme_command import command

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from fake_hub import serve  # noqa: E402
from tiny import make_drafter, make_target  # noqa: E402

MODEL = "google/gemma-4-E2B-it"
TRAINED = ROOT.parent / "shared" / "pair"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        if TRAINED.is_dir():
            target, drafter = TRAINED / "target", TRAINED / "assistant"
        else:
            target = make_target(temporary / "target", "e2b")
            drafter = make_drafter(temporary / "drafter", "e2b")
        copy = temporary / "checkout"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "VIRTUAL_ENV"))}
        env |= {"HF_HOME": str(temporary / "hub")}
        run("main", copy, env | {"HF_HUB_OFFLINE": "1"}, "Acceptance length: ", "Speed: ")
        with serve({MODEL: target, f"{MODEL}-assistant": drafter}) as (endpoint, _):
            assert MODEL in command("model")
            run("model", copy, env | {"HF_ENDPOINT": endpoint}, "Acceptance length: ")


def run(name: str, folder: Path, env: dict[str, str], *expected: str) -> None:
    shell = ["bash", "-euo", "pipefail", "-c", command(name)]
    result = subprocess.run(shell, cwd=folder, env=env, capture_output=True, text=True)
    print(result.stdout, result.stderr, sep="\n")
    if result.returncode:
        sys.exit(f"error: the README's command {name!r} failed with status {result.returncode}")
    missing = [text for text in expected if text not in result.stderr]
    if missing or not result.stdout.strip():
        sys.exit(f"error: the README's command {name!r} printed no text, or no {', '.join(missing)}")


if __name__ == "__main__":
    main()
