"""One model on several threads: its lock, and the thread that runs jobs."""
