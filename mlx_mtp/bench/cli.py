"""Command line that measures the decoding speed of a pair: `python -m mlx_mtp.bench --help`.

It measures by kind of text, prompt length, temperature and draft length. Each setting of a case runs once to warm up.
Then the settings run in turn, several times, so that a machine that slows down affects all settings. The figures are
medians with their range.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Final

import mlx.core as mx
from huggingface_hub.utils import tqdm
from mlx.utils import tree_flatten

from mlx_mtp.bandwidth import memory_bandwidth
from mlx_mtp.command_line import add_kv_options, add_model_options, calibrate, load_or_demo, read_kv_options
from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.draft_length import Costs
from mlx_mtp.decoding.report import Stats
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.errors import OptionError
from mlx_mtp.launched import check_alone
from mlx_mtp.loading import follow_others
from mlx_mtp.model import Model
from mlx_mtp.options import GenerationOptions, OptionChanges
from mlx_mtp.shell import Parser, exit_status, write_json

from . import together
from .environment import environment, models
from .operations import operations, round_outputs
from .peers import PEERS, Run, load_peer
from .plots import check_plots, write_plots
from .prompts import KINDS, TOLD_KINDS, Task, task
from .together import Length, measure_together
from .told import decode_told

AUTO: Final = "auto"
# Automatic draft length without copies, to compare both.
NO_COPIES = "no-copies"
_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Return the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    return exit_status(lambda: _run(args))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = Parser(
        prog="mlx_mtp.bench",
        description="Measure how fast a pair decodes on this machine, against plain decoding: the tokens per second "
        "of every draft length and of auto in the same run, acceptance by position, the newly measured cost of passes "
        "and draft steps, kernels and host reads per round, and the share of the speed that the memory's bandwidth "
        "allows. The last line is a JSON object with all figures and versions.",
    )
    add_model_options(parser, default="the demo pair in the package", lengths=False)
    add = parser.add_argument
    add(
        "--kinds",
        type=_kinds,
        default=KINDS,
        metavar="A,B",
        help=f"Kinds of text, made from files that come with Python (default: {','.join(KINDS)}). The target is told "
        f"the answers of {','.join(TOLD_KINDS)}: changes of a source file and quotes from a text. They run once, "
        "without a temperature, and the context is the length of the file or text.",
    )
    add("--contexts", type=_numbers, default=(512,), metavar="N,N", help="Tokens of the prompts (default: 512).")
    add("--temps", type=_temperatures, default=(0.0, 1.0), metavar="T,T", help="Temperatures (default: 0,1).")
    add(
        "--num-draft-tokens",
        type=_lengths,
        default=(0, 1, 2, 3, 4, 6, 8, AUTO),
        metavar="N,auto",
        help="Draft lengths; 0, plain decoding, is always among them (default: 0,1,2,3,4,6,8,auto). auto may "
        "also copy draft tokens from the text; no-copies is auto without them, as --copy-drafts off.",
    )
    add("--max-tokens", "-m", type=int, default=128, help="Tokens to generate in a run (default: %(default)s).")
    add("--repeats", type=int, default=3, help="Runs of each setting that count (default: %(default)s).")
    add("--cool-down", type=float, default=0.0, metavar="SECONDS", help="Pause before each run (default: none).")
    add("--seed", type=int, default=0, help="Seed of the first run at a temperature above 0 (default: %(default)s).")
    add(
        "--peers",
        type=_peers,
        default=(),
        metavar="A,B",
        help=f"Other runtimes to run on the same pair in the same turns, of {','.join(PEERS)}; they must be "
        "installed, see the extra peers, and read the pair's folders themselves.",
    )
    add(
        "--concurrency",
        type=_numbers,
        default=(),
        metavar="N,N",
        help="Numbers of texts that decode together, as 1,2,4,8, against the same texts one after the other: plainly "
        "and with auto, if these are among --num-draft-tokens (default: none).",
    )
    add("--dtype", choices=_DTYPES, help="Compute in this type (default: the checkpoint's).")
    add_kv_options(parser)
    add(
        "--plot",
        type=Path,
        metavar="DIR",
        help="Draw the figures into this new folder, as PNG files: speed-up by draft length, acceptance by position, "
        "costs. It needs the extra plot.",
    )
    add("--json", action="store_true", help="Print nothing but the last line, a JSON object with all figures.")
    return parser


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def names(text: str, known: tuple[str, ...] = KINDS) -> tuple[str, ...]:
    """Parse a comma-separated list of known names. Raises ArgumentTypeError if it is empty or a name is unknown."""
    found = tuple(_split(text))
    if not found or not set(found) <= set(known):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, found {text!r}")
    return found


def _kinds(text: str) -> tuple[str, ...]:
    return names(text, (*KINDS, *TOLD_KINDS))


def _peers(text: str) -> tuple[str, ...]:
    return names(text, PEERS)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in _split(text))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers of at least 1, found {text!r}")
    return numbers


def _temperatures(text: str) -> tuple[float, ...]:
    try:
        temperatures = tuple(float(part) for part in _split(text))
    except ValueError:
        temperatures = ()
    if not temperatures:
        raise argparse.ArgumentTypeError(f"expected temperatures, found {text!r}")
    return temperatures


def _lengths(text: str) -> tuple[int | str, ...]:
    try:
        lengths = [part if part in (AUTO, NO_COPIES) else int(part) for part in _split(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected draft lengths, auto or no-copies, found {text!r}") from None
    return tuple(dict.fromkeys([0, *lengths]))


@dataclass
class Setting:
    """The runs of one case with one draft length.

    `tps` holds the tokens per second of each run, and `stats` covers all runs. With `peer`, another runtime decodes,
    and only its tokens per second are known. `error` is the reason if that runtime failed.
    """

    peer: Run | None = None
    error: str | None = None
    tps: list[float] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    peak_memory_gb: float = 0.0

    def figures(self) -> dict[str, Any]:
        """Return the figures of this setting for the report, or only the error of a peer that failed."""
        if self.error is not None:
            return {"error": self.error}
        speed: dict[str, Any] = {"tokens_per_second": median(self.tps), "range": [min(self.tps), max(self.tps)]}
        if self.peer is not None:
            return speed
        return speed | {
            "acceptance_length": self.stats.acceptance_length,
            "drafted_per_round": self.stats.drafted / self.stats.rounds,
            "acceptance_by_position": self.stats.acceptance_by_position,
            "share_of_rounds": self._shares(),
            "share_of_rounds_ahead": self.stats.rounds_ahead / self.stats.rounds,
            "host_reads_per_round": self.stats.host_reads / self.stats.rounds,
            "peak_memory_gb": self.peak_memory_gb,
        }

    def _shares(self) -> dict[str, float]:
        """Return the share of the rounds whose draft tokens came from the drafter, from the text, or from neither."""
        rounds, copied = self.stats.rounds, self.stats.copied.rounds
        drafted = sum(self.stats.drafted_at[:1])
        shares = {"plain": rounds - drafted - copied, "drafter": drafted, "copy": copied}
        return {source: count / rounds for source, count in shares.items()}


def changes(length: int | str) -> OptionChanges:
    """Return the options of a setting: its draft length, and whether it copies."""
    if length == NO_COPIES:
        return {"num_draft_tokens": AUTO, "copy_drafts": "off"}
    return {"num_draft_tokens": length if isinstance(length, int) else AUTO}


def _run(args: argparse.Namespace) -> int:
    follow_others()
    if args.dtype is not None:
        check_alone("--dtype")
    for name, least in (("repeats", 1), ("max_tokens", 2), ("cool_down", 0)):
        if not least <= getattr(args, name) < math.inf:
            raise OptionError(f"{name} must be at least {least}, found {getattr(args, name)}")
    if args.exact and args.dtype is not None:
        raise OptionError("--exact is found out in the checkpoint's own type: leave out --dtype")
    if args.peers and args.kv_bits is not None:
        raise OptionError("--peers run with K/V that are not quantized: leave out --kv-bits")
    # The options are checked before the model is loaded, which takes seconds. With `reuse_prompt` false, each run reads
    # its prompt and leaves no K/V behind.
    options = GenerationOptions(
        max_tokens=args.max_tokens, ignore_eos=True, reuse_prompt=False, **read_kv_options(args)
    )
    for temperature in args.temps:
        Sampling(temperature=temperature, seed=args.seed)
    for length in args.num_draft_tokens:
        replace(options, **changes(length))
    if args.plot is not None:
        check_plots(args.plot)
    model = load_or_demo(args, options)
    if args.dtype is not None:
        for module in (model.target, model.drafter):
            if module is not None:
                module.set_dtype(getattr(mx, args.dtype))
    lengths = [k for k in args.num_draft_tokens if model.drafter is not None or k in (0, AUTO)]
    # The target is told the answer without a temperature.
    cases = [
        (kind, n, task(model, kind, n, args.max_tokens), temperature)
        for kind in args.kinds
        for n in args.contexts
        for temperature in ((0.0,) if kind in TOLD_KINDS else args.temps)
    ]
    samplings = {t: replace(model.default_sampling, temperature=t, seed=args.seed) for *_, t in cases}
    for sampling in samplings.values():
        several_texts = max(args.concurrency, default=1) > 1
        calibrate(model, replace(options, sampling=sampling), remeasure=True, several_texts=several_texts)
    counts = {
        t: {str(k): count_operations(model, k, s, options) for k in lengths if isinstance(k, int)}
        for t, s in samplings.items()
    }
    report = {"environment": environment(), **models(model), **bound(model), "cases": []}
    report |= {"date": date.today().isoformat(), "max_tokens": args.max_tokens, "repeats": args.repeats}
    report |= read_kv_options(args) if args.kv_bits is not None else {"kv_bits": None}
    report["dtype"] = str(model.target.dtype).removeprefix("mlx.core.")
    drafter = None if model.drafter_config is None else model.drafter_config.path.parent
    peers, report["failed_peers"] = _load_peers(args.peers, model, drafter)
    report["environment"] |= {name: version(name) for name in args.peers if name not in report["failed_peers"]}
    told = sum(each.answer is not None for _, _, each, _ in cases)
    shared: list[Length] = [k for k in (0, "auto") if k in lengths]
    runs = len(cases) * (len(lengths) + len(peers)) - told * len(peers)
    runs += (len(cases) - told) * len(args.concurrency) * 2 * len(shared)
    runs *= args.repeats + 1
    with tqdm(total=runs, desc="Bench", unit="run", disable=None, file=sys.stderr) as bar:
        for kind, context, task_of_case, temperature in cases:
            sampling = samplings[temperature]
            settings: dict[int | str, Setting] = {k: Setting() for k in lengths}
            if task_of_case.answer is None:
                settings |= {name: Setting(run) for name, run in peers.items()}
            measure(model, task_of_case, replace(options, sampling=sampling), settings, args, bar)
            costs = None if model.drafter is None else _costs(model, sampling, options)
            case: dict[str, Any] = {"kind": kind, "context": context, "temperature": temperature}
            if args.concurrency and task_of_case.answer is None:
                case["concurrency"] = measure_together(
                    model,
                    task_of_case.prompt,
                    replace(options, sampling=sampling),
                    shared,
                    args.concurrency,
                    args.repeats,
                    bar.update,
                )
            report["cases"].append(case | summary(settings, costs) | {"operations": counts[temperature]})
            if not args.json:
                tqdm.write(table(report["cases"][-1], report["bound_tokens_per_second"]))
    if args.plot is not None:
        write_plots(report, args.plot)
    write_json(report)
    return 0


def _load_peers(names: tuple[str, ...], model: Model, drafter: Path | None) -> tuple[dict[str, Run], dict[str, str]]:
    """Load the other runtimes. Return their settings, and the reason for each runtime that failed."""
    found: dict[str, Run] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            found |= load_peer(name, model.config.path.parent, drafter, model.target.dtype)
        # A runtime may raise any exception. The other runtimes continue.
        except Exception as error:
            failed[name] = _reason(error)
            print(f"{name} failed to load the pair: {failed[name]}", file=sys.stderr)
    return found, failed


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def measure(
    model: Model,
    task: Task,
    options: GenerationOptions,
    settings: dict[int | str, Setting],
    args: Any,
    bar: Any,
) -> None:
    """Run all settings in turn, `args.repeats` times, after one warm-up turn that does not count."""
    first = options.sampling
    # The compiled rounds of a told answer hold it.
    rounds = CompiledRounds()
    for repeat in range(-1, args.repeats):
        for k, setting in settings.items():
            time.sleep(args.cool_down)
            mx.reset_peak_memory()
            sampling = replace(first, seed=first.seed + max(0, repeat))
            if setting.peer is not None:
                _measure_peer(setting, task.prompt, sampling, args, repeat)
                bar.update()
                continue
            chosen = replace(replace(options, **changes(k)), sampling=sampling)
            if task.answer is None:
                last = model.generate(task.prompt, chosen).last
                tps, stats = last.generation_tps, last.stats
            else:
                tps, stats = decode_told(model, task.prompt, task.answer, chosen, rounds)
            bar.update()
            if repeat < 0:
                continue
            setting.tps.append(tps)
            setting.stats.merge(stats)
            setting.peak_memory_gb = max(setting.peak_memory_gb, mx.get_peak_memory() / 1e9)


def _measure_peer(setting: Setting, prompt: list[int], sampling: Sampling, args: Any, repeat: int) -> None:
    assert setting.peer is not None
    if setting.error is not None:
        return
    try:
        rate = setting.peer(prompt, sampling, args.max_tokens)
    except Exception as error:
        setting.error = _reason(error)
    else:
        setting.tps += [rate] if repeat >= 0 else []


def _costs(model: Model, sampling: Sampling, options: GenerationOptions) -> Costs:
    return model.calibrate(sampling, kv_bits=options.kv_bits, kv_group_size=options.kv_group_size)


def count_operations(model: Model, k: int, sampling: Sampling, options: GenerationOptions) -> int:
    """Count the operations of a round of k draft tokens on this device. It launches about one kernel per operation."""
    kv = options.kv_quantization
    return operations(round_outputs(model.target, model.drafter, k, sampling, kv_quantization=kv)).total()


def summary(settings: dict[int | str, Setting], costs: Costs | None) -> dict[str, Any]:
    """Summarize the figures of a case.

    A ratio is the median over pairs of runs in the same turn. `best` is the fixed draft length with the largest ratio.
    """
    results = {str(k): setting.figures() for k, setting in settings.items()}
    for k, setting in settings.items():
        if setting.error is not None:
            continue
        ratios = [a / b for a, b in zip(setting.tps, settings[0].tps, strict=True)]
        results[str(k)] |= {"ratio": median(ratios), "ratio_range": [min(ratios), max(ratios)]}
        if costs is not None and isinstance(k, int) and k < len(costs.waiting.verify):
            predicted = results[str(k)]["acceptance_length"] / costs.round(k)
            results[str(k)] |= {"share_of_prediction": results[str(k)]["tokens_per_second"] / predicted}
    fixed = [k for k in settings if isinstance(k, int)]
    best = max(fixed, key=lambda k: results[str(k)]["ratio"])
    found: dict[str, Any] = {"settings": results, "best": best}
    if AUTO in settings:
        pairs = zip(settings[AUTO].tps, settings[best].tps, strict=True)
        found["auto_over_best"] = median(a / b for a, b in pairs)
        if NO_COPIES in settings:
            pairs = zip(settings[AUTO].tps, settings[NO_COPIES].tps, strict=True)
            found["auto_over_no_copies"] = median(a / b for a, b in pairs)
    if costs is not None:
        curve = costs.waiting
        one = curve.verify[0]
        verify = [seconds / one for seconds in curve.verify]
        found["costs"] = {"verify": verify, "draft": curve.draft / one, "overhead": curve.overhead / one}
        found["costs"]["seconds"] = one
        if costs.ahead is not None:
            found["costs"]["ahead"] = [costs.ahead.round(k) / one for k in range(len(verify))]
    return found


def table(case: dict[str, Any], bound: float) -> str:
    """Format the figures of a case as a text table. `bound` is the upper bound of plain decoding, in tokens/s."""
    lines = [f"{case['kind']}, {case['context']} tokens, temperature {case['temperature']:g}"]
    width = max(8, *(len(k) for k in case["settings"]))
    header = f"{'drafted':>{width}} {'tokens/s':>9} {'range':>15} {'ratio':>6} {'of bound':>8}"
    lines.append(f"{header} {'GB':>6} {'kernels':>7} {'reads':>5} {'length':>6}  accepted by position")
    for k, row in case["settings"].items():
        if "error" in row:
            lines.append(f"{k:>{width}} failed: {row['error']}")
            continue
        low, high = row["range"]
        line = f"{k:>{width}} {row['tokens_per_second']:>9.1f} {f'{low:.1f}-{high:.1f}':>15} {row['ratio']:>6.2f} "
        line += f"{row['tokens_per_second'] / bound:>8.0%}"
        if "acceptance_length" in row:
            by_position = " ".join(f"{share:.2f}" for share in row["acceptance_by_position"])
            line += f" {row['peak_memory_gb']:>6.2f} {case['operations'].get(k, ''):>7}"
            line += f" {row['host_reads_per_round']:>5.2f} {row['acceptance_length']:>6.2f}  {by_position}"
        lines.append(line)
    if "costs" in case:
        costs = case["costs"]
        curve = " ".join(f"{v:.2f}" for v in costs["verify"])
        lines.append(
            f"a pass of 1 to 9 rows costs {curve} of one; a draft step {costs['draft']:.2f}, the rest of drafting "
            f"{costs['overhead']:.2f}"
        )
    if "auto_over_best" in case:
        lines.append(f"auto is at {case['auto_over_best']:.2f} of the best, {case['best']}")
    if "auto_over_no_copies" in case:
        shares = ", ".join(f"{share:.0%} {name}" for name, share in case["settings"][AUTO]["share_of_rounds"].items())
        lines.append(f"auto is at {case['auto_over_no_copies']:.2f} of auto without copies; its rounds: {shares}")
    lines += together.lines(case.get("concurrency", {}))
    return "\n".join(lines) + "\n"


def bound(model: Model) -> dict[str, Any]:
    """Compute the upper bound of plain decoding in tokens per second: memory bandwidth over the bytes of a pass.

    `pass_bytes` is in bytes and `bandwidth` in bytes per second. A chip that is not listed is measured.
    """
    size = pass_bytes(model)
    bandwidth, source = memory_bandwidth()
    return {
        "pass_bytes": size,
        "bandwidth": bandwidth,
        "bandwidth_source": source,
        "bound_tokens_per_second": bandwidth / size,
    }


def pass_bytes(model: Model) -> float:
    """Return the bytes of weights that a pass over one token reads.

    Of the experts, only the chosen experts count. A table that is no head does not count, because a pass reads only one
    row of it. All other weights count in full.
    """
    text = model.config.text
    size = 0.0
    weights: dict[str, mx.array] = tree_flatten(model.target.parameters(), destination={})  # type: ignore[assignment]
    for name, value in weights.items():
        is_table = name.startswith("embed_tokens.") and text.own_head
        if "embed_tokens_per_layer" in name or is_table:
            continue
        share = text.top_k_experts / text.num_experts if "switch_glu" in name else 1.0
        size += share * value.nbytes
    return size
