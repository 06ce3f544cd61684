import sys

from mlx_mtp.shell import run_command

sys.exit(run_command("convert.cli"))
