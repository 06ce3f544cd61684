"""Targets whose output head is not their embedding, as after a fine-tune that trained the head."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file
from support.tiny import random_tokens

import mlx_mtp
from mlx_mtp.bench.cli import pass_bytes
from mlx_mtp.convert.converter import Options, convert
from mlx_mtp.convert.quantization import WeightOptions
from mlx_mtp.decoding.exact import check_exact, make_exact

TinyPair = Callable[[str], Path]
PROMPT = random_tokens(20, seed=4)
TOKENS = 24
EMBEDDING = "model.language_model.embed_tokens.weight"
GREEDY: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True}


def write(pair: Path, to: Path, *, outer: bool, inner: bool, equal: bool = False) -> Path:
    """Copy a pair and give its target a head. The head differs from the embedding unless `equal` is set."""
    shutil.copytree(pair, to)
    file = to / "target" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors[EMBEDDING] if equal else np.roll(tensors[EMBEDDING], 7, axis=0).copy()
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((to / "target" / "config.json").read_text())
    config["tie_word_embeddings"] = outer
    config["text_config"]["tie_word_embeddings"] = inner
    (to / "target" / "config.json").write_text(json.dumps(config))
    return to / "target"


@pytest.fixture(scope="module")
def folder(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tiny_pair("31b"), tmp_path_factory.mktemp("head") / "pair", outer=False, inner=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> mlx_mtp.Model:
    return mlx_mtp.load(folder)


def reference(folder: Path) -> list[int]:
    """Return the greedy tokens of transformers."""
    model = transformers.Gemma4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    config = transformers.GenerationConfig(max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        output = model.generate(torch.tensor([PROMPT]), generation_config=config)
    tokens: list[int] = output[0, len(PROMPT) :].tolist()
    return tokens


def test_text_is_that_of_transformers(tiny_pair: TinyPair, folder: Path, model: mlx_mtp.Model) -> None:
    expected = reference(folder)
    tied = mlx_mtp.load(tiny_pair("31b") / "target", "none")
    assert tied.generate(PROMPT, **GREEDY).tokens != expected
    for k in (0, 1, 4):
        assert model.generate(PROMPT, num_draft_tokens=k, **GREEDY).tokens == expected


def test_the_bytes_of_a_pass(model: mlx_mtp.Model) -> None:
    """A pass reads only one row of the embedding, because the embedding is not the head here."""
    weights: dict[str, mx.array] = tree_flatten(model.target.parameters(), destination={})  # type: ignore[assignment]
    assert pass_bytes(model) == sum(array.nbytes for name, array in weights.items() if "embed_tokens" not in name)


def test_a_head_that_config_says_is_tied(
    tiny_pair: TinyPair, tmp_path: Path, model: mlx_mtp.Model, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers uses the head if it differs from the embedding. A message reports this."""
    folder = write(tiny_pair("31b"), tmp_path / "pair", outer=True, inner=True)
    tokens = mlx_mtp.load(folder).generate(PROMPT, num_draft_tokens=2, **GREEDY).tokens
    assert tokens == reference(folder) == model.generate(PROMPT, num_draft_tokens=0, **GREEDY).tokens
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("mlx_mtp")]
    assert str(folder) in message
    assert message.endswith("lm_head.weight is used")


def test_a_head_equal_to_the_embedding_is_no_head_of_its_own(
    tiny_pair: TinyPair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tied = mlx_mtp.load(tiny_pair("31b") / "target", "none").generate(PROMPT, **GREEDY).tokens
    for outer in (False, True):
        folder = write(tiny_pair("31b"), tmp_path / str(outer), outer=outer, inner=outer, equal=True)
        model = mlx_mtp.load(folder, "none")
        assert "lm_head" not in model.target
        assert model.generate(PROMPT, **GREEDY).tokens == tied
    assert not caplog.messages


def test_a_head_that_is_missing(tiny_pair: TinyPair, tmp_path: Path) -> None:
    shutil.copytree(tiny_pair("31b"), tmp_path / "pair")
    file = tmp_path / "pair" / "target" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}))
    with pytest.raises(mlx_mtp.WeightsError, match=r"lm_head\.weight is missing, but tie_word_embeddings is false"):
        mlx_mtp.load(tmp_path / "pair" / "target")


@pytest.mark.parametrize("quantize", [True, False])
def test_conversions_keep_it(folder: Path, model: mlx_mtp.Model, tmp_path: Path, quantize: bool) -> None:
    """mlx-lm also loads the conversions and computes with the head."""
    from mlx_lm.utils import load_model

    convert(
        Options(str(folder), tmp_path / "out", weights=WeightOptions(quantize=quantize, q_bits=8 if quantize else None))
    )
    converted = mlx_mtp.load(tmp_path / "out")
    assert isinstance(converted.target.lm_head, nn.QuantizedLinear if quantize else nn.Linear)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    tokens = converted.generate(PROMPT, num_draft_tokens=3, **GREEDY).tokens
    assert tokens == converted.generate(PROMPT, num_draft_tokens=0, **GREEDY).tokens
    if not quantize:
        assert tokens == model.generate(PROMPT, num_draft_tokens=0, **GREEDY).tokens
    theirs, _ = load_model(tmp_path / "out")
    logits = theirs(mx.array([PROMPT + tokens]))[0, len(PROMPT) - 1 : -1]
    assert mx.argmax(logits, axis=-1).tolist() == tokens


def test_what_it_takes_of_memory(tiny_pair: TinyPair, folder: Path) -> None:
    own, tied = mlx_mtp.plan_memory(folder, "none"), mlx_mtp.plan_memory(tiny_pair("31b") / "target", "none")
    assert own.resident - tied.resident == 512 * 128 * 4
    read: list[tuple[int, int]] = []
    mlx_mtp.load(folder, "none", on_load=lambda *progress: read.append(progress))
    assert read[-1] == (own.resident, own.resident)


def test_verify_passes_are_made_exact(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this device only the head rounds differently for several rows."""
    target = mlx_mtp.load(folder, "none").target
    call = nn.Linear.__call__

    def other_bits(self: nn.Linear, x: mx.array) -> mx.array:
        result: mx.array = call(self, x)
        # The difference is large enough to choose another token.
        return mx.roll(result, 1, -1) if self is head and x.shape[1] > 1 else result

    head = target.lm_head
    monkeypatch.setattr(nn.Linear, "__call__", other_bits)
    with pytest.raises(mlx_mtp.OptionError, match="a pass over 2 rows has other bits"):
        check_exact(target)
    make_exact(target)
    check_exact(target)
