"""The pair in the package: its contents, the README's first command, and the repair of its drafter."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import mlx
import numpy as np
import pytest

import mlx_mtp
from mlx_mtp.checkpoints.config import read_drafter_config, read_target_config
from mlx_mtp.train import main

PROMPT = "def read_config(path):"


@pytest.fixture(scope="module")
def demo() -> mlx_mtp.Model:
    return mlx_mtp.load(mlx_mtp.DEMO_PAIR)


def test_generate_without_a_model_and_without_a_network(tmp_path: Path) -> None:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "mlx_mtp.generate", "--prompt", PROMPT, "--temp", "0", "--json"]
    command += ["--num-draft-tokens", "3", "--compare", "--max-tokens", "60"]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[0].startswith("no --model: the demo pair in the package")
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["text"].startswith(PROMPT)
    assert report["acceptance_length"] > 1.8
    assert f"Speed: {report['speedup']:.2f} times plain decoding" in result.stderr


def test_it_is_small_and_has_every_feature_of_e2b(demo: mlx_mtp.Model) -> None:
    files = [file for file in mlx_mtp.DEMO_PAIR.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 9e6
    text = read_target_config(mlx_mtp.DEMO_PAIR).text
    assert text.per_layer_input_size > 0
    widths = [layer.intermediate_size for layer in text.layers]
    shared = [not layer.has_kv for layer in text.layers]
    assert 0 < sum(shared) < len(shared)
    assert {w for w, s in zip(widths, shared, strict=True) if s} == {2 * widths[0]}
    assert {layer.layer_type for layer in text.layers} == {"sliding_attention", "full_attention"}
    assert text.sliding_window < 250
    drafter = read_drafter_config(mlx_mtp.DEMO_PAIR / "drafter")
    assert drafter.num_centroids
    assert demo.drafter is not None
    vocabulary = demo.tokenizer.get_vocab()
    for token in ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", "<|tool_call>", "<tool_call|>"):
        assert demo.tokenizer.encode(token, add_special_tokens=False) == [vocabulary[token]]
    chat = demo.encode([{"role": "user", "content": "x"}], enable_thinking=True)
    assert vocabulary["<|think|>"] in chat
    assert demo.default_sampling == mlx_mtp.Sampling(temperature=0.7, top_k=64, top_p=0.95)


def test_its_template_has_tools(demo: mlx_mtp.Model) -> None:
    """The template writes Gemma's syntax: declarations in the system turn, calls and responses in the model's turn."""
    parameters = {"type": "object", "properties": {"city-name": {"type": "string"}}, "required": ["city-name"]}
    tool = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": parameters}}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city-name": "Oslo", "days": [1, 2.5]}}}
    messages = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "weather", "content": "No."},
    ]
    text = demo.tokenizer.apply_chat_template(
        messages, tools=[tool], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert text == (
        '<bos><|turn>system\n<|tool>declaration:weather{description:<|"|>Now.<|"|>,parameters:{properties:{city-name:'
        '{type:<|"|>string<|"|>}},required:[<|"|>city-name<|"|>],type:<|"|>object<|"|>}}<tool|><turn|>\n'
        "<|turn>user\nRain?<turn|>\n<|turn>model\n"
        '<|tool_call>call:weather{city-name:<|"|>Oslo<|"|>,days:[1,2.5]}<tool_call|>'
        '<|tool_response>response:weather{value:<|"|>No.<|"|>}<tool_response|>'
    )


def test_training_repairs_the_drafter_of_a_target_that_drifted_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """mlx-lm's own commands train a LoRA on C++. Then this project's command trains the drafter."""
    data = tmp_path / "data"
    write_cpp(data)
    drifted = tmp_path / "drifted"
    lora = ["--train", "--data", str(data), "--iters", "6", "--batch-size", "1", "--max-seq-length", "128"]
    lora += ["--num-layers", "-1", "--learning-rate", "2e-3", "--val-batches", "1"]
    lora += ["--adapter-path", str(tmp_path / "lora")]
    mlx_lm("lora", "--model", mlx_mtp.DEMO_PAIR, *lora)
    mlx_lm("fuse", "--model", mlx_mtp.DEMO_PAIR, "--adapter-path", tmp_path / "lora", "--save-path", drifted)
    args = ["--model", drifted, "--drafter", mlx_mtp.DEMO_PAIR / "drafter", "--data", data, "--iters", "5"]
    args += ["--batch-size", "2", "--max-seq-length", "128", "--learning-rate", "1.5e-3", "--val-batches", "1"]
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 0
    print(capsys.readouterr().out)
    texts = [line["text"] for line in map(json.loads, (data / "valid.jsonl").read_text().splitlines())]
    lengths = {}
    for drafter in (mlx_mtp.DEMO_PAIR / "drafter", drifted / "drafter"):
        model = mlx_mtp.load(drifted, drafter)
        tokens = [model.tokenizer.encode(text)[:40] for text in texts[:3]]
        options = mlx_mtp.GenerationOptions(
            max_tokens=40,
            num_draft_tokens=3,
            ignore_eos=True,
            sampling=mlx_mtp.Sampling(temperature=1.0, top_k=64, top_p=0.95, seed=0),
        )
        stats = [model.generate(prompt, options).last.stats for prompt in tokens]
        lengths[drafter] = np.array([each.acceptance_length for each in stats])
        print(lengths[drafter])
    before, after = lengths.values()
    assert np.mean(after - before) > 0.1


def mlx_lm(command: str, *args: str | Path) -> None:
    """Run a command of mlx-lm in this process, which saves the start time. It raises its errors."""
    with patch("sys.argv", [f"mlx_lm.{command}", *map(str, args)]):
        import_module(f"mlx_lm.{command}").main()


def write_cpp(folder: Path) -> None:
    """Write C++ text for training and measuring: MLX's headers, in pieces."""
    root = Path(next(iter(mlx.__path__))) / "include"
    files = sorted(root.rglob("*.h"))
    assert len(files) > 100
    pieces = [
        text[i : i + 600] for text in (f.read_text(errors="ignore") for f in files) for i in range(0, len(text), 600)
    ]
    chosen = np.random.default_rng(0).permutation(len(pieces))[:640]
    folder.mkdir()
    for name, part in (("valid", chosen[:40]), ("train", chosen[40:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": pieces[i]}) + "\n" for i in part))
