"""Command line of the server: serve a target and its drafter over OpenAI's and Anthropic's APIs.

Run `python -m mlx_mtp.server --help` for the options. The server prints its address to stdout when it is ready.
All other output goes to stderr.
"""

import argparse
import asyncio
import ipaddress
import logging
import math
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

from mlx_mtp.batch import DEFAULT_CONCURRENCY
from mlx_mtp.command_line import (
    add_kv_options,
    add_model_options,
    add_sampling_options,
    add_thinking_options,
    calibrate,
    given_sampling,
    load_or_demo,
    read_kv_options,
    read_sampling,
)
from mlx_mtp.errors import OptionError, ServerError
from mlx_mtp.loading import DEMO_PAIR, follow_others
from mlx_mtp.memory_plan import parse_bytes
from mlx_mtp.model import Model
from mlx_mtp.options import DEFAULT_PREFILL_STEP, GenerationOptions
from mlx_mtp.scheduler import Scheduler
from mlx_mtp.shell import Parser, exit_status
from mlx_mtp.threads.job_thread import Worker

DEFAULT_PORT = 8080
DEFAULT_MAX_TOKENS = 4096
KEY_VARIABLE = "MLX_MTP_API_KEY"


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Return the exit status: 0 after a stop, 1 after an error."""
    args = parser().parse_args(argv)
    return exit_status(lambda: _run(args))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = Parser(
        prog="mlx_mtp.server",
        description="Serve Gemma 4 with its drafter over OpenAI's and Anthropic's APIs, several requests at once. "
        "The address is the only line on stdout. docs/server.md describes the API.",
    )
    add_model_options(parser, default="the demo pair in the package")
    _add_access_options(parser)
    _add_limit_options(parser)
    add_sampling_options(parser)
    add_thinking_options(parser)
    add_kv_options(parser)
    return parser


def _add_access_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the address, of the names of server and model, and of who may ask."""
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="Address to bind (default: %(default)s, this machine only).")
    add("--port", type=int, default=DEFAULT_PORT, help="Port, 0 for any free port (default: %(default)s).")
    add(
        "--api-key",
        default=os.environ.get(KEY_VARIABLE),
        metavar="KEY",
        help="Key that clients must send, needed for a --host that other machines can reach. The chat page and "
        f"/health need none (default: the environment's {KEY_VARIABLE}, else none).",
    )
    add("--served-model-name", metavar="NAME", help="Name of the model in the API (default: the name of --model).")
    add(
        "--allowed-origins",
        type=_names,
        default=(),
        metavar="URL,URL",
        help="Origins of web pages that may send requests (CORS; default: none).",
    )
    add(
        "--allowed-hosts",
        type=_names,
        default=(),
        metavar="NAME,NAME",
        help="Host names that the server answers to: *.DOMAIN for all names in a domain, * for any name. A server "
        "that is bound to this machine also answers to the machine's own names, and to names under .local, .internal "
        "and .localhost.",
    )


def _add_limit_options(parser: argparse.ArgumentParser) -> None:
    """Add the limits of the queue, the requests, the memory and the shutdown, and the level of the log."""
    add = parser.add_argument_group("limits").add_argument
    add(
        "--decode-concurrency",
        "--max-num-seqs",
        "--parallel",
        type=int,
        default=DEFAULT_CONCURRENCY,
        metavar="N",
        help="Largest number of requests that are answered at the same time, in shared passes over the weights. With "
        "1, and with --exact, one request is answered after the other (default: %(default)s).",
    )
    add(
        "--prefill-step-size",
        type=int,
        default=DEFAULT_PREFILL_STEP,
        metavar="N",
        help="Prompt tokens read per pass. While a prompt is read, the longest pause of other answers is one such pass "
        "and one round (default: %(default)s).",
    )
    add(
        "--max-queue",
        type=int,
        default=32,
        metavar="N",
        help="Largest number of requests that wait (default: %(default)s).",
    )
    add(
        "--max-body-size",
        type=_size,
        default=32_000_000,
        metavar="SIZE",
        help="Largest body of a request (default: 32MB).",
    )
    add(
        "--max-prompt-tokens",
        type=int,
        metavar="N",
        help="Largest number of tokens in a prompt (default: the context of the model).",
    )
    add(
        "--max-tokens",
        "-m",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        help="Largest number of tokens in an answer, if the request sets none (default: %(default)s).",
    )
    add(
        "--prompt-cache-bytes",
        type=_size,
        metavar="SIZE",
        help="Largest memory of earlier prompts (default: a tenth of the machine's).",
    )
    add(
        "--shutdown-timeout",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="How long generations may go on after SIGTERM or Ctrl-C (default: %(default)s).",
    )
    add(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="Level of the log on stderr (default: %(default)s).",
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run(args: argparse.Namespace) -> int:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ServerError(f"the server needs {error.name}: pip install 'mlx-mtp[server]'") from None
    follow_others()
    options = _options(args)
    _check(args)
    logging.basicConfig(
        level=args.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # `exit_status` adds this handler for commands without a log. With both, each warning would appear twice.
    if logging.lastResort is not None:
        logging.getLogger("mlx_mtp").removeHandler(logging.lastResort)
    listener = _bind(args.host, args.port)
    if args.exact:
        args.decode_concurrency = 1
    scheduler = Scheduler(args.decode_concurrency)
    worker = Worker("mlx-mtp-model", args.max_queue, scheduler, scheduler.concurrency)
    try:
        # Load on the thread that generates, because MLX's streams belong to threads.
        model, options = worker.run(lambda: _load(args, options))
    except KeyboardInterrupt:
        # The thread cannot be interrupted, and there is nothing to save.
        os._exit(130)
    try:
        _serve(args, model, options, worker, scheduler, listener)
    finally:
        worker.close()
    return 0


def _options(args: argparse.Namespace) -> GenerationOptions:
    """Return the default options of requests.

    The sampling holds only the command line's values. `_load` adds the defaults of the model.
    """
    return GenerationOptions(
        sampling=given_sampling(args),
        max_tokens=args.max_tokens,
        num_draft_tokens=args.num_draft_tokens,
        copy_drafts=args.copy_drafts,
        enable_thinking=args.enable_thinking,
        thinking_budget=args.thinking_budget,
        prefill_step_size=args.prefill_step_size,
        **read_kv_options(args),
    )


def _check(args: argparse.Namespace) -> None:
    for name, least in (
        ("decode_concurrency", 1),
        ("max_queue", 0),
        ("max_body_size", 1),
        ("shutdown_timeout", 0),
        ("max_prompt_tokens", 1),
    ):
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            raise OptionError(f"--{name.replace('_', '-')} must be at least {least}, found {value}")
    if not 0 <= args.port <= 65535:
        raise OptionError(f"--port must be between 0 and 65535, found {args.port}")
    if args.api_key == "":
        raise OptionError(f"--api-key is empty (or {KEY_VARIABLE} is): leave it out, or give a key")
    if args.api_key is None and not _is_local(args.host):
        raise OptionError(f"--host {args.host} can be reached from other machines: give an --api-key")


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bind(host: str, port: int) -> socket.socket:
    """Return a bound socket that does not accept yet. Raises ServerError if the address cannot be bound."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ServerError(f"{host}:{port} cannot be bound: {error}") from None
    return listener


def _load(args: argparse.Namespace, options: GenerationOptions) -> tuple[Model, GenerationOptions]:
    model = load_or_demo(args, options)
    if args.prompt_cache_bytes is not None:
        model.prompt_cache.limit = args.prompt_cache_bytes
    options = replace(options, sampling=read_sampling(args, model))
    calibrate(model, options, several_texts=args.decode_concurrency > 1)
    # This call checks all options and decodes nothing, so that wrong options fail at the start.
    model.stream_generate([0], options)
    return model, options


def _serve(
    args: argparse.Namespace,
    model: Model,
    options: GenerationOptions,
    worker: Worker,
    scheduler: Scheduler,
    listener: socket.socket,
) -> None:
    from .app import Settings, create_app
    from .http_entry import local_hosts
    from .http_server import serve_until_stopped
    from .service import Service

    name = args.served_model_name or (args.model if args.model and not Path(args.model).is_dir() else None)
    name = name or Path(args.model or DEMO_PAIR).resolve().name
    service = Service(model, worker, scheduler, name, options, args.max_prompt_tokens)
    hosts = (*local_hosts(args.host), *args.allowed_hosts) if _is_local(args.host) else args.allowed_hosts or ("*",)
    settings = Settings(args.api_key, hosts, args.allowed_origins, args.max_body_size)
    app = create_app(service, settings)
    asyncio.run(serve_until_stopped(app, model, service.worker, listener, args.shutdown_timeout, args.log_level))
