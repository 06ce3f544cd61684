"""Training of a drafter: data, losses, and the training loop.

This package does not contain the networks (see `gemma4`) or the command line (see `mlx_mtp/train.py`).
"""
