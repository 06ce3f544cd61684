"""Folders of checkpoints: configs, tensors on disk, the hub, and files that appear whole. No networks."""
