"""Checkpoint folders: configs, tensors and their names, the hub, and files that appear only when they are complete.

This package does not contain networks, tokenizers or decoding. Only its module `config` reads `config.json`.
"""
