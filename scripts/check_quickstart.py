"""Run the README's first commands like a new user, in a fresh copy of the repository and a new virtual environment.

The first command needs no model, and no network except the package registry. The second command names a model. The demo
pair stands in the cache of the hub's client under that name, as after a download. All other parts are real: pip, the
hub's client, conversion and decoding.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from readme_command import command

ROOT = Path(__file__).parents[1]
DEMO_PAIR = ROOT / "mlx_mtp" / "demo"
MODEL = "google/gemma-4-E2B-it"
REVISION = "0123456789abcdef0123456789abcdef01234567"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        cache = temporary / "hub"
        # The drafter of a published model is a model of its own, with a tokenizer.
        cache_model(cache, MODEL, DEMO_PAIR)
        cache_model(cache, f"{MODEL}-assistant", DEMO_PAIR / "drafter", *DEMO_PAIR.glob("tokenizer*"))
        copy = temporary / "checkout"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
        env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "VIRTUAL_ENV"))}
        # Without kept costs, the first rounds of a text draft tokens on any machine.
        env |= {"HF_HOME": str(temporary), "HF_HUB_OFFLINE": "1", "MLX_MTP_CACHE": str(temporary / "costs")}
        run("main", copy, env, "Acceptance length: ", "Speed: ")
        assert MODEL in command("model")
        run("model", copy, env, "Acceptance length: ")


def cache_model(cache: Path, model: str, folder: Path, *more: Path) -> None:
    """Put the files of a folder, and more files, where the hub's client looks for a downloaded model."""
    entry = cache / f"models--{model.replace('/', '--')}"
    snapshot = entry / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    for file in (*folder.iterdir(), *more):
        if file.is_file():
            shutil.copy(file, snapshot)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(REVISION)


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
