"""Two and more ranks on loopback write the texts of one process, and every failure is one line in bounded time."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import group_cases
from support.paths import ROOT
from support.ranks import Ranks, start_ranks
from support.serving import eventually
from support.tiny import VARIANTS, make_target

from mlx_mtp import DEMO_PAIR, load
from mlx_mtp.checkpoints.config import read_target_config

CASES = ROOT / "tests" / "support" / "group_cases.py"
# Splits beside the default one, for two ranks.
OTHER_SPLITS = (("12b", "pipeline"), ("31b", "feed-forward"))
LOAD = "import mlx_mtp; mlx_mtp.load({0!r}{1}); print('loaded')"
# A lost rank is found within this time, in seconds.
SILENCE = 3


def one_process(folder: Path) -> dict[str, Any]:
    """Return the texts of one process, as they are in JSON."""
    with load(folder) as model:
        found: dict[str, Any] = json.loads(json.dumps(group_cases.texts(model)))
    return found


def test_two_ranks_write_the_texts_of_one_process(
    tiny_pair: Callable[[str], Path], tiny_media: Callable[[str], Path], tmp_path: Path
) -> None:
    folders = {variant: tiny_pair(variant) / "target" for variant in VARIANTS} | {"media": tiny_media("31b")}
    layers = {variant: len(read_target_config(folder).text.layers) for variant, folder in folders.items()}
    arguments = [f"{folder}:" for folder in folders.values()]
    arguments += [f"{folders[variant]}:{split}" for variant, split in OTHER_SPLITS]
    with start_ranks(tmp_path, [[CASES, *arguments]] * 2) as ranks:
        expected = {str(folder): one_process(folder) for folder in folders.values()}
        leader, follower = ranks.wait(600)
    assert leader.returncode == 0, leader.stderr
    assert (follower.returncode, follower.stdout) == (0, ""), follower.stderr
    found = [json.loads(line) for line in leader.stdout.splitlines()]
    assert [argument for argument, *_ in found] == arguments
    for argument, texts, _, machines in found:
        split = argument.partition(":")[2] or "tensor"
        assert machines == {"ranks": 2, "split": split, "bandwidths": [], "backend": "ring"}
        of_one = expected[argument.partition(":")[0]]
        assert texts == {name: of_one[name] for name in texts}, argument
    assert expected[str(folders["e2b"])]["evaluations"] == [4, 4]
    # One collective brings the tokens. The others are two of each layer, and that of the logits.
    assert [count for _, _, count, _ in found[:5]] == [1 + 2 * layers[variant] + 1 for variant in folders]
    assert [count for _, _, count, _ in found[5:]] == [2, 1 + layers["31b"] + 1]


def test_four_ranks_write_the_texts_of_one_process(tiny_pair: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_pair("e2b") / "target"
    code = (
        "import mlx_mtp, sys; model = mlx_mtp.load(sys.argv[1]); "
        "print([each.token for each in model.stream_generate(list(range(20, 45)), max_tokens=8, ignore_eos=True, "
        "num_draft_tokens=3)])"
    )
    leader, *followers = start_ranks(tmp_path, [["-c", code, folder]] * 4).wait()
    with load(folder) as model:
        responses = model.stream_generate(list(range(20, 45)), max_tokens=8, ignore_eos=True, num_draft_tokens=3)
        assert leader.stdout == f"{[each.token for each in responses]}\n", leader.stderr
    assert [each.returncode for each in followers] == [0] * 3


def test_the_launcher_of_mlx_runs_the_command_and_rank_0_prints(tmp_path: Path) -> None:
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps([{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}] * 2))
    port = 20_000 + os.getpid() % 20_000
    launch = Path(sys.executable).parent / "mlx.launch"
    command = [launch, "--backend", "ring", "--hostfile", file, "-p", port, "--", sys.executable, "-m"]
    generate = [
        "mlx_mtp.generate",
        "--prompt",
        "def read",
        "--max-tokens",
        "4",
        "--split",
        "feed-forward",
        "--temp",
        "0",
    ]
    found = subprocess.run(
        [*map(str, command), *generate], cwd=ROOT, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert found.stdout.count("Generation: 4 tokens") + found.stderr.count("Generation: 4 tokens") == 1, found.stderr
    # The messages of each rank come on the same streams.
    assert (found.stdout + found.stderr).count("no --model: the demo pair") == 1


def test_a_dry_run_shows_the_plan_and_the_cost_of_a_split(tmp_path: Path) -> None:
    leader, follower = start_ranks(tmp_path, [["-m", "mlx_mtp.generate", "--dry-run", "--json"]] * 2).wait()
    assert leader.returncode == follower.returncode == 0, leader.stderr
    table, _, last = leader.stdout.strip().rpartition("\n")
    plan = json.loads(last)
    assert len(plan["shared"]["peaks"]) == 2
    assert plan["shared"]["collectives"] == 52
    assert plan["shared"]["latency"] > 0
    # Rank 0 has more than a half: all K/V heads of two layers, and the projections of per-layer inputs.
    assert 0.5 * plan["shared"]["whole"] <= plan["shared"]["read"] < 0.6 * plan["shared"]["whole"]
    assert "split tensor over 2 machines: rank 0" in table
    assert "a pass has 52 collectives of" in table
    assert "GB/s of rank 0, a pass over one token takes at least" in table
    assert follower.stdout == follower.stderr == ""


def test_the_server_serves_a_group_and_answers_503_when_a_rank_dies(tmp_path: Path) -> None:
    server = ["-m", "mlx_mtp.server", "--port", "0", "--num-draft-tokens", "2", "--temp", "0"]
    with start_ranks(tmp_path, [server] * 2) as ranks:
        leader, follower = ranks.processes
        assert leader.stdout is not None
        url = leader.stdout.readline().strip()
        assert url.startswith("http://"), leader.stderr.read() if leader.stderr else ""
        body = {"prompt": "def read", "max_tokens": 6}
        first = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        endless = {"prompt": "x = ", "max_tokens": 3900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=endless, timeout=60) as gone:
            assert next(gone.iter_lines())
        eventually(lambda: httpx.get(f"{url}/health").json()["running"] == 0)
        again = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        assert again["choices"] == first["choices"]
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(httpx.post, f"{url}/v1/completions", json={**endless, "stream": False}, timeout=60)
            eventually(lambda: httpx.get(f"{url}/health").json()["running"] == 1)
            follower.kill()
            lost = running.result()
        assert lost.status_code == 503
        assert lost.json()["error"]["code"] == "machine_lost"
        assert "rank 1" in lost.json()["error"]["message"]
        leader.wait(20)
        assert leader.returncode == 1
        assert leader.stderr is not None
        assert leader.stderr.read().count("error: rank 1") == 1


def fails(ranks: Ranks, *messages: str, seconds: float = 60) -> None:
    """Check that each rank ends with status 1, and that its last line is this error."""
    for finished, message in zip(ranks.wait(seconds), messages, strict=True):
        assert finished.returncode == 1
        assert message in finished.stderr.splitlines()[-1]
        assert finished.stdout == ""


def test_a_rank_without_the_model_or_with_another_one_ends_all_ranks(
    tiny_pair: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_pair("31b") / "target"
    # Both ranks look at the same relative path, in folders of their own.
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()
    (tmp_path / "rank0" / "model").symlink_to(folder)
    places = [f"import os; os.chdir({str(tmp_path / f'rank{rank}')!r}); " for rank in range(2)]
    command = [["-c", f"{place}{LOAD.format('model', '')}"] for place in places]
    wrong = "rank 1: "
    fails(start_ranks(tmp_path, command), "mlx_mtp.errors.GroupError: rank 1: model", "error: rank 1: model")
    make_target(tmp_path / "rank1" / "model", "31b", seed=1)
    other = "rank 1: model holds another checkpoint than on rank 0"
    fails(start_ranks(tmp_path, command), other, f"error: {other}")
    assert wrong in other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (", split='pipeline'", "rank 0: E2B and E4B share K/V between layers"),
        (", exact=True", "rank 0: exact is set, but several machines share the model"),
        (", per_layer_embeddings='mapped'", "rank 0: per_layer_embeddings is 'mapped'"),
    ],
)
def test_an_option_that_a_group_cannot_use_ends_all_ranks(tmp_path: Path, options: str, message: str) -> None:
    ranks = start_ranks(tmp_path, [["-c", LOAD.format(str(DEMO_PAIR), options)]] * 2)
    fails(ranks, message.removeprefix("rank 0: "), f"error: {message}")


def test_other_versions_and_absent_backends_are_errors(tmp_path: Path) -> None:
    patched = "import mlx_mtp.group.membership as m; m.version = lambda name: '0'; " + LOAD.format(str(DEMO_PAIR), "")
    version = "rank 1 has mlx-mtp 0, but rank 0 has"
    ranks = start_ranks(tmp_path, [["-c", LOAD.format(str(DEMO_PAIR), "")], ["-c", patched]])
    fails(ranks, version, f"error: {version}")
    nccl = {"NCCL_HOST_IP": "127.0.0.1", "MLX_WORLD_SIZE": "2"}
    ranks = start_ranks(tmp_path, [["-m", "mlx_mtp.generate", "--prompt", "a"]] * 2, [nccl] * 2)
    fails(ranks, *["error: the launcher chose the backend nccl, but MLX has only ring"] * 2)


def test_a_load_that_fails_or_a_model_that_is_dropped_leaves_the_group_usable(
    tiny_pair: Callable[[str], Path], tmp_path: Path
) -> None:
    good, other, broken = tiny_pair("31b") / "target", tiny_pair("12b") / "target", tmp_path / "broken"
    shutil.copytree(tiny_pair("31b") / "target-assistant", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code = f"""
import mlx_mtp
def fail(done, total):
    raise ZeroDivisionError("stopped")
def load(folder={str(good)!r}, **options):
    return mlx_mtp.load(folder, **options)
def report(work):
    try:
        work()
    except (ValueError, ZeroDivisionError) as error:
        print(type(error).__name__)
report(lambda: load("nowhere"))
report(lambda: load(on_load=fail))
report(lambda: load(drafter={str(broken)!r}))
model = load()
expected = model.generate("abc", max_tokens=5).text
report(lambda: load({str(other)!r}))
report(lambda: mlx_mtp.plan_memory({str(good)!r}, memory_limit=1000))
assert model.generate("abc", max_tokens=5).text == expected
del model
model = load()
assert model.generate("abc", max_tokens=5).text == expected
"""
    leader, follower = start_ranks(tmp_path, [["-c", code]] * 2).wait()
    kinds = ["ConfigError", "ZeroDivisionError", "WeightsError", "GroupError", "MemoryLimitError"]
    assert leader.stdout.split() == kinds, leader.stderr
    assert (leader.returncode, follower.returncode, follower.stderr) == (0, 0, "")


def test_interrupted_texts_leave_the_group_usable(tiny_pair: Callable[[str], Path], tmp_path: Path) -> None:
    """Ctrl-C comes at the worst moment: after a pass was announced, and before it is dispatched."""
    folder = tiny_pair("31b") / "target"
    code = f"""
import os, signal, mlx_mtp
from mlx_mtp.group.leader import Leader
announce, left = Leader.announce, [-1]
def interrupted(*arguments, **fields):
    announce(*arguments, **fields)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGINT)
Leader.announce = interrupted
model = mlx_mtp.load({str(folder)!r})
options = mlx_mtp.GenerationOptions(max_tokens=8, ignore_eos=True, num_draft_tokens=2)
prompt = list(range(20, 50))
expected = model.generate(prompt, options).text
# The first pass reads the prompt. Passes of a shape are compiled from the second one on.
for passes in (1, 2, 3, 6):
    left[0] = passes
    try:
        model.generate(prompt, options, max_tokens=30)
        print("not interrupted")
    except KeyboardInterrupt:
        pass
    assert model.generate(prompt, options).text == expected
print("usable")
"""
    leader, follower = start_ranks(tmp_path, [["-c", code]] * 2).wait()
    assert (leader.stdout, leader.returncode) == ("usable\n", 0), leader.stderr
    assert follower.returncode == 0


def test_a_rank_whose_partner_never_starts_ends(tmp_path: Path) -> None:
    code = "import mlx_mtp.group.membership as m; m.JOIN_LIMIT = 2; " + LOAD.format(str(DEMO_PAIR), "")
    ranks = start_ranks(tmp_path, [["-c", code], ["-c", "pass"]])
    alone, _ = ranks.wait(30)
    assert (alone.returncode, alone.stderr) == (1, "error: the other ranks did not join within 2 s: do they run?\n")


def test_one_process_of_a_launcher_is_alone(tmp_path: Path) -> None:
    (finished,) = start_ranks(tmp_path, [["-c", LOAD.format(str(DEMO_PAIR), "")]]).wait()
    assert finished.stdout == "loaded\n", finished.stderr
    (refused,) = start_ranks(tmp_path, [["-m", "mlx_mtp.generate", "--prompt", "a", "--pipeline"]]).wait()
    assert refused.stderr.endswith(
        "error: a split is given, but the launcher has started one process: expected several\n"
    )


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("hangs", [False, True])
def test_a_rank_that_dies_or_hangs_ends_the_other_one(tmp_path: Path, lost: int, hangs: bool) -> None:
    code = (
        f"import mlx_mtp.group.peer as peer; peer.SILENCE = {SILENCE}\n"
        f"import mlx_mtp; model = mlx_mtp.load({str(DEMO_PAIR)!r})\n"
        "for each in model.stream_generate('x', max_tokens=3000, ignore_eos=True): print(each.token, flush=True)"
    )
    with start_ranks(tmp_path, [["-c", code]] * 2) as ranks:
        leader = ranks.processes[0]
        assert leader.stdout is not None
        assert leader.stdout.readline().strip().isdigit(), leader.stderr.read() if leader.stderr else ""
        began = time.monotonic()
        if hangs:
            ranks.stop(lost)
        else:
            ranks.processes[lost].kill()
        other = ranks.processes[1 - lost]
        _, stderr = other.communicate(timeout=30)
        assert other.returncode == 1
        reason = "has given no sign of life for 3 s" if hangs else f"rank {lost}"
        assert reason in stderr.splitlines()[-1]
        assert time.monotonic() - began < 30


def test_a_pass_that_never_ends_ends_all_ranks(tmp_path: Path) -> None:
    """The follower gives signs of life, but takes no part in the pass."""
    code = (
        "import time, mlx_mtp.group.membership as m, mlx_mtp.group.follower as f\n"
        "m.PASS_LIMIT = 3; f.Follower._take_part = lambda *_, **__: time.sleep(100)\n"
        f"import mlx_mtp; mlx_mtp.load({str(DEMO_PAIR)!r}).generate('x', max_tokens=5)"
    )
    reason = "a pass has not ended after 3 s"
    fails(start_ranks(tmp_path, [["-c", code]] * 2), reason, reason)


def test_a_command_for_one_machine_is_refused(tmp_path: Path) -> None:
    ranks = start_ranks(tmp_path, [["-m", "mlx_mtp.probe"]] * 2)
    fails(ranks, *["error: a comparison of passes needs one machine: start it without mlx.launch"] * 2)
    ranks = start_ranks(tmp_path, [["-m", "mlx_mtp.convert", "--hf-path", "a", "--mlx-path", tmp_path / "b"]] * 2)
    fails(ranks, *["error: a conversion needs one machine: start it without mlx.launch"] * 2)
    leader, follower = start_ranks(tmp_path, [["-m", "mlx_mtp.bench", "--dtype", "float16"]] * 2).wait()
    assert leader.stderr == "error: --dtype needs one machine: start it without mlx.launch\n"
    assert (leader.returncode, follower.returncode, follower.stderr) == (1, 0, "")
    ranks = start_ranks(tmp_path, [["-m", "mlx_mtp.generate", "--prompt", "-"]] * 2)
    leader, follower = ranks.wait()
    assert leader.stderr.startswith("error: --prompt -: mlx.launch does not pass on the end of stdin: give the text")
    assert (leader.returncode, follower.returncode) == (1, 0)
