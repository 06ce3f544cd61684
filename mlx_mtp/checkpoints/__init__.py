"""Checkpoint folders: configs, tensors on disk, the hub, and files that appear only when complete. No networks."""
