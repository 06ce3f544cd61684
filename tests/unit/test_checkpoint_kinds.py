"""Checkpoints from other programs: odd checkpoints are read, and ambiguous checkpoints are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.tiny import STOP_IDS, VOCAB_SIZE, make_tokenizer, random_tokens

import mlx_mtp
from mlx_mtp.convert.cli import main as convert
from mlx_mtp.text.tokenizer import encode_chat, encode_in_parts, load_tokenizer

TinyPair = Callable[[str], Path]
PROMPT = random_tokens(20, seed=6)
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def folders(tiny_pair: TinyPair, tmp_path: Path) -> tuple[Path, Path]:
    """The folders of a target and a drafter that a test may change."""
    shutil.copytree(tiny_pair("e2b"), tmp_path / "pair")
    return tmp_path / "pair" / "target", tmp_path / "pair" / "target-assistant"


def tensors_of(folder: Path) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = mx.load(str(folder / "model.safetensors"))  # type: ignore[assignment]
    return tensors


def generate(model: mlx_mtp.Model, k: int = 3) -> list[int]:
    return model.generate(PROMPT, max_tokens=12, num_draft_tokens=k).tokens


@pytest.fixture(scope="module")
def quantized(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-only checkpoint with experts, as mlx-lm converts it. The router has other bits than the rest."""
    from mlx_lm.convert import convert

    root = tmp_path_factory.mktemp("text")
    shutil.copytree(tiny_pair("26b") / "target", root / "source")
    tensors = {
        name.replace("model.language_model.", "model."): value for name, value in tensors_of(root / "source").items()
    }
    mx.save_safetensors(str(root / "source" / "model.safetensors"), tensors, metadata={"format": "pt"})
    file = root / "source" / "config.json"
    text = json.loads(file.read_text())["text_config"]
    file.write_text(json.dumps(text | {"model_type": "gemma4_text", "dtype": "float32"}))
    convert(str(root / "source"), str(root / "mlx"), quantize=True, q_group_size=32)
    return root / "mlx"


@pytest.mark.parametrize(
    "prefix",
    ["model.", "model.language_model.", "language_model.", "language_model.model.", ""],
    ids=lambda p: p or "-",
)
@pytest.mark.parametrize("field", ["quantization", "quantization_config"])
def test_quantization_overrides_under_every_prefix(quantized: Path, tmp_path: Path, prefix: str, field: str) -> None:
    folder = tmp_path / "it"
    shutil.copytree(quantized, folder)
    tensors = {name.replace("model.", prefix, 1): value for name, value in tensors_of(folder).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    (folder / "model.safetensors.index.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    found = config.pop("quantization")
    config.pop("quantization_config", None)
    assert found["model.layers.0.router.proj"] == {"group_size": 64, "bits": 8}
    # An override of a missing module has no effect.
    found["model.layers.0.absent"] = {"group_size": 128, "bits": 2}
    config[field] = {name.replace("model.", prefix, 1): value for name, value in found.items()}
    (folder / "config.json").write_text(json.dumps(config))
    model = mlx_mtp.load(folder, "none")
    router = model.target.layers[0].router.proj
    assert (router.bits, model.target.layers[0].mlp.down_proj.bits) == (8, 4)


def test_overrides_of_a_drafter(folders: tuple[Path, Path]) -> None:
    target, drafter = folders
    tensors = tensors_of(drafter)
    name = "model.layers.0.mlp.down_proj"
    weight, scales, biases = mx.quantize(tensors.pop(f"{name}.weight"), group_size=64, bits=8)
    tensors |= {f"{name}.weight": weight, f"{name}.scales": scales, f"{name}.biases": biases}
    mx.save_safetensors(str(drafter / "model.safetensors"), tensors, metadata={"format": "mlx"})
    config = json.loads((drafter / "config.json").read_text())
    for written in (name, name.removeprefix("model.")):
        config["quantization"] = {"group_size": 64, "bits": 4, written: {"group_size": 64, "bits": 8}}
        (drafter / "config.json").write_text(json.dumps(config))
        loaded = mlx_mtp.load(target).drafter
        assert loaded is not None
        assert loaded.model.layers[0].mlp.down_proj.bits == 8


def test_two_complete_copies_of_the_weights(folders: tuple[Path, Path]) -> None:
    """Shards without an index are beside an older file. It is unknown which copy is meant."""
    target, _ = folders
    tensors = tensors_of(target)
    names = sorted(tensors)
    for part in range(2):
        shard = {name: tensors[name] for name in names[part::2]}
        mx.save_safetensors(
            str(target / f"model-0000{part + 1}-of-00002.safetensors"), shard, metadata={"format": "pt"}
        )
    with pytest.raises(
        mlx_mtp.WeightsError, match=r"model-0000\d-of-00002\.safetensors and model\.safetensors both hold"
    ):
        mlx_mtp.load(target)
    (target / "model.safetensors").unlink()
    assert generate(mlx_mtp.load(target), 0)


def test_an_index_chooses_between_copies(folders: tuple[Path, Path]) -> None:
    """The index can name any file for a tensor, first or last by name. Loading, conversion and byte counts obey it."""
    target, _ = folders
    expected = generate(mlx_mtp.load(target, "none"), 0)
    tensors = tensors_of(target)
    norm, mlp = "model.language_model.norm.weight", "model.language_model.layers.0.mlp.up_proj.weight"
    (target / "model.safetensors").unlink()
    # Each file has a wrong copy of the tensor that the index takes from the other file.
    first = tensors | {norm: mx.zeros_like(tensors[norm])}
    last = {norm: tensors[norm], mlp: mx.zeros((3, 5))}
    mx.save_safetensors(str(target / "model.safetensors"), first, metadata={"format": "pt"})
    mx.save_safetensors(str(target / "model-z.safetensors"), last, metadata={"format": "pt"})
    weight_map = dict.fromkeys(tensors, "model.safetensors") | {norm: "model-z.safetensors"}
    index = target / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    read: list[tuple[int, int]] = []
    assert generate(mlx_mtp.load(target, "none", on_load=lambda done, total: read.append((done, total))), 0) == expected
    assert read[-1][0] == read[-1][1]
    output = target.parent / "out"
    assert convert(["--hf-path", str(target), "--mlx-path", str(output), "--drafter", "none"]) == 0
    assert generate(mlx_mtp.load(output), 0) == expected
    # The index does not choose between these copies.
    for chosen, reason in ((None, "remove the older file"), ("model-0.safetensors", "names model-0.safetensors for")):
        mx.save_safetensors(str(target / "model-0.safetensors"), {"odd": mx.zeros(1)}, metadata={"format": "pt"})
        wrong = {name: file for name, file in weight_map.items() if name != mlp} | {"odd": "model-0.safetensors"}
        index.write_text(json.dumps({"weight_map": wrong if chosen is None else wrong | {mlp: chosen}}))
        with pytest.raises(mlx_mtp.WeightsError, match=rf"both hold tensor {mlp}, and .*{reason}"):
            mlx_mtp.load(target, "none")


@pytest.mark.parametrize("kind", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_token_ids_that_were_cast(folders: tuple[Path, Path], kind: mx.Dtype) -> None:
    """A float type that holds 512 different ids is accepted. bfloat16 is not, because it rounds ids above 256."""
    target, drafter = folders
    expected = mlx_mtp.load(target).drafter
    tensors = tensors_of(drafter)
    name = "masked_embedding.token_ordering"
    tensors[name] = tensors[name].astype(kind)
    mx.save_safetensors(str(drafter / "model.safetensors"), tensors, metadata={"format": "pt"})
    if kind == mx.bfloat16:
        with pytest.raises(
            mlx_mtp.WeightsError, match=r"token_ordering must hold 512 different token ids, found 38\d in"
        ):
            mlx_mtp.load(target)
        assert convert(["--hf-path", str(target), "--mlx-path", str(target.parent / "out")]) == 1
        return
    assert convert(["--hf-path", str(target), "--mlx-path", str(target.parent / "out")]) == 0
    found = mlx_mtp.load(target.parent / "out").drafter
    assert found is not None
    assert found.masked_embedding is not None
    assert expected is not None
    assert expected.masked_embedding is not None
    ordering = found.masked_embedding.token_ordering
    assert ordering.dtype == mx.int32
    assert mx.array_equal(ordering, expected.masked_embedding.token_ordering)


@pytest.mark.parametrize("kind", [mx.int16, mx.uint16, mx.uint32, mx.uint64], ids=str)
def test_token_ids_of_every_integer_type(folders: tuple[Path, Path], kind: mx.Dtype) -> None:
    target, drafter = folders
    tensors = tensors_of(drafter)
    name = "masked_embedding.token_ordering"
    expected = tensors[name].astype(mx.int32)
    planned = mlx_mtp.plan_memory(target, max_context=100).drafter
    mx.save_safetensors(
        str(drafter / "model.safetensors"), tensors | {name: tensors[name].astype(kind)}, metadata={"format": "pt"}
    )
    assert mlx_mtp.plan_memory(target, max_context=100).drafter == planned
    output = target.parent / "out"
    assert convert(["--hf-path", str(target), "--mlx-path", str(output)]) == 0
    for folder in (target, output):
        found = mlx_mtp.load(folder).drafter
        assert found is not None
        assert found.masked_embedding is not None
        assert found.masked_embedding.token_ordering.dtype == mx.int32
        assert mx.array_equal(found.masked_embedding.token_ordering, expected)


@pytest.mark.parametrize("kind", [mx.int64, mx.bool_], ids=str)
def test_token_ids_that_are_none(
    folders: tuple[Path, Path], kind: mx.Dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint is neither loaded nor converted."""
    target, drafter = folders
    tensors = tensors_of(drafter)
    tensors["masked_embedding.token_ordering"] = mx.zeros((VOCAB_SIZE,), kind)
    mx.save_safetensors(str(drafter / "model.safetensors"), tensors, metadata={"format": "pt"})
    with pytest.raises(mlx_mtp.WeightsError, match="must hold 512 different token ids, found 1 in"):
        mlx_mtp.load(target)
    output = target.parent / "out"
    assert convert(["--hf-path", str(target), "--mlx-path", str(output)]) == 1
    assert "token_ordering" in capsys.readouterr().err
    assert not output.exists()


def test_tokens_beyond_the_embedding(folders: tuple[Path, Path]) -> None:
    """A fine-tune added a token without a resize. The error names the token, for text and for ids."""
    target, _ = folders
    file = target / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": 600, "content": "<|mine|>"})
    file.write_text(json.dumps(content))
    model = mlx_mtp.load(target, "none")
    for prompt in ("a<|mine|>b", [{"role": "user", "content": "a<|mine|>b"}]):
        with pytest.raises(mlx_mtp.PromptError, match=r"holds '<\|mine\|>', token 512, .* embeddings of 512"):
            model.stream_generate(prompt)
    wrong: list[Any] = [VOCAB_SIZE, -1, True, 5.0, np.int64(-3), "5"]
    for token in wrong:
        with pytest.raises(mlx_mtp.PromptError, match="must hold token ids from 0 to 511, found"):
            model.stream_generate([2, token])
    assert model.encode(np.array([2, 20, 30])) == [2, 20, 30]  # type: ignore[arg-type]


def without_template(folder: Path) -> str:
    make_tokenizer(folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    return template


def rendered(folder: Path, tools: list[dict[str, Any]] | None = None) -> str:
    tokenizer = load_tokenizer(folder, STOP_IDS)
    text: str = tokenizer.decode(encode_chat(tokenizer, MESSAGES, tools=tools))
    return text


def test_a_chat_template_in_a_file_of_its_own(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "a")
    expected = rendered(tmp_path / "a")
    template = without_template(tmp_path / "b")
    file = tmp_path / "b" / "chat_template.json"
    file.write_text(json.dumps({"chat_template": template}))
    assert rendered(tmp_path / "b") == expected
    # Newer locations have priority.
    file.write_text(json.dumps({"chat_template": "old"}))
    (tmp_path / "b" / "chat_template.jinja").write_text(template)
    assert rendered(tmp_path / "b") == expected
    (tmp_path / "b" / "chat_template.jinja").unlink()
    file.write_text(json.dumps({"template": template}))
    with pytest.raises(mlx_mtp.TokenizerError, match=r"chat_template\.json: field chat_template must be a template"):
        load_tokenizer(tmp_path / "b", STOP_IDS)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.json"])
def test_several_named_chat_templates(tmp_path: Path, place: str) -> None:
    template = without_template(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) if "config" in place else {}

    def write(*names: str) -> None:
        named = [{"name": name, "template": f"{name} {template}"} for name in names]
        (tmp_path / place).write_text(json.dumps(config | {"chat_template": named}))

    write("default", "rag")
    assert rendered(tmp_path).startswith("default")
    write("rag")
    assert rendered(tmp_path).startswith("rag")
    write("rag", "poem")
    with pytest.raises(mlx_mtp.PromptError, match="chat templates named poem, rag, but none named default"):
        rendered(tmp_path)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("1 / 0", "division by zero"),
        ("range(99999999999)", "Range too big"),
        ("'poem'.index('z')", "substring not found"),
        ("messages[0].content[9:].x.y", "has no attribute 'x'"),
        ("messages[7]['role']", "list object has no element 7"),
        ("raise_exception('')", "TemplateError"),
    ],
)
def test_a_chat_template_that_fails(tmp_path: Path, expression: str, reason: str) -> None:
    """A template can raise any exception. The caller gets a PromptError."""
    make_tokenizer(tmp_path)
    file = tmp_path / "chat_template.jinja"
    file.write_text(file.read_text() + "{{ " + expression + " }}")
    tokenizer = load_tokenizer(tmp_path, STOP_IDS)
    message = f"^the chat template cannot render the messages: .*{reason}"
    with pytest.raises(mlx_mtp.PromptError, match=message):
        encode_chat(tokenizer, MESSAGES)
    with pytest.raises(mlx_mtp.PromptError, match=message):
        encode_in_parts(tokenizer, "hi", begins=True)


def test_half_a_surrogate_pair(folders: tuple[Path, Path]) -> None:
    model = mlx_mtp.load(folders[0], "none")
    message = r"the prompt holds '\\ud8ff', half a surrogate pair: expected text that UTF-8 can write"
    for prompt in ("so \ud8ff it goes", [{"role": "user", "content": "so\ud8ff"}]):
        with pytest.raises(mlx_mtp.PromptError, match=message):
            model.stream_generate(prompt)
    for begins in (True, False):
        for use_chat_template in (True, False):
            with pytest.raises(mlx_mtp.PromptError, match=message):
                encode_in_parts(model.tokenizer, "\ud8ff", begins=begins, use_chat_template=use_chat_template)
