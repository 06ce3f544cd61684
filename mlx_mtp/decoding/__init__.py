"""The decode loop in token ids: the round, its compiled forms, the stream of rounds, its costs and the prompt cache.

This package does not handle text, tokenizers, checkpoint folders or the command line. It follows grammars that
`grammars` has compiled.
"""
