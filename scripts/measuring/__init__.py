"""The measurements of `scripts/measure.py`: one module for each, and the modules that they share.

The module of a measurement has two functions: `add_arguments` adds its arguments to a parser, and `run` measures and
prints. Its docstring is the description in `--help`.
"""
