"""Load a `Model` from a folder or a hub id: find the drafter, check the pair, and plan its memory."""

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mlx_mtp.checkpoints.config import (
    DrafterConfig,
    LayerConfig,
    TargetConfig,
    read_drafter_config,
    read_json,
    read_target_config,
)
from mlx_mtp.checkpoints.files import fault
from mlx_mtp.checkpoints.hub import DRAFTER_FOLDER, Downloads, is_repo, resolve_folder
from mlx_mtp.checkpoints.layouts import resolve_head
from mlx_mtp.decoding.prefill import Progress
from mlx_mtp.text.tokenizer import load_tokenizer
from mlx_mtp.threads.job_thread import Job, Worker

from .errors import ConfigError, HubError, OptionError, PairError
from .launched import SplitKind, is_launched
from .memory_plan import MemoryPlan, check_memory, memory_size, planner
from .model import Model
from .networks import count_read_bytes, load_drafter, load_target, prepare_drafter, prepare_target
from .options import GenerationOptions

if TYPE_CHECKING:
    # A process that is alone does not import this package.
    from mlx_mtp.group.split import Part

    from .shared_loading import Sharing

logger = logging.getLogger(__name__)

PerLayerEmbeddings = Literal["resident", "mapped", "auto"]
PER_LAYER_EMBEDDINGS: tuple[PerLayerEmbeddings, ...] = get_args(PerLayerEmbeddings)
# A small pair that is part of the package. It was trained on Python source; its README.md describes the training.
DEMO_PAIR = Path(__file__).parent / "demo"

# Publishers of conversions append these parts to a model's name: gemma-4-E2B-it-4bit, gemma-4-E2B-it-UD-MLX-4bit.
_PRECISION = r"(?:\d+bit|bf16|fp16|fp32|mxfp4|mxfp8|nvfp4)"
_LABEL = r"(?:mlx|ud|qat|text|dwq|gs\d+|q\d\w*|unquantized)"
_CONVERSION = re.compile(rf"(?:-(?:{_LABEL}|{_PRECISION}))*(?:-{_PRECISION}(?:-\w+)?|-{_LABEL})$", re.IGNORECASE)
# The sizes in the names of the drafters that Google publishes, by the target's hidden size.
_OFFICIAL = {1536: "E2B", 2560: "E4B", 3840: "12B", 2816: "26B-A4B", 5376: "31B"}
# The largest share of the ids in both tokenizers that may stand for different tokens.
_RENAMED_TOKENS = 0.01


def load(
    path_or_repo: str | Path,
    drafter: str | Path | None = None,
    *,
    revision: str | None = None,
    exact: bool = False,
    max_context: int | None = None,
    memory_limit: int | None = None,
    per_layer_embeddings: PerLayerEmbeddings = "auto",
    split: SplitKind | None = None,
    bandwidths: Sequence[float] = (),
    on_download: Progress | None = None,
    on_load: Progress | None = None,
) -> Model:
    """Load a target and its drafter from folders or from the hub.

    The checkpoints have this project's, mlx-lm's, mlx-vlm's or Hugging Face's layout.

    `drafter` is a folder, a hub id, "none" for plain decoding, or None. With None, `load` looks for a drafter: first in
    the folder's `drafter/`, then next to the target as `<target>-assistant`, and so on (see `find_drafter`). If it
    finds none, the model decodes plainly and `Model.drafter` is None.

    With `exact`, a verify pass gives the same bits as passes over single tokens, at any cost in speed on this device.
    `max_context` is the largest number of tokens of prompt and answer together. `memory_limit` is in bytes. Before
    anything is loaded, the weights and the K/V of that context are checked against it.

    `per_layer_embeddings` is the place of the per-layer table of E2B and E4B. "resident" holds the table in memory.
    "mapped" leaves it in its files and reads one row per token. The tokens are the same, but a round that drafts needs
    one more host read. "auto" maps the table if the weights would take more than half of the machine's memory.
    `Model.per_layer_embeddings` gives the choice.

    If a launcher such as `mlx.launch` has started this process on several machines, they share the target, and this
    function returns on rank 0 only. On the other ranks it never returns: they take part in the passes of rank 0, and
    end with it. `split` is "tensor" (the default), "feed-forward" or "pipeline", and `bandwidths` are those of the
    machines (see `group.split.Split`).

    `on_download` and `on_load` are called with the bytes done and the total bytes, of target and drafter together.
    `on_download` is called on the threads that download the hub's files, one call at a time. It is not called if there
    is nothing to download. With `on_download`, no progress bar is shown. `on_load` is called while the weights are
    read. If a callback raises, loading ends and the exception is raised here. The weights read so far are released. The
    next call continues a download from its last state.

    Raises MTPError kinds: HubError, ConfigError, WeightsError, TokenizerError, PairError and MemoryLimitError. Raises
    OptionError if the context is longer than the model's, if passes cannot be made exact, if there is no table to map,
    or if the target cannot be split. Raises GroupError if the machines cannot work together.
    """
    started = time.perf_counter()
    with _sharing(split, bandwidths) as sharing:
        config, drafter_config = _read_configs(path_or_repo, drafter, revision, on_download)
        context_length = _context_length(config, max_context)
        part = None if sharing is None else sharing.part(config, exact=exact, per_layer_embeddings=per_layer_embeddings)
        mapped = part is None and _is_mapped(per_layer_embeddings, config, drafter_config)
        if memory_limit is not None:
            plan = _planner(config, drafter_config, GenerationOptions(), mapped, part)
            check_memory(plan, context_length, memory_limit, str(path_or_repo))
        tokenizer = load_tokenizer(config.path.parent, config.eos_token_ids)
        on_read = None
        if on_load is not None:
            on_read = count_read_bytes(on_load, config, drafter_config, mapped=mapped, part=part)
        if sharing is None or part is None:
            target = load_target(config, mapped=mapped, on_read=on_read)
        else:
            target = sharing.load(config, part, str(path_or_repo), revision, max_context, memory_limit, on_read)
            config = replace(config, text=target.config)
        prepare_target(target, exact)
        loaded_drafter = None
        if drafter_config is not None:
            loaded_drafter = load_drafter(drafter_config, target.dtype, on_read)
            prepare_drafter(loaded_drafter, config)
    if drafter_config is None and drafter is None:
        _log_plain_decoding(path_or_repo, config)
    if mapped and per_layer_embeddings == "auto":
        logger.info("%s would take more than half of the memory: its per-layer embeddings stay on disk", path_or_repo)
    logger.info("loaded %s in %.1f s", config.path.parent, time.perf_counter() - started)
    return Model(
        target=target,
        drafter=loaded_drafter,
        tokenizer=tokenizer,
        config=config,
        drafter_config=drafter_config,
        exact=exact,
        context_limit=max_context,
        memory_limit=memory_limit,
    )


def _sharing(split: SplitKind | None, bandwidths: Sequence[float]) -> AbstractContextManager["Sharing | None"]:
    """Return how the ranks of a group share the target. The result is None if this process is alone.

    It never returns on a follower. After an error in the `with` statement, another model may be loaded.

    Raises OptionError for a split without a group, and GroupError if the group cannot be joined.
    """
    if is_launched():
        from .shared_loading import join_sharing

        return join_sharing(split, bandwidths)
    if split is not None or bandwidths:
        raise OptionError("a split is given, but this process is alone: start it on several machines with mlx.launch")
    return nullcontext()


def follow_others() -> None:
    """Take part in the passes of rank 0 until its end, if this is another rank of a group. It then never returns.

    Commands call it before anything that only rank 0 should do. Raises GroupError if the group cannot be joined.
    """
    with _sharing(None, ()):
        pass


def _log_plain_decoding(path_or_repo: str | Path, config: TargetConfig) -> None:
    advice = "" if published_drafter(config) is None else f" ({how_to_name_a_drafter(config)})"
    logger.info("no drafter found for %s: decoding plainly%s", path_or_repo, advice)


async def aload(
    path_or_repo: str | Path,
    drafter: str | Path | None = None,
    *,
    on_download: Progress | None = None,
    on_load: Progress | None = None,
    **options: Any,
) -> Model:
    """Load a model as `load` does, for callers on an event loop.

    Loading runs on a thread of its own and shows no progress bars. `options` are the other options of `load`. The
    callbacks are called on the event loop. If the task is cancelled, loading ends at the next step of its progress, and
    this call waits for that. No partly loaded model remains.
    """

    def start(job: Job[Model]) -> Iterator[Model]:
        def progress(callback: Progress | None) -> Progress:
            report = None if callback is None else job.on_loop(callback)

            def call(done: int, total: int) -> None:
                job.check()
                if report is not None:
                    report(done, total)

            return call

        yield load(path_or_repo, drafter, on_download=progress(on_download), on_load=progress(on_load), **options)

    worker = Worker("mlx-mtp load")
    try:
        return await worker.submit(start).next()
    finally:
        await asyncio.shield(asyncio.to_thread(worker.close))


def plan_memory(
    path_or_repo: str | Path,
    drafter: str | Path | None = None,
    *,
    revision: str | None = None,
    max_context: int | None = None,
    memory_limit: int | None = None,
    per_layer_embeddings: PerLayerEmbeddings = "auto",
    split: SplitKind | None = None,
    bandwidths: Sequence[float] = (),
    options: GenerationOptions | None = None,
    on_download: Progress | None = None,
) -> MemoryPlan:
    """Return the memory that `load` and decoding would need for a context of `max_context` tokens.

    The default context is the model's own. The plan is made from the headers of the files. Only the K/V quantization
    and `prefill_step_size` matter among `options`. Files on the hub are downloaded, as by `load`.

    If several machines share the target, the plan is that of rank 0, and `MemoryPlan.shared` has those of the others
    and the measured cost of the split. As with `load`, the other ranks never return.

    Raises the errors of `load`.
    """
    with _sharing(split, bandwidths) as sharing:
        config, drafter_config = _read_configs(path_or_repo, drafter, revision, on_download)
        context_length = _context_length(config, max_context)
        part = None if sharing is None else sharing.part(config, per_layer_embeddings=per_layer_embeddings)
        mapped = part is None and _is_mapped(per_layer_embeddings, config, drafter_config)
        plan = _planner(config, drafter_config, options or GenerationOptions(), mapped, part)
        if memory_limit is not None:
            check_memory(plan, context_length, memory_limit, str(path_or_repo))
        found = plan(context_length)
        if sharing is None:
            return found

        def plan_of(part: "Part") -> MemoryPlan:
            return _planner(config, None, options or GenerationOptions(), mapped, part)(context_length)

        return replace(found, shared=sharing.plan(config, found, plan_of))


def _read_configs(
    path_or_repo: str | Path, drafter: str | Path | None, revision: str | None, on_download: Progress | None
) -> tuple[TargetConfig, DrafterConfig | None]:
    """Read the configs of a target and its drafter, and check that the two fit each other."""
    downloads = None
    if on_download is not None:
        downloads = Downloads(on_download)
        _expect_downloads(downloads, path_or_repo, drafter, revision)
    folder = resolve_folder(path_or_repo, revision, downloads)
    config = read_target_config(folder)
    if drafter is None:
        drafter_folder = find_drafter(path_or_repo, folder, downloads)
    else:
        drafter_folder = None if str(drafter) == "none" else resolve_folder(drafter, downloads=downloads)
    if downloads is not None:
        downloads.finish()
    if drafter_folder is None:
        return resolve_head(config), None
    drafter_config = read_drafter_config(drafter_folder)
    check_pair(config, drafter_config)
    return resolve_head(config), drafter_config


def _expect_downloads(
    downloads: Downloads, path_or_repo: str | Path, drafter: str | Path | None, revision: str | None
) -> None:
    """Count the bytes of a target and its drafter before the first download begins."""
    files = downloads.expect(str(path_or_repo), revision) if is_repo(path_or_repo) else []
    if drafter is not None:
        if str(drafter) != "none" and is_repo(drafter):
            downloads.expect(str(drafter))
    elif files and not any(file.startswith(f"{DRAFTER_FOLDER}/") for file in files):
        # `any` stops at the first repository that exists.
        name = str(path_or_repo)
        any(downloads.expect(name) for name in filter(None, [*assistant_names(name), official_drafter(name)]))


def _planner(
    config: TargetConfig,
    drafter: DrafterConfig | None,
    options: GenerationOptions,
    mapped: bool,
    part: "Part | None" = None,
) -> Callable[[int], MemoryPlan]:
    return planner(
        config,
        drafter,
        max_block=options.longest_draft + 1,
        prefill_step=options.prefill_step_size,
        kv=options.kv_quantization,
        mapped=mapped,
        part=part,
    )


def _context_length(config: TargetConfig, max_context: int | None) -> int:
    most = config.text.max_position_embeddings
    if max_context is not None and not 2 <= max_context <= most:
        raise OptionError(
            f"max_context is {max_context}: expected 2 to the model's {most} (max_position_embeddings in {config.path})"
        )
    return max_context or most


def _is_mapped(requested: PerLayerEmbeddings, config: TargetConfig, drafter: DrafterConfig | None) -> bool:
    if requested not in PER_LAYER_EMBEDDINGS:
        expected = ", ".join(PER_LAYER_EMBEDDINGS)
        raise OptionError(f"per_layer_embeddings must be one of {expected}, found {requested!r}")
    has_table = config.text.per_layer_input_size > 0
    if requested == "mapped" and not has_table:
        raise OptionError(f"per_layer_embeddings is 'mapped', but {config.path.parent} has no per-layer table")
    if requested != "auto" or not has_table:
        return requested == "mapped"
    resident = _planner(config, drafter, GenerationOptions(), mapped=False)(1).resident
    return resident > memory_size() / 2


def find_drafter(path_or_repo: str | Path, folder: Path, downloads: Downloads | None = None) -> Path | None:
    """Find the drafter of a target whose files are in `folder`. Return its folder, or None if there is none.

    The first place is `drafter/` in `folder`. The next places have the names of `assistant_names`. For a local folder,
    they are next to it, or next to each folder that it links to. For a hub id, they are on the hub.

    If no such drafter exists, the name may tell the size of a published model, as for a fine-tune or another
    publisher's conversion. Then the function takes the drafter that Google published for that size, from the same
    place. If that drafter cannot be used, a warning gives the reason.

    Raises HubError if the hub fails or refuses a drafter that exists, and ConfigError if the drafter is a broken link.
    """
    inside = folder / DRAFTER_FOLDER
    if _is_folder(inside):
        return inside
    if Path(path_or_repo).is_dir():
        return _find_sibling(Path(path_or_repo), folder)
    for name in assistant_names(str(path_or_repo)):
        try:
            return resolve_folder(name, downloads=downloads)
        except HubError as error:
            if not error.is_absent:
                raise
    return _find_official(str(path_or_repo), folder, downloads)


def _is_folder(path: Path) -> bool:
    """Return whether a drafter's folder exists. Raises ConfigError if it is a broken link."""
    if path.is_symlink() and not path.exists():
        raise ConfigError(f"{path}: the drafter is {fault(path)}")
    return path.is_dir()


def _find_sibling(path: Path, folder: Path) -> Path | None:
    places = list(dict.fromkeys(_places(path)))
    for place in places:
        for name in assistant_names(place.name):
            if _is_folder(place.parent / name):
                return place.parent / name
    guesses = (sibling for place in places for sibling in _official_siblings(place))
    return next((guess for guess in guesses if _fits(str(path), folder, guess)), None)


def _places(path: Path) -> Iterator[Path]:
    """Yield the names of a folder: the shell's, the given one, each folder that a link leads to, the resolved path."""
    # After a change of folder through a link, the shell knows the link's name; the system does not.
    logical = Path(os.path.normpath(os.path.join(os.environ.get("PWD", ""), path)))
    if logical.is_absolute() and logical.is_dir() and logical.samefile(path):
        yield logical
        yield from _links(logical)
    named = Path(os.path.abspath(path))
    yield named
    yield from _links(named)
    yield path.resolve()


def _links(place: Path) -> Iterator[Path]:
    """Yield each folder along a chain of links."""
    # The caller found a folder at this place, so the chain has an end.
    while place.is_symlink():
        place = Path(os.path.abspath(place.parent / place.readlink()))
        yield place


def _official_siblings(place: Path) -> Iterator[Path]:
    """Yield sibling folders with the name of Google's drafter for this size, or of a conversion of it."""
    official = official_drafter(place.name)
    if official is not None:
        named = re.compile(rf"{re.escape(official.removeprefix('google/'))}(?:-.+)?", re.IGNORECASE)
        yield from filter(_is_folder, sorted(s for s in place.parent.glob("*") if named.fullmatch(s.name)))


def _fits(target: str, folder: Path, guess: Path) -> bool:
    """Return whether `guess` holds a drafter of the target in `folder`. Log a warning if it does not."""
    try:
        check_pair(read_target_config(folder), read_drafter_config(guess))
    except (ConfigError, PairError) as error:
        logger.warning("the drafter of %s would be %s, but: %s", target, guess, error)
        return False
    logger.info("%s has no drafter of its own: that of the published model is taken, %s", target, guess)
    return True


def _find_official(repo: str, folder: Path, downloads: Downloads | None) -> Path | None:
    """Return the published drafter of a fine-tune, or None. It is only a guess, so a failure raises nothing."""
    name = official_drafter(repo)
    if name is None or name != published_drafter(read_target_config(folder)):
        return None
    try:
        found = resolve_folder(name, downloads=downloads)
    except HubError as error:
        if not error.is_absent:
            logger.warning("the drafter of %s would be %s, but: %s", repo, name, error)
        return None
    return found if _fits(repo, folder, found) else None


def official_drafter(name: str) -> str | None:
    """Return the drafter that Google published for the model size in a name, or None if there is no size."""
    sizes = [size for size in _OFFICIAL.values() if re.search(rf"gemma-?4-{size}(?![a-z0-9])", name, re.IGNORECASE)]
    return f"google/gemma-4-{sizes[0]}-it-assistant" if sizes else None


def published_drafter(config: TargetConfig) -> str | None:
    """Return the drafter that Google published for targets of this shape, or None for other shapes."""
    size = _OFFICIAL.get(config.text.hidden_size)
    return None if size is None else f"google/gemma-4-{size}-it-assistant"


def how_to_name_a_drafter(config: TargetConfig) -> str:
    """Return advice for a target without a drafter, such as "pass --drafter NAME"."""
    official = published_drafter(config)
    return "name one with --drafter" if official is None else f"pass --drafter {official}"


def assistant_names(name: str) -> Iterator[str]:
    """Yield the names that a target's drafter may have.

    For gemma-4-E2B-it-UD-MLX-4bit, they are gemma-4-E2B-it-assistant-UD-MLX-4bit, then the names that end in -4bit and
    in -bf16, then the name of the unconverted drafter.
    """
    conversion = _CONVERSION.search(name)
    if conversion is None:
        yield f"{name}-assistant"
        return
    base, suffix = name[: conversion.start()], conversion.group()
    precision = re.search(rf"-{_PRECISION}(?![a-z0-9])", suffix, re.IGNORECASE)
    endings = [suffix, *([] if precision is None else [precision.group()]), "-bf16", ""]
    yield from dict.fromkeys(f"{base}-assistant{ending}" for ending in endings)


def check_pair(target: TargetConfig, drafter: DrafterConfig) -> None:
    """Check that a drafter belongs to a target. Raises PairError with the first difference and both values."""
    pairs: list[tuple[str, Any, Any]] = [
        ("backbone_hidden_size", drafter.backbone_hidden_size, target.text.hidden_size),
        ("vocab_size", drafter.text.vocab_size, target.text.vocab_size),
        ("sliding_window", drafter.text.sliding_window, target.text.sliding_window),
    ]
    for index, layer in enumerate(drafter.text.layers):
        source = target.text.layers[target.text.last_kv_layer(layer.layer_type)]
        for name in ("num_kv_heads", "head_dim"):
            pairs.append((f"layer {index} ({layer.layer_type}) {name}", _value(layer, name), _value(source, name)))
    for name, found, expected in pairs:
        if found != expected:
            raise PairError(
                f"{drafter.path}: the drafter does not belong to {target.path}: "
                f"its {name} is {found}, the target's {expected}"
            )
    _check_tokenizers(target.path.parent, drafter.path.parent)


def _value(layer: LayerConfig, name: str) -> int:
    value: int = getattr(layer, name)
    return value


def _check_tokenizers(target: Path, drafter: Path) -> None:
    """Check that both tokenizers agree on nearly all ids that both have. Raises PairError if not.

    The check is made only if both checkpoints have a tokenizer. The drafter works on ids. It can work without tokens
    that a fine-tune added or renamed; a warning reports them.
    """
    ours, theirs = target / "tokenizer.json", drafter / "tokenizer.json"
    if not (ours.is_file() and theirs.is_file()) or ours.read_bytes() == theirs.read_bytes():
        return
    expected, found = _tokens(ours), _tokens(theirs)
    both = expected.keys() & found.keys()
    renamed = sorted(token for token in both if expected[token] != found[token])
    first = f"its token {renamed[0]} is {found[renamed[0]]!r}, the target's {expected[renamed[0]]!r}" if renamed else ""
    if len(renamed) > _RENAMED_TOKENS * len(both):
        raise PairError(
            f"{theirs}: the drafter does not belong to {ours}: {first} ({len(renamed)} of {len(both)} differ)"
        )
    added = sorted(expected.keys() ^ found.keys())
    if renamed or added:
        others = f"{len(renamed)} tokens differ{f' ({first})' if first else ''}, {len(added)} are in one of them alone"
        logger.warning("%s: not the tokenizer of %s: %s; drafting goes on by ids", theirs, ours, others)


def _tokens(path: Path) -> dict[int, str]:
    return {index: token for token, index in _vocabulary(path).items()}


def _vocabulary(path: Path) -> dict[str, int]:
    content = read_json(path)
    try:
        vocabulary = dict(content["model"]["vocab"])
        return vocabulary | {token["content"]: token["id"] for token in content["added_tokens"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a tokenizer with model.vocab and added_tokens: {error!r}") from None
