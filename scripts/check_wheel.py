"""Build the sdist and the wheel, check the files in the wheel, and use it in a new virtual environment.

All steps run in a temporary folder, on a copy of the committed files. The wheel is built from the sdist. When the tests
run, the copy has no sources any more, so they can only find the installed package.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The demo pair is 9 MB of it. docs/releasing.md has the reason.
MOST_BYTES = 12_000_000
# The tests of the installed package: imports, public names, and the bad options of all commands. Plots need an extra
# that is not installed.
TESTS = (
    "tests/unit/test_imports.py::test_importing_is_light",
    "tests/unit/test_imports.py::test_public_names",
    "tests/unit/test_bad_options.py",
    "-k",
    "not plot",
)
TEST_PACKAGES = ("hypothesis", "pytest", "pytest-xdist")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="put the sdist and the wheel into this new folder")
    parser.add_argument("--tag", help="fail unless this tag (v1.2.3) is that of pyproject.toml and of CHANGELOG.md")
    args = parser.parse_args()
    if args.tag is not None:
        check_tag(args.tag)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy = folder / "copy"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
        wheel = build(copy, folder)
        check_files(wheel, copy)
        for sources in ("mlx_mtp", "convert"):
            shutil.rmtree(copy / sources)
        environment = Environment(folder / "installed")
        environment.install(copy, f"{wheel}[server]", *TEST_PACKAGES)
        check_commands(environment, folder)
        check_page(environment, folder)
        environment.run("pytest", "-q", *TESTS, folder=copy)
        if args.output is not None:
            shutil.copytree(wheel.parent, args.output)
    print(f"{wheel.name}: built, installed and used")


def check_tag(tag: str) -> None:
    """Exit with a message unless pyproject.toml and a dated heading of CHANGELOG.md have the version of a tag."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    if tag != f"v{version}":
        sys.exit(f"error: pyproject.toml: expected the version of the tag {tag}, found {version}")
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$"
    if not re.search(heading, (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE):
        sys.exit(f"error: CHANGELOG.md: expected a heading '## [{version}] - YEAR-MONTH-DAY'")


class Environment:
    """A new virtual environment. Its programs run without the variables that could lead them to other packages."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=True)
        self.programs = folder / "bin"
        hidden = ("PYTHON", "HF_", "VIRTUAL_ENV")
        self.variables = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        self.variables |= {"HF_HUB_OFFLINE": "1", "MLX_MTP_CACHE": str(folder / "cache")}

    def install(self, copy: Path, *packages: str) -> None:
        """Install packages at the versions of constraints.txt."""
        self.run(
            "pip", "install", "--quiet", "--no-compile", "-c", str(copy / "constraints.txt"), *packages, folder=copy
        )

    def run(self, program: str, *args: str, folder: Path) -> str:
        """Run a program in a folder. Return its standard output. Exit with its output if it fails."""
        command = [str(self.programs / program), *args]
        result = subprocess.run(command, cwd=folder, env=self.variables, capture_output=True, text=True)
        if result.returncode:
            print(result.stdout, result.stderr, sep="\n")
            sys.exit(f"error: {program} {' '.join(args)} failed with status {result.returncode}")
        return result.stdout


def build(copy: Path, folder: Path) -> Path:
    """Build the sdist, and the wheel from the sdist. Return the wheel's path. The sdist is beside it."""
    tools = Environment(folder / "tools")
    tools.install(copy, "build", "setuptools")
    output = folder / "dist"
    # Without isolation, `build` makes no virtual environments of its own. It still checks [build-system].
    tools.run("python", "-m", "build", "--no-isolation", "--outdir", str(output), str(copy), folder=folder)
    (wheel,) = output.glob("*.whl")
    (_,) = output.glob("*.tar.gz")
    return wheel


def check_files(wheel: Path, copy: Path) -> None:
    """Exit with a message unless the wheel has exactly the repository's files of the package and the converter."""
    tracked = subprocess.run(
        ["git", "ls-files", "mlx_mtp", "convert"], cwd=copy, capture_output=True, text=True, check=True
    ).stdout.split()
    expected = {re.sub("^convert/", "mlx_mtp/convert/", name) for name in tracked}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    if found != expected:
        missing, surplus = sorted(expected - found), sorted(found - expected)
        sys.exit(f"error: {wheel.name}: missing files {missing}, files that do not belong there {surplus}")
    if (size := wheel.stat().st_size) > MOST_BYTES:
        sys.exit(f"error: {wheel.name}: expected at most {MOST_BYTES} bytes, found {size}")


def check_commands(environment: Environment, folder: Path) -> None:
    """Decode with the demo pair, convert it, and decode with the result."""
    where = environment.run("python", "-c", "import mlx_mtp; print(mlx_mtp.DEMO_PAIR)", folder=folder).strip()
    if not Path(where).is_relative_to(environment.programs.parent):
        sys.exit(f"error: expected the demo pair in the virtual environment, found {where}")
    generate = ("generate", "--prompt", "def read_config(path):", "--temp", "0", "--num-draft-tokens", "3", "-m", "40")
    for model in ((), ("--model", "converted")):
        if model:
            environment.run("mlx-mtp", "convert", "--hf-path", where, "--mlx-path", "converted", "-q", folder=folder)
        text = environment.run("mlx-mtp", *generate, *model, folder=folder)
        if not text.strip():
            sys.exit(f"error: mlx-mtp {' '.join((*generate, *model))} printed no text")
    if "--hf-path" not in environment.run("mlx-mtp", "convert", "--help", folder=folder):
        sys.exit("error: mlx-mtp convert --help does not describe --hf-path")


def check_page(environment: Environment, folder: Path) -> None:
    """Start the server, and read the chat page, which is a file of the package."""
    options = ("--port", "0", "--num-draft-tokens", "3", "--log-level", "warning")
    command = [str(environment.programs / "mlx-mtp"), "serve", *options]
    server = subprocess.Popen(command, cwd=folder, env=environment.variables, stdout=subprocess.PIPE, text=True)
    try:
        page = read_page(server)
    finally:
        server.terminate()
        server.wait()
    if "</html>" not in page:
        sys.exit("error: the server did not send the chat page")


def read_page(server: "subprocess.Popen[str]") -> str:
    """Wait until the server prints its address, and return the page at this address."""
    assert server.stdout is not None
    line = server.stdout.readline()
    address = re.search(r"http://\S+", line)
    if address is None:
        sys.exit(f"error: expected the address of the server, found {line!r}")
    with urllib.request.urlopen(address[0], timeout=60) as answer:
        text: str = answer.read().decode()
    return text


if __name__ == "__main__":
    main()
