"""Grammars that hold a text to a JSON Schema or to valid tool calls."""
