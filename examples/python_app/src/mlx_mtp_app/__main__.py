"""Start the app, or with --headless go through the same life without a window."""

import argparse
import asyncio
import logging
import sys
from contextlib import aclosing

import mlx.core as mx

import mlx_mtp

from .bridge import Bridge


async def run_headless(model: str, question: str) -> None:
    """Load with progress, stream an answer, stop a second one half way, close."""
    last: dict[str, int] = {}

    def report(what: str, done: int, total: int) -> None:
        tenth = 10 * done // total
        if last.get(what) != tenth:
            last[what] = tenth
            print(f"{what}: {10 * tenth} %", flush=True)

    print(f"memory before: {mx.get_active_memory() / 1e6:.1f} MB")
    bridge = Bridge(report)
    await bridge.load(model)
    print(f"memory loaded: {mx.get_active_memory() / 1e6:.1f} MB")
    print("answer: ", end="")
    async with aclosing(bridge.ask(question)) as answer:
        async for text in answer:
            print(text, end="", flush=True)
    pieces = 0
    async with aclosing(bridge.ask(question)) as answer:
        async for _ in answer:
            pieces += 1
            if pieces == 10:
                break
    print(f"\nstopped after {pieces} pieces")
    await bridge.close()
    print(f"memory after: {mx.get_active_memory() / 1e6:.1f} MB")


def main() -> int:
    parser = argparse.ArgumentParser(prog="mlx_mtp_app", description=__doc__)
    parser.add_argument("--model", default=str(mlx_mtp.DEMO_PAIR), help="Folder or hub id (default: the demo pair).")
    parser.add_argument("--headless", action="store_true", help="Without a window.")
    parser.add_argument("--prompt", default="def read_config(path):", help="What to ask without a window.")
    args = parser.parse_args()
    # The library says nothing unless the program, which owns logging, wants to hear it.
    logging.basicConfig(level=logging.INFO)
    if not args.headless:
        from .app import App

        App(args.model).main_loop()
        return 0
    try:
        asyncio.run(run_headless(args.model, args.prompt))
    except mlx_mtp.MTPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
