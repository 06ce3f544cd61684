"""Converter of a Hugging Face target and its drafter to one folder of MLX weights: `python -m mlx_mtp.convert -h`."""
