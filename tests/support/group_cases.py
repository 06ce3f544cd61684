"""Texts that a model writes for the tests of groups. As a program, it prints those of a group's models as JSON.

python group_cases.py FOLDER:SPLIT ...

A folder with media has no drafter. Its texts are about a picture.
"""

import io
import json
import sys
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from mlx_mtp import GenerationOptions, Model, Sampling, load
from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.stream import Stream, can_go_ahead
from mlx_mtp.gemma4.kv_cache import Cache

PROMPT = [2, *np.random.default_rng(5).integers(16, 512, 29).tolist()]
BASE = GenerationOptions(max_tokens=9, ignore_eos=True, reuse_prompt=False, num_draft_tokens=2)
PICTURE = np.random.default_rng(1).integers(0, 256, (300, 300, 3), np.uint8)


def texts(model: Model, *, all_options: bool = True) -> dict[str, Any]:
    """Return the tokens of texts with many options, or with some, by name."""
    if model.drafter is None:
        return {"picture": list(_about_a_picture(model))}
    found: dict[str, Any] = {}

    def add(name: str, **changes: Any) -> None:
        found[name] = [each.token for each in model.stream_generate(PROMPT, BASE, **changes)]

    for k in range(5):
        add(f"greedy with {k} draft tokens", num_draft_tokens=k)
    add("greedy with auto", num_draft_tokens="auto", max_tokens=14)
    found["ahead"] = list(_ahead(model))
    found["evaluations"] = _evaluations(model)
    found["together"] = [each.text for each in model.generate_batch([PROMPT, PROMPT[:12], PROMPT[:20]], BASE)]
    if not all_options:
        return found
    for acceptance in ("block", "coupled"):
        add(f"sampled, {acceptance}", sampling=Sampling(temperature=1.0, seed=7, acceptance=acceptance))
    add("penalty", sampling=Sampling(repetition_penalty=1.3))
    add("K/V of 8 bits", kv_bits=8, kv_group_size=32, quantized_kv_start=0)
    add("K/V of 8 bits later", kv_bits=8, kv_group_size=32, quantized_kv_start=36)
    add("stop", stop=model.tokenizer.decode(found["greedy with 0 draft tokens"][7:9]))
    add("regex", regex="[a-f ]{12}", ignore_eos=False)
    add("processor", logits_processors=[lambda tokens, logits: logits.at[:, 17].add(4.0)])
    found["error in a processor"] = _failure(model)
    found["after the error"] = model.generate(PROMPT, BASE).text
    found["prompt cache"] = list(_cached(model))
    found["in turn"] = list(_in_turn(model))
    found["left"] = _left(model)
    found["after a text that was left"] = model.generate(PROMPT, BASE).text
    return found


def _failure(model: Model) -> str:
    def fail(tokens: mx.array, logits: mx.array) -> mx.array:
        # Without the evaluation, the pass would not have run.
        if tokens.size > len(PROMPT) + 4 and mx.all(logits < 1e9).item():
            raise ZeroDivisionError("the processor failed")
        return logits

    try:
        model.generate(PROMPT, BASE, logits_processors=[fail])
    except ZeroDivisionError as error:
        return str(error)
    return "no error"


def _cached(model: Model) -> Iterator[Any]:
    """Yield texts whose prompts begin as earlier ones, and the tokens that were not read again."""
    options = GenerationOptions(max_tokens=5, ignore_eos=True, num_draft_tokens=1, prefill_step_size=8)
    for prompt in (PROMPT, [*PROMPT, 30, 31], [*PROMPT[:20], 40, 41], [*PROMPT, 30, 31, 50]):
        last = model.generate(prompt, options).last
        yield last.cached_tokens, last.token
    model.prompt_cache.clear()


def _in_turn(model: Model) -> Iterator[Any]:
    """Yield the tokens of two texts that are read in turn."""
    one = model.stream_generate(PROMPT, BASE)
    other = model.stream_generate(PROMPT[:13], BASE, num_draft_tokens=3, max_tokens=6)
    for pair in zip_longest(one, other):
        yield [None if each is None else each.token for each in pair]


def _ahead(model: Model) -> Iterator[list[int]]:
    """Yield the tokens and the number of host reads of rounds, some of which are dispatched ahead of their report."""
    parts = model.parts
    stream = Stream(parts.target, parts.drafter, max_draft_tokens=2, rounds=parts.rounds)
    yield stream.prefill(PROMPT, 512).tokens
    for _ in range(4):
        assert can_go_ahead(stream, 2, 1)
        for k in (2, 1):
            stream.dispatch(k)
        while stream.in_flight:
            report = stream.finish()
            yield [*report.tokens, report.host_reads]


def _evaluations(model: Model) -> list[int]:
    """Return how many evaluations, and how many host reads, four compiled rounds have in all."""
    parts = model.parts
    stream = Stream(parts.target, parts.drafter, max_draft_tokens=2, rounds=CompiledRounds(always=True))
    stream.prefill(PROMPT, 512)
    with patch("mlx.core.async_eval", wraps=mx.async_eval) as evaluated:
        reads = sum(stream.round(2).host_reads for _ in range(4))
    return [evaluated.call_count, reads]


def _about_a_picture(model: Model) -> Iterator[str]:
    """Yield texts about a picture, alone and together with another text, and one without it."""
    image = {"type": "image", "image": PICTURE, "max_soft_tokens": 70}
    prompt = [{"role": "user", "content": [image, {"type": "text", "text": "tell"}]}]
    options = GenerationOptions(max_tokens=6, ignore_eos=True)
    yield model.generate(prompt, options).text
    yield from (each.text for each in model.generate_batch([prompt, PROMPT], options, prefill_step_size=32))
    yield model.generate(PROMPT, options).text


def collectives(model: Model) -> int:
    """Return the number of collectives in the graph of a verify pass of three rows, which is not evaluated."""
    target = model.target.in_graph
    cache = Cache(target.config, target.dtype, max_block=4)
    output = target(mx.array([PROMPT[:3]]), cache, 3)
    graph = io.StringIO()
    mx.export_to_dot(graph, output.logits, *cache.arrays())
    return sum(graph.getvalue().count(f'label ="{name}"') for name in ("Sum AllReduce", "AllGather"))


def shared_by(model: Model) -> Any:
    """Return how machines share the model, in the identity of its costs."""
    return model.parts.costs.identity(Sampling(), None, 0).get("machines")


def _left(model: Model) -> list[int]:
    """Return the first tokens of a text that nobody reads to its end."""
    responses = model.stream_generate(PROMPT, BASE, num_draft_tokens=1)
    found = [next(responses).token for _ in range(4)]
    responses.close()
    return found


def main() -> None:
    """Load one model after the other, and print the texts of each in a line."""
    for argument in sys.argv[1:]:
        folder, _, split = argument.partition(":")
        with load(folder, split=split or None) as model:  # type: ignore[arg-type]
            found = texts(model, all_options=not split), collectives(model), shared_by(model)
            print(json.dumps([argument, *found]), flush=True)


if __name__ == "__main__":
    main()
