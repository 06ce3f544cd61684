"""Measure the pause of running texts while a long prompt is read.

    python scripts/measure.py pause --model DIR --tokens 4000 --step-sizes 512 128

Some texts decode. Then another text with a long prompt joins them. The prompt is read in chunks, and after each chunk
the running texts have rounds for as long as the chunk took. So the longest time between two of their tokens should be
that of one chunk and one round. "Share" is the speed of the running texts while the prompt is read, relative to their
speed before.
"""

import argparse
import time
from statistics import mean

import mlx_mtp
from mlx_mtp.batch import Batch
from mlx_mtp.generation import Generation

# The running texts have this number of rounds alone, after as many that do not count.
ROUNDS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=str(mlx_mtp.DEMO_PAIR), metavar="DIR", help="The pair (default: the demo).")
    parser.add_argument("--tokens", type=int, default=4000, help="Tokens of the prompt (%(default)s).")
    parser.add_argument("--running", type=int, default=1, metavar="N", help="Running texts (%(default)s).")
    parser.add_argument(
        "--step-sizes", type=int, nargs="+", default=[512, 128], metavar="N", help="Prompt tokens per pass (512 128)."
    )


def run(args: argparse.Namespace) -> None:
    model = mlx_mtp.load(args.model)
    print(f"{'tokens per pass':16}{'chunk, s':>10}{'round, s':>10}{'both':>10}{'longest pause, s':>18}{'share':>8}")
    for step_size in args.step_sizes:
        chunk, longest_round, pause, share = measure(model, args.tokens, args.running, step_size)
        figures = f"{chunk:10.3f}{longest_round:10.3f}{chunk + longest_round:10.3f}{pause:18.3f}{share:8.2f}"
        print(f"{step_size:<16}" + figures)


def measure(model: mlx_mtp.Model, tokens: int, running: int, step_size: int) -> tuple[float, float, float, float]:
    """Return the seconds of the longest chunk, round and pause, and the speed relative to that before the prompt."""
    options = mlx_mtp.GenerationOptions(
        max_tokens=model.max_context,
        ignore_eos=True,
        num_draft_tokens=0,
        reuse_prompt=False,
        prefill_step_size=step_size,
    )

    def begin(prompt: list[int]) -> Generation:
        return model.begin(prompt, options, None, lambda: None)

    words = model.encode("def read(path):\n    return path\n")
    texts = [begin(words[: 4 + index]) for index in range(running)]
    batch = Batch(texts)
    while any(each.is_reading for each in texts):
        batch.turn()
    for _ in range(ROUNDS):
        batch.turn()
    alone = mean(timed(batch) for _ in range(ROUNDS))
    prompt = begin((words * tokens)[:tokens])
    batch.add(prompt)
    chunks, rounds, pauses, pause = [0.0], [0.0], [0.0], 0.0
    began = time.perf_counter()
    while prompt.is_reading:
        before = prompt.unread
        seconds = timed(batch)
        pause += seconds
        if prompt.is_reading and prompt.unread == before:
            rounds.append(seconds)
            pauses.append(pause)
            pause = 0.0
        else:
            chunks.append(seconds)
    share = (len(rounds) - 1) * alone / (time.perf_counter() - began)
    batch.close()
    return max(chunks), max(rounds), max(pauses), share


def timed(batch: Batch) -> float:
    """Run a turn, and return its seconds."""
    began = time.perf_counter()
    for step in batch.turn():
        if step.error is not None:
            raise step.error
    return time.perf_counter() - began
