"""Run the README's first command as a newcomer would: in a fresh copy of the repository, in a new virtual environment.

The model it names comes from a hub on loopback, which serves a small pair under that name: the trained one where it
lies beside the checkout, else a random one. Everything else is real: pip, the hub client, conversion, decoding.
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
        with serve({MODEL: target, f"{MODEL}-assistant": drafter}) as (endpoint, _):
            env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "VIRTUAL_ENV"))}
            env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(temporary / "hub")}
            script = command("main")
            assert MODEL in script
            shell = ["bash", "-euo", "pipefail", "-c", script]
            result = subprocess.run(shell, cwd=copy, env=env, capture_output=True, text=True)
        print(result.stdout, result.stderr, sep="\n")
        if result.returncode:
            sys.exit(f"error: the README's first command failed with status {result.returncode}")
        if not result.stdout.strip() or "Acceptance length: " not in result.stderr:
            sys.exit("error: the README's first command printed no text, or no acceptance length")


if __name__ == "__main__":
    main()
