"""Several machines, one target: its parts, the passes in which all ranks take part, and their messages.

Rank 0, the leader, does everything that a single process does. The other ranks, the followers, hold a part of the
target and take part in its passes. A process that is alone imports nothing of this package. The package does not handle
drafting, acceptance or text. `decoding` does, on the leader.
"""
