"""The training loop of a drafter: updates, measurements on held-out texts, and a state on disk to resume from."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_mtp.checkpoints.output_files import replace_tensors, replace_text
from mlx_mtp.errors import OptionError, TrainingError
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.target import Target

from .dataset import Data, Text
from .losses import TargetStates, acceptance_lengths, compute_target_states, objective, unroll

Arrays = dict[str, mx.array]

OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a training. Where mlx-lm has the option, the name is the same.

    One update reads `batch_size` texts, one after the other. Memory holds one text, and `positions_per_pass` of its
    positions at a time. `optimizer` is "adamw" or "muon": Muon trains the matrices of the layers, and AdamW trains the
    other weights. `num_draft_tokens` is the number of draft steps that a pass unrolls. With `weight_by_reach`, the
    weight of a step is the probability that decoding reaches it. The trainer measures every `steps_per_eval` updates.
    The training ends early after `patience` measurements in a row without a new best (0: never).

    Raises OptionError if a value is out of range.
    """

    iters: int = 1000
    batch_size: int = 4
    learning_rate: float = 1e-4
    optimizer: str = "adamw"
    num_draft_tokens: int = 4
    weight_by_reach: bool = False
    positions_per_pass: int = 512
    grad_checkpoint: bool = False
    steps_per_eval: int = 200
    val_batches: int = 25
    save_every: int = 100
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        least = dict.fromkeys(["iters", "batch_size", "num_draft_tokens", "positions_per_pass"], 1)
        least |= {"steps_per_eval": 1, "val_batches": 1, "save_every": 1, "patience": 0, "seed": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise OptionError(f"{name} must be at least {minimum}, found {getattr(self, name)}")
        if self.num_draft_tokens > 8:
            raise OptionError(f"num_draft_tokens must be at most 8 to train, found {self.num_draft_tokens}")
        if self.optimizer not in OPTIMIZERS:
            raise OptionError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, found {self.optimizer}")
        if not 0 < self.learning_rate < 1:
            raise OptionError(f"learning_rate must be between 0 and 1, found {self.learning_rate}")


class Measure(NamedTuple):
    """A measurement on held-out texts.

    `loss` is in nats. `sampled_length` and `greedy_length` are the expected acceptance lengths at temperature 1 and for
    greedy decoding. `agreement` holds, for each draft step, the share of positions where drafter and target have the
    same most likely token.
    """

    loss: float
    sampled_length: float
    greedy_length: float
    agreement: list[float]

    def __str__(self) -> str:
        steps = " ".join(f"{share:.3f}" for share in self.agreement)
        return (
            f"loss {self.loss:.4f}, acceptance length {self.sampled_length:.2f} sampled, "
            f"{self.greedy_length:.2f} greedy, agreement by step {steps}"
        )


class Trainer:
    """The training loop for the trainable parameters of a drafter.

    `folder` holds the training state. `state.json` names the file of arrays and is replaced last. So the state on disk
    is complete at any time. A resumed training gives bit for bit the result of an uninterrupted training.
    """

    def __init__(self, target: Target, drafter: Drafter, data: Data, options: TrainingOptions, folder: Path) -> None:
        self.target = target
        self.drafter = drafter
        self.data = data
        self.options = options
        self.folder = folder
        self.optimizer = _optimizer(options, drafter.config.text.hidden_size)
        self.optimizer.init(drafter.trainable_parameters())
        self.update = 0
        self.initial: Measure | None = None
        self.best: Measure | None = None
        self.best_update = 0
        self._best_parameters = _flat(drafter.trainable_parameters())
        self._gradients = nn.value_and_grad(drafter, self._loss)

    def run(self, report: Callable[[int, float, Measure | None], None]) -> Measure:
        """Train to the end, restore the best parameters, and return the best measurement.

        `report` is called once before the first update of a new training, and then after each update. Its arguments are
        the number of updates, the loss, and the measurement after the update or None.

        Raises TrainingError if the loss is no longer finite, OutputError if the state cannot be written.
        """
        if self.best is None:
            self.initial = self.best = self.measure()
            report(0, self.best.loss, self.best)
            self.save()
        while self.update < self.options.iters and not self._is_over():
            loss = self._step()
            self.update += 1
            measured = None
            if self.update % self.options.steps_per_eval == 0 or self.update == self.options.iters:
                measured = self.measure()
                if measured.sampled_length > self.best.sampled_length:
                    self.best, self.best_update = measured, self.update
                    self._best_parameters = _flat(self.drafter.trainable_parameters())
            if self.update % self.options.save_every == 0 or measured is not None:
                self.save()
            report(self.update, loss, measured)
        self.drafter.update(tree_unflatten(list(self._best_parameters.items())))
        return self.best

    def measure(self) -> Measure:
        """Measure the drafter on the held-out texts.

        It uses at most `val_batches` batches of texts, at equal distances over all held-out texts.
        """
        sums: list[float] | None = None
        count = 0
        texts = self.data.valid
        chosen = min(len(texts), self.options.val_batches * self.options.batch_size)
        for text in (texts[index * len(texts) // chosen] for index in range(chosen)):
            target_states = compute_target_states(self.target, text.tokens)
            for first, rows in self._passes(text):
                losses = unroll(self.target, self.drafter, target_states, first, rows, self.options.num_draft_tokens)
                sampled, greedy = acceptance_lengths(losses)
                total = objective(losses, by_reach=False) * rows
                values = mx.stack([total, sampled.sum(), greedy.sum(), *(step.agrees.sum() for step in losses)])
                found: list[float] = values.tolist()  # type: ignore[assignment]
                sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
                count += rows
        assert sums is not None
        loss, sampled_length, greedy_length, *agreement = (value / count for value in sums)
        return Measure(loss, sampled_length, greedy_length, agreement)

    def _is_over(self) -> bool:
        waited = (self.update - self.best_update) // self.options.steps_per_eval
        return 0 < self.options.patience <= waited

    def _step(self) -> float:
        texts = [self.data.train[index] for index in self._indices(self.update)]
        positions = sum(rows for text in texts for _, rows in self._passes(text))
        total, gradients = mx.array(0.0), None
        for text in texts:
            target_states = compute_target_states(self.target, text.tokens)
            for first, rows in self._passes(text):
                share = rows / positions
                loss, found = self._gradients(target_states, first, rows)
                total = total + loss * share
                scaled = tree_map(lambda g, share=share: g * share, found)
                gradients = scaled if gradients is None else tree_map(mx.add, gradients, scaled)
                mx.eval(total, gradients)
        value = float(total.item())  # type: ignore[arg-type]
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss of update {self.update + 1} is {value}: a lower --learning-rate may help; the state of the "
                f"last save is kept in {self.folder}"
            )
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        self.optimizer.update(self.drafter, gradients)
        mx.eval(self.drafter.trainable_parameters(), self.optimizer.state)
        return value

    def _loss(self, target_states: TargetStates, first: int, rows: int) -> mx.array:
        options = self.options
        losses = unroll(
            self.target,
            self.drafter,
            target_states,
            first,
            rows,
            options.num_draft_tokens,
            checkpoint=options.grad_checkpoint,
        )
        return objective(losses, by_reach=options.weight_by_reach)

    def _passes(self, text: Text) -> Iterator[tuple[int, int]]:
        """Yield the first position and the number of positions of each pass over the bonus tokens of a text."""
        end = len(text.tokens) - self.options.num_draft_tokens + 1
        for first in range(max(1, text.answer), end, self.options.positions_per_pass):
            yield first, min(self.options.positions_per_pass, end - first)

    def _indices(self, update: int) -> Sequence[int]:
        """Return the indices of the texts of an update.

        Each epoch is a different permutation of the texts. The seed and the epoch number determine it.
        """
        size, texts = self.options.batch_size, len(self.data.train)
        places = range(update * size, (update + 1) * size)
        orders = {epoch: self._order(epoch) for epoch in {place // texts for place in places}}
        return [int(orders[place // texts][place % texts]) for place in places]

    def _order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.random.default_rng([self.options.seed, epoch]).permutation(len(self.data.train))

    def save(self) -> None:
        """Write the training state to the folder.

        Raises OutputError if it cannot be written. The previous state then stays in place.
        """
        name = f"state-{self.update:07}.safetensors"
        arrays = {f"drafter.{key}": value for key, value in _flat(self.drafter.parameters()).items()}
        arrays |= {f"optimizer.{key}": value for key, value in _flat(self.optimizer.state).items()}
        arrays |= {f"best.{key}": value for key, value in self._best_parameters.items()}
        state = {
            "update": self.update,
            "arrays": name,
            "initial": self.initial,
            "best": self.best,
            "best_update": self.best_update,
            "options": asdict(self.options),
        }
        replace_tensors(self.folder / name, arrays, {"format": "mlx"})
        replace_text(self.folder / "state.json", json.dumps(state, indent=2))
        # A save that was killed leaves a file with another beginning.
        for old in self.folder.glob("*.safetensors"):
            if old.name != name:
                old.unlink()

    def resume(self) -> None:
        """Load the training state from the folder.

        Raises TrainingError if the state does not exist, cannot be read, or has other options or another drafter.
        """
        file = self.folder / "state.json"
        try:
            state = json.loads(file.read_text())
            arrays: Arrays = mx.load(str(self.folder / state["arrays"]))  # type: ignore[assignment]
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise TrainingError(f"{file}: no training to go on from: {error}") from None
        for name, value in asdict(self.options).items():
            # This includes `iters`: the learning rate of every update depends on the number of updates.
            if state["options"].get(name) != value:
                raise TrainingError(f"{file}: begun with {name} {state['options'].get(name)}, found {value}")
        parts: dict[str, Arrays] = {"drafter": {}, "optimizer": {}, "best": {}}
        for key, value in arrays.items():
            part, _, rest = key.partition(".")
            parts[part][rest] = value
        if parts["drafter"].keys() != _flat(self.drafter.parameters()).keys():
            raise TrainingError(f"{file}: begun with another drafter")
        self.drafter.load_weights(list(parts["drafter"].items()))
        self.optimizer.state = tree_unflatten(list(parts["optimizer"].items()))
        self._best_parameters = parts["best"]
        self.update, self.best_update = state["update"], state["best_update"]
        self.initial, self.best = (Measure(*state[name]) for name in ("initial", "best"))


def _optimizer(options: TrainingOptions, hidden_size: int) -> optim.Optimizer:
    def schedule(rate: float) -> Callable[[mx.array], mx.array]:
        warmup = max(1, min(100, options.iters // 10))
        rising = optim.linear_schedule(rate / warmup, rate, warmup)
        falling = optim.cosine_decay(rate, max(1, options.iters - warmup), rate / 20)
        joined: Callable[[mx.array], mx.array] = optim.join_schedules([rising, falling], [warmup])
        return joined

    adamw = optim.AdamW(schedule(options.learning_rate), betas=[0.9, 0.95], weight_decay=0.01, bias_correction=True)
    if options.optimizer == "adamw":
        return adamw
    # With this factor, Muon's steps are about as large as AdamW's, so that one learning rate fits both
    # (Liu et al. 2025, arXiv:2502.16982).
    rate = 0.2 * math.sqrt(hidden_size) * options.learning_rate
    return optim.MultiOptimizer([optim.Muon(schedule(rate), weight_decay=0.0), adamw], [_is_inner_matrix])


def _is_inner_matrix(name: str, weight: mx.array) -> bool:
    """Return whether Muon trains this weight: a matrix that does not belong to the head."""
    return weight.ndim == 2 and not name.endswith(("embed_tokens.weight", "centroids.weight"))


def _flat(tree: Any) -> Arrays:
    flat: Arrays = tree_flatten(tree, destination={})  # type: ignore[assignment]
    return flat
