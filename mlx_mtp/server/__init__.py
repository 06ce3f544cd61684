"""The HTTP server over OpenAI's and Anthropic's APIs: `python -m mlx_mtp.server`."""
