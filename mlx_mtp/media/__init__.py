"""Media of prompts: from files, bytes and arrays to the arrays that the networks read.

This package does not contain networks, tokens, prompts or HTTP. It imports Pillow, soundfile, soxr and PyAV only when
it reads a medium that needs them.
"""
