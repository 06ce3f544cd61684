"""Measurement of decoding speed: `python -m mlx_mtp.bench`.

This package compares draft lengths, counts operations, runs other engines, and makes plots. It does not decode in its
own way: it uses the package `decoding`. The cost measurement for `--num-draft-tokens auto` is in
`decoding/calibration.py`.
"""
