"""Grammars that restrict the generated text to a JSON Schema or to valid tool calls."""
