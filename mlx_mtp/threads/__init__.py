"""One model on several threads: its lock, and the thread that runs jobs.

This package does not handle networks, tokens or HTTP.
"""
