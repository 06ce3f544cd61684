"""One model on several threads: the lock, and the thread for jobs."""
