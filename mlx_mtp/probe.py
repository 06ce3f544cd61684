"""Command line that compares verify passes with plain decoding: `python -m mlx_mtp.probe --help`.

A device computes several rows with different kernels than one row, and these kernels round differently. Sometimes the
most likely token changes. Then the text differs from the text of plain decoding, and a good draft token is rejected.
"""

import sys

if __name__ == "__main__":
    # This comes before the slow imports, so that Ctrl-C ends the command from the first moment on.
    from .commands import run_command

    sys.exit(run_command("probe"))

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub.utils import tqdm

from mlx_mtp.bench.cli import names
from mlx_mtp.bench.environment import environment, models
from mlx_mtp.bench.prompts import KINDS, prompt
from mlx_mtp.decoding.exact import MAX_ROWS, ExactRows, ExactTable
from mlx_mtp.gemma4 import fused_attention, kernels
from mlx_mtp.gemma4.drafter import DraftInputs
from mlx_mtp.gemma4.kv_cache import Cache
from mlx_mtp.gemma4.layers import Experts, Router
from mlx_mtp.gemma4.target import Target

from .command_line import add_model_options, load_or_demo
from .errors import OptionError
from .launched import check_alone
from .model import Model
from .shell import Parser, exit_status, write_json, write_out

# Number of tokens before the compared tokens.
_CONTEXT_TOKENS = 64
# Draft tokens per round in the measure of lost acceptance.
_DRAFTED = 3
# The inputs and results of these modules are compared.
_PARTS = (nn.Linear, nn.QuantizedLinear, nn.RMSNorm, Router, Experts, ExactRows)
_TABLES = (nn.Embedding, nn.QuantizedEmbedding, ExactTable)
_RECORDED = [*((kind, "__call__") for kind in _PARTS), *((kind, "as_linear") for kind in _TABLES)]


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    return exit_status(lambda: _run(args))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = Parser(
        prog="mlx_mtp.probe",
        description="Compare passes over several rows with passes over one, as plain decoding makes them: bits, most "
        "likely tokens, and the draft tokens rejected because of it. The last line is a JSON object with all figures.",
    )
    add_model_options(parser, default="the demo pair in the package", lengths=False)
    add = parser.add_argument
    add("--kinds", type=names, default=("code", "prose"), metavar="A,B", help=f"Texts, of {','.join(KINDS)}.")
    add("--max-tokens", "-m", type=int, default=256, help="Tokens of each text to compare (default: %(default)s).")
    add("--json", action="store_true", help="Print nothing but the last line, a JSON object with all figures.")
    return parser


def _run(args: argparse.Namespace) -> int:
    check_alone("a comparison of passes")
    if args.max_tokens < 2 * MAX_ROWS:
        raise OptionError(f"max_tokens must be at least {2 * MAX_ROWS}, found {args.max_tokens}")
    model = load_or_demo(args)
    texts = [prompt(model, kind, _CONTEXT_TOKENS + args.max_tokens, 0) for kind in args.kinds]
    total = len(texts) * args.max_tokens * (1 if model.drafter is None else 2)
    with tqdm(total=total, desc="Probe", unit="tok", disable=None, file=sys.stderr) as bar:
        rows = compare_rows(model.target, texts, bar.update)
        where = first_differences(model.target, texts[0])
        lost = None if model.drafter is None else acceptance(model, texts, args.max_tokens, bar.update)
    report: dict[str, Any] = {"environment": environment(), **models(model)}
    report |= {"exact": model.exact, "tokens": len(texts) * args.max_tokens}
    report["rows"] = {str(n): found | {"first_difference": where[n]} for n, found in rows.items()}
    report["acceptance"] = lost
    report["attention"] = fused_attention.describe(model.target)
    networks = {"target": model.target, "drafter": model.drafter}
    report["kernels"] = {name: kernels.describe(each) for name, each in networks.items() if each is not None}
    if not args.json:
        write_out(_table(report))
    write_json(report)
    return 0


def compare_rows(
    target: Target, texts: list[list[int]], on_progress: Callable[[int], object]
) -> dict[int, dict[str, int]]:
    """Compare passes over 2 to 9 rows of each text, after its first tokens, with passes over one row.

    Return counts of rows by the number of rows per pass: "compared", "other_bits" for different bits in the hidden
    state, and "other_token" for a different most likely token. Every pass finds the K/V that single passes wrote.
    """
    found = {n: {"compared": 0, "other_bits": 0, "other_token": 0} for n in range(2, MAX_ROWS + 1)}
    for text in texts:
        cache = _prefilled(target, text)
        waiting: list[tuple[int, int, mx.array, list[int]]] = []
        for at in range(_CONTEXT_TOKENS, len(text)):
            for n in found:
                if (at - _CONTEXT_TOKENS) % n == 0 and at + n <= len(text) and cache.rows_for(n) == cache.rows_for(1):
                    waiting.append((n, at, *_pass(target, cache, text[at : at + n])))
            hidden, tokens = _pass(target, cache, text[at : at + 1])
            cache.set_length(at + 1)
            for n, start, several, chosen in waiting:
                found[n]["compared"] += 1
                found[n]["other_bits"] += not mx.array_equal(several[:, at - start], hidden[:, 0]).item()
                found[n]["other_token"] += chosen[at - start] != tokens[0]
            waiting = [entry for entry in waiting if entry[1] + entry[0] > at + 1]
            on_progress(1)
    return found


def acceptance(
    model: Model, texts: list[list[int]], count: int, on_progress: Callable[[int], object]
) -> dict[str, float]:
    """Compare the acceptance length of one verify pass with the acceptance length of single passes.

    Both are measured on the text of plain decoding, `count` tokens after each prompt. Each round drafts from the hidden
    states and the K/V of plain decoding. The result holds the draft tokens per round, the number of rounds, and both
    acceptance lengths, in tokens per round with the bonus token.
    """
    assert model.drafter is not None
    totals = {"rounds": 0, "by_verify_pass": 0, "by_single_passes": 0}
    for text in texts:
        cache = _prefilled(model.target, text)
        hidden, tokens = _pass(model.target, cache, text[_CONTEXT_TOKENS : _CONTEXT_TOKENS + 1])
        cache.set_length(_CONTEXT_TOKENS + 1)
        plain = tokens
        waiting: list[tuple[int, list[int], list[int]]] = []
        for _ in range(count):
            if (len(plain) - 1) % (_DRAFTED + 1) == 0 and cache.rows_for(_DRAFTED + 1) == cache.rows_for(1):
                context = model.drafter.draft_context(cache)
                bonus = mx.array([plain[-1:]], mx.int32)
                draft = model.drafter.draft(model.target, DraftInputs(bonus, hidden, context, _DRAFTED)).tokens
                drafted: list[int] = draft[0].tolist()  # type: ignore[assignment]
                del context
                waiting.append((len(plain), drafted, _pass(model.target, cache, [plain[-1], *drafted])[1]))
            hidden, tokens = _pass(model.target, cache, plain[-1:])
            cache.set_length(cache.length + 1)
            plain += tokens
            on_progress(1)
        for start, drafted, verified in waiting:
            if start + _DRAFTED <= len(plain):
                totals["rounds"] += 1
                totals["by_verify_pass"] += 1 + _common(drafted, verified)
                totals["by_single_passes"] += 1 + _common(drafted, plain[start:])
    rounds = max(1, totals["rounds"])
    lengths = {name: totals[name] / rounds for name in ("by_verify_pass", "by_single_passes")}
    return {"draft_tokens": _DRAFTED, "rounds": totals["rounds"], **lengths}


def first_differences(target: Target, text: list[int]) -> dict[int, str | None]:
    """Return the first place in a pass of 2 to 9 rows whose bits differ from single passes.

    The result has one entry for each number of rows. An entry is None if all bits are equal.
    """
    cache = _prefilled(target, text)
    single: list[list[tuple[str, mx.array]]] = []
    for at in range(_CONTEXT_TOKENS, _CONTEXT_TOKENS + MAX_ROWS):
        with _recorded(target) as seen:
            _pass(target, cache, text[at : at + 1])
        single.append(seen)
        cache.set_length(at + 1)
    found: dict[int, str | None] = {}
    for n in range(2, MAX_ROWS + 1):
        cache.set_length(_CONTEXT_TOKENS)
        with _recorded(target) as several:
            _pass(target, cache, text[_CONTEXT_TOKENS : _CONTEXT_TOKENS + n])
        found[n] = None
        for index, (place, rows) in enumerate(several):
            alone = [seen[index][1] for seen in single[:n]]
            axis = next(i for i, size in enumerate(rows.shape) if size != alone[0].shape[i])
            if not mx.array_equal(rows, mx.concatenate(alone, axis=axis)).item():
                found[n] = place
                break
    return found


@contextmanager
def _recorded(target: Target) -> Iterator[list[tuple[str, mx.array]]]:
    """Collect the inputs and outputs of the modules of a pass, in the order of their calls."""
    names = {id(module): name for name, module in target.named_modules()}
    seen: list[tuple[str, mx.array]] = []

    def recording(call: Callable[..., Any]) -> Callable[..., Any]:
        def record(module: nn.Module, x: mx.array, *others: mx.array) -> Any:
            name = names.get(id(module), "")
            result = call(module, x, *others)
            # Leave out the inner modules of a part that computes row by row: only the part itself is compared.
            if name and not name.endswith(".inner") and ".experts." not in name and ".router." not in name:
                seen.append((f"before {name}", x))
                outputs = result if isinstance(result, tuple) else (result,)
                seen.extend((name, output) for output in outputs)
            return result

        return record

    calls = [(kind, name, getattr(kind, name)) for kind, name in _RECORDED]
    try:
        for kind, name, call in calls:
            setattr(kind, name, recording(call))
        yield seen
    finally:
        for kind, name, call in calls:
            setattr(kind, name, call)


def _prefilled(target: Target, text: list[int]) -> Cache:
    cache = Cache(target.config, target.dtype, max_block=MAX_ROWS)
    _pass(target, cache, text[:_CONTEXT_TOKENS])
    cache.set_length(_CONTEXT_TOKENS)
    return cache


def _pass(target: Target, cache: Cache, tokens: list[int]) -> tuple[mx.array, list[int]]:
    """Return the hidden states, and the most likely next token of each row."""
    output = target(mx.array([tokens], mx.int32), cache, logit_rows=len(tokens))
    hidden, chosen = output.hidden, mx.argmax(output.logits[0], axis=-1)
    del output
    mx.eval(hidden, chosen, cache.arrays())
    return hidden, chosen.tolist()  # type: ignore[return-value]


def _common(first: list[int], second: list[int]) -> int:
    """Return the length of the common beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _table(report: dict[str, Any]) -> str:
    lines = [f"passes over several rows against passes over one, {report['tokens']} tokens of real text"]
    lines += [f"{layer_type}: {kernel}" for layer_type, kernel in report["attention"].items()]
    lines += [f"kernels of the {name}: {found}" for name, found in report["kernels"].items()]
    lines.append(f"{'rows':>4} {'other bits':>10} {'other token':>11}  first difference")
    for n, found in report["rows"].items():
        bits, token = (found[name] / found["compared"] for name in ("other_bits", "other_token"))
        lines.append(f"{n:>4} {bits:>10.1%} {token:>11.2%}  {found['first_difference'] or 'none'}")
    if (lost := report["acceptance"]) is not None:
        single, several = lost["by_single_passes"], lost["by_verify_pass"]
        lines.append(
            f"tokens per round with {lost['draft_tokens']} draft tokens: {several:.3f} by one pass, {single:.3f} by "
            f"single passes, {single - several:.3f} lost in {lost['rounds']} rounds"
        )
    return "\n".join(lines)
