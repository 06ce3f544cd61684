"""Print one of the README's commands: the code block after the comment `<!-- command: NAME -->`."""

import re
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def command(name: str) -> str:
    """Return the command's text. Exit with a message if the README does not have the command."""
    pattern = rf"<!-- command: {re.escape(name)} -->\s*```bash\n(.*?)```"
    match = re.search(pattern, README.read_text(encoding="utf-8"), re.DOTALL)
    if match is None:
        sys.exit(f"error: {README}: no command {name!r}")
    return match.group(1)


if __name__ == "__main__":
    print(command(sys.argv[1]))
