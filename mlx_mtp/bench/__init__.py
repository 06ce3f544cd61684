"""Measurement of decoding speed: `python -m mlx_mtp.bench`."""
