"""The parts of a target: together they are the whole, without any process."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.ranks import Alone, ThreadRanks, quantize, shared_target
from support.tiny import VARIANTS, load_target, make_target, random_tokens

from mlx_mtp.checkpoints.config import Quantization, TargetConfig, read_target_config
from mlx_mtp.checkpoints.weights import lazy_parameters
from mlx_mtp.errors import OptionError
from mlx_mtp.gemma4.kv_cache import Cache, KVQuantization
from mlx_mtp.gemma4.layers import fuse_projections
from mlx_mtp.gemma4.target import MediaRows, Target
from mlx_mtp.group.shared_target import PipelineTarget, SharedTarget
from mlx_mtp.group.split import Part, Split
from mlx_mtp.memory_plan import planner
from mlx_mtp.networks import load_shared_target

QUANTIZATIONS = {
    "float32": None,
    "4bit": Quantization(32, 4),
    "8bit": Quantization(32, 8),
    "mxfp4": Quantization(32, 4, "mxfp4"),
}
# 33 and 11 groups of 32, as 26B has of 64.
WIDTHS: dict[str, Any] = {"intermediate_size": 33 * 32, "num_attention_heads": 8, "head_dim": 32, "global_head_dim": 64}
Whole = Callable[..., tuple[Target, TargetConfig]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Return a function from a variant and a quantization to a whole target, with its config."""
    found: dict[tuple[str, str], tuple[Target, TargetConfig]] = {}
    folder = tmp_path_factory.mktemp("wide")

    def get(variant: str, bits: str = "float32") -> tuple[Target, TargetConfig]:
        if (variant, bits) not in found:
            experts = {"moe_intermediate_size": 11 * 32} if variant == "26b" else {}
            path = folder / variant
            if not path.is_dir():
                make_target(path, variant, **WIDTHS, **experts)
            target, config = load_target(path)
            quantize(target, QUANTIZATIONS[bits])
            mx.eval(target.parameters())
            found[variant, bits] = target, replace(config, quantization=QUANTIZATIONS[bits])
        return found[variant, bits]

    return get


def parts(whole: Whole, variant: str, bits: str, split: Split) -> list[SharedTarget]:
    """Return the parts of all ranks, whose collectives do nothing."""
    target, config = whole(variant, bits)
    found = [shared_target(target, config, split, rank, Alone()) for rank in range(split.size)]
    for each in found:
        fuse_projections(each.layers)
    return found


def attention(target: Target, h: mx.array) -> list[mx.array]:
    """Return the output of each layer's attention for the same inputs."""
    step = Cache(target.config, mx.float32, max_block=8).start(h.shape[1])
    found = []
    for index, (layer, config) in enumerate(zip(target.layers, target.config.layers, strict=True)):
        queries, keys, values = layer.project(h, step.offset)
        view = step.read(config.kv_layer) if keys is None or values is None else step.write(index, keys, values)
        found.append(layer.self_attn(layer.attend(queries, view)))
    return found


def is_close(found: mx.array, expected: mx.array, tolerance: float = 2e-5) -> bool:
    return bool((mx.abs(found - expected).max() <= tolerance * mx.abs(expected).max()).item())


@pytest.mark.parametrize("bits", QUANTIZATIONS)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parts_of_each_module_add_up_to_the_whole(whole: Whole, variant: str, size: int, bits: str) -> None:
    target, config = whole(variant, bits)
    # Three machines cannot share 8 query heads of several K/V heads.
    split = Split("feed-forward" if size == 3 else "tensor", size)
    found = parts(whole, variant, bits, split)
    h = mx.random.normal((1, 5, config.text.hidden_size), key=mx.random.key(1))
    if split.kind == "tensor":
        for layers in zip(attention(target, h), *(attention(each, h) for each in found), strict=True):
            assert is_close(mx.stack(list(layers[1:])).sum(0), layers[0])
    for index, layer in enumerate(target.layers):
        assert is_close(mx.stack([each.layers[index].mlp(h) for each in found]).sum(0), layer.mlp(h))
        if layer.has_experts:
            chosen = layer.router(h)
            outputs = mx.stack([each.layers[index].experts(h, *chosen) for each in found])
            assert is_close(outputs.sum(0), layer.experts(h, *chosen))


def passes(target: Target, tokens: list[int]) -> list[mx.array]:
    """Return the logits of passes as a text has them: a prompt beyond the window, a block, and a block of two texts."""
    quantization = KVQuantization(8, 32, 0)
    caches = [target.make_cache(8), target.make_cache(8, quantization)]
    media = MediaRows([(2, mx.ones((1, 3, target.config.hidden_size)))], None)
    logits = []
    for cache, given in zip(caches, (None, media), strict=True):
        output = target(mx.array([tokens]), cache, 1, 1, media=given)
        logits.append(output.logits)
        cache.set_length(len(tokens))
        output = target(mx.array([tokens[:4]]), cache, 4)
        logits.append(output.logits)
        cache.set_length(len(tokens) + 2)
    outputs = target.packed(mx.array([tokens[:5]]), caches, [2, 3])
    return [*logits, *(each.logits for each in outputs)]


@pytest.mark.parametrize(
    ("variant", "split"),
    [(variant, Split("tensor", 2)) for variant in VARIANTS]
    + [("26b", Split("tensor", 4)), ("e2b", Split("feed-forward", 3, (3, 2, 1))), ("26b", Split("feed-forward", 3))]
    + [(variant, Split("pipeline", 2)) for variant in ("12b", "26b", "31b")],
    ids=str,
)
def test_passes_of_all_ranks_give_the_logits_of_one_process(whole: Whole, variant: str, split: Split) -> None:
    target, config = whole(variant)
    tokens = random_tokens(40)
    expected = passes(target, tokens)
    mx.eval(expected)
    ranks = ThreadRanks(split.size)

    def run(rank: int) -> list[mx.array]:
        shared = shared_target(target, config, split, rank, ranks)
        # The tokens of rank 0 count.
        logits = passes(shared, tokens if rank == 0 else [0] * len(tokens))
        mx.eval(logits)
        return logits

    found = ranks.run(run)
    for logits in found if split.kind != "pipeline" else found[:1]:
        for index, (each, one) in enumerate(zip(logits, expected, strict=True)):
            # With another rounding, a quantized K/V value may be the next one of 8 bits.
            is_quantized = index in (2, 3, 5)
            assert is_close(each, one, 5e-3 if is_quantized else 5e-5), index
    layers = len(config.text.layers)
    of_pass = {"tensor": 2 * layers + 1, "feed-forward": layers + 1, "pipeline": split.size - 1}[split.kind]
    assert Part(config, split, 0).collectives == of_pass + 1
    # One pass has media, whose rows come from rank 0. Fake ranks cannot skip a result that nothing needs.
    assert ranks.counts == [5 * (of_pass + 1) + 1] * split.size


def test_a_part_holds_its_bytes_alone(whole: Whole) -> None:
    target, config = whole("26b", "4bit")
    for split in (Split("tensor", 2), Split("feed-forward", 3), Split("pipeline", 2)):
        shares = []
        for rank in range(split.size):
            part = Part(config, split, rank)
            before = mx.get_active_memory()
            shared = shared_target(target, config, split, rank, Alone())
            held = {name: array.nbytes for name, array in lazy_parameters(shared).items() if part.cut(name) is not None}
            whole_bytes = {name: array.nbytes for name, array in lazy_parameters(target).items()}
            for name, nbytes in held.items():
                assert nbytes == whole_bytes[name] * part.share(name)
            mx.eval(shared.parameters())
            shares.append(sum(held.values()))
            # Arrays that are not cut are those of the whole target.
            assert mx.get_active_memory() - before <= sum(held.values()) + 200_000
        assert split.kind == "pipeline" or min(shares) > 0


def test_parts_follow_the_bandwidths(whole: Whole) -> None:
    config = whole("12b")[1]
    found = [Part(config, Split("feed-forward", 3, (400, 200, 100)), rank) for rank in range(3)]
    assert [each.config.layers[0].intermediate_size // 32 for each in found] == [19, 9, 5]
    layers = [Part(config, Split("pipeline", 2, (3, 1)), rank).layers for rank in range(2)]
    assert layers == [range(1, 4), range(1)]


@pytest.mark.parametrize(
    ("variant", "split", "message"),
    [
        ("12b", ("tensor", 3), "8 attention heads with 2 K/V heads cannot be split over 3 machines: use --split feed"),
        ("e2b", ("pipeline", 2), "E2B and E4B share K/V between layers"),
        ("12b", ("pipeline", 5), "the first machine would have the last 1 of 4 layers"),
        ("12b", ("feed-forward", 40), "layers.0.mlp has 33 quantization groups of 32, which cannot be split over 40"),
        ("12b", ("tensor", 2, (1, 2)), "bandwidths are given, but the split is tensor"),
        ("12b", ("feed-forward", 2, (1, 2, 3)), "bandwidths has 3 numbers, expected one for each of the 2 machines"),
        ("12b", ("feed-forward", 2, (1, -2)), "bandwidths must be numbers greater than 0, found -2"),
        ("12b", ("feed-forward", 2, (1, math.nan)), "bandwidths must be numbers greater than 0, found nan"),
        ("12b", ("other", 2), "split must be one of tensor, feed-forward, pipeline, found 'other'"),
    ],
)
def test_a_split_that_is_not_possible_is_refused(
    whole: Whole, variant: str, split: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(OptionError) as refused:
        Part(whole(variant, "4bit")[1], Split(*split), 0)
    assert message in str(refused.value)


def test_heads_that_end_inside_a_quantization_group_are_refused(tmp_path: Path) -> None:
    _, config = load_target(make_target(tmp_path, "12b"))
    narrow = replace(config, quantization=Quantization(32, 4))
    with pytest.raises(OptionError, match="quantization groups of 32, which attention heads of 16 would cut"):
        Part(narrow, Split("tensor", 4), 0)


@pytest.mark.parametrize("split", [Split("tensor", 2), Split("feed-forward", 3), Split("pipeline", 2)], ids=str)
def test_loading_a_part_takes_the_memory_of_its_plan(tmp_path: Path, split: Split) -> None:
    layers = ["sliding_attention", "full_attention"] * 4
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 2048, "layer_types": layers}
    folder = make_target(tmp_path, "31b", **sizes)
    config = read_target_config(folder)
    part = Part(config, split, 1)
    planned = planner(config, None, max_block=9, prefill_step=512, part=part)(100).resident
    shared = (PipelineTarget if split.kind == "pipeline" else SharedTarget)(config.text, part, Alone())
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    load_shared_target(shared, config)
    assert planned < 0.75 * planner(config, None, max_block=9, prefill_step=512)(100).resident
    assert mx.get_active_memory() - before == pytest.approx(planned, rel=0.02)
    assert mx.get_peak_memory() - before <= 1.1 * planned
