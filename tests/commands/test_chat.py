"""`python -m mlx_mtp.chat`, run as a user runs it: as a process, through a pipe and on a terminal."""

import os
import re
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.commands import run

import mlx_mtp

TinyPair = Callable[[str], Path]
COMMAND = [sys.executable, "-m", "mlx_mtp.chat", "--temp", "0", "--num-draft-tokens", "3"]
AUTO = ("--num-draft-tokens", "auto")
# Run a command on a terminal of its own, between the test's pipes. Exit with the command's status.
ON_A_TERMINAL = [
    sys.executable,
    "-c",
    "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))",
]
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


def chat(*args: str | Path, stdin: str = "", code: int = 0) -> tuple[str, list[str]]:
    """Run the chat. Return stdout and the lines of stderr."""
    finished = run("chat", *COMMAND[3:], *args, stdin=stdin, code=code)
    return finished.stdout, finished.stderr.splitlines()


def answers(folder: Path, conversations: list[list[str]], system_prompt: str | None = None) -> str:
    """Return the expected answers to the messages of each conversation, eight tokens each."""
    model = mlx_mtp.load(folder, "none")
    texts = []
    for conversation in conversations:
        messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        for message in conversation:
            messages.append({"role": "user", "content": message})
            prompt = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False)
            texts.append(model.generate(prompt, max_tokens=8).text)
            messages.append({"role": "assistant", "content": texts[-1]})
    return "".join(text + "\n" for text in texts)


def test_a_conversation_through_a_pipe(tiny_pair: TinyPair) -> None:
    """Turns build on earlier turns, /reset forgets them, and a message that does not fit is dropped."""
    target = tiny_pair("e2b") / "target"
    lines = ["hello there", "and then", "x" * 5000, "go on", "", "/nonsense", "/stats", "/reset", "go on", "/stats"]
    stdout, stderr = chat("--model", target, "-m", "8", stdin="\n".join(lines))
    assert stdout == answers(target, [["hello there", "and then", "go on"], ["go on"]])
    assert stderr[0] == f"model: {target}, drafter: {target}-assistant; /help lists the commands"
    assert re.fullmatch(r"error: the prompt has \d+ tokens, but the context holds 4096 with the answer; .*", stderr[1])
    assert stderr[2] == "unknown command /nonsense: /help lists them"
    before, after = (part.splitlines() for part in "\n".join(stderr[3:]).split("\nconversation forgotten\n"))
    for stats, count in ((before, 3), (after, 4)):
        last, total = stats[: stats.index(f"All answers: {count}")], stats[stats.index(f"All answers: {count}") :]
        assert last[0] == "Last answer"
        assert_figures(last, 8)
        assert_figures(total, 8 * count)
    used, used_after_reset = (int(stats[-1].split()[1]) for stats in (before, after))
    assert before[-1] == f"Context: {used} of 4096 tokens"
    assert 8 < used_after_reset < used


def assert_figures(lines: list[str], tokens: int) -> None:
    values = dict(line.split(": ", 1) for line in lines if ": " in line)
    assert re.fullmatch(rf"{tokens} tokens, \d+\.\d tokens/s", values["Generation"])
    assert re.fullmatch(r"\d+, drafted: [1-9]\d* \(\d\.\d per round\), accepted: \d+", values["Rounds"])
    assert {"Prompt", "Acceptance length", "Acceptance by position"} <= set(values)


def test_system_prompt_outlives_reset_and_no_drafter_is_said(tiny_pair: TinyPair, tmp_path: Path) -> None:
    alone = shutil.copytree(tiny_pair("12b") / "target", tmp_path / "alone")
    args = ("--model", alone, "-m", "8", "--system-prompt", "be brief", "--verbose", *AUTO)
    stdout, stderr = chat(*args, stdin="hello\n/reset\nhello\n/help\n/exit\nnever read\n")
    assert stdout == answers(alone, [["hello"], ["hello"]], "be brief")
    assert stdout != answers(alone, [["hello"], ["hello"]])
    assert stderr[0].startswith(f"model: {alone}, no drafter found for {alone}: decoding plainly; ")
    assert f"target: {alone}, gemma4_unified, not quantized" in stderr
    assert stderr.count("Rounds: 7, nothing drafted (no drafter)") == 2
    assert [line.split()[0] for line in stderr[-4:]] == ["/reset", "/stats", "/help", "/exit"]


def test_errors_at_the_start_give_one_line(tiny_pair: TinyPair, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert chat("--model", absent, stdin="hello\n", code=1) == ("", [f"error: {absent}: no such folder"])
    stdout, stderr = chat("--model", tiny_pair("e2b") / "target", "-m", "0", stdin="hello\n", code=1)
    assert stdout == ""
    assert len(stderr) == 1
    assert re.fullmatch("error: max_tokens must be .*at least 1, found 0", stderr[0])


class Terminal:
    """A program on a terminal: it records the output and types keys."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process, self.keyboard, self.screen = process, process.stdin, process.stdout
        self.shown = ""
        self._seen = 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.screen, selectors.EVENT_READ)

    def type(self, keys: str) -> None:
        """Type keys."""
        self.keyboard.write(keys.encode())
        self.keyboard.flush()

    def interrupt(self) -> None:
        """Type Ctrl-C at a prompt. Python notices it only while it waits for keys, just after it shows the prompt."""
        time.sleep(0.5)
        self.type(CTRL_C)

    def expect(self, pattern: str, seconds: float = 30.0) -> re.Match[str]:
        """Wait until the output matches the pattern, after the last match."""
        deadline = time.monotonic() + seconds
        while (match := re.compile(pattern).search(self.shown, self._seen)) is None:
            assert self._selector.select(max(0.0, deadline - time.monotonic())), f"no {pattern!r} in {self.shown!r}"
            data = os.read(self.screen.fileno(), 65536)
            assert data, f"ended without {pattern!r}: {self.shown!r}"
            self.shown += data.decode(errors="replace")
        self._seen = match.end()
        return match


@contextmanager
def terminal(*args: str | Path) -> Iterator[Terminal]:
    environment = os.environ | {"TERM": "xterm", "INPUTRC": os.devnull}
    command = [*ON_A_TERMINAL, *COMMAND, *map(str, args)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    try:
        yield Terminal(process)
    finally:
        process.kill()
        process.communicate()


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends(tiny_pair: TinyPair) -> None:
    prompts = []
    with terminal("--model", tiny_pair("e2b") / "target", "-m", "3500") as user:
        for count in (1, 2):
            user.expect(">>> ")
            user.type("hello\r")
            # The output has the typed line, and then at least a few characters of the answer. The second answer depends
            # on the length of the first, and may end by itself.
            if ">>> " not in user.expect(r"hello\r\n((.|\n){40}|(.|\n)*>>> )")[0]:
                user.type(CTRL_C)
                user.expect(">>> ")
            user.type("/stats\r")
            prompts.append(int(user.expect(r"Last answer\r\nPrompt: (\d+) tokens")[1]))
            user.expect(f"All answers: {count}\r\n")
        user.expect(">>> ")
        user.type(CTRL_D)
        assert user.process.wait(30) == 0
    # The second prompt holds the stopped answer and two messages.
    assert prompts[1] > 2 * prompts[0]
    assert "Traceback" not in user.shown


def test_editing_and_ctrl_c_at_the_prompt(tiny_pair: TinyPair) -> None:
    readline = pytest.importorskip("readline")
    # libedit does not report the text of the line after Ctrl-C.
    times = 1 if "libedit" in readline.__doc__ else 2
    with terminal("--model", tiny_pair("e2b") / "target") as user:
        user.expect(">>> ")
        user.type("/recalled\r")
        user.expect("unknown command /recalled")
        user.expect(">>> ")
        user.type(UP + "\r")
        user.expect("unknown command /recalled")
        # Ctrl-C discards the line. Only a second Ctrl-C on an empty line ends the program.
        for _ in range(times):
            user.expect(">>> ")
            user.type("/cleared")
            user.expect("/cleared")
            user.interrupt()
        user.expect(">>> ")
        user.type("/help\r")
        user.expect("/exit")
        user.expect(">>> ")
        user.interrupt()
        user.expect(">>> ")
        user.interrupt()
        assert user.process.wait(30) == 130
    assert "unknown command /cleared" not in user.shown
    assert "Traceback" not in user.shown


def test_thinking_is_a_switch_of_every_turn(tiny_pair: TinyPair, switchless: Path) -> None:
    target = tiny_pair("e2b") / "target"
    options = ("--model", target, "-m", "6", "--enable-thinking", "--thinking-budget", "4")
    stdout, _ = chat(*options, stdin="hello\nand then\n")
    model = mlx_mtp.load(target, "none")
    messages = [{"role": "user", "content": "hello"}]
    first = model.generate(messages, max_tokens=6, enable_thinking=True).text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "and then"}]
    assert stdout == f"{first}\n{model.generate(messages, max_tokens=6, enable_thinking=True).text}\n"
    # A template without the switch is refused before the first message.
    _, stderr = chat("--model", switchless, "--drafter", "none", *AUTO, "--enable-thinking", stdin="hello\n", code=1)
    assert stderr == ["error: thinking cannot be enabled: the chat template has no switch enable_thinking"]
