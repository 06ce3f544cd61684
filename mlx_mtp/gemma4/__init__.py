"""The two networks of Gemma 4, target and drafter, and the K/V cache: functions of arrays.

It also reads the rows of tables that stay on disk. This package does not handle acceptance, sampling, text or the
loading of checkpoints. The packages `decoding`, `text` and `checkpoints` do.
"""
