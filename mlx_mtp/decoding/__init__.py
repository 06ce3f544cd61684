"""The decode loop in token ids: the round, its compiled forms, and the stream of rounds.

This package does not handle text, tokenizers, checkpoint folders or the command line. It follows grammars that
`grammars` has compiled.
"""
