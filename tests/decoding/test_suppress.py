"""Tokens that `generation_config.json` suppresses never appear with any option, and nothing else changes."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from mlx_lm.tokenizer_utils import TokenizerWrapper
from support.tiny import FIRST_TEXT_ID, VOCAB_SIZE, load_drafter, load_target, random_tokens

import mlx_mtp
from mlx_mtp.bench.operations import operations, round_outputs
from mlx_mtp.decoding.sampling import AcceptanceRule
from mlx_mtp.decoding.stream import Stream
from mlx_mtp.decoding.text_loop import decode
from mlx_mtp.gemma4.draft_vocab import prune
from mlx_mtp.gemma4.drafter import Draft, Drafter

TinyPair = Callable[[str], Path]
PROMPT = random_tokens(20, seed=3)
TOKENS = 24
HOT = mlx_mtp.Sampling(temperature=1.5, seed=3)


@pytest.fixture(scope="module", params=["e2b", "31b"])
def variant(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def plain(tiny_pair: TinyPair, variant: str) -> mlx_mtp.Model:
    """A model that suppresses nothing."""
    return mlx_mtp.load(tiny_pair(variant) / "target")


@pytest.fixture(scope="module")
def suppressed(plain: mlx_mtp.Model) -> tuple[int, ...]:
    """Tokens that the model prefers: all tokens of its greedy text and of a sampled text."""
    texts = [generate(plain, 0), generate(plain, 0, sampling=HOT)]
    return tuple(sorted({token for text in texts for token in text}))


@pytest.fixture(scope="module")
def folder(
    tiny_pair: TinyPair, variant: str, suppressed: Sequence[int], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    pair = tmp_path_factory.mktemp("suppress") / variant
    shutil.copytree(tiny_pair(variant), pair)
    file = pair / "target" / "generation_config.json"
    # As published, the list also has ids that only a larger vocabulary has.
    fields = {"suppress_tokens": [*suppressed, 258883, 258882]}
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return pair / "target"


@pytest.fixture(scope="module")
def model(folder: Path) -> mlx_mtp.Model:
    return mlx_mtp.load(folder)


def generate(model: mlx_mtp.Model, k: int, **options: Any) -> list[int]:
    return model.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True, num_draft_tokens=k, **options).tokens


def test_greedy_text_is_that_of_transformers(folder: Path, model: mlx_mtp.Model, plain: mlx_mtp.Model) -> None:
    assert model.config.suppress_tokens
    assert generate(plain, 0)[0] in model.config.suppress_tokens
    reference = transformers.Gemma4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    config = transformers.GenerationConfig(
        suppress_tokens=list(model.config.suppress_tokens), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0
    )
    with torch.no_grad():
        output = reference.generate(torch.tensor([PROMPT]), generation_config=config)
    expected = output[0, len(PROMPT) :].tolist()
    for k in (0, 1, 4):
        assert generate(model, k) == expected


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("acceptance", ["block", "coupled"])
def test_sampled_text_is_that_of_a_bias_of_minus_infinity(
    model: mlx_mtp.Model, plain: mlx_mtp.Model, acceptance: AcceptanceRule, k: int
) -> None:
    """A bias reaches the same distribution in another way. The same draws give the same tokens."""
    options = replace(HOT, acceptance=acceptance, top_k=200, top_p=0.99)
    tokens = generate(model, k, sampling=options)
    assert not set(tokens) & set(model.config.suppress_tokens)
    biased = replace(options, logit_bias=dict.fromkeys(model.config.suppress_tokens, float("-inf")))
    assert tokens == generate(plain, k, sampling=biased)


def test_no_option_brings_them_back(model: mlx_mtp.Model) -> None:
    for sampling in (mlx_mtp.Sampling(), HOT):
        liked = replace(sampling, logit_bias=dict.fromkeys(model.config.suppress_tokens, 1e30), repetition_penalty=0.5)
        for k in (0, 3):
            assert not set(generate(model, k, sampling=liked)) & set(model.config.suppress_tokens)


def test_log_probabilities_are_of_the_other_tokens(model: mlx_mtp.Model) -> None:
    response = model.generate(PROMPT, max_tokens=1, logprobs=VOCAB_SIZE).last
    assert response.logprobs is not None
    found = dict(response.logprobs.top)
    assert [found[token] for token in model.config.suppress_tokens] == [-np.inf] * len(model.config.suppress_tokens)
    assert sum(np.exp(list(found.values()))) == pytest.approx(1, abs=1e-5)
    assert response.logprobs.token == max(found.values())


@pytest.mark.parametrize("kind", ["centroids", "dead clusters", "dense", "pruned"])
@pytest.mark.parametrize("sampling", [mlx_mtp.Sampling(), HOT], ids=["greedy", "sampled"])
def test_they_are_not_drafted(
    tiny_pair: TinyPair, kind: str, sampling: mlx_mtp.Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No draft step is used for a token that cannot be accepted."""
    folder = tiny_pair("e2b" if kind in ("centroids", "dead clusters") else "31b")
    target, drafter = load_target(folder / "target")[0], load_drafter(folder / "target-assistant")[0]
    tokens = list(range(0, VOCAB_SIZE, 2))
    if kind == "dead clusters":
        assert drafter.masked_embedding is not None
        # The tokens that can still be drafted are all in four of 32 clusters.
        tokens = np.array(drafter.masked_embedding.token_ordering).tolist()[64:]
    if kind == "pruned":
        prune(drafter, np.arange(64, dtype=np.int32))
        tokens = list(range(70))
    target.suppress(tokens)
    drafter.suppress(tokens)
    drafted, draft = [], Drafter.draft

    def recorded(self: Drafter, *args: Any, **options: Any) -> Draft:
        result = draft(self, *args, **options)
        drafted.append(result.tokens)
        return result

    monkeypatch.setattr(Drafter, "draft", recorded)
    stream = Stream(target, drafter, max_draft_tokens=3, sampling=sampling)
    rounds = decode(stream, PROMPT, max_tokens=TOKENS, num_draft_tokens=3, stop_ids=frozenset(), prefill_step_size=512)
    emitted = {token for step in rounds for token in step.tokens}
    seen = {token for block in drafted for token in np.array(block)[0].tolist()}
    assert seen
    assert not (emitted | seen) & set(tokens)


def _tokenizer(folder: Path) -> TokenizerWrapper:
    return mlx_mtp.load(folder / "target", "none").tokenizer


def test_a_grammar_goes_on_without_them(model: mlx_mtp.Model) -> None:
    for k in (0, 3):
        text = model.generate(PROMPT, regex="[a-z ]{30}", max_tokens=40, num_draft_tokens=k)
        assert len(text.text) == 30
        assert not set(text.tokens) & set(model.config.suppress_tokens)


def test_a_grammar_of_nothing_else_is_an_error(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """The grammar needs the letter q, which is a token alone or with a vowel."""
    shutil.copytree(tiny_pair("31b") / "target", tmp_path / "it")
    tokenizer = _tokenizer(tiny_pair("31b"))
    texts = {token: tokenizer.decode([token]) for token in range(FIRST_TEXT_ID, VOCAB_SIZE)}
    file = tmp_path / "it" / "generation_config.json"
    fields = {"suppress_tokens": [token for token, text in texts.items() if "q" in text]}
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    model = mlx_mtp.load(tmp_path / "it", tiny_pair("31b") / "target-assistant")
    message = "the other options exclude every token that the grammar allows"
    with pytest.raises(mlx_mtp.OptionError, match=message):
        model.generate(PROMPT, regex="q+")
    for k in (0, 3):
        with pytest.raises(mlx_mtp.OptionError, match=message):
            model.generate(PROMPT, regex="aq", num_draft_tokens=k)


def test_what_it_costs(tiny_pair: TinyPair) -> None:
    """The cost is one selection for all verified rows and one per draft step. An empty list costs nothing."""
    target, _ = load_target(tiny_pair("31b") / "target")
    drafter, _ = load_drafter(tiny_pair("31b") / "target-assistant")
    before = operations(round_outputs(target, drafter, 3, compiled=False))
    for model in (target, drafter):
        model.suppress([])
    assert operations(round_outputs(target, drafter, 3, compiled=False)) == before
    for model in (target, drafter):
        model.suppress([5, 9])
    more = operations(round_outputs(target, drafter, 3, compiled=False)) - before
    assert more.pop("Select") == 4
    # The other operations are constants and their types.
    assert set(more) <= {"AsType", "Full", "Load"}


def test_a_conversion_keeps_them(folder: Path, model: mlx_mtp.Model, tmp_path: Path) -> None:
    from mlx_mtp.convert.converter import Options, convert

    convert(Options(str(folder), tmp_path / "out"))
    converted = mlx_mtp.load(tmp_path / "out")
    assert converted.config.suppress_tokens == model.config.suppress_tokens
    assert not set(generate(converted, 2)) & set(model.config.suppress_tokens)
    assert converted.target.without_suppressed(mx.zeros((1, VOCAB_SIZE))).min().item() == -np.inf
