"""Grammars that restrict the generated text to a JSON Schema or to valid tool calls.

This package makes the source text of grammars. It does not make token masks (see `decoding.constraints`), and it does
not read tool calls (see `text.tool_call_parser`).
"""
