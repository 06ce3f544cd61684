"""HTTP server with OpenAI's and Anthropic's APIs. Run it with `python -m mlx_mtp.server`.

This package handles requests, the queue, answers and errors. It does not decode, render prompts or parse tool calls
itself: it uses `Model` and the package `text`. No other package imports it.
"""
