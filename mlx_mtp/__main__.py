"""`python -m mlx_mtp COMMAND ...`."""

import sys

from mlx_mtp.commands import main

sys.exit(main())
