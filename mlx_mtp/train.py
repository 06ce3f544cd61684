"""Command line that trains a drafter for a target: `python -m mlx_mtp.train --help`."""

import sys

if __name__ == "__main__":
    # This stands before the slow imports, so that Ctrl-C ends the command from its first moment on.
    from .commands import run_command

    sys.exit(run_command("train"))

import argparse
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub.utils import tqdm
from mlx.utils import tree_unflatten

from mlx_mtp.checkpoints.config import DrafterConfig, read_drafter_config, read_json, read_target_config
from mlx_mtp.checkpoints.hub import DRAFTER_FOLDER, resolve_folder
from mlx_mtp.checkpoints.output_files import check_output, new_folder, replace_tensors
from mlx_mtp.checkpoints.weights import lazy_parameters
from mlx_mtp.gemma4.draft_vocab import check_draft_vocab, choose_ids, prune
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.training.centroids import build_centroids, start_from_target
from mlx_mtp.training.dataset import Data, answer_prompts, check_data, read_data
from mlx_mtp.training.trainer import OPTIMIZERS, Measure, Trainer, TrainingOptions

from .command_line import add_embedding_option, load_model
from .errors import MTPError, OptionError, OutputError
from .launched import check_alone
from .loading import check_pair, find_drafter
from .model import Model
from .networks import load_drafter
from .options import GenerationOptions
from .shell import Parser, exit_status, write_out

DEFAULT_MAX_LENGTH = 2048
DEFAULT_ANSWER_TOKENS = 512


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Return the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    return exit_status(lambda: _run(args))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = Parser(
        prog="mlx_mtp.train",
        description="Train a drafter for a target: to repair one whose acceptance fell, or from scratch. The target is "
        "left as it is. Loss, acceptance length and agreement by step are measured on held-out text, and the best "
        "drafter is kept.",
    )
    add = parser.add_argument
    add("--model", required=True, help="Target: a local folder or a Hugging Face hub id; it may be quantized.")
    add("--drafter", help="Drafter to begin with. Default: MODEL/drafter, else the sibling MODEL-assistant.")
    add_embedding_option(parser)
    add("--drafter-config", metavar="FOLDER", help="Train a new drafter with the config.json in this folder.")
    add(
        "--data",
        type=Path,
        required=True,
        metavar="FILE|FOLDER",
        help="JSONL file, of which a twentieth is held out, or folder with train.jsonl and valid.jsonl. A line holds "
        "text, messages, prompt and completion, or a prompt alone, which the target answers first.",
    )
    add(
        "--output",
        type=Path,
        help="Folder of the trained drafter, which appears when training is complete (default: "
        f"MODEL/{DRAFTER_FOLDER}).",
    )
    add("--overwrite", action="store_true", help="Replace the output folder if it exists.")
    add(
        "--resume",
        action="store_true",
        help="Go on with a training that was interrupted, to the same result bit for bit.",
    )
    add(
        "--fine-tune-type",
        choices=("full", "lora"),
        default="full",
        help="Train all weights, or LoRA matrices, which quantized drafters need (default: %(default)s).",
    )
    add("--lora-rank", type=int, default=16, help="Rank of the LoRA matrices (default: %(default)s).")
    add(
        "--rebuild-centroids",
        action="store_true",
        help="Cluster the vocabulary of a centroid head (E2B, E4B) again before training.",
    )
    add("--draft-vocab", type=int, metavar="N", help="Cut a dense head to the N tokens most frequent in the data.")
    add(
        "--max-seq-length",
        type=int,
        default=DEFAULT_MAX_LENGTH,
        help="Longest text in tokens. Longer texts are cut into pieces (default: %(default)s).",
    )
    add(
        "--max-answer-tokens",
        type=int,
        default=DEFAULT_ANSWER_TOKENS,
        help="Longest answer to a prompt (default: %(default)s).",
    )
    _add_training_options(parser)
    return parser


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of TrainingOptions."""
    add = parser.add_argument
    defaults = TrainingOptions()
    add("--iters", type=int, default=defaults.iters, help="Updates to make (default: %(default)s).")
    add("--batch-size", type=int, default=defaults.batch_size, help="Texts per update (default: %(default)s).")
    add("--learning-rate", type=float, default=defaults.learning_rate, help="Highest step size (default: %(default)s).")
    add(
        "--optimizer",
        choices=OPTIMIZERS,
        default=defaults.optimizer,
        help="Muon needs half of the updates from scratch, at a higher learning rate, 1e-2 (default: %(default)s).",
    )
    add(
        "--num-draft-tokens",
        type=int,
        default=defaults.num_draft_tokens,
        help="Draft steps to unroll (default: %(default)s).",
    )
    add(
        "--weight-by-reach",
        action="store_true",
        help="Weight a draft step by the chance that all steps before it are accepted.",
    )
    add(
        "--positions-per-pass",
        type=int,
        default=defaults.positions_per_pass,
        help="Positions of a text trained on at once; fewer take less memory (default: %(default)s).",
    )
    add("--grad-checkpoint", action="store_true", help="Compute logits twice instead of keeping them: less memory.")
    add(
        "--steps-per-eval",
        type=int,
        default=defaults.steps_per_eval,
        help="Updates between measurements on held-out texts (default: %(default)s).",
    )
    add("--val-batches", type=int, default=defaults.val_batches, help="Batches to measure with (default: %(default)s).")
    add("--save-every", type=int, default=defaults.save_every, help="Updates between saves (default: %(default)s).")
    add(
        "--patience",
        type=int,
        default=defaults.patience,
        help="End after this many measurements without gain, 0 never (default: %(default)s).",
    )
    add("--seed", type=int, default=defaults.seed, help="Seed of data order and new weights (default: %(default)s).")


def _run(args: argparse.Namespace) -> int:
    check_alone("the training of a drafter")
    options = TrainingOptions(**{field.name: getattr(args, field.name) for field in fields(TrainingOptions)})
    _check(args)
    folder = resolve_folder(args.model)
    output = args.output or folder / DRAFTER_FOLDER
    check_output(output, "--output", args.overwrite)
    workspace = _workspace(output, args.resume)
    source = _source(args, folder)
    config = read_drafter_config(source)
    check_pair(read_target_config(folder), config)
    _check_drafter(args, config)
    # The existing drafter helps the target to answer prompts. A damaged drafter also helps.
    model = load_model(args.model, "none" if args.drafter_config else source, args)
    mx.random.seed(options.seed)
    drafter = _initial(args, model, config)
    data = _read_data(args, model, workspace)
    if args.draft_vocab is not None:
        texts = (text.tokens for text in data.train)
        prune(drafter, choose_ids(texts, model.tokenizer.eos_token_ids, config.text.vocab_size, args.draft_vocab))
    _unfreeze(drafter, None if args.fine_tune_type == "full" else args.lora_rank)
    trainer = Trainer(model.target, drafter, data, options, workspace)
    if args.resume and (workspace / "state.json").exists():
        trainer.resume()
    print(f"{len(data.train)} texts to train on, {len(data.valid)} held out", file=sys.stderr)
    best = _train(trainer)
    _write(output, source, drafter, config, model)
    shutil.rmtree(workspace)
    first = trainer.initial
    assert first is not None
    write_out(
        f"{output}: acceptance length, held out, {first.sampled_length:.2f} -> {best.sampled_length:.2f} sampled, "
        f"{first.greedy_length:.2f} -> {best.greedy_length:.2f} greedy"
    )
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.drafter is not None and args.drafter_config is not None:
        raise OptionError("--drafter and --drafter-config contradict each other: begin with one, or from scratch")
    if args.fine_tune_type == "lora" and args.drafter_config is not None:
        raise OptionError("--fine-tune-type lora needs a drafter to begin with, found --drafter-config")
    for name, least in (("lora_rank", 1), ("max_seq_length", 32), ("max_answer_tokens", 16)):
        if getattr(args, name) < least:
            raise OptionError(f"{name} must be at least {least}, found {getattr(args, name)}")
    check_data(args.data)


def _read_data(args: argparse.Namespace, model: Model, workspace: Path) -> Data:
    """Read the texts. The target answers prompts without an answer, and the answers are kept in the workspace."""

    def answer(prompts: Sequence[list[int]]) -> list[list[int]]:
        options = GenerationOptions(
            max_tokens=args.max_answer_tokens, sampling=model.default_sampling, reuse_prompt=False
        )
        with tqdm(total=len(prompts), desc="Answers", unit="prompt", disable=None, file=sys.stderr) as bar:
            return answer_prompts(
                model, prompts, workspace / "answers.jsonl", options, lambda done, _: bar.update(done - bar.n)
            )

    workspace.mkdir(parents=True, exist_ok=True)
    try:
        return read_data(args.data, model, args.max_seq_length, answer)
    except MTPError:
        # rmdir removes only an empty folder. A folder with answers stays, so that the training can be resumed.
        with suppress(OSError):
            workspace.rmdir()
        raise


def _workspace(output: Path, resume: bool) -> Path:
    """Return the folder that holds the training state until the training ends.

    Raises OutputError if there is no training to resume, or if an unfinished training is in the way.
    """
    workspace = output.with_name(f"{output.name}.training")
    if resume and not workspace.is_dir():
        raise OutputError(f"{workspace}: no training to resume")
    if not resume and workspace.exists():
        raise OutputError(f"{workspace}: an unfinished training; go on with --resume, or remove it")
    return workspace


def _source(args: argparse.Namespace, folder: Path) -> Path:
    """Return the folder of the initial drafter, or of the config.json for a training from scratch.

    Raises OptionError if no drafter is found.
    """
    if args.drafter_config is not None:
        return Path(args.drafter_config)
    found = resolve_folder(args.drafter) if args.drafter else find_drafter(args.model, folder)
    if found is None:
        raise OptionError(f"no drafter found for {args.model}: name one with --drafter, or begin with --drafter-config")
    return found


def _check_drafter(args: argparse.Namespace, config: DrafterConfig) -> None:
    """Check that the options fit the drafter config. Raises OptionError if they do not."""
    if args.draft_vocab is not None:
        check_draft_vocab(config, args.draft_vocab)
    if args.rebuild_centroids and not config.num_centroids:
        raise OptionError(
            f"{config.path}: --rebuild-centroids needs a centroid head, found use_ordered_embeddings false"
        )
    is_quantized = config.quantization is not None and args.drafter_config is None
    if is_quantized and args.fine_tune_type == "full":
        raise OptionError(f"{config.path}: a quantized drafter can be trained with --fine-tune-type lora only")


def _initial(args: argparse.Namespace, model: Model, config: DrafterConfig) -> Drafter:
    """Return the initial drafter, in float32."""
    if args.drafter_config is not None:
        drafter = Drafter(config)
        start_from_target(drafter, model.target, args.seed)
    else:
        drafter = load_drafter(config, mx.float32)
        if args.rebuild_centroids:
            build_centroids(drafter, args.seed)
    return drafter


def _unfreeze(drafter: Drafter, lora_rank: int | None) -> None:
    """Make only the weights trainable or, with `lora_rank`, only new LoRA matrices of this rank."""
    drafter.unfreeze()
    if drafter.masked_embedding is not None:
        drafter.masked_embedding.freeze(recurse=False, keys="token_ordering")
    if drafter.draft_vocab_ids is not None:
        drafter.freeze(recurse=False, keys="draft_vocab_ids")
    if lora_rank is not None:
        _add_lora(drafter, lora_rank)
    mx.eval(drafter.parameters())


def _add_lora(drafter: Drafter, rank: int) -> None:
    from mlx_lm.tuner.lora import LoRALinear

    drafter.freeze()
    linears = {
        name: LoRALinear.from_base(module, r=rank)  # type: ignore[arg-type]
        for name, module in drafter.named_modules()
        if isinstance(module, nn.Linear | nn.QuantizedLinear)
    }
    drafter.update_modules(tree_unflatten(list(linears.items())))


def _train(trainer: Trainer) -> Measure:
    """Train to the end and show the progress. Return the best measurement."""
    with tqdm(total=trainer.options.iters, initial=trainer.update, desc="Train", unit="update", disable=None) as bar:

        def report(update: int, loss: float, measured: Measure | None) -> None:
            bar.update(update - bar.n)
            held_out = measured or trainer.best
            assert held_out is not None
            bar.set_postfix(loss=f"{loss:.4f}", acceptance=f"{held_out.sampled_length:.2f}", refresh=False)
            if measured is not None:
                tqdm.write(f"update {update}: {measured}", file=sys.stderr)

        return trainer.run(report)


def _write(output: Path, source: Path, drafter: Drafter, config: DrafterConfig, model: Model) -> None:
    """Write the drafter's folder in the layout and type of its source.

    LoRA matrices are fused first. The folder appears only when it is complete.
    """
    from mlx_lm.tuner.lora import LoRALinear

    lora = {name: module for name, module in drafter.named_modules() if isinstance(module, LoRALinear)}
    drafter.update_modules(tree_unflatten([(name, module.fuse()) for name, module in lora.items()]))
    dtype = getattr(mx, config.dtype) if config.dtype else model.target.dtype
    arrays = {
        name: value.astype(dtype) if value.dtype == mx.float32 else value
        for name, value in lazy_parameters(drafter).items()
    }
    fields = read_json(config.path)
    if drafter.config.draft_vocab_size:
        fields["draft_vocab_size"] = drafter.config.draft_vocab_size
    with new_folder(output) as new:
        replace_tensors(new / "model.safetensors", arrays, {"format": "mlx"})
        (new / config.path.name).write_text(json.dumps(fields, indent=2))
        for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (source / name).is_file():
                shutil.copyfile(source / name, new / name)
