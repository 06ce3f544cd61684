"""The models against transformers in float32: logits, hidden states, greedy tokens and drafts."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten, tree_unflatten
from numpy.typing import NDArray
from support.quiet_torch import quiet_torch
from support.tiny import VARIANTS, WINDOW, load_drafter, load_target, make_drafter, make_target, random_tokens
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

from mlx_mtp.checkpoints.config import LayerType
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.decoding.text_loop import decode
from mlx_mtp.gemma4.drafter import Draft, DraftContext, Drafter, DraftInputs
from mlx_mtp.gemma4.kv_cache import Cache, ring_positions
from mlx_mtp.gemma4.target import Target

TOLERANCE = 1e-4
MAX_BLOCK = 8
# The passes have these lengths, 75 tokens in all. The window is 16.
PASSES = {
    "one pass": [75],
    "prefill, then single rows": [11] + [1] * 64,
    "2 rows": [11] + [2] * 32,
    "4 rows": [11] + [4] * 16,
    "8 rows": [11] + [8] * 8,
    "mixed": [5, 1, 30, 1, 7, 23, 8],
}
# The lengths are below the window, near the window, near the window + 1 rows that the drafter sees, and far beyond.
CONTEXTS = (3, 15, 16, 17, 18, 40, 75)


@dataclass(frozen=True)
class Pair:
    """One variant's target and drafter, in this project and in transformers."""

    variant: str
    target_folder: Path
    drafter_folder: Path
    target: Target
    drafter: Drafter
    hf_target: Any
    hf_drafter: Any


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_torch():
        yield


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    variant = request.param
    folder = tmp_path_factory.mktemp(variant)
    target_folder = make_target(folder / "target", variant)
    drafter_folder = make_drafter(folder / "drafter", variant)
    return Pair(
        variant,
        target_folder,
        drafter_folder,
        load_target(target_folder)[0],
        load_drafter(drafter_folder)[0],
        load_reference(target_folder, "ForConditionalGeneration", unified=variant == "12b"),
        load_reference(drafter_folder, "AssistantForCausalLM", unified=variant == "12b"),
    )


def load_reference(folder: Path, kind: str, *, unified: bool) -> Any:
    """Load the checkpoint in transformers. Its tensors must match transformers' exactly, except for towers."""
    cls = getattr(transformers, f"Gemma4{'Unified' if unified else ''}{kind}")
    model, info = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(key.startswith("model.vision_tower.") for key in info["unexpected_keys"])
    # There is no stop token, so every comparison has its full length.
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, num_assistant_tokens=6)
    return model.eval()


def new_cache(target: Target) -> Cache:
    return Cache(target.config, target.dtype, max_block=MAX_BLOCK)


def run_pass(target: Target, cache: Cache, tokens: list[int], kept: int | None = None) -> tuple[mx.array, mx.array]:
    """Run one pass and keep its first `kept` tokens (all, if None). Return their hidden states and final logits."""
    kept = len(tokens) if kept is None else kept
    output = target(mx.array([tokens], mx.int32), cache, logit_rows=len(tokens))
    hidden, logits = output.hidden[:, :kept], target.soft_cap(output.logits)[:, :kept]
    mx.eval(hidden, logits, cache.arrays())
    cache.set_length(cache.length + kept)
    return hidden, logits


def reference_pass(pair: Pair, tokens: list[int]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Run a full pass of transformers without a cache. Return hidden states after the final norm, and logits."""
    output = pair.hf_target(torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    return output.hidden_states[-1].numpy(), output.logits.numpy()


def difference(ours: mx.array, reference: Any) -> float:
    ours_array, reference_array = np.array(ours), np.array(reference)
    assert ours_array.shape == reference_array.shape
    return float(np.abs(ours_array - reference_array).max())


@pytest.mark.parametrize("lengths", PASSES.values(), ids=PASSES.keys())
def test_target_equals_reference(pair: Pair, lengths: list[int]) -> None:
    tokens = random_tokens(75)
    cache = new_cache(pair.target)
    bounds = pairwise(accumulate(lengths, initial=0))
    results = [run_pass(pair.target, cache, tokens[start:end]) for start, end in bounds]
    hidden, logits = reference_pass(pair, tokens)
    assert difference(mx.concatenate([h for h, _ in results], axis=1), hidden) < TOLERANCE
    assert difference(mx.concatenate([x for _, x in results], axis=1), logits) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_scales_before_norms(variant: str, tmp_path: Path) -> None:
    """A large epsilon in the norms reveals factors that the norms would otherwise cancel."""
    make_target(tmp_path, variant, rms_norm_eps=0.1)
    tokens = random_tokens(30)
    target = load_target(tmp_path)[0]
    reference = load_reference(tmp_path, "ForConditionalGeneration", unified=variant == "12b")
    expected = reference(torch.tensor([tokens]), use_cache=False).logits.numpy()
    assert difference(run_pass(target, new_cache(target), tokens)[1], expected) < TOLERANCE


def test_target_forgets_rejected_rows(pair: Pair) -> None:
    """Passes read 1 to 8 rows, and only the first few rows belong to the text. The other rows leave no trace."""
    tokens, wrong = random_tokens(75), random_tokens(MAX_BLOCK, seed=1)
    rng = np.random.default_rng(0)
    cache = new_cache(pair.target)
    results = [run_pass(pair.target, cache, tokens[:11])]
    while (done := cache.length) < len(tokens):
        rows = int(rng.integers(1, MAX_BLOCK + 1))
        kept = min(int(rng.integers(1, rows + 1)), len(tokens) - done)
        block = tokens[done : done + kept] + wrong[: rows - kept]
        results.append(run_pass(pair.target, cache, block, kept))
    hidden, logits = reference_pass(pair, tokens)
    assert difference(mx.concatenate([h for h, _ in results], axis=1), hidden) < TOLERANCE
    assert difference(mx.concatenate([x for _, x in results], axis=1), logits) < TOLERANCE


def test_logits_for_last_rows_only(pair: Pair) -> None:
    tokens = mx.array([random_tokens(20)], mx.int32)
    every = pair.target(tokens, new_cache(pair.target), logit_rows=20).logits
    assert pair.target(tokens, new_cache(pair.target)).logits.shape == (1, 0, every.shape[-1])
    assert difference(pair.target(tokens, new_cache(pair.target), logit_rows=3).logits, every[:, -3:]) < TOLERANCE


def valid_rows(cache: Cache, layer_type: LayerType) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the K/V rows that the drafter may read, in the order of their positions, without stale rows."""
    layer = cache.config.last_kv_layer(layer_type)
    if layer_type == "full_attention":
        slots = np.arange(cache.length)
    else:
        positions = np.array(ring_positions(cache.offset, cache.slots))
        slots = np.argsort(positions)
        slots = slots[positions[slots] >= 0]
    keys, values = (np.array(buffers[layer])[:, :, slots] for buffers in (cache.keys, cache.values))
    return torch.from_numpy(keys), torch.from_numpy(values)


def reference_step(
    pair: Pair, cache: Cache, token: int, hidden: mx.array, position: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Run one draft step in transformers on this project's K/V. Return the projected hidden state and logits."""
    embedding = pair.hf_target.get_input_embeddings()(torch.tensor([[token]]))
    output = pair.hf_drafter(
        inputs_embeds=torch.cat([embedding, torch.from_numpy(np.array(hidden))], dim=-1),
        position_ids=torch.tensor([[position]]),
        shared_kv_states={name: valid_rows(cache, name) for name in ("full_attention", "sliding_attention")},
    )
    return output.last_hidden_state.numpy(), output.logits[0].numpy()


def check_candidates(drafter: Drafter, state: mx.array, logits: NDArray[Any]) -> int:
    """Compare a head's candidates with transformers' logits, [1, vocab]. Return the best token."""
    ids, ours = drafter.candidates(state)
    if ids is None:
        assert difference(ours, logits) < TOLERANCE
        return int(ours.argmax())
    # transformers sets the logits of all other tokens to one value below the candidates' logits.
    assert sorted(np.array(ids[0]).tolist()) == np.flatnonzero(logits[0] > logits[0].min()).tolist()
    assert difference(ours, logits[:, np.array(ids[0])]) < TOLERANCE
    return int(ids[0, ours[0].argmax()])


@pytest.mark.parametrize("length", CONTEXTS)
def test_drafter_equals_reference(pair: Pair, length: int) -> None:
    """Several steps are at one position. Each step gets this project's last step. Earlier passes left rejected rows."""
    tokens = random_tokens(length, seed=length)
    cache = new_cache(pair.target)
    run_pass(pair.target, cache, tokens[:2])
    hidden, logits = run_pass(pair.target, cache, tokens[2:])
    run_pass(pair.target, cache, random_tokens(MAX_BLOCK, seed=1), kept=0)
    hidden, token = hidden[:, -1:], int(logits[0, -1].argmax())
    context = pair.drafter.draft_context(cache)
    for _ in range(4):
        step = pair.drafter(pair.target.embed(mx.array([[token]])), hidden, context)
        expected_hidden, expected_logits = reference_step(pair, cache, token, hidden, length)
        assert difference(step.hidden, expected_hidden) < TOLERANCE
        token = check_candidates(pair.drafter, step.state, expected_logits)
        assert token == expected_logits.argmax()
        hidden = step.hidden


def test_draft_position(pair: Pair, tmp_path: Path) -> None:
    """`bonus` is the index of the bonus token, which is the number of positions in the cache. `last` is one less."""
    last = load_drafter(make_drafter(tmp_path, pair.variant, draft_position="last"))[0]
    cache = new_cache(pair.target)
    hidden = run_pass(pair.target, cache, random_tokens(30))[0][:, -1:]
    embedding = pair.target.embed(mx.array([[100]]))
    steps = {}
    for drafter, position in ((pair.drafter, 30), (last, 29)):
        step = drafter(embedding, hidden, drafter.draft_context(cache))
        expected_hidden, expected_logits = reference_step(pair, cache, 100, hidden, position)
        assert difference(step.hidden, expected_hidden) < TOLERANCE
        check_candidates(drafter, step.state, expected_logits)
        steps[position] = step.hidden
    assert difference(steps[30], steps[29]) > 100 * TOLERANCE


def reference_drafts(pair: Pair, tokens: list[int]) -> list[int]:
    """Return the bonus token and drafts of assisted generation's first round. All inputs are transformers' own."""
    prompt = torch.tensor([tokens])
    output = pair.hf_target(prompt, use_cache=True, output_hidden_states=True, return_shared_kv_states=True)
    generator = SinglePositionMultiTokenCandidateGenerator(
        pair.hf_drafter, pair.hf_target.get_input_embeddings(), transformers.GenerationConfig(max_length=1000)
    )
    with_bonus: Any = torch.cat([prompt, output.logits[:, -1:].argmax(-1)], dim=1)
    candidates, _ = generator.get_candidates(with_bonus, {}, output, is_first_iteration=False, n_last_matches=0)
    drafts: list[int] = candidates[0, len(tokens) :].tolist()
    return drafts


@pytest.mark.parametrize("length", [11, 40])
def test_first_drafts_equal_reference(pair: Pair, length: int) -> None:
    tokens = random_tokens(length)
    cache = new_cache(pair.target)
    hidden, logits = run_pass(pair.target, cache, tokens)
    bonus = logits[:, -1:].argmax(-1)
    inputs = DraftInputs(bonus, hidden[:, -1:], pair.drafter.draft_context(cache), 6)
    drafted = pair.drafter.draft(pair.target, inputs)
    assert [bonus.item(), *np.array(drafted.tokens)[0].tolist()] == reference_drafts(pair, tokens)


class ScriptedDrafter:
    """A drafter that drafts a known continuation with some wrong tokens, so that rounds accept 0 to k tokens."""

    def __init__(self, prompt: int, continuation: list[int]) -> None:
        self.prompt = prompt
        wrong = np.random.default_rng(0).random(len(continuation)) < 0.3
        self.script = [0 if w else token for token, w in zip(continuation, wrong, strict=True)] + [0] * MAX_BLOCK

    def draft_context(self, cache: Cache) -> int:
        return cache.length - self.prompt + 1

    def draft(self, target: Target, inputs: Any) -> Draft:
        return Draft(mx.array([self.script[inputs.context : inputs.context + inputs.k]], mx.int32))


class ObservedDrafter(ScriptedDrafter):
    """A scripted drafter that records a real drafter's drafts, by the length of the text in the cache."""

    def __init__(self, drafter: Drafter, prompt: int, continuation: list[int]) -> None:
        super().__init__(prompt, continuation)
        self.drafter = drafter
        self.drafts: dict[int, list[int]] = {}
        self.real_context: DraftContext | None = None

    def draft_context(self, cache: Cache) -> int:
        self.real_context = self.drafter.draft_context(cache)
        return super().draft_context(cache)

    def draft(self, target: Target, inputs: Any) -> Draft:
        assert self.real_context is not None
        drafted = self.drafter.draft(target, inputs._replace(context=self.real_context, k=6))
        self.drafts[inputs.context - 1 + self.prompt] = [int(inputs.token), *np.array(drafted.tokens)[0].tolist()]
        self.real_context = None
        return super().draft(target, inputs)


def generate(pair: Pair, drafter: Any, prompt: list[int], count: int, k: int) -> tuple[list[int], set[int]]:
    """Return greedy tokens, and the set of the rounds' numbers of accepted draft tokens."""
    stream = Stream(pair.target, drafter, max_draft_tokens=k)
    rounds = list(
        decode(
            stream,
            prompt,
            max_tokens=count,
            num_draft_tokens=k,
            stop_ids=frozenset(),
            prefill_step_size=WINDOW + 5,
        )
    )
    return [token for r in rounds for token in r.tokens], {r.accepted for r in rounds}


@pytest.mark.parametrize("length", [11, 40])
def test_greedy_tokens_equal_reference(pair: Pair, length: int) -> None:
    prompt = random_tokens(length, seed=5)
    expected = pair.hf_target.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0, length:].tolist()
    assert len(set(expected)) > 20, "the text loops, the test proves little"
    assert generate(pair, None, prompt, 60, 0)[0] == expected
    # A random drafter is nearly always wrong and makes one round per token. The text is shorter for it.
    assert generate(pair, pair.drafter, prompt, 30, 3)[0] == expected[:30]
    tokens, accepted = generate(pair, ScriptedDrafter(length, expected), prompt, 60, 3)
    assert tokens == expected
    assert accepted == {0, 1, 2, 3}


def test_drafts_after_rounds_equal_reference(pair: Pair) -> None:
    """After rounds that accept 0 to 3 draft tokens, drafts equal transformers' drafts on a fresh read of the text."""
    prompt = random_tokens(11)
    plain = generate(pair, None, prompt, 80, 0)[0]
    drafter = ObservedDrafter(pair.drafter, len(prompt), plain)
    tokens, accepted = generate(pair, drafter, prompt, 80, 3)
    assert tokens == plain
    assert accepted == {0, 1, 2, 3}
    text = prompt + tokens
    assert len(drafter.drafts) > 20
    for length, drafts in drafter.drafts.items():
        assert drafts == reference_drafts(pair, text[:length])


def dequantized(module: nn.Module, make: Any) -> Any:
    """Return a new module with the dequantized weights of a quantized module."""
    weights = dict(tree_flatten(module.parameters()))
    for name, layer in module.named_modules():
        if "scales" in layer:
            weights[f"{name}.weight"] = mx.dequantize(
                layer.weight, layer.scales, layer.biases, group_size=layer.group_size, bits=layer.bits, mode=layer.mode
            )
            del weights[f"{name}.scales"], weights[f"{name}.biases"]
    plain = make()
    plain.update(tree_unflatten(list(weights.items())), strict=True)
    mx.eval(plain.parameters())
    return plain


def test_quantized_drafter(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantized drafter equals one with dequantized weights. A centroid head dequantizes only its candidates."""
    quantized = load_drafter(pair.drafter_folder)[0]
    nn.quantize(quantized, group_size=64, bits=4)
    assert isinstance(quantized.model.embed_tokens, nn.QuantizedEmbedding)
    plain = dequantized(quantized, lambda: Drafter(quantized.config))
    sizes: list[int] = []
    dequantize = mx.dequantize

    def counted(weight: mx.array, *args: Any, **options: Any) -> mx.array:
        sizes.append(weight.shape[0])
        return dequantize(weight, *args, **options)

    monkeypatch.setattr(mx, "dequantize", counted)
    cache = new_cache(pair.target)
    hidden = run_pass(pair.target, cache, random_tokens(30))[0][:, -1:]
    context: DraftContext = quantized.draft_context(cache)
    for token in (50, 51, 52):
        embedding = pair.target.embed(mx.array([[token]]))
        step, expected = quantized(embedding, hidden, context), plain(embedding, hidden, context)
        assert difference(step.hidden, expected.hidden) < TOLERANCE
        (ids, logits), (expected_ids, expected_logits) = quantized.candidates(step.state), plain.candidates(step.state)
        if ids is None:
            assert expected_ids is None
        else:
            assert ids.tolist() == expected_ids.tolist()
        assert difference(logits, expected_logits) < TOLERANCE
        hidden = step.hidden
    centroids = quantized.config.num_centroids
    candidates = quantized.config.centroid_top_k * quantized.config.text.vocab_size // centroids if centroids else 0
    assert sizes == [candidates] * 3 * bool(centroids)


def test_quantized_target(pair: Pair) -> None:
    """A target with all modules quantized equals a target with the dequantized weights."""
    quantized = load_target(pair.target_folder)[0]
    nn.quantize(quantized, group_size=64, bits=4)
    plain = dequantized(quantized, lambda: Target(quantized.config))
    logits = [run_pass(model, new_cache(model), random_tokens(30))[1] for model in (quantized, plain)]
    assert difference(logits[0], logits[1]) < TOLERANCE
