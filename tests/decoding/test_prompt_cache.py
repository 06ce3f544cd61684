"""The prompt cache: reuse does not change the tokens, memory is bounded in bytes, and damaged files are refused."""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.commands import run
from support.streams import LONG, Models, Scripted, assert_same_state
from support.tiny import WINDOW, random_tokens

import mlx_mtp
from mlx_mtp import cache_prompt, generate, generation
from mlx_mtp.decoding.prompt_cache import PromptCache
from mlx_mtp.decoding.stream import Stream

TinyPair = Callable[[str], Path]
GREEDY = mlx_mtp.GenerationOptions(max_tokens=24, num_draft_tokens=3, ignore_eos=True, prefill_step_size=24)
# The pairs have a centroid head and a dense head, with and without shared K/V.
PAIRS = ("e2b", "31b")


Load = Callable[[str], mlx_mtp.Model]


@pytest.fixture(scope="module")
def load(tiny_pair: TinyPair) -> Load:
    """Return a function from a variant to its model, whose prompt cache is as new. It keeps its compiled rounds."""
    models: dict[str, mlx_mtp.Model] = {}

    def model(variant: str) -> mlx_mtp.Model:
        if variant not in models:
            models[variant] = mlx_mtp.load(tiny_pair(variant) / "target")
        cache = models[variant].prompt_cache
        cache.clear()
        cache.limit, cache.reused = 1 << 30, 0
        return models[variant]

    return model


@pytest.fixture(params=PAIRS)
def model(request: pytest.FixtureRequest, load: Load) -> mlx_mtp.Model:
    return load(request.param)


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "SNAPSHOT_EVERY", 2 * WINDOW)


def fresh(model: mlx_mtp.Model, prompt: list[int], **changes: Any) -> mlx_mtp.GenerationResult:
    return model.generate(prompt, GREEDY, reuse_prompt=False, **changes)


def test_a_text_that_goes_on_is_not_read_again(model: mlx_mtp.Model) -> None:
    prompt = random_tokens(5 * WINDOW, seed=1)
    first = model.generate(prompt, GREEDY)
    assert first.last.cached_tokens == 0
    assert first.tokens == fresh(model, prompt).tokens
    longer = prompt + first.tokens + random_tokens(9, seed=2)[1:]
    again = model.generate(longer, GREEDY)
    # All tokens are cached except the last one, which was emitted but not read.
    assert again.last.cached_tokens == len(prompt) + 23
    assert again.last.prompt_tokens == len(longer)
    expected = fresh(model, longer)
    assert again.tokens == expected.tokens
    # Drafting continues as after a full prefill.
    assert again.last.stats == expected.last.stats
    assert model.prompt_cache.reused == len(prompt) + 23
    assert len(model.prompt_cache.entries) == 1, "a text that goes on is kept once"


def test_the_same_prompt_again_and_branches_of_it(model: mlx_mtp.Model) -> None:
    prompt = random_tokens(6 * WINDOW, seed=3)
    model.generate(prompt, GREEDY)
    again = model.generate(prompt, GREEDY)
    assert again.last.cached_tokens == len(prompt) - 1
    assert again.tokens == fresh(model, prompt).tokens
    # The branch differs from the first prompt in the middle. The spare slots of a ring reach back to there.
    branch = prompt[: 5 * WINDOW - 3] + random_tokens(2 * WINDOW, seed=4)[1:]
    branched = model.generate(branch, GREEDY)
    assert branched.last.cached_tokens == 5 * WINDOW - 3
    assert branched.tokens == fresh(model, branch).tokens
    # The first prompt is still cached.
    assert model.generate(prompt, GREEDY).last.cached_tokens == len(prompt) - 1
    assert model.generate(random_tokens(50, seed=5)[1:], GREEDY).last.cached_tokens == 0


@pytest.mark.parametrize("seed", range(8))
def test_any_history_of_a_chat_gives_the_tokens_of_a_fresh_prefill(load: Load, seed: int) -> None:
    """Turns are added, removed, edited and branched. With a low limit in bytes, old texts are dropped on the way."""
    chooser = random.Random(seed)
    model = load(PAIRS[seed % 2])
    if seed % 3 == 0:
        model.prompt_cache.limit = 1_500_000
    sampling = mlx_mtp.Sampling(temperature=float(seed % 4 == 1), seed=seed, acceptance="coupled")
    turns: list[list[int]] = [random_tokens(chooser.randint(2, 60), seed=1000 + seed)]
    reused = 0
    for step in range(6):
        prompt = [token for turn in turns for token in turn]
        options: dict[str, Any] = {
            "sampling": sampling,
            "max_tokens": chooser.randint(1, 30),
            "num_draft_tokens": chooser.randint(0, 8),
        }
        options["prefill_step_size"] = chooser.choice([1, 7, 24, 512])
        result = model.generate(prompt, GREEDY, **options)
        expected = fresh(model, prompt, **options | {"prefill_step_size": 512})
        assert result.tokens == expected.tokens, (seed, step)
        assert model.prompt_cache.nbytes <= model.prompt_cache.limit
        reused += result.last.cached_tokens
        turns.append(result.tokens)
        action = chooser.choice(["add", "add", "rewind", "edit", "branch"])
        if action != "add":
            del turns[chooser.randint(1, len(turns)) :]
        if action == "edit":
            turns[-1] = turns[-1][: len(turns[-1]) // 2 + 1]
        turns.append(random_tokens(chooser.randint(2, 40), seed=100 * seed + step)[1:])
    assert reused > 0


@pytest.mark.parametrize("back", range(12))
def test_a_text_whose_drafts_were_rejected_goes_back(tiny_models: Models, back: int) -> None:
    """Rows of rejected draft tokens use spare slots of a ring. They limit how far the ring can go back."""
    target, drafter = tiny_models("31b")
    plain = Stream(target, drafter, max_draft_tokens=8)
    first = plain.prefill(LONG, 512).tokens
    continuation = first + [token for _ in range(8) for token in plain.round(0).tokens]
    wrong = Scripted(drafter, LONG, continuation, wrong_at=(0,))
    stream = Stream(target, wrong, max_draft_tokens=8)
    stream.prefill(LONG, 512)
    assert [stream.round(8).accepted for _ in range(6)] == [0] * 6
    entry = stream.cache_entry()
    assert entry is not None
    shared = entry.tokens[: len(entry.tokens) - back]
    cache = PromptCache(1 << 40)
    cache.put(entry)
    later = Stream(target, drafter, max_draft_tokens=8)
    reused = cache.take([*shared, 7 if not back else entry.tokens[-back] ^ 1, 7], later.kv_format)
    # The last round wrote 8 rows after the end, and the ring has 18 spare slots.
    if back >= 10:
        assert reused is None
        return
    assert reused is not None
    assert reused.length == len(shared)
    later.resume(reused)
    assert_same_state(later, target, shared)


def positions(model: mlx_mtp.Model) -> list[int]:
    """Return the positions of the snapshots of the text used last."""
    return [snapshot.position for snapshot in model.prompt_cache.entries[-1].snapshots]


def test_snapshots_lie_at_their_positions_once_each(model: mlx_mtp.Model) -> None:
    """A prompt can end where a snapshot is due. An answer can end at a snapshot, or start again at one."""
    every = 2 * WINDOW
    prompt = random_tokens(3 * every, seed=6)
    chunks: dict[str, Any] = {"prefill_step_size": every}
    model.generate(prompt, GREEDY, max_tokens=1, **chunks)
    assert positions(model) == [every, 2 * every, 3 * every]
    # The last token of the prompt must be read, so the reuse from the snapshot at the end stops one token before it.
    again = model.generate(prompt, GREEDY, max_tokens=1, **chunks)
    assert again.last.cached_tokens == 3 * every - 1
    assert positions(model) == [every, 2 * every, 3 * every]
    # One more token gets a snapshot of its own.
    model.generate(prompt, GREEDY, max_tokens=2, **chunks)
    assert positions(model) == [every, 2 * every, 3 * every, 3 * every + 1]
    # A text that continues at the snapshot keeps it. A text that branches there begins with it.
    longer = prompt + random_tokens(every + 1, seed=7)[1:]
    result = model.generate(longer, GREEDY, max_tokens=1, **chunks)
    assert result.last.cached_tokens == 3 * every
    assert result.tokens == fresh(model, longer, max_tokens=1).tokens
    assert positions(model) == [every, 2 * every, 3 * every, 4 * every]
    branch = prompt + random_tokens(9, seed=8)[1:]
    result = model.generate(branch, GREEDY, **chunks)
    assert result.last.cached_tokens == 3 * every
    assert result.tokens == fresh(model, branch).tokens
    # The answer's last token is emitted, not read.
    assert positions(model) == [every, 2 * every, 3 * every, len(branch), len(branch) + 23]
    # If a chunk passes a snapshot's position, the snapshot is at the chunk's end. There are no duplicates.
    model.generate(random_tokens(3 * every, seed=9)[1:], GREEDY, max_tokens=1, prefill_step_size=every // 2 + 4)
    assert positions(model) == [40, 80, 95]


def test_old_texts_go_first_and_snapshots_where_they_are_missed_least(model: mlx_mtp.Model) -> None:
    prompts = [random_tokens(4 * WINDOW, seed=seed) for seed in (10, 11, 12)]
    for prompt in prompts[:2]:
        model.generate(prompt, GREEDY)
    model.prompt_cache.limit = int(2.5 * model.prompt_cache.entries[0].nbytes)
    model.generate(prompts[0], GREEDY, max_tokens=2)
    model.generate(prompts[2], GREEDY)
    kept = [entry.tokens[: 4 * WINDOW] for entry in model.prompt_cache.entries]
    assert prompts[1] not in kept
    assert prompts[2] in kept
    assert model.prompt_cache.nbytes <= model.prompt_cache.limit
    # A long text keeps eight snapshots. They are closer to each other near its end.
    model.prompt_cache.limit = 10**9
    model.generate(random_tokens(40 * WINDOW, seed=13), GREEDY)
    positions = [snapshot.position for snapshot in model.prompt_cache.entries[-1].snapshots]
    assert len(positions) == 8
    gaps = [b - a for a, b in itertools.pairwise([0, *positions])]
    assert gaps[0] < 24 * WINDOW
    assert max(gaps[-3:]) <= 3 * WINDOW
    # With a limit of 0 nothing is kept.
    model.prompt_cache.limit = 0
    model.generate(prompts[0], GREEDY)
    assert not model.prompt_cache.entries


def test_clearing_frees_the_memory(model: mlx_mtp.Model) -> None:
    # These calls compile the rounds, which the model keeps.
    for seed in (20, 21):
        model.generate(random_tokens(4 * WINDOW, seed=seed), GREEDY)
    model.prompt_cache.clear()
    before = mx.get_active_memory()
    model.generate(random_tokens(4 * WINDOW, seed=22), GREEDY)
    kept = model.prompt_cache.nbytes
    assert mx.get_active_memory() - before >= kept > 50_000
    model.prompt_cache.clear()
    assert mx.get_active_memory() - before < kept / 10


@pytest.mark.in_place
def test_a_text_that_goes_on_is_written_in_place_and_a_branch_is_copied(tiny_pair: TinyPair) -> None:
    model = mlx_mtp.load(tiny_pair("31b") / "target")
    prompt = random_tokens(900, seed=25)
    options = mlx_mtp.GenerationOptions(max_tokens=8, num_draft_tokens=3, ignore_eos=True)
    # The second run does not count the compiled rounds, which stay in memory.
    for _ in range(2):
        model.prompt_cache.clear()
        kept = model.generate(prompt, options)
    size = model.prompt_cache.nbytes
    for continued, least, most in ((prompt + kept.tokens + [99], 0.0, 0.5), ([*prompt[:-2], 98, 97], 0.8, 1.6)):
        active = mx.get_active_memory()
        mx.reset_peak_memory()
        result = model.generate(continued, options)
        assert result.last.cached_tokens > 890
        assert least * size <= mx.get_peak_memory() - active < most * size


def test_prefill_ends_between_chunks_and_goes_on_there(model: mlx_mtp.Model) -> None:
    prompt = random_tokens(8 * WINDOW, seed=30)
    seen: list[tuple[int, int]] = []

    class CancelledError(Exception):
        pass

    def cancel(done: int, total: int) -> None:
        seen.append((done, total))
        if done >= 72:
            raise CancelledError

    with pytest.raises(CancelledError):
        next(model.stream_generate(prompt, GREEDY, on_prefill=cancel))
    assert seen == [(24, 128), (48, 128), (72, 128)]
    result = model.generate(prompt, GREEDY)
    assert result.last.cached_tokens == 72
    assert result.tokens == fresh(model, prompt).tokens


def test_a_stream_that_is_closed_or_fails_leaves_what_it_read(
    model: mlx_mtp.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_tokens(4 * WINDOW, seed=40)
    stream = model.stream_generate(prompt, GREEDY)
    emitted = [next(stream).token for _ in range(9)]
    stream.close()
    longer = prompt + emitted + random_tokens(30, seed=41)[1:]
    expected = fresh(model, longer)
    # Ctrl-C stops in the middle of a chunk: its ring buffers are lost, but the snapshots before it are not.
    target, calls = type(model.target), []
    original = target.read_per_layer_rows

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(target, "read_per_layer_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate(longer, GREEDY)
    monkeypatch.undo()
    result = model.generate(longer, GREEDY)
    assert result.last.cached_tokens >= len(prompt)
    assert result.tokens == expected.tokens


def test_streams_of_one_model_may_interleave(model: mlx_mtp.Model) -> None:
    prompt = random_tokens(4 * WINDOW, seed=50)
    expected = fresh(model, prompt).tokens
    model.generate(prompt, GREEDY, max_tokens=3)
    streams = [model.stream_generate(prompt, GREEDY) for _ in range(3)]
    tokens = list(zip(*streams, strict=True))
    for column in zip(*tokens, strict=True):
        assert [response.token for response in column] == expected


def test_what_was_read_for_other_rings_is_not_reused(model: mlx_mtp.Model) -> None:
    prompt = random_tokens(3 * WINDOW, seed=60)
    model.generate(prompt, GREEDY)
    result = model.generate(prompt, GREEDY, num_draft_tokens=40)
    assert result.last.cached_tokens == 0
    assert result.tokens == fresh(model, prompt).tokens


@pytest.mark.parametrize("start", [0, 60])
def test_quantized_kv_is_reused_from_where_it_begins(model: mlx_mtp.Model, start: int) -> None:
    prompt = random_tokens(5 * WINDOW, seed=61)
    kv: dict[str, Any] = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": start}
    first = model.generate(prompt, GREEDY, **kv)
    # The branches go back to before the start of quantization, and to after it.
    for length, least in ((4 * WINDOW + 8, 3 * 24 - 12), (3 * WINDOW, 0)):
        branch = prompt[:length] + random_tokens(20, seed=62)[1:]
        result = model.generate(branch, GREEDY, **kv)
        assert result.last.cached_tokens == 0 or result.last.cached_tokens >= max(1, start), length
        assert result.last.cached_tokens >= least
        assert result.tokens == fresh(model, branch, **kv).tokens
    assert model.generate(prompt, GREEDY, **kv).tokens == first.tokens == fresh(model, prompt, **kv).tokens
    # Other K/V settings do not reuse it.
    assert model.generate(prompt, GREEDY).last.cached_tokens == 0


# Files


def test_a_saved_prompt_is_gone_on_from(model: mlx_mtp.Model, tiny_pair: TinyPair, tmp_path: Path) -> None:
    file = tmp_path / "prompt.safetensors"
    prompt = random_tokens(5 * WINDOW, seed=70)
    assert model.save_prompt(prompt, file) == len(prompt)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    other = mlx_mtp.load(model.config.path.parent)
    other.prompt_cache.limit = 0
    assert other.load_prompt(file) == prompt
    longer = prompt + random_tokens(20, seed=71)[1:]
    result = other.generate(longer, GREEDY)
    assert result.last.cached_tokens == len(prompt)
    expected = fresh(model, longer)
    assert result.tokens == expected.tokens
    assert result.last.stats == expected.last.stats


def test_quantized_kv_is_saved_as_it_is(model: mlx_mtp.Model, tmp_path: Path) -> None:
    prompt = random_tokens(5 * WINDOW, seed=75)
    kv: dict[str, Any] = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0}
    sizes = {}
    for name, options in (("plain", {}), ("quantized", kv)):
        file = tmp_path / f"{name}.safetensors"
        model.save_prompt(prompt, file, **options)
        sizes[name] = file.stat().st_size
        other = mlx_mtp.load(model.config.path.parent)
        longer = other.load_prompt(file, **options) + random_tokens(9, seed=76)[1:]
        result = other.generate(longer, GREEDY, **options)
        assert result.last.cached_tokens == len(prompt)
        assert result.tokens == fresh(model, longer, **options).tokens
    assert sizes["quantized"] < sizes["plain"]
    with pytest.raises(mlx_mtp.PromptCacheError, match="its K/V quantization is KVQuantization"):
        model.load_prompt(file)


def test_a_damaged_file_is_refused(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """Any changed byte and any cut end is an error of the right kind, and nothing else is lost."""
    model = mlx_mtp.load(tiny_pair("e2b") / "target")
    whole, file = tmp_path / "whole.safetensors", tmp_path / "damaged.safetensors"
    model.save_prompt(random_tokens(20, seed=80), whole)
    content = whole.read_bytes()
    chooser = random.Random(0)
    header = int.from_bytes(content[:8], "little")
    places = [*range(8), *(chooser.randrange(8, 8 + header) for _ in range(60))]
    places += [chooser.randrange(8 + header, len(content)) for _ in range(40)]
    refused = 0
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << chooser.randrange(8)
        file.write_bytes(damaged)
        # The padding of the header can have any value.
        if place < 8 + header and content[place : place + 1] == b" ":
            continue
        with pytest.raises(mlx_mtp.PromptCacheError, match=str(file)):
            model.load_prompt(file)
        refused += 1
    assert refused > 90
    for length in [0, 4, 8, 100, header, *(chooser.randrange(len(content)) for _ in range(20))]:
        file.write_bytes(content[:length])
        with pytest.raises(mlx_mtp.PromptCacheError):
            model.load_prompt(file)
    file.write_bytes(content + b"more")
    with pytest.raises(mlx_mtp.PromptCacheError):
        model.load_prompt(file)
    with pytest.raises(mlx_mtp.PromptCacheError, match=r"gone.safetensors: no prompt cache"):
        model.load_prompt(tmp_path / "gone.safetensors")
    assert model.load_prompt(whole) == random_tokens(20, seed=80)


def test_a_file_of_another_model_or_version_is_refused(
    tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.safetensors"
    model = mlx_mtp.load(tiny_pair("e2b") / "target")
    model.save_prompt("hello", file)
    with pytest.raises(mlx_mtp.PromptCacheError, match="a prompt cache of another model: its field model is"):
        mlx_mtp.load(tiny_pair("31b") / "target").load_prompt(file)
    # One different weight is enough.
    layer = model.target.layers[0].mlp.down_proj
    monkeypatch.setattr(layer, "weight", layer.weight + 1.0)
    model = mlx_mtp.Model(model.target, None, model.tokenizer, model.config, None)
    with pytest.raises(mlx_mtp.PromptCacheError, match="of another model"):
        model.load_prompt(file)
    monkeypatch.setattr("mlx_mtp.decoding.prompt_cache.FORMAT", 4)
    with pytest.raises(mlx_mtp.PromptCacheError, match="of another version: its field format is 3, expected 4"):
        model.load_prompt(file)
    safetensors = tiny_pair("e2b") / "target" / "model.safetensors"
    with pytest.raises(mlx_mtp.PromptCacheError, match="not a prompt cache"):
        model.load_prompt(safetensors)


def test_an_exact_model_reuses_nothing(tiny_pair: TinyPair, tmp_path: Path) -> None:
    model = mlx_mtp.load(tiny_pair("31b") / "target", exact=True)
    prompt = random_tokens(20, seed=90)
    for _ in range(2):
        assert model.generate(prompt, GREEDY).last.cached_tokens == 0
    with pytest.raises(mlx_mtp.OptionError, match="an exact model reuses no prompts"):
        model.save_prompt(prompt, tmp_path / "x.safetensors")
    with pytest.raises(mlx_mtp.OptionError, match="an exact model reuses no prompts"):
        model.load_prompt(tmp_path / "x.safetensors")


# Command lines


@pytest.mark.parametrize("bare", [(), ("--ignore-chat-template",)])
def test_a_prompt_read_ahead_from_the_command_line(tiny_pair: TinyPair, tmp_path: Path, bare: tuple[str, ...]) -> None:
    target, file = tiny_pair("e2b") / "target", tmp_path / "long.safetensors"
    text, question = "A long text to ask about.\n" * 20, "What is it?"
    saved = run("cache_prompt", "--model", target, "--prompt", text, "--prompt-cache", file, *bare)
    assert f"{file}: " in saved.stderr
    common = ["--model", target, "--temp", "0", "--num-draft-tokens", "3", "-m", "12", "--json", *bare]
    reused = run("generate", *common, "--prompt", question, "--prompt-cache-file", file)
    report = json.loads(reused.stdout.splitlines()[-1])
    whole = json.loads(run("generate", *common, "--prompt", text + question).stdout.splitlines()[-1])
    assert report["prompt_tokens"] == whole["prompt_tokens"]
    assert report["cached_tokens"] > 200
    assert whole["cached_tokens"] == 0
    assert report["tokens"] == whole["tokens"]
    assert f"{report['cached_tokens']} of them read before" in reused.stderr


def test_what_cannot_be_read_ahead_is_one_error(
    tiny_pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, file = str(tiny_pair("e2b") / "target"), tmp_path / "x.safetensors"
    again = ["--model", target, "--prompt", "hello", "--prompt-cache", str(file)]
    assert run("generate", *again, code=1).stderr.startswith(f"error: {file}: no prompt cache")
    file.write_bytes(b"not it")
    nowhere = tmp_path / "none" / "x.safetensors"

    def error(command: Callable[[list[str]], int], *args: str) -> str:
        assert command([*args]) == 1
        return capsys.readouterr().err

    assert error(generate.main, *again).startswith(f"error: {file}: truncated or not a safetensors file")
    assert "--system-prompt" in error(generate.main, *again, "--system-prompt", "x")
    assert "at most 31" in error(generate.main, *again, "--num-draft-tokens", "32")
    ahead = ["--model", target, "--prompt-cache"]
    assert error(cache_prompt.main, *ahead, str(nowhere), "--prompt", "hello").startswith(f"error: {nowhere}: cannot")
    assert "the prompt is empty" in error(cache_prompt.main, *ahead, str(file), "--prompt", "")
    assert "but the context holds 4096" in error(cache_prompt.main, *ahead, str(file), "--prompt", "hello " * 3000)
    assert file.read_bytes() == b"not it", "a file is replaced by a whole one only"


def test_a_chat_reads_only_what_is_new(tiny_pair: TinyPair) -> None:
    options = ["--model", tiny_pair("e2b") / "target", "--temp", "0", "--num-draft-tokens", "3", "-m", "8"]
    lines = "\n".join(["hello there, how are you today?", "and then?", "/stats"])
    last = run("chat", *options, stdin=lines).stderr.splitlines()
    prompt = next(line for line in last if line.startswith("Prompt: "))
    count, cached = (int(word) for word in prompt.replace(",", "").split() if word.isdigit())
    assert cached > count / 2
