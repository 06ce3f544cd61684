"""Loading: all folder layouts, the search for a drafter on disk and on a hub, and one clear error per failure."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.fake_hub import serve
from support.tiny import make_drafter, make_target, random_tokens

import mlx_mtp
from mlx_mtp.checkpoints.config import read_target_config
from mlx_mtp.checkpoints.layouts import MLX_PREFIX
from mlx_mtp.checkpoints.tensors import INDEX_NAME
from mlx_mtp.convert.cli import main as convert_main
from mlx_mtp.loading import assistant_names, find_drafter, how_to_name_a_drafter, official_drafter

TinyPair = Callable[[str], Path]
PROMPT = random_tokens(40, seed=3)


def decode(model: mlx_mtp.Model, k: int = 3) -> list[int]:
    return model.generate(PROMPT, max_tokens=30, num_draft_tokens=k).tokens


@pytest.fixture(scope="module")
def reference(tiny_pair: TinyPair) -> Callable[[str], list[int]]:
    """Return plain tokens of the unconverted Hugging Face folder."""
    return lambda variant: decode(mlx_mtp.load(tiny_pair(variant) / "target", "none"), 0)


@pytest.fixture
def folders(tiny_pair: TinyPair, tmp_path: Path) -> tuple[Path, Path]:
    """The target and drafter folders of an E2B-like pair that a test may damage."""
    shutil.copytree(tiny_pair("e2b"), tmp_path / "pair")
    return tmp_path / "pair" / "target", tmp_path / "pair" / "target-assistant"


def edit_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name, value in fields.items():
        is_text = name in config["text_config"] and name not in config
        (config["text_config"] if is_text else config)[name] = value
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Callable[[dict[str, mx.array]], None]) -> None:
    file = folder / "model.safetensors"
    tensors: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
    mx.eval(tensors)
    edit(tensors)
    mx.save_safetensors(str(file), tensors)


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_hugging_face_folders_with_the_sibling_found(
    tiny_pair: TinyPair, reference: Callable[[str], list[int]]
) -> None:
    for variant in ("e2b", "26b"):
        model = mlx_mtp.load(tiny_pair(variant) / "target")
        assert model.drafter is not None
        assert decode(model) == reference(variant)


def test_drafter_none_and_no_drafter_found(folders: tuple[Path, Path]) -> None:
    target, drafter = folders
    assert mlx_mtp.load(target, "none").drafter is None
    shutil.rmtree(drafter)
    model = mlx_mtp.load(target)
    assert model.drafter is None
    with pytest.raises(mlx_mtp.OptionError, match="num_draft_tokens is 3, but no drafter is loaded"):
        model.generate(PROMPT, num_draft_tokens=3)
    assert model.generate(PROMPT, max_tokens=5).last.stats.drafted == 0


def test_the_drafter_inside_the_folder_comes_first(folders: tuple[Path, Path], tmp_path: Path) -> None:
    target, sibling = folders
    assert find_drafter(target, target) == sibling
    shutil.copytree(sibling, target / "drafter")
    assert find_drafter(target, target) == target / "drafter"
    # The sibling is also found for a relative path.
    shutil.rmtree(target / "drafter")
    code = "from mlx_mtp.loading import find_drafter; from pathlib import Path; print(find_drafter('.', Path('.')))"
    result = subprocess.run([sys.executable, "-c", code], cwd=target, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(sibling)


@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "4-bit"])
@pytest.mark.parametrize("variant", ["e2b", "12b", "26b"])
def test_mlx_lm_conversions(tiny_pair: TinyPair, tmp_path: Path, variant: str, quantized: bool) -> None:
    """mlx-lm's conversions load unchanged and give mlx-lm's logits. The router at 8 bits is an override."""
    from mlx_lm.convert import convert
    from mlx_lm.utils import load_model

    shutil.copytree(tiny_pair(variant) / "target", tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    # mlx-lm reads the vocabulary's size only at the top level.
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"vocab_size": 512}))
    convert(str(tmp_path / "source"), str(tmp_path / "mlx"), quantize=quantized)
    model = mlx_mtp.load(tmp_path / "mlx", tiny_pair(variant) / "target-assistant")
    theirs, config = load_model(tmp_path / "mlx")
    if quantized and variant == "26b":
        assert config["quantization"][f"{MLX_PREFIX}layers.0.router.proj"] == {"group_size": 64, "bits": 8}
    tokens = decode(model)
    logits = theirs(mx.array([PROMPT + tokens]))[0, len(PROMPT) - 1 : -1]
    assert mx.argmax(logits, axis=-1).tolist() == tokens


def test_mlx_vlm_folders(tiny_pair: TinyPair, tmp_path: Path, reference: Callable[[str], list[int]]) -> None:
    """Their text decoder has mlx-lm's names. Towers are beside it at the top level and are ignored."""
    folder = tmp_path / "vlm"
    shutil.copytree(tiny_pair("e2b") / "target", folder)

    def rename(tensors: dict[str, mx.array]) -> None:
        for name in list(tensors):
            value = tensors.pop(name)
            if "vision_tower" not in name:
                tensors[name.replace("model.language_model.", MLX_PREFIX)] = value
        for name in ("vision_tower.encoder.layers.0.weight", "embed_vision.projection.scales", "audio_tower.x.weight"):
            tensors[name] = mx.ones((3, 3))

    edit_tensors(folder, rename)
    assert decode(mlx_mtp.load(folder), 0) == reference("e2b")


def test_flat_text_only_folders(tiny_pair: TinyPair, tmp_path: Path, reference: Callable[[str], list[int]]) -> None:
    """A text-only checkpoint has a flat config, names without `language_model.`, and a copy of the tied head."""
    folder = tmp_path / "text"
    shutil.copytree(tiny_pair("31b") / "target", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config["text_config"]))

    def rename(tensors: dict[str, mx.array]) -> None:
        for name in list(tensors):
            tensors[name.replace("model.language_model.", "model.")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    edit_tensors(folder, rename)
    assert decode(mlx_mtp.load(folder), 0) == reference("31b")


def test_several_shards_with_an_index(
    tiny_pair: TinyPair, tmp_path: Path, reference: Callable[[str], list[int]]
) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_pair("e2b") / "target", folder)
    tensors: dict[str, mx.array] = mx.load(str(folder / "model.safetensors"))  # type: ignore[assignment]
    mx.eval(tensors)
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for index in range(3):
        shard = f"model-{index + 1:05d}-of-00003.safetensors"
        part = {name: value for i, (name, value) in enumerate(sorted(tensors.items())) if i % 3 == index}
        mx.save_safetensors(str(folder / shard), part)
        weight_map |= dict.fromkeys(part, shard)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert decode(mlx_mtp.load(folder), 0) == reference("e2b")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        mlx_mtp.WeightsError, match=r"names model-00002-of-00003.safetensors, which is not in the folder"
    ):
        mlx_mtp.load(folder)


def test_an_override_of_false_and_one_of_other_bits(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """Per-module overrides have priority over the default. Modules without scales stay unquantized."""
    folder = tmp_path / "mixed"
    shutil.copytree(tiny_pair("12b") / "target", folder)
    eight, four = "layers.0.mlp.down_proj", "layers.1.mlp.down_proj"

    def quantize(tensors: dict[str, mx.array]) -> None:
        for path, bits in ((eight, 8), (four, 4)):
            name = f"model.language_model.{path}"
            weight, scales, biases = mx.quantize(tensors.pop(f"{name}.weight"), group_size=64, bits=bits)
            tensors |= {f"{name}.weight": weight, f"{name}.scales": scales, f"{name}.biases": biases}

    edit_tensors(folder, quantize)
    entry = {"group_size": 64, "bits": 8}
    quantization = {"group_size": 64, "bits": 4, MLX_PREFIX + eight: entry, MLX_PREFIX + "embed_tokens": False}
    edit_config(folder, quantization=quantization)
    target = mlx_mtp.load(folder, "none").target
    assert target.layers[0].mlp.down_proj.bits == 8
    assert target.layers[1].mlp.down_proj.bits == 4
    assert not hasattr(target.embed_tokens, "bits")


def test_the_drafter_computes_in_the_targets_type(folders: tuple[Path, Path]) -> None:
    target, drafter = folders

    def to_bfloat16(tensors: dict[str, mx.array]) -> None:
        for name, value in tensors.items():
            if mx.issubdtype(value.dtype, mx.floating):
                tensors[name] = value.astype(mx.bfloat16)

    edit_tensors(drafter, to_bfloat16)
    model = mlx_mtp.load(target)
    assert model.drafter is not None
    assert model.drafter.pre_projection.weight.dtype == mx.float32
    assert model.drafter.masked_embedding is not None
    assert model.drafter.masked_embedding.token_ordering.dtype == mx.int32


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "drafters"),
    [
        ("google/gemma-4-E2B-it", ["google/gemma-4-E2B-it-assistant"]),
        (
            "mlx-community/gemma-4-E2B-it-4bit",
            [f"mlx-community/gemma-4-E2B-it-assistant{ending}" for ending in ("-4bit", "-bf16", "")],
        ),
        (
            "mlx-community/gemma-4-31B-it-bf16",
            ["mlx-community/gemma-4-31B-it-assistant-bf16", "mlx-community/gemma-4-31B-it-assistant"],
        ),
        (
            "mlx-community/gemma-4-12B-it-mxfp4",
            [f"mlx-community/gemma-4-12B-it-assistant{ending}" for ending in ("-mxfp4", "-bf16", "")],
        ),
        (
            "unsloth/gemma-4-E4B-it-UD-MLX-4bit",
            [f"unsloth/gemma-4-E4B-it-assistant{ending}" for ending in ("-UD-MLX-4bit", "-4bit", "-bf16", "")],
        ),
        ("a/gemma-4-31B-it-4bit-DWQ", [f"a/gemma-4-31B-it-assistant{e}" for e in ("-4bit-DWQ", "-4bit", "-bf16", "")]),
        ("a/my-tune-qat-MXFP4", [f"a/my-tune-assistant{e}" for e in ("-qat-MXFP4", "-MXFP4", "-bf16", "")]),
        ("a/my-tune-mlx", [f"a/my-tune-assistant{ending}" for ending in ("-mlx", "-bf16", "")]),
        ("a/texts-8bits", ["a/texts-8bits-assistant"]),
    ],
)
def test_names_a_drafter_goes_by(target: str, drafters: list[str]) -> None:
    assert list(assistant_names(target)) == drafters


@pytest.mark.parametrize(
    ("repo", "official"),
    [
        ("lmstudio-community/gemma-4-E2B-it-MLX-4bit", "google/gemma-4-E2B-it-assistant"),
        ("someone/Poems-gemma-4-26b-a4b-it", "google/gemma-4-26B-A4B-it-assistant"),
        ("someone/gemma-4-12b", "google/gemma-4-12B-it-assistant"),
        ("someone/gemma-4-120B-it", None),
        ("someone/poems", None),
    ],
)
def test_the_published_drafter_of_a_name(repo: str, official: str | None) -> None:
    assert official_drafter(repo) == official


FIND = """
import importlib, json, logging, sys, mlx_mtp
from mlx_mtp.checkpoints.hub import resolve_folder
load = importlib.import_module("mlx_mtp.loading")
load._OFFICIAL = {64: "E2B"}
logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
for repo in json.loads(sys.argv[1]):
    try:
        found = load.find_drafter(repo, resolve_folder(repo))
        print(repo, None if found is None else found.parents[1].name)
    except mlx_mtp.MTPError as error:
        print(repo, f"{type(error).__name__}: {error}")
"""


def test_a_hub_that_fails_is_no_missing_drafter(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """It is an error that names the drafter's repository. For a guess at another publisher, it is only a warning."""
    target, drafter = tiny_pair("e2b") / "target", tiny_pair("e2b") / "target-assistant"
    failing = {"a/broken-it-assistant": 500, "a/busy-it-assistant": 429, "a/gated-it-assistant": 403}
    names = ["a/broken-it", "a/busy-it", "a/gated-it", "a/gemma-4-E2B-it-tuned", "a/gemma-4-E2B-other"]
    official = "google/gemma-4-E2B-it-assistant"
    arguments = json.dumps(names)
    with serve(dict.fromkeys(names, target), failing=failing | {official: 403}) as (endpoint, _):
        result = hub_run(FIND, endpoint, tmp_path / "one", arguments)
        lines = result.stdout.splitlines()
        assert len(lines) == len(names), result.stderr
        for line, reason in zip(lines[:3], ("500", "429", "a gated repository"), strict=True):
            repo, message = line.split(" ", 1)
            assert message.startswith(f"HubError: {repo}-assistant: no such folder, and the hub does not give it: ")
            assert reason in message
        assert lines[3:] == [f"{name} None" for name in names[3:]]
        assert f"the drafter of {names[3]} would be {official}, but: {official}: no such folder" in result.stderr
        convert = "import sys; from mlx_mtp.convert.cli import main; sys.exit(main())"
        output = tmp_path / "out"
        result = hub_run(convert, endpoint, tmp_path / "one", "--hf-path", names[0], "--mlx-path", str(output))
        assert result.returncode == 1
        assert result.stderr.startswith("error: a/broken-it-assistant: ")
        assert not output.exists()
        # Offline, only the cache is used.
        result = hub_run(FIND, endpoint, tmp_path / "one", arguments, HF_HUB_OFFLINE="1")
        assert result.stdout.splitlines() == [f"{name} None" for name in names], result.stderr
    with serve(dict.fromkeys(names, target) | {official: drafter}) as (endpoint, requests):
        result = hub_run(FIND, endpoint, tmp_path / "two", json.dumps(names[3:4]))
        assert result.stdout.split() == [names[3], "models--google--gemma-4-E2B-it-assistant"], result.stderr
        assert len({request for request in requests if "-assistant/revision/" in request}) == 2


@pytest.mark.parametrize("linked", ["both", "beside the target"])
def test_linked_folders(folders: tuple[Path, Path], tmp_path: Path, linked: str) -> None:
    """Models are links to other folders. The drafter is beside the link, or else beside the link's target."""
    target, drafter = folders
    models = tmp_path / "models"
    models.mkdir()
    (models / "gemma-it").symlink_to(target)
    if linked == "both":
        (models / "gemma-it-assistant").symlink_to(drafter)
    expected = models / "gemma-it-assistant" if linked == "both" else drafter
    assert find_drafter(models / "gemma-it", models / "gemma-it") == expected


@pytest.mark.parametrize("beside", ["second", "m/gemma-it", "cache/abc"])
def test_a_link_to_a_link(folders: tuple[Path, Path], tmp_path: Path, beside: str) -> None:
    """The drafter can be beside any folder of the chain. Links are absolute or relative."""
    target, drafter = folders
    for name in ("m", "cache"):
        (tmp_path / name).mkdir()
    target.rename(tmp_path / "cache" / "abc")
    (tmp_path / "m" / "gemma-it").symlink_to(Path("..", "cache", "abc"))
    (tmp_path / "second").symlink_to(tmp_path / "m" / "gemma-it")
    assert find_drafter(tmp_path / "second", tmp_path / "second") is None
    expected = tmp_path / f"{beside}-assistant"
    drafter.rename(expected)
    assert find_drafter(tmp_path / "second", tmp_path / "second") == expected


def test_the_folder_one_is_in_by_a_link(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell's PWD gives the link's name if it refers to this folder."""
    target, drafter = folders
    target.rename(tmp_path / "abc")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "gemma-it").symlink_to(tmp_path / "abc")
    monkeypatch.chdir(tmp_path / "models" / "gemma-it")
    expected = tmp_path / "models" / "gemma-it-assistant"
    drafter.rename(expected)
    for pwd in (str(tmp_path), "", str(tmp_path / "gone"), "models/gemma-it"):
        monkeypatch.setenv("PWD", pwd)
        assert find_drafter(".", Path(".")) is None
    monkeypatch.setenv("PWD", str(tmp_path / "models" / "gemma-it"))
    assert find_drafter(".", Path(".")) == expected
    monkeypatch.delenv("PWD")
    expected.rename(tmp_path / "abc-assistant")
    assert find_drafter(".", Path(".")) == tmp_path / "abc-assistant"


@pytest.mark.parametrize("place", ["target-assistant", "target/drafter"])
def test_a_drafter_behind_a_link_to_nowhere(folders: tuple[Path, Path], tmp_path: Path, place: str) -> None:
    """The user wants this drafter. Half a pair is never loaded."""
    target, drafter = folders
    shutil.rmtree(drafter)
    link = target.parent / place
    link.symlink_to("gone")
    message = rf"{link}: the drafter is a link to gone, which is not there"
    check(mlx_mtp.ConfigError, message, target)
    assert convert_main(["--hf-path", str(target), "--mlx-path", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()
    # The error is also raised if the user names this drafter.
    check(mlx_mtp.ConfigError, rf"{link}: a link to gone", target, link)
    check(mlx_mtp.ConfigError, rf"{link}: a link to gone", link)


def test_links_are_no_hub_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("models/gemma-it").symlink_to("gone")
    check(mlx_mtp.ConfigError, "^models/gemma-it: a link to gone, which is not there", "models/gemma-it")


@pytest.mark.parametrize("ending", ["-abliterated", "-heretic-MLX-4bit", "-oQ4", "-optiq-4bit", "", "_v2"])
def test_a_fine_tune_beside_the_published_drafter(
    folders: tuple[Path, Path], tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    target, drafter = folders
    path = target.rename(target.parent / f"Poems-gemma-4-E2B-it{ending}")
    official = drafter.rename(target.parent / "gemma-4-E2B-it-assistant-bf16")
    # One drafter has another size. Another drafter's name only begins like the right name.
    for name in ("gemma-4-E4B-it-assistant", "gemma-4-E2B-it-assistants"):
        shutil.copytree(official, target.parent / name)
    assert find_drafter(path, path) == official
    edit_config(official, backbone_hidden_size=96)
    with caplog.at_level("WARNING"):
        assert find_drafter(path, path) is None
    assert f"the drafter of {path} would be {official}, but: " in caplog.text


def test_what_is_said_where_no_drafter_is_found(tiny_pair: TinyPair) -> None:
    config = read_target_config(tiny_pair("e2b") / "target")
    assert how_to_name_a_drafter(config) == "name one with --drafter"
    for size, name in ((1536, "E2B"), (2560, "E4B"), (3840, "12B"), (2816, "26B-A4B"), (5376, "31B")):
        published = replace(config, text=replace(config.text, hidden_size=size))
        assert how_to_name_a_drafter(published) == f"pass --drafter google/gemma-4-{name}-it-assistant"


def hub_run(code: str, endpoint: str, home: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process, because huggingface-hub reads its environment on import."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **env}
    variables = {"PATH": "", "HOME": str(home), "PYTHONPATH": os.environ["PYTHONPATH"], **settings}
    return subprocess.run([sys.executable, "-c", code, *args], env=variables, capture_output=True, text=True)


LOAD = """
import sys, mlx_mtp
try:
    model = mlx_mtp.load({repo!r})
except mlx_mtp.MTPError as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
print(model.drafter_config.path.parent if model.drafter else None)
"""


def test_hub_download_sibling_cache_and_offline_mode(tiny_pair: TinyPair, tmp_path: Path) -> None:
    pair = tiny_pair("e2b")
    repos = {
        "some/gemma-it-4bit": pair / "target",
        "some/gemma-it-assistant-bf16": pair / "target-assistant",
        "some/lonely-it": pair / "target",
    }
    load = LOAD.format(repo="some/gemma-it-4bit")
    with serve(repos) as (endpoint, requests):
        result = hub_run(load, endpoint, tmp_path)
        assert "models--some--gemma-it-assistant-bf16" in result.stdout, result.stderr
        assert any("gemma-it-assistant-4bit" in request for request in requests), "the same suffix is tried first"
        downloads = [request for request in requests if request.startswith("GET") and "safetensors" in request]
        assert len(downloads) == 2
        # Offline, the cache provides both models without a request.
        before = len(requests)
        result = hub_run(load, endpoint, tmp_path, HF_HUB_OFFLINE="1")
        assert "models--some--gemma-it-assistant-bf16" in result.stdout, result.stderr
        assert len(requests) == before
        assert hub_run(LOAD.format(repo="some/lonely-it"), endpoint, tmp_path).stdout.strip() == "None"
        result = hub_run(LOAD.format(repo="some/absent"), endpoint, tmp_path)
        assert result.stderr.startswith("HubError: some/absent: no such folder, and the hub does not give it: no such")
        result = hub_run(LOAD.format(repo="some/absent"), endpoint, tmp_path, HF_HUB_OFFLINE="1")
        assert result.stderr.startswith("HubError: some/absent: no such folder, and the hub does not give it: ")


def test_a_download_that_is_cut_is_an_error_and_goes_on(tiny_pair: TinyPair, tmp_path: Path) -> None:
    code = LOAD.format(repo="some/gemma-it")
    cut = {"model.safetensors"}
    with serve({"some/gemma-it": tiny_pair("e2b") / "target"}, cut=cut) as (endpoint, requests):
        result = hub_run(code, endpoint, tmp_path)
        # The hub's client writes its retries on lines of its own.
        error = result.stderr.splitlines()[-1]
        assert error.startswith("HubError: some/gemma-it: no such folder, and the hub does not give it: ")
        assert "Traceback" not in result.stderr
        before = len(requests)
        cut.clear()
        assert hub_run(code, endpoint, tmp_path).stdout.strip() == "None"
        assert not any("tokenizer.json" in request for request in requests[before:] if request.startswith("GET"))


def test_hub_tokens(tiny_pair: TinyPair, tmp_path: Path) -> None:
    with serve({"some/private": tiny_pair("e2b") / "target"}, token="hf_secret") as (endpoint, _):
        code = LOAD.format(repo="some/private")
        result = hub_run(code, endpoint, tmp_path)
        assert "which needs an access token (HF_TOKEN)" in result.stderr
        result = hub_run(code, endpoint, tmp_path, HF_TOKEN="hf_secret")
        assert result.stdout.strip() == "None", result.stderr


PROGRESS = """
import json, sys, mlx_mtp
most, *cases = json.loads(sys.argv[1])
answers = []
for repo, drafter in cases:
    seen = []

    def report(done, total):
        seen.append((done, total))
        if done > most:
            raise ConnectionError("enough")

    try:
        # Both download all that there is.
        get = mlx_mtp.plan_memory if answers else mlx_mtp.load
        get(repo, drafter, on_download=report)
    except ConnectionError as error:
        seen = str(error)
    answers.append(seen)
print(json.dumps(answers))
"""


def downloads(endpoint: str, home: Path, cases: list[tuple[str, str | None]], most: int = 1 << 40, **env: str) -> Any:
    """Return each case's (done, total) calls of `on_download`, or the error that it raised above `most` bytes."""
    show = {"TQDM_POSITION": "-1", "HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    result = hub_run(PROGRESS, endpoint, home, json.dumps([most, *cases]), **show, **env)
    # Progress bars are enabled, but nothing is drawn.
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


def test_progress_of_downloads(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """Progress is in bytes of target and drafter together, wherever the drafter is."""
    target, drafter = tiny_pair("e2b") / "target", tiny_pair("e2b") / "target-assistant"
    whole = tmp_path / "whole"
    shutil.copytree(target, whole)
    shutil.copytree(drafter, whole / "drafter")
    repos = {
        "some/gemma-it-4bit": target,
        "some/gemma-it-assistant-bf16": drafter,
        "some/other-it": target,
        "some/named": drafter,
        "some/lonely-it": target,
        "some/whole-it": whole,
    }
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in (target, drafter)]
    cases = {
        ("some/gemma-it-4bit", None): sum(sizes),
        ("some/other-it", "some/named"): sum(sizes),
        ("some/lonely-it", "none"): sizes[0],
        ("some/whole-it", None): sum(sizes),
    }
    with serve(repos) as (endpoint, _):
        # The second time, all files are there, so there is no download.
        *found, again = downloads(endpoint, tmp_path, [*cases, ("some/gemma-it-4bit", None)])
        assert again == []
        for seen, expected in zip(found, cases.values(), strict=True):
            assert {total for _, total in seen} == {expected}
            assert [done for done, _ in seen] == sorted(done for done, _ in seen)
            assert seen[-1][0] == expected
            assert len(seen) > 4
        assert downloads(endpoint, tmp_path, list(cases), HF_HUB_OFFLINE="1") == [[]] * len(cases)


def test_an_error_of_the_callback_ends_the_download(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """This also holds for an exception from which the hub's own errors derive."""
    folder = tiny_pair("e2b")
    repos = {"some/gemma-it": folder / "target", "some/gemma-it-assistant": folder / "target-assistant"}
    with serve(repos) as (endpoint, requests):
        assert downloads(endpoint, tmp_path, [("some/gemma-it", None)], most=100_000) == ["enough"]
        assert not any(request.startswith("GET /some/gemma-it-assistant/resolve") for request in requests)
        # Another call continues the download to its end.
        (seen,) = downloads(endpoint, tmp_path, [("some/gemma-it", None)])
        assert seen[-1][0] == seen[-1][1]


# --- bad input -------------------------------------------------------------------------------------------------------


def check(error: type[mlx_mtp.MTPError], message: str, target: Path | str, drafter: Path | str | None = None) -> None:
    with pytest.raises(error, match=message):
        mlx_mtp.load(target, drafter)


def test_no_such_folder_and_a_file(tmp_path: Path) -> None:
    check(mlx_mtp.ConfigError, r"absent: no such folder", tmp_path / "absent")
    (tmp_path / "file").write_text("")
    check(mlx_mtp.ConfigError, r"file: no such folder", tmp_path / "file")
    check(mlx_mtp.ConfigError, r"absent: no such folder", "./absent")


def test_folder_without_config(tmp_path: Path) -> None:
    check(mlx_mtp.ConfigError, r"the folder has no config.json", tmp_path)


def test_unknown_model_type(folders: tuple[Path, Path]) -> None:
    edit_config(folders[0], model_type="llama")
    check(
        mlx_mtp.ConfigError, r"config.json: field model_type must be a Gemma 4 target's .*, found 'llama'", folders[0]
    )


def test_a_drafter_as_target_and_a_target_as_drafter(folders: tuple[Path, Path]) -> None:
    target, drafter = folders
    check(mlx_mtp.ConfigError, r"found 'gemma4_assistant'; this is a drafter, pass it with --drafter", drafter)
    check(mlx_mtp.ConfigError, r"must be a Gemma 4 drafter's .*, found 'gemma4'; this is a target", target, target)


def test_no_weights(folders: tuple[Path, Path]) -> None:
    (folders[0] / "model.safetensors").unlink()
    check(mlx_mtp.WeightsError, r"the folder has no model\*.safetensors", folders[0])


@pytest.mark.parametrize("keep", [4, 1000, -1])
def test_truncated_safetensors(folders: tuple[Path, Path], keep: int) -> None:
    file = folders[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    check(mlx_mtp.WeightsError, r"model.safetensors: truncated", folders[0])


def test_a_file_that_is_no_safetensors(folders: tuple[Path, Path]) -> None:
    (folders[0] / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"\xff" * 8)
    check(mlx_mtp.WeightsError, r"model.safetensors: not a safetensors file", folders[0])


def test_missing_tensor(folders: tuple[Path, Path]) -> None:
    edit_tensors(folders[0], lambda tensors: tensors.__delitem__("model.language_model.layers.1.mlp.up_proj.weight"))
    check(
        mlx_mtp.WeightsError, r"tensor layers.1.mlp.up_proj.weight is missing \(1 missing in all\)", folders[0], "none"
    )


def test_tensor_of_wrong_shape(folders: tuple[Path, Path]) -> None:
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    edit_tensors(folders[0], lambda tensors: tensors.update({name: mx.zeros((128, 32))}))
    check(mlx_mtp.WeightsError, rf"tensor {name} has shape \[128, 32\], expected \[128, 64\]", folders[0], "none")


def test_unexpected_tensor(folders: tuple[Path, Path]) -> None:
    edit_tensors(folders[1], lambda tensors: tensors.update({"model.extra.weight": mx.zeros((2, 2))}))
    check(mlx_mtp.WeightsError, r"tensor model.extra.weight belongs to no part of the model", *folders)


def test_tensor_of_a_type_that_is_no_weight(folders: tuple[Path, Path]) -> None:
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    edit_tensors(folders[0], lambda tensors: tensors.update({name: tensors[name].astype(mx.int8)}))
    check(mlx_mtp.WeightsError, rf"tensor {name} is I8, expected one of F32, F16, BF16", folders[0], "none")


@pytest.mark.parametrize("header", [b"[]", b'{"a": {}}', b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": 3}}'])
def test_a_header_that_makes_no_sense(folders: tuple[Path, Path], header: bytes) -> None:
    (folders[0] / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    check(mlx_mtp.WeightsError, r"not a safetensors file: its header cannot be read", folders[0], "none")


def test_index_naming_a_tensor_that_is_not_there(folders: tuple[Path, Path]) -> None:
    weight_map = {"model.ghost.weight": "model.safetensors"}
    (folders[0] / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    check(mlx_mtp.WeightsError, r"names tensor model.ghost.weight in model.safetensors, which does not", folders[0])


def test_quantization_that_does_not_fit_the_tensors(folders: tuple[Path, Path]) -> None:
    def quantize(tensors: dict[str, mx.array]) -> None:
        name = "model.language_model.layers.0.mlp.up_proj"
        weight, scales, biases = mx.quantize(tensors.pop(f"{name}.weight"), group_size=64, bits=8)
        tensors |= {f"{name}.weight": weight, f"{name}.scales": scales, f"{name}.biases": biases}

    edit_tensors(folders[0], quantize)
    edit_config(folders[0], quantization={"group_size": 64, "bits": 4})
    check(mlx_mtp.WeightsError, r"up_proj.weight has shape \[128, 16\], expected \[128, 8\]", folders[0], "none")


@pytest.mark.parametrize("wrong", [{"bits": 7}, {"group_size": 48}, {"mode": "int4"}])
def test_quantization_that_is_none(folders: tuple[Path, Path], wrong: dict[str, object]) -> None:
    name = "model.language_model.layers.0.mlp.up_proj.scales"
    edit_tensors(folders[0], lambda tensors: tensors.update({name: mx.zeros((128, 1))}))
    edit_config(folders[0], quantization={"group_size": 64, "bits": 4} | wrong)
    check(mlx_mtp.WeightsError, r"config.json gives a quantization its weights cannot have", folders[0], "none")


def test_tokenizer_missing(folders: tuple[Path, Path]) -> None:
    (folders[0] / "tokenizer.json").unlink()
    check(
        mlx_mtp.TokenizerError, r"the folder has no tokenizer: expected tokenizer.json or tokenizer.model", folders[0]
    )


@pytest.mark.parametrize("text", ["", "{}", '{"model": 3'])
def test_tokenizer_damaged(folders: tuple[Path, Path], text: str) -> None:
    (folders[0] / "tokenizer.json").write_text(text)
    check(mlx_mtp.TokenizerError, r"tokenizer\.json: (truncated|not a tokenizer|cannot be read)", folders[0], "none")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone_hidden_size": 96}, "its backbone_hidden_size is 96, the target's 64"),
        ({"vocab_size": 1024, "num_centroids": 64}, "its vocab_size is 1024, the target's 512"),
        ({"sliding_window": 32}, "its sliding_window is 32, the target's 16"),
        ({"head_dim": 32}, r"its layer 0 \(sliding_attention\) head_dim is 32, the target's 16"),
        ({"global_head_dim": 64}, r"its layer 3 \(full_attention\) head_dim is 64, the target's 32"),
        ({"num_key_value_heads": 2}, r"its layer 0 \(sliding_attention\) num_kv_heads is 2, the target's 1"),
    ],
)
def test_drafter_of_another_target(folders: tuple[Path, Path], fields: dict[str, int], message: str) -> None:
    edit_config(folders[1], **fields)
    check(mlx_mtp.PairError, message, folders[0])


def test_drafter_of_another_tokenizer(folders: tuple[Path, Path]) -> None:
    file = folders[1] / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    # The letter pairs have another order.
    content["model"]["vocab"] = vocabulary | dict(zip(list(vocabulary)[300:], range(511, 299, -1), strict=True))
    content["model"]["merges"] = []
    file.write_text(json.dumps(content))
    message = r"the drafter does not belong to .*: its token 300 is '.*', the target's '.*' \(212 of 512 differ\)"
    check(mlx_mtp.PairError, message, folders[0])


def test_a_fine_tune_that_renamed_and_added_tokens(
    folders: tuple[Path, Path], reference: Callable[[str], list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """The drafter works with ids and still drafts. A warning names the differences."""
    file = folders[0] / "tokenizer.json"
    content = json.loads(file.read_text().replace('"<|tool_response>"', '"<|role>"'))
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": 600, "content": "<|mine|>"})
    file.write_text(json.dumps(content))
    model = mlx_mtp.load(folders[0])
    assert model.drafter is not None
    assert decode(model) == reference("e2b")
    (message,) = caplog.messages
    expected = "1 tokens differ (its token 7 is '<|tool_response>', the target's '<|role>'), 1 are in one of them alone"
    assert expected in message


def test_drafter_of_another_variant(tiny_pair: TinyPair) -> None:
    check(mlx_mtp.PairError, "does not belong to", tiny_pair("e2b") / "target", tiny_pair("31b") / "target-assistant")


def test_draft_position_of_the_loaded_config(folders: tuple[Path, Path]) -> None:
    edit_config(folders[1], draft_position="last")
    model = mlx_mtp.load(folders[0])
    assert model.drafter is not None
    from mlx_mtp.gemma4.kv_cache import Cache

    cache = Cache(model.config.text, mx.float32, max_block=4)
    cache.set_length(9)
    assert model.drafter.draft_context(cache).position.item() == 8
    edit_config(folders[1], draft_position="bonus")
    model = mlx_mtp.load(folders[0])
    assert model.drafter is not None
    assert model.drafter.draft_context(cache).position.item() == 9


def test_another_seed_gives_other_tokens(tmp_path: Path) -> None:
    """Another seed gives other tokens, so the layout tests above prove something."""
    make_target(tmp_path / "a", "e2b", seed=0)
    make_target(tmp_path / "b", "e2b", seed=1)
    make_drafter(tmp_path / "d", "e2b")
    a, b = (mlx_mtp.load(tmp_path / name, tmp_path / "d") for name in "ab")
    assert decode(a) != decode(b)
