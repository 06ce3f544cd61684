"""Conversion between text and tokens: tokenizer, chat template, answers and their tool calls."""
