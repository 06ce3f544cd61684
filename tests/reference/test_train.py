"""`python -m mlx_mtp.train`: as a process, killed and resumed, and its training data."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support.commands import run
from support.tiny import load_drafter, load_target

import mlx_mtp
from mlx_mtp.errors import DataError, TrainingError
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.train import main
from mlx_mtp.training.dataset import Data, Text, read_data
from mlx_mtp.training.trainer import Trainer, TrainingOptions

TinyPair = Callable[[str], Path]
COMMAND = [sys.executable, "-m", "mlx_mtp.train"]
QUICK = ("--iters", "6", "--batch-size", "2", "--steps-per-eval", "3", "--save-every", "2", "--learning-rate", "3e-3")


@pytest.fixture
def folder(tiny_pair: TinyPair, tmp_path: Path) -> Path:
    """A tiny pair in a folder that a test may write to."""
    shutil.copytree(tiny_pair("e2b"), tmp_path / "pair")
    return tmp_path / "pair"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    rng = np.random.default_rng(0)
    words = [f"{a}{b}" for a in "bcdfgh" for b in ("a", "e", "i", "an", "on")]
    file.write_text("".join(json.dumps({"text": " ".join(rng.choice(words, 30))}) + "\n" for _ in range(24)))
    return file


def test_training_writes_a_drafter_that_is_found_and_works(
    folder: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run("train", "--model", folder / "target", "--data", data, *QUICK)
    assert "23 texts to train on, 1 held out" in result.stderr
    assert "update 6: loss " in result.stderr
    assert result.stdout.startswith(f"{folder / 'target' / 'drafter'}: acceptance length, held out, ")
    assert not (folder / "target" / "drafter.training").exists()
    model = mlx_mtp.load(folder / "target")
    assert model.drafter_config is not None
    assert model.drafter_config.path.parent == folder / "target" / "drafter"
    plain = model.generate("hello", max_tokens=30, num_draft_tokens=0, ignore_eos=True)
    assert model.generate("hello", max_tokens=30, num_draft_tokens=3, ignore_eos=True).tokens == plain.tokens
    # An existing output is replaced only on request.
    again = ["--model", str(folder / "target"), "--data", str(data), *QUICK, "--iters", "1"]
    assert main(again) == 1
    assert "exists already; choose another --output, or replace it with --overwrite" in capsys.readouterr().err
    assert main([*again, "--overwrite"]) == 0


@pytest.mark.parametrize("options", [["--fine-tune-type", "lora", "--lora-rank", "4"], ["--rebuild-centroids"]])
def test_ways_to_train(folder: Path, data: Path, options: list[str]) -> None:
    args = ["--model", folder / "target", "--data", data, "--output", folder / "new", *QUICK, *options]
    assert main(list(map(str, args))) == 0
    old, new = (load_drafter(path)[0] for path in (folder / "target-assistant", folder / "new"))
    before, after = (dict(tree_flatten(drafter.parameters())) for drafter in (old, new))
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    if "lora" in options:
        assert changed == {
            name for name in before if name.endswith(("proj.weight", "projection.weight", "centroids.weight"))
        }
    else:
        assert changed == before.keys()


def test_from_scratch_and_in_the_form_asked_for(folder: Path, data: Path, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.mkdir()
    shutil.copyfile(folder / "target-assistant" / "config.json", config / "config.json")
    shutil.rmtree(folder / "target-assistant")
    args = ["--model", folder / "target", "--drafter-config", config, "--data", data, *QUICK, "--weight-by-reach"]
    assert main(list(map(str, args))) == 0
    assert mlx_mtp.load(folder / "target").drafter is not None


def interrupted(command: list[str], state: Path) -> None:
    """Run a command until it has saved a state after some updates. Then kill it."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        time.sleep(0.02)
        if state.is_file() and json.loads(state.read_text())["update"] >= 2:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert process.returncode == -signal.SIGKILL, "ended before it could be killed"


def test_a_killed_training_goes_on_to_the_same_drafter(
    folder: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--model", str(folder / "target"), "--data", str(data), *QUICK, "--iters", "8", "--steps-per-eval", "4"]
    args += ["--optimizer", "muon"]
    run("train", *args, "--output", folder / "whole")
    output = folder / "killed"
    interrupted([*COMMAND, *args, "--output", str(output)], folder / "killed.training" / "state.json")
    assert not output.exists()
    assert main([*args, "--output", str(output)]) == 1
    assert "an unfinished training; go on with --resume, or remove it" in capsys.readouterr().err
    assert main([*args, "--output", str(output), "--resume", "--seed", "5"]) == 1
    assert "begun with seed 0, found 5" in capsys.readouterr().err
    run("train", *args, "--output", output, "--resume")
    for name in ("model.safetensors", "config.json"):
        assert (output / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_prompts_are_answered_by_the_target_and_kept(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"tell me about {i}"}) + "\n" for i in range(6)))
    args = ["--model", str(folder / "target"), "--data", str(file), *QUICK, "--max-answer-tokens", "24"]
    assert main(args) == 0
    assert (folder / "target" / "drafter" / "model.safetensors").is_file()


def test_answers_are_resumed(tiny_pair: TinyPair, tmp_path: Path) -> None:
    from mlx_mtp.training.dataset import answer_prompts

    model = mlx_mtp.load(tiny_pair("e2b") / "target")
    prompts = [model.encode([{"role": "user", "content": f"{i}"}]) for i in range(5)]
    options = mlx_mtp.GenerationOptions(max_tokens=8, sampling=mlx_mtp.Sampling(temperature=1.0))
    file = tmp_path / "answers.jsonl"
    whole = answer_prompts(model, prompts, file, options, lambda done, of: None)
    content = file.read_text()
    assert all(answer == model.generate(prompt, options).tokens for answer, prompt in zip(whole, prompts, strict=True))
    file.write_text(content[: len(content) // 2])
    seen = []
    assert answer_prompts(model, prompts, file, options, lambda done, of: seen.append(done)) == whole
    assert file.read_text() == content
    assert seen[0] > 0
    with pytest.raises(DataError, match="line 1: answers another prompt than the data's"):
        answer_prompts(model, prompts[1:], file, options, lambda done, of: None)


def make_trainer(tiny_pair: TinyPair, folder: Path, **options: Any) -> Trainer:
    target = load_target(tiny_pair("31b") / "target")[0]
    drafter = load_drafter(tiny_pair("31b") / "target-assistant")[0]
    rng = np.random.default_rng(1)
    texts = [Text([2, *rng.integers(16, 512, 40).tolist()], 1) for _ in range(10)]
    chosen = TrainingOptions(**{"iters": 12, "batch_size": 2, "steps_per_eval": 4, "save_every": 3} | options)
    folder.mkdir(exist_ok=True)
    return Trainer(target, drafter, Data(texts[:8], texts[8:]), chosen, folder)


def parameters(drafter: Drafter) -> dict[str, mx.array]:
    return dict(tree_flatten(drafter.parameters()))


def test_early_stopping_keeps_the_best(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """The steps are far too large, so no later state measures better than the first one."""
    options: dict[str, Any] = {"learning_rate": 0.9, "patience": 2, "iters": 200, "steps_per_eval": 2}
    trainer = make_trainer(tiny_pair, tmp_path / "state", **options)
    before = parameters(trainer.drafter)
    best = trainer.run(lambda update, loss, measured: None)
    assert trainer.update < 100
    if trainer.best_update == 0:
        assert best == trainer.initial
        assert all(mx.array_equal(value, before[name]) for name, value in parameters(trainer.drafter).items())
    assert trainer.measure().sampled_length == pytest.approx(best.sampled_length, abs=1e-6)


def test_a_loss_that_is_no_number_keeps_the_last_state(tiny_pair: TinyPair, tmp_path: Path) -> None:
    options: dict[str, Any] = {"iters": 5, "save_every": 2}
    trainer = make_trainer(tiny_pair, tmp_path / "state", **options)

    def poison(update: int, loss: float, measured: object) -> None:
        if update == 3:
            trainer.drafter.pre_projection.weight = trainer.drafter.pre_projection.weight * float("nan")

    with pytest.raises(TrainingError, match="the loss of update 4 is nan: a lower --learning-rate may help"):
        trainer.run(poison)
    state = json.loads((tmp_path / "state" / "state.json").read_text())
    assert state["update"] == 2
    again, whole = (make_trainer(tiny_pair, tmp_path / name, **options) for name in ("state", "other"))
    again.resume()
    measures = [trainer.run(lambda update, loss, measured: None) for trainer in (again, whole)]
    assert measures[0] == measures[1]


def test_a_full_disk_keeps_the_last_state(folder: Path, data: Path) -> None:
    """A size limit prevents large files, as a full disk does. No partial file is left."""
    size = (folder / "target-assistant" / "model.safetensors").stat().st_size

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    command = [*COMMAND, "--model", str(folder / "target"), "--data", str(data), *QUICK]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "cannot be written" in result.stderr.splitlines()[-1]
    left = [path.name for path in (folder / "target" / "drafter.training").iterdir()]
    assert not [name for name in left if "part" in name or name.startswith("state")]
    assert not (folder / "target" / "drafter").exists()


def test_every_kind_of_line(tiny_pair: TinyPair, tmp_path: Path) -> None:
    model = mlx_mtp.load(tiny_pair("e2b") / "target", "none")
    file = tmp_path / "data.jsonl"
    words = "some words to make it long enough for training"
    lines: list[dict[str, Any]] = [
        {"text": words},
        {"prompt": "a question", "completion": words},
        {"messages": [{"role": "user", "content": "a question"}, {"role": "assistant", "content": words}]},
        {"prompt": "a question"},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    answer = model.tokenizer.encode(words, add_special_tokens=False)
    prompt = model.encode([{"role": "user", "content": "a question"}])

    def answers(prompts: Any) -> list[list[int]]:
        assert prompts == [prompt]
        return [answer]

    train, valid = read_data(file, model, 1000, answers)
    turn_end = model.tokenizer.get_vocab()["<turn|>"]
    chat = Text([*prompt, *answer, turn_end], len(prompt))
    assert train == [Text(answer, 1), chat, chat]
    assert valid == [Text([*prompt, *answer], len(prompt))]
    # A long text is cut. Every piece begins like the text, and the prompt is never counted as an answer.
    file.write_text("".join(json.dumps({"text": f"<bos>{words * n}"}) + "\n" for n in (5, 1)))
    tokens = model.tokenizer.encode(words * 5, add_special_tokens=False)
    pieces = read_data(file, model, 32, answers)[0]
    assert [piece.tokens for piece in pieces[:-1]] == [[2, *tokens[i : i + 31]] for i in range(0, len(tokens) - 31, 31)]
    file.write_text("".join(json.dumps({"prompt": words * 2, "completion": words * n}) + "\n" for n in (3, 1)))
    pieces = read_data(file, model, 32, answers)[0]
    prompt = model.encode([{"role": "user", "content": words * 2}])
    assert all(piece.tokens[0] == 2 for piece in pieces)
    answered = [token for piece in pieces for token in piece.tokens[piece.answer :]]
    assert answered == [*(answer * 3), turn_end][: len(answered)]
    file.unlink()
    (tmp_path / "train.jsonl").write_text(json.dumps(lines[0]) + "\n")
    (tmp_path / "valid.jsonl").write_text(json.dumps(lines[1]) + "\n")
    assert read_data(tmp_path, model, 1000, answers) == Data(train[:1], [chat])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no text to train on: 0 lines read"),
        ('{"text": "x"}\n' * 5, "no text to train on: 5 lines read, none long enough is left"),
        ('{"text": "x"}\n{"text', "line 2: not JSON"),
        ("[1]\n", "line 1: expected an object, found list"),
        ('{"txt": "x"}\n', "line 1: expected text, messages or prompt, found txt"),
        ('{"text": ""}\n', "line 1: the prompt is empty"),
        ('{"messages": [{"content": "x"}]}\n', r"line 1: messages\[0\] must have a role"),
        ('{"prompt": "x", "completion": 3}\n', "line 1: expected the answer as text, found 3"),
    ],
)
def test_data_that_is_no_use(tiny_pair: TinyPair, tmp_path: Path, content: str, message: str) -> None:
    model = mlx_mtp.load(tiny_pair("e2b") / "target", "none")
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=f"{file}.*{message}"):
        read_data(file, model, 100, lambda prompts: [[] for _ in prompts])
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read"):
        read_data(tmp_path / "absent.jsonl", model, 100, lambda prompts: [])


def test_what_cannot_be_trained(
    folder: Path, data: Path, tiny_pair: TinyPair, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("--model", folder / "target", "--data", data)
    other = tiny_pair("31b") / "target-assistant"
    for args, message in (
        (["--drafter", other], "the drafter does not belong to"),
        (["--drafter", other, "--drafter-config", other], "--drafter and --drafter-config contradict each other"),
        (
            ["--drafter-config", other, "--fine-tune-type", "lora"],
            "--fine-tune-type lora needs a drafter to begin with",
        ),
        (["--iters", "0"], "iters must be at least 1, found 0"),
        (["--num-draft-tokens", "9"], "num_draft_tokens must be at most 8 to train, found 9"),
        (["--learning-rate", "2"], "learning_rate must be between 0 and 1, found 2.0"),
        (["--resume"], "no training to resume"),
        (["--data", folder / "absent.jsonl"], "absent.jsonl: cannot be read"),
    ):
        assert main(list(map(str, [*model, *args]))) == 1
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not list((folder / "target").glob("drafter*"))
