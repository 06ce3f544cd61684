"""HTTP server with OpenAI's and Anthropic's APIs. Run it with `python -m mlx_mtp.server`."""
