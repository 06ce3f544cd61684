"""Measuring speed: `python -m mlx_mtp.bench`."""
