"""Conversion between text and tokens: tokenizer, chat template, answers and their tool calls.

This package does not contain networks, grammars or the formats of HTTP requests.
"""
