"""Rounds of copied tokens: the text is that of plain decoding, and the state that of a fresh pass."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.streams import LONG, SHORT, Models, assert_same_state
from support.tiny import VARIANTS

import mlx_mtp
from mlx_mtp import GenerationOptions, Sampling
from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.copy_index import CopyIndex
from mlx_mtp.decoding.host import Host
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.gemma4.kv_cache import KVQuantization

TOKENS = 110


def plain_text(target: Any, prompt: list[int], sampling: Sampling, kv: KVQuantization | None = None) -> list[int]:
    stream = Stream(target, None, max_draft_tokens=31, sampling=sampling, kv_quantization=kv)
    tokens = stream.prefill(prompt, 64).tokens
    while len(tokens) < TOKENS:
        tokens += stream.round(0).tokens
    return tokens


def copied_text(
    target: Any, drafter: Any, prompt: list[int], plain: list[int], k: int, **options: Any
) -> tuple[list[int], Stream, int]:
    """Decode with copies of the plain text, of which some are wrong at a random place. Rounds of the drafter mix in."""
    rng = np.random.default_rng(k)
    stream = Stream(target, drafter, max_draft_tokens=31, **options)
    tokens = stream.prefill(prompt, 64).tokens
    accepted = 0
    while len(tokens) < TOKENS:
        if rng.random() < 0.2:
            tokens += stream.round(0 if drafter is None else 2).tokens
            continue
        count = min(k, stream.longest_draft())
        copied = (plain + [3] * 40)[len(tokens) : len(tokens) + count]
        if count and rng.random() < 0.5:
            copied[rng.integers(count)] ^= 1
        report = stream.round(count, copied=copied)
        assert report.copied == (count > 0)
        accepted += report.accepted
        tokens += report.tokens
    return tokens, stream, accepted


@pytest.mark.parametrize("k", [2, 15, 31])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_text_is_plain_text(tiny_models: Models, variant: str, k: int) -> None:
    target, drafter = tiny_models(variant)
    prompt = LONG if k == 15 else SHORT
    plain = plain_text(target, prompt, Sampling())
    rounds = CompiledRounds() if k != 2 else None
    tokens, stream, accepted = copied_text(target, drafter, prompt, plain, k, rounds=rounds)
    assert tokens[:TOKENS] == plain
    assert accepted > 20
    assert_same_state(stream, target, prompt + tokens[:-1])


@pytest.mark.parametrize("variant", ["e2b", "31b"])
def test_coupled_and_quantized_text_is_plain_text(tiny_models: Models, variant: str) -> None:
    target, drafter = tiny_models(variant)
    for sampling, kv in (
        (Sampling(temperature=1.0, acceptance="coupled", seed=4), None),
        (Sampling(repetition_penalty=1.3, presence_penalty=0.2), None),
        (Sampling(), KVQuantization(8, 32, 70)),
    ):
        plain = plain_text(target, SHORT, sampling, kv)
        options = {"sampling": sampling, "kv_quantization": kv, "rounds": CompiledRounds()}
        tokens, _, accepted = copied_text(target, drafter, SHORT, plain, 15, **options)
        assert tokens[:TOKENS] == plain
        assert accepted > 20


def test_a_stop_token_in_a_copy_ends_the_text(tiny_models: Models) -> None:
    target, _ = tiny_models("12b")
    plain = plain_text(target, SHORT, Sampling())
    stop = next(token for token in plain[10:] if token not in plain[:10])
    stream = Stream(target, None, max_draft_tokens=31)
    stream.prefill(SHORT, 64)
    report = stream.round(31, frozenset([stop]), copied=plain[1:32])
    expected = plain[1 : plain.index(stop) + 1]
    assert report.tokens == expected[:32]
    assert stream.cache.length == len(SHORT) + len(report.tokens)


CODE = "def first(value):\n    return value + 1\n\n\ndef second(other):\n    return other * 2\n\n\n"


@pytest.fixture(scope="module")
def models() -> dict[str, mlx_mtp.Model]:
    return {"auto": mlx_mtp.load(mlx_mtp.DEMO_PAIR), "none": mlx_mtp.load(mlx_mtp.DEMO_PAIR, drafter="none")}


# Text that repeats itself: the demo pair's greedy text does. A grammar makes it certain.
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalties": {"sampling": Sampling(repetition_penalty=1.02, frequency_penalty=0.01)},
    "coupled": {"sampling": Sampling(temperature=0.2, acceptance="coupled", seed=1)},
    "regex": {"regex": r"(alpha beta gamma delta\n){4,30}"},
    "processor": {"logits_processors": [lambda tokens, logits: logits * 1.0]},
    "log probabilities": {"logprobs": 2},
}


@pytest.mark.parametrize(
    ("case", "drafter"), [*((case, "auto") for case in CASES), ("greedy", "none"), ("regex", "none")]
)
def test_a_user_gets_the_same_text_with_copies(models: dict[str, mlx_mtp.Model], case: str, drafter: str) -> None:
    model = models[drafter]
    options = GenerationOptions(max_tokens=80, ignore_eos="regex" not in CASES[case])
    options = replace(options, **({"sampling": Sampling()} | CASES[case]))
    plain = model.generate(CODE * 2, options, num_draft_tokens=0)
    found = model.generate(CODE * 2, options)
    assert found.tokens == plain.tokens
    copied = found.last.stats.copied
    print(f"{case}: {copied}, {found.last.stats.rounds} rounds for {len(found.tokens)} tokens")
    assert copied.rounds > 0
    assert copied.accepted > 10
    assert found.last.stats.rounds < plain.last.stats.rounds
    assert plain.last.stats.copied.rounds == 0


def test_a_copy_that_a_grammar_cuts_has_the_length_of_other_copies(models: dict[str, mlx_mtp.Model]) -> None:
    parts = models["auto"].parts
    allowed = parts.tokenizer.encode("alpha beta gamma delta", add_special_tokens=False)
    forbidden = parts.tokenizer.encode("ZZ" * 9, add_special_tokens=False)
    options = GenerationOptions(regex="alpha beta gamma delta ?")
    for count in range(len(allowed) + 1):
        host = Host(parts.guides.guide(options, None, frozenset([1])))
        copied, masks = host.cut(allowed[:count] + forbidden)
        kept = max((k for k in (2, 4, 7, 15) if k <= count), default=count)
        assert copied == allowed[:kept]
        assert masks is not None
        assert masks.shape[0] == kept + 1
    assert len(allowed) > 7


def test_mapped_tables_are_read_ahead(tmp_path: Path, tiny_pair: Callable[[str], Path]) -> None:
    """The host knows copied tokens, so it does not wait for the device to read their rows."""
    folder = tiny_pair("e2b")
    model = mlx_mtp.load(folder / "target", drafter="none", per_layer_embeddings="mapped")
    prompt = SHORT * 2
    plain = model.generate(prompt, max_tokens=60, num_draft_tokens=0, ignore_eos=True)
    found = model.generate(prompt, max_tokens=60, ignore_eos=True)
    assert found.tokens == plain.tokens
    stats = found.last.stats
    assert stats.copied.rounds > 0
    assert stats.host_reads == stats.rounds


def test_a_prompt_read_before_keeps_its_index(
    models: dict[str, mlx_mtp.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later turn indexes its own tokens only, and copies from the whole text as without the prompt cache."""
    model = models["auto"]
    prompt = model.encode(CODE * 3)
    first = model.generate(prompt, max_tokens=20, ignore_eos=True)
    following = prompt + first.tokens + model.encode(CODE)[1:]
    indexed: list[int] = []
    extend = CopyIndex.extend

    def counted(index: CopyIndex, tokens: list[int]) -> None:
        indexed.append(len(tokens))
        extend(index, tokens)

    monkeypatch.setattr(CopyIndex, "extend", counted)
    options: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True}
    again = model.generate(following, **options)
    assert 0 < sum(indexed) < len(following) - len(prompt) + 2
    indexed.clear()
    alone = model.generate(following, **options, reuse_prompt=False)
    assert sum(indexed) > len(following)
    assert again.tokens == alone.tokens
    assert again.last.stats.copied == alone.last.stats.copied


def test_an_exact_model_copies_at_most_seven_tokens(models: dict[str, mlx_mtp.Model]) -> None:
    model = mlx_mtp.load(mlx_mtp.DEMO_PAIR, exact=True)
    plain = model.generate(CODE, max_tokens=80, num_draft_tokens=0, ignore_eos=True)
    found = model.generate(CODE, max_tokens=80, ignore_eos=True)
    assert found.tokens == plain.tokens
    copied = found.last.stats.copied
    assert 0 < copied.drafted <= 7 * copied.rounds


def test_a_fixed_number_of_draft_tokens_copies_nothing(models: dict[str, mlx_mtp.Model]) -> None:
    last = models["auto"].generate(CODE, max_tokens=40, num_draft_tokens=2).last
    assert last.stats.copied.rounds == 0


def test_another_value_is_an_error() -> None:
    with pytest.raises(mlx_mtp.OptionError, match="copy_drafts must be auto or off, found 'on'"):
        GenerationOptions(copy_drafts="on")  # type: ignore[arg-type]
