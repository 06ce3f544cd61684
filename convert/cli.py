"""Command line of the converter: `python -m mlx_mtp.convert --help`."""

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mlx_mtp.commands import INTERRUPTED
from mlx_mtp.launched import check_alone
from mlx_mtp.shell import Parser, exit_status

from .converter import MODALITIES, FolderPlan, Options, Summary, convert
from .quantization import AFFINE_BITS, AFFINE_GROUP_SIZES, DRAFTER_BITS, MODES, RECIPES, WEIGHT_DTYPES, WeightOptions


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 after an error, 130 after an interruption."""
    args = parser().parse_args(argv)
    return exit_status(lambda: _run_interruptibly(args))


def _run_interruptibly(args: argparse.Namespace) -> int:
    try:
        with _interruptible():
            _run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = Parser(
        prog="mlx_mtp.convert",
        description="Convert a Gemma 4 target and its drafter from Hugging Face format to one folder of MLX weights. "
        "Weights are read and quantized in blocks, so memory stays small. An already quantized checkpoint is refused.",
    )
    add = parser.add_argument
    add(
        "--hf-path", "--model", required=True, metavar="TARGET", help="Target: a local folder or a Hugging Face hub id."
    )
    add(
        "--mlx-path",
        type=Path,
        default=Path("mlx_model"),
        metavar="OUT",
        help="Folder to write, which appears when it is complete (default: %(default)s).",
    )
    add(
        "--drafter",
        default="auto",
        metavar="auto|none|PATH",
        help="Drafter: a local folder or a hub id. Default: TARGET/drafter, else the sibling TARGET-assistant, else "
        "Google's drafter if the name of the target has a published size.",
    )
    add(
        "--modalities",
        metavar="LIST",
        help=f"What the result reads, of {', '.join(MODALITIES)}, with commas between them. image includes video. "
        "'text' leaves out all parts for media (default: all that TARGET has).",
    )
    add(
        "-q",
        "--quantize",
        action="store_true",
        help="Quantize the target. Of the parts for media, the projections in blocks get 8 bits.",
    )
    _add_weight_options(parser)
    add("--overwrite", action="store_true", help="Replace OUT if it exists, once the new one is complete.")
    add("--revision", help="Branch, tag or commit of the target on the hub.")
    add("--upload-repo", metavar="REPO", help="Hub repository to upload the result to.")
    return parser


def _add_weight_options(parser: argparse.ArgumentParser) -> None:
    def choices(values: tuple[object, ...]) -> str:
        return ", ".join(str(value) for value in values)

    defaults = ", ".join(f"{mode} {group_size}/{bits}" for mode, (group_size, bits) in MODES.items())
    add = parser.add_argument
    add("--q-bits", type=int, metavar="BITS", help=f"Bits per weight, of {choices(AFFINE_BITS)}.")
    add(
        "--q-group-size",
        type=int,
        metavar="SIZE",
        help=f"Weights per group, of {choices(AFFINE_GROUP_SIZES)}. It must divide all weights of the text decoder; by "
        "default, weights that it does not divide get smaller groups, or stay unquantized.",
    )
    add(
        "--q-mode",
        default="affine",
        metavar="MODE",
        help=f"Quantization mode; group size and bits are by default {defaults} (default: %(default)s).",
    )
    add("--quant-predicate", metavar="RECIPE", help=f"Mixed bits, recipes of mlx-lm: {choices(RECIPES)}.")
    add(
        "--dtype",
        metavar="DTYPE",
        help=f"Type of the weights that are not quantized: {choices(WEIGHT_DTYPES)} (default: the checkpoint's).",
    )
    add(
        "--drafter-q-bits",
        type=int,
        metavar="BITS",
        help=f"Bits of the drafter's weights, of {choices(DRAFTER_BITS)}; 16 leaves them unquantized "
        "(default: 4 with a dense head, 16 with a centroid head).",
    )
    add(
        "--draft-vocab",
        type=int,
        metavar="N",
        help="Cut the drafter's dense head to N tokens: the most frequent in --draft-vocab-text, else the first.",
    )
    add("--draft-vocab-text", type=Path, metavar="FILE", help="Text to count tokens in: one text a line, or JSONL.")


def _run(args: argparse.Namespace) -> None:
    check_alone("a conversion")
    weights = WeightOptions(
        quantize=args.quantize,
        q_bits=args.q_bits,
        q_group_size=args.q_group_size,
        q_mode=args.q_mode,
        quant_predicate=args.quant_predicate,
        dtype=args.dtype,
        drafter_q_bits=args.drafter_q_bits,
        draft_vocab=args.draft_vocab,
        draft_vocab_text=args.draft_vocab_text,
    )
    options = Options(
        hf_path=args.hf_path,
        mlx_path=args.mlx_path,
        drafter=args.drafter,
        weights=weights,
        overwrite=args.overwrite,
        revision=args.revision,
        upload_repo=args.upload_repo,
        modalities=None if args.modalities is None else tuple(args.modalities.split(",")),
    )
    started = time.perf_counter()
    with _Bar() as bar:
        summary = convert(options, progress=bar.update)
    _print_summary(summary, args.drafter, args.hf_path, time.perf_counter() - started)


class _Bar:
    """A progress bar on stderr that counts the bytes of the source checkpoints."""

    def __enter__(self) -> "_Bar":
        from huggingface_hub.utils import tqdm

        self._bar = tqdm(
            total=0, desc="Converting", unit="B", unit_scale=True, leave=False, disable=None, file=sys.stderr
        )
        return self

    def update(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done)

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _print_summary(summary: Summary, drafter: str, target: str, seconds: float) -> None:
    def describe(plan: FolderPlan) -> str:
        return f"{plan.nbytes / 1e6:,.1f} MB ({plan.bits_per_weight:.2f} bits per weight)"

    parts = [f"target {describe(summary.target)}"]
    if summary.drafter is not None:
        parts.append(f"drafter {describe(summary.drafter)}")
    elif drafter == "auto":
        print(f"no drafter found for {target}: converted alone ({summary.advice})", file=sys.stderr)
    print(f"{summary.folder}: {', '.join(parts)}, {seconds:.1f} s", file=sys.stderr)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into KeyboardInterrupt, so that the cleanup removes incomplete output."""
    signals = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        # A second signal must not stop the cleanup.
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
