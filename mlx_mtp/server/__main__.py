import sys

from mlx_mtp.commands import run_command

sys.exit(run_command("server.cli"))
