"""Real shells and files: encodings, closed descriptors, full disks, odd files, and Ctrl-C at any time."""

import errno
import fcntl
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.tiny import STOP_IDS, make_tokenizer

import mlx_mtp
from mlx_mtp import DEMO_PAIR, cache_prompt, chat, generate, shell
from mlx_mtp.checkpoints.config import read_json
from mlx_mtp.checkpoints.output_files import check_file, new_folder, remove_abandoned, replace_text
from mlx_mtp.checkpoints.tensors import read_checkpoint
from mlx_mtp.convert import cli as convert
from mlx_mtp.convert.converter import Options
from mlx_mtp.convert.converter import convert as run_convert
from mlx_mtp.decoding.draft_length import CostCurve, Costs
from mlx_mtp.decoding.kept_costs import CostsFile, read_or_measure
from mlx_mtp.errors import ConfigError, DataError, OutputError, TokenizerError, WeightsError
from mlx_mtp.server import cli as server
from mlx_mtp.text.tokenizer import check_tokenizer, encode_prompt, load_tokenizer
from mlx_mtp.training.dataset import check_data

GREEDY = ("--temp", "0", "--num-draft-tokens", "0", "--max-tokens", "2")
MARK = b"\xef\xbb\xbf"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0f3a\nsize 4711\n"


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A copy of the demo pair that a test may damage. Its folder's name has blanks and other scripts."""
    return shutil.copytree(DEMO_PAIR, tmp_path / "ein Modell é 日本 🔥" / "demo", copy_function=os.link)


def replace(file: Path, content: bytes) -> None:
    """Replace a file. The file that was linked to does not change."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes, encoding: str = "utf-8") -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding=encoding))


# Input text


@pytest.mark.parametrize(
    ("content", "encoding", "text"),
    [
        ("é\r\nü\r".encode(), "utf-8", "é\nü\n"),
        (MARK + "é".encode(), "utf-8", "é"),
        ("é".encode(), "ascii", "é"),
        ("é".encode("latin-1"), "latin-1", "é"),
    ],
)
def test_a_prompt_on_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes, encoding: str, text: str) -> None:
    stdin(monkeypatch, content, encoding)
    assert shell.read_prompt("-") == text


def test_a_prompt_that_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("utf-8", "ascii"):
        stdin(monkeypatch, b"caf\xe9 noir", encoding)
        with pytest.raises(mlx_mtp.PromptError, match="stdin: not UTF-8: byte 0xe9 at position 3"):
            shell.read_prompt("-")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(mlx_mtp.PromptError, match="expected text on stdin, which is closed"):
        shell.read_prompt("-")


def test_an_argument_in_another_encoding() -> None:
    assert shell.text_argument("日本") == "日本"
    # Python decodes UTF-8 in this way in an ASCII-only locale.
    assert shell.text_argument(b"caf\xc3\xa9".decode("ascii", "surrogateescape")) == "café"
    result = subprocess.run(
        [sys.executable, "-m", "mlx_mtp.generate", "--prompt", b"caf\xe9"], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: argument --prompt/-p: not UTF-8: byte 0xe9 at position 3\n"


# Output text


def test_characters_that_the_terminal_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are written as escape sequences, with a note. JSON stays JSON."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    arguments = ["--prompt", "x", "--regex", "aé🔥", *GREEDY[:4], "--max-tokens", "20", "--json"]
    assert generate.main(arguments) == 0
    text, report = out.buffer.getvalue().splitlines()
    assert text == b"a\xe9\\U0001f525"
    assert json.loads(report)["text"] == "aé🔥"
    assert "stdout's encoding, latin-1, lacks characters of this text, such as '\\U0001f525'" in capsys.readouterr().err


def command(*arguments: str, redirect: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a shell with a redirection."""
    script = f'"$@" {redirect}'
    line = ["bash", "-c", script, "bash", sys.executable, "-m", *arguments]
    result = subprocess.run(line, capture_output=True, text=True, env=os.environ | env)
    assert "Traceback" not in result.stderr
    return result


def test_descriptors_that_are_closed_or_full(capsys: pytest.CaptureFixture[str]) -> None:
    decode = ("mlx_mtp.generate", "--prompt", "def f", *GREEDY)
    assert generate.main([*decode[1:]]) == 0
    expected = capsys.readouterr().out
    assert expected.strip()
    closed = command(*decode, redirect="<&-")
    assert (closed.returncode, closed.stdout) == (0, expected), closed.stderr
    silent = command(*decode, redirect="2>&-")
    assert (silent.returncode, silent.stdout) == (0, expected)
    if Path("/dev/full").exists():
        full = command(*decode, redirect=">/dev/full")
        assert full.returncode == 1
        assert full.stderr.splitlines()[1:] == ["error: stdout cannot be written: No space left on device"]


class _Full(io.FileIO):
    """A file on a full disk."""

    def write(self, _: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("run", [chat.main, server.main], ids=["chat", "server"])
def test_stdout_is_full(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: Any, tmp_path: Path, run: Any
) -> None:
    stdin(monkeypatch, b"def f\n")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(_Full(str(tmp_path / "out"), "w"))))
    arguments = ["--port", "0", "--log-level", "warning"] if run is server.main else ["--max-tokens", "2"]
    assert run(["--model", str(DEMO_PAIR), "--num-draft-tokens", "0", *arguments]) == 1
    error = capsys.readouterr().err.splitlines()
    assert error[-1] == "error: stdout cannot be written: No space left on device"
    assert len(error) == (1 if run is server.main else 2), error
    # Uvicorn must log no traceback.
    assert [record for record in caplog.records if record.levelno > logging.WARNING] == []


def test_a_message_that_is_no_text_is_dropped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error line reports it, and the conversation continues. UTF-8 text is read even in an ASCII-only locale."""
    arguments = ["--model", str(DEMO_PAIR), *GREEDY, "--seed", "1"]
    found = []
    for content, encoding in ((b"caf\xe9\ndef f\n", "utf-8"), (b"def f\n", "utf-8"), ("é\n".encode(), "ascii")):
        stdin(monkeypatch, content, encoding)
        assert chat.main(arguments) == 0
        found.append(capsys.readouterr())
    assert found[0].out == found[1].out != ""
    message = "error: stdin: not UTF-8: byte 0xe9 at position 3; the message is dropped"
    assert [message in part.err.splitlines() for part in found] == [True, False, False]
    assert found[2].out


def test_converting_without_a_terminal(tiny_pair: Any, tmp_path: Path) -> None:
    source = str(tiny_pair("e2b") / "target")
    arguments = ("mlx_mtp.convert", "--hf-path", source, "--mlx-path", str(tmp_path / "out"), "--drafter", "none")
    assert command(*arguments, redirect="<&- 2>&-").returncode == 0
    assert (tmp_path / "out" / "config.json").is_file()


# Ctrl-C


@pytest.mark.parametrize("module", ["mlx_mtp.generate", "mlx_mtp.convert", "installed"])
def test_ctrl_c_while_importing(tmp_path: Path, module: str) -> None:
    """The program ends without a message, even if an imported package catches the exception."""
    slow = "import time\nprint('importing', flush=True)\ntry:\n    time.sleep(60)\nexcept BaseException:\n    pass\n"
    (tmp_path / "numpy.py").write_text(slow)
    code = ["-c", "import sys; from mlx_mtp.commands import generate; sys.exit(generate())"]
    arguments = code if module == "installed" else ["-m", module, "--help"]
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130


def test_importing_the_package_is_instant() -> None:
    """A command's own code runs before all slow imports. Ctrl-C keeps the program's handler."""
    code = "import signal, sys; before = signal.getsignal(2); import mlx_mtp; from mlx_mtp import commands\n"
    code += "assert signal.getsignal(2) is before; print(*sys.modules)\n"
    # The names exist, whatever is imported first.
    code += "import mlx_mtp.loading; assert callable(mlx_mtp.load) and mlx_mtp.Model and 'Model' in dir(mlx_mtp)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"mlx", "mlx.core", "numpy", "huggingface_hub", "argparse", "logging"} & set(result.stdout.split())


# Folders and files


def test_the_current_folder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert convert.main(["--hf-path", str(DEMO_PAIR), "--mlx-path", "out"]) == 1
    assert capsys.readouterr().err == "error: the current folder is gone: change to another one\n"


def test_paths_in_any_script(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = demo.parent / "gelesen 🔥.kv"
    arguments = ["--model", str(demo), "--prompt", "def f(x):"]
    assert cache_prompt.main([*arguments, "--prompt-cache", str(kept)]) == 0
    assert sorted(path.name for path in demo.parent.iterdir()) == sorted(["demo", kept.name])
    assert generate.main([*arguments, "--prompt-cache", str(kept), *GREEDY, "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["cached_tokens"] > 5
    assert report["drafter"] == str(demo / "drafter")


def test_a_prompt_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (tmp_path, tmp_path / "absent" / "x", tmp_path / ("x" * 250)):
        with pytest.raises(OutputError, match="cannot be written"):
            check_file(file)
    model = mlx_mtp.load(DEMO_PAIR, "none")
    monkeypatch.setattr("mlx_mtp.prompt_files.Stream", lambda *_, **__: pytest.fail("the prompt is read"))
    with pytest.raises(OutputError, match="cannot be written"):
        model.save_prompt("def f", tmp_path / "absent" / "x")
    assert list(tmp_path.iterdir()) == []


def test_only_files_are_replaced(tmp_path: Path) -> None:
    """A device or a pipe is never replaced. For a link, the file that it names is replaced."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to pipe").symlink_to("pipe")
    (tmp_path / "loop").symlink_to("loop")
    arguments = ["--prompt", "def f", "--model", str(DEMO_PAIR), "--prompt-cache"]
    for name, found in (("pipe", "a device"), ("to pipe", "a device"), ("loop", "a link that leads nowhere")):
        for write in (check_file, lambda file: replace_text(file, "new")):
            with pytest.raises(OutputError, match=f"{name}: cannot be written: expected a file .*, found {found}"):
                write(tmp_path / name)
        assert cache_prompt.main([*arguments, str(tmp_path / name)]) == 1
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "folder").mkdir()
    for name in ("old", "new"):
        (tmp_path / name).symlink_to(Path("folder", name))
        check_file(tmp_path / name)
        for text in ("one", "two"):
            replace_text(tmp_path / name, text)
            assert (tmp_path / name).is_symlink()
            assert (tmp_path / "folder" / name).read_text() == text
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["new", "old"]


def test_byte_order_marks_and_line_ends(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some editors write them. They can be in every file of a model, in a schema, and in training data."""
    arguments = ["--prompt", "def read(path):", *GREEDY]
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json"):
        text = (demo / name).read_text().replace("\n", "\r\n")
        replace(demo / name, MARK + text.encode())
    for name in ("tokenizer.json", "chat_template.jinja", "drafter/config.json"):
        replace(demo / name, MARK + (demo / name).read_bytes())
    texts = []
    for model in (DEMO_PAIR, demo):
        assert generate.main(["--model", str(model), *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    prompts = [encode_prompt(load_tokenizer(folder, STOP_IDS), "x") for folder in (DEMO_PAIR, demo)]
    assert prompts[0] == prompts[1]
    check_tokenizer(demo)
    schema = demo.parent / "schema.json"
    schema.write_bytes(MARK + b'{"type":\r\n "integer"}')
    assert generate.main(["--model", str(demo), *arguments, "--json-schema", str(schema)]) == 0
    (demo.parent / "data.jsonl").write_bytes(MARK + b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    check_data(demo.parent / "data.jsonl")
    (demo.parent / "data.jsonl").write_bytes(b"[1]\n")
    with pytest.raises(DataError, match=r"data.jsonl, line 1: expected an object, found list"):
        check_data(demo.parent / "data.jsonl")


def test_a_link_to_nowhere_is_named(demo: Path) -> None:
    for name in ("model.safetensors", "config.json", "generation_config.json", "chat_template.jinja"):
        content = (demo / name).read_bytes()
        (demo / name).unlink()
        (demo / name).symlink_to("../blobs/pruned")
        with pytest.raises(ConfigError, match=rf"{name}: .*a link to \.\./blobs/pruned, which is not there"):
            mlx_mtp.load(demo)
        replace(demo / name, content)


def test_a_file_of_another_user(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(WeightsError, match=r"model.safetensors: cannot be opened: Permission denied"):
        mlx_mtp.load(demo)


def test_pointers_of_git_lfs(demo: Path) -> None:
    replace(demo / "model.safetensors", POINTER)
    with pytest.raises(WeightsError, match=r"model.safetensors: a git-lfs pointer in place of the file: run `git lfs"):
        read_checkpoint(demo)
    replace(demo / "drafter" / "config.json", POINTER)
    with pytest.raises(ConfigError, match=r"config.json: .*a git-lfs pointer"):
        read_json(demo / "drafter" / "config.json")


def test_no_home_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    # An empty value has the effect of no value.
    monkeypatch.setenv("MLX_MTP_CACHE", "")
    assert generate.main(["--prompt", "def f", "--temp", "0", "--max-tokens", "2"]) == 0
    assert "the measurement of rounds is not kept: Could not determine home directory." in caplog.text
    assert "Traceback" not in capsys.readouterr().err


def test_a_cache_folder_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    costs = Costs(CostCurve([1.0 + 0.1 * k for k in range(9)], 0.05, 0.02))

    def refuse(path: Path, *_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    assert read_or_measure(CostsFile({"a": 1}, tmp_path), lambda: costs) == costs
    assert "not a usable measurement of rounds, measured again: " in caplog.text


# The converter


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", POINTER, "tokenizer.json: a git-lfs pointer in place of the file"),
        ("tokenizer.json", b"", "tokenizer.json: truncated: an empty file"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"ty', "tokenizer.json: not a tokenizer: "),
        ("tokenizer.json", b"{}", "tokenizer.json: not a tokenizer: "),
        ("tokenizer_config.json", b'{"bos_token": ', "tokenizer_config.json: cannot be read as JSON: "),
        ("special_tokens_map.json", POINTER, "special_tokens_map.json: cannot be read as JSON: a git-lfs pointer"),
        ("chat_template.jinja", POINTER, "chat_template.jinja: a git-lfs pointer in place of the file"),
        ("chat_template.jinja", b"", "chat_template.jinja: truncated: an empty file"),
        ("chat_template.jinja", b" \n", "chat_template.jinja: expected a chat template"),
        ("chat_template.jinja", "{# Gruß #}".encode("latin-1"), "chat_template.jinja: not UTF-8: "),
        ("chat_template.jinja", "{# a #}".encode("utf-16"), "chat_template.jinja: not UTF-8: "),
        (
            "chat_template.jinja",
            "{# a #}".encode("utf-16-le"),
            "chat_template.jinja: expected a chat template in UTF-8",
        ),
        ("additional_chat_templates/tool_use.jinja", POINTER, "tool_use.jinja: a git-lfs pointer in place of the file"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_not_converted(
    tiny_pair: Any, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    source = shutil.copytree(tiny_pair("e2b") / "target", tmp_path / "source", copy_function=os.link)
    (source / name).parent.mkdir(exist_ok=True)
    replace(source / name, content)
    with pytest.raises(TokenizerError) as caught:
        run_convert(Options(str(source), tmp_path / "out", "none"))
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with pytest.raises(TokenizerError, match=name):
        load_tokenizer(source, STOP_IDS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", "{% for m in messages %}{{ m", "not a chat template: "),
        ("chat_template.jinja", "{{ 'a' | no_such_filter }}", "not a chat template: "),
        ("additional_chat_templates/tool_use.jinja", "{% if %}", "not a chat template: "),
        ("chat_template.json", "5", "expected a JSON object, found int"),
        *(
            ("chat_template.json", json.dumps({"chat_template": value}), "field chat_template must be a template or")
            for value in (5, [1], {"default": "x"}, [{"name": "default"}])
        ),
        ("tokenizer_config.json", '{"eos_token": 5}', "field eos_token must be a token"),
        ("tokenizer_config.json", '{"bos_token": {"content": 1}}', "field bos_token must be a token"),
        ("tokenizer_config.json", '{"eos_token": {"content": "<eos>"}}', "field eos_token must be a token"),
        ("tokenizer_config.json", '{"extra_special_tokens": {"a": 5}}', "field extra_special_tokens must be a list"),
        ("tokenizer_config.json", '{"model_max_length": "x"}', "field model_max_length must be a number, found 'x'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "field added_tokens_decoder must be"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "added_tokens_decoder.x must"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {"lstrip": true}}}', "added_tokens_decoder.1 must"),
        ("tokenizer_config.json", '{"chat_template": "{{ m"}', "not a chat template: "),
        ("special_tokens_map.json", '{"unk_token": [1]}', "field unk_token must be a token"),
        ("added_tokens.json", '{"<x>": "y"}', "field <x> must be the token's id, found 'y'"),
    ],
)
def test_fields_and_templates_of_a_tokenizer_are_checked(tmp_path: Path, name: str, content: str, message: str) -> None:
    folder = make_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text("{% generation %}{{ messages | tojson }}{% endgeneration %}")
    check_tokenizer(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    replace(folder / name, content.encode())
    with pytest.raises(TokenizerError) as caught:
        check_tokenizer(folder)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{folder / name}: ")


def test_named_chat_templates_are_files_of_the_model(tiny_pair: Any, tmp_path: Path) -> None:
    """They are converted, and read without a byte order mark."""
    source = shutil.copytree(tiny_pair("e2b") / "target", tmp_path / "source", copy_function=os.link)
    replace(source / "chat_template.jinja", b"default")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_bytes(MARK + b"tools")
    run_convert(Options(str(source), tmp_path / "out", "none"))
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_bytes() == b"tools"
    for folder in (source, tmp_path / "out"):
        assert load_tokenizer(folder, STOP_IDS).chat_template == {"default": "default", "tool_use": "tools"}


def test_a_chat_template_json_without_a_template_counts_as_absent(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path)
    for content in ("{}", '{"chat_template": null}'):
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        (folder / "chat_template.json").write_text(content)
        check_tokenizer(folder)
        assert not load_tokenizer(folder, STOP_IDS).has_chat_template


def test_a_tokenizer_of_sentencepiece_is_checked(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not it")
    with pytest.raises(TokenizerError, match=r"tokenizer.model: not a tokenizer: "):
        check_tokenizer(tmp_path)
    check_tokenizer(make_tokenizer(tmp_path))


@pytest.mark.parametrize(
    ("card", "license"),
    [
        (b"---\nlicense: gemma\n---\n# Mod\xe8le\n", "gemma"),
        (MARK + b"---\r\nlicense: gemma\r\n---\r\n", "gemma"),
        (b"---\nlicense: [a\n\tb: :\n---\n", None),
        (b"---\n- a\n---\n", None),
        (b"---\nlicense: [a, b]\n---\n", None),
        (b"no metadata", None),
    ],
)
def test_a_model_card_in_any_state(tiny_pair: Any, tmp_path: Path, card: bytes, license: str | None) -> None:
    source = shutil.copytree(tiny_pair("e2b") / "target", tmp_path / "source", copy_function=os.link)
    replace(source / "README.md", card)
    replace(source / "tokenizer_config.json", MARK + (source / "tokenizer_config.json").read_bytes())
    run_convert(Options(str(source), tmp_path / "out", "none"))
    written = (tmp_path / "out" / "README.md").read_text()
    assert ("license: gemma" in written) == (license is not None)
    assert (tmp_path / "out" / "tokenizer_config.json").read_bytes().startswith(b"{")


@pytest.fixture
def abandoned(tmp_path: Path) -> Path:
    """The leftover folder of a killed conversion to `out`."""
    folder = tmp_path / ".out.partial-x1"
    (folder / "new").mkdir(parents=True)
    (folder / "new" / "model.safetensors").write_bytes(b"half")
    return folder


def test_what_a_killed_conversion_left_is_removed(
    tiny_pair: Any, tmp_path: Path, abandoned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / ".output.partial-x1"
    other.mkdir()
    arguments = ["--hf-path", str(tiny_pair("e2b") / "target"), "--mlx-path", str(tmp_path / "out")]
    assert convert.main([*arguments, "--drafter", "none"]) == 0
    assert f"{abandoned}: left by a run that was killed, removed" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".output.partial-x1", "out"]


def test_what_a_killed_replacement_moved_away_is_put_back(tmp_path: Path, abandoned: Path) -> None:
    (abandoned / "old").mkdir()
    (abandoned / "old" / "config.json").write_text("whole")
    remove_abandoned(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "whole"
    assert not abandoned.exists()


def test_what_another_run_writes_is_left_alone(tmp_path: Path, abandoned: Path, caplog: Any) -> None:
    with new_folder(tmp_path / "out") as new:
        (new / "file").touch()
        (others,) = [path for path in tmp_path.iterdir() if path != abandoned]
        remove_abandoned(tmp_path / "out")
        assert (others / "new" / "file").exists()
        assert not abandoned.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # The lock ends with the run.
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_one_program_for_all_commands() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "mlx_mtp", *arguments], capture_output=True, text=True)

    named = "generate,chat,serve,convert,bench,train,probe,cache-prompt"
    helped = run("--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert named in helped.stdout
    for arguments, found in (((), "found none"), (("generat",), "found 'generat'")):
        wrong = run(*arguments)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert f"error: expected a command, {found}" in wrong.stderr
    for name in named.split(","):
        described = run(name, "--help")
        assert (described.returncode, described.stderr) == (0, "")
        assert "usage: mlx_mtp." in described.stdout
    bad = run("generate", "--prompt", "x", "--temp", "-1")
    assert bad.returncode != 0
    assert "temp" in bad.stderr
