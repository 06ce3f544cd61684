"""Decoding of one text, in token ids alone: the round, its compiled forms, and the stream of rounds.

Nothing here knows text, tokenizers, files or options of a user.
"""
