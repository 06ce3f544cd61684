"""A small app around mlx-mtp: `bridge` has no user interface, `app` is one with Toga."""
