"""Checkpoint folders: configs, tensors and their names, the hub, files that appear only when complete. No networks."""
