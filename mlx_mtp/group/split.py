"""The part of a target that each rank of a group holds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx

from mlx_mtp.checkpoints.config import LayerConfig, TargetConfig, TextConfig
from mlx_mtp.checkpoints.layouts import plain_name
from mlx_mtp.errors import OptionError
from mlx_mtp.launched import SPLITS, SplitKind

# A part of an unquantized axis is a multiple of this number where the axis is one. Kernels are fast with such parts.
_UNIT = 32
_ROWS, _COLUMNS = -2, -1


@dataclass(frozen=True)
class Split:
    """How a target is split over the ranks of a group.

    "tensor" splits attention heads, feed-forward blocks and the head. "feed-forward" leaves attention whole on each
    rank. "pipeline" gives each rank some of the layers, and rank 0 the last of them.

    `bandwidths` are the memory bandwidths of the machines, in the order of the ranks and in any unit. The parts of
    feed-forward blocks, or the numbers of layers, are in proportion to them. Without them, all parts are equal.

    Raises OptionError if the bandwidths do not fit the number of ranks.
    """

    kind: SplitKind
    size: int
    bandwidths: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in SPLITS:
            raise OptionError(f"split must be one of {', '.join(SPLITS)}, found {self.kind!r}")
        if not self.bandwidths:
            return
        if self.kind == "tensor":
            raise OptionError(
                "bandwidths are given, but the split is tensor, whose parts are equal: expected no "
                "bandwidths, or the split feed-forward or pipeline"
            )
        if len(self.bandwidths) != self.size:
            raise OptionError(
                f"bandwidths has {len(self.bandwidths)} numbers, expected one for each of the {self.size} machines"
            )
        for bandwidth in self.bandwidths:
            if not 0 < bandwidth < math.inf:
                raise OptionError(f"bandwidths must be numbers greater than 0, found {bandwidth:g}")

    def ends(self, count: int) -> list[int]:
        """Return where the parts of `count` things begin and end, one number more than there are ranks."""
        if not self.bandwidths:
            return [count * rank // self.size for rank in range(self.size + 1)]
        total = sum(self.bandwidths)
        return [round(count * sum(self.bandwidths[:rank]) / total) for rank in range(self.size + 1)]


class Range(NamedTuple):
    """The things from `start` to before `end`, of `total` things."""

    start: int
    end: int
    total: int

    @property
    def size(self) -> int:
        """The number of things."""
        return self.end - self.start


class Cut(NamedTuple):
    """A range of one axis of a tensor."""

    axis: int
    range: Range

    def __call__(self, tensor: mx.array) -> mx.array:
        """Return this part of a tensor, as an array that holds no other bytes."""
        start, end = (tensor.shape[self.axis] * each // self.range.total for each in self.range[:2])
        return mx.contiguous(tensor[..., start:end, :] if self.axis == _ROWS else tensor[..., start:end])


class Part:
    """The part of a target that one rank holds.

    `config` describes it as if it were a target of its own, with fewer heads, or with fewer layers. `layers` are the
    indices of its layers in the whole target. `logits` is the number of tokens whose logits each rank computes.

    Rank 0 keeps all K/V heads of the two layers that a drafter reads.

    Raises OptionError if the target cannot be split in this way.
    """

    def __init__(self, config: TargetConfig, split: Split, rank: int) -> None:
        self.split = split
        self.rank = rank
        self.layers = range(len(config.text.layers))
        self.config = self._whole = config.text
        self.logits = -(-config.text.vocab_size // split.size)
        self._cuts: dict[str, Cut] = {}
        self._seen: dict[int, slice] = {}
        if split.kind == "pipeline":
            self.layers = _own_layers(config.text, split, rank)
            self.config = _config_of_layers(config.text, self.layers)
            return
        if split.kind == "tensor":
            self._split_attention(config)
        self._split_feed_forward(config)
        if config.text.own_head:
            self._cuts["lm_head"] = Cut(_ROWS, self.head(rank))

    @property
    def collectives(self) -> int:
        """The number of collectives of a pass with logits. One of them brings the tokens from rank 0."""
        layers = len(self._whole.layers)
        of_layers = {"tensor": 2 * layers + 1, "feed-forward": layers + 1, "pipeline": self.split.size - 1}
        return 1 + of_layers[self.split.kind]

    def holds(self, name: str) -> bool:
        """Return whether the rank has any of a parameter with this name in the whole target."""
        parts = name.split(".")
        return parts[0] != "layers" or int(parts[1]) in self.layers

    def cut(self, name: str) -> Cut | None:
        """Return how a parameter is cut, or None if the rank has the whole parameter."""
        return self._cuts.get(name.rpartition(".")[0])

    def share(self, name: str) -> Fraction:
        """Return the share of a parameter's bytes that the rank has."""
        cut = self.cut(name)
        if cut is None:
            return Fraction(self.holds(name))
        return Fraction(cut.range.size, cut.range.total)

    @property
    def head_share(self) -> Fraction:
        """The share of the table's rows whose logits the rank computes."""
        if self.split.kind == "pipeline":
            return Fraction(self.rank == 0)
        return Fraction(self.logits, self.config.vocab_size)

    def of(self, name: str, whole: mx.array) -> mx.array:
        """Return the rank's part of a parameter of the target."""
        cut = self.cut(name)
        return whole if cut is None else cut(whole)

    def seen_heads(self, layer: int) -> slice | None:
        """Return which K/V heads in the cache the queries of a layer attend to, or None for all."""
        return self._seen.get(layer)

    def head(self, rank: int) -> Range:
        """Return the tokens whose logits a rank computes. Ranges may overlap, because all have the same size."""
        vocab_size = self.config.vocab_size
        start = min(self.logits * rank, vocab_size - self.logits)
        return Range(start, start + self.logits, vocab_size)

    def _split_attention(self, config: TargetConfig) -> None:
        """Give the rank some query heads, and the K/V heads to which they attend."""
        text, split, layers = config.text, self.split, list(config.text.layers)
        ends = split.ends(text.num_attention_heads)
        heads = Range(ends[self.rank], ends[self.rank + 1], text.num_attention_heads)
        needed = [_kv_heads(text, layer, ends)[self.rank] for layer in layers]
        drafted = {text.last_kv_layer(kind) for kind in ("sliding_attention", "full_attention")}
        for index, layer in enumerate(layers):
            path, kept = f"layers.{index}.self_attn", needed[layer.kv_layer]
            if not self.rank and layer.kv_layer in drafted:
                kept = Range(0, layer.num_kv_heads, layer.num_kv_heads)
            if kept != needed[index]:
                self._seen[index] = slice(needed[index].start - kept.start, needed[index].end - kept.start)
            self._cuts[f"{path}.q_proj"] = Cut(_ROWS, heads)
            self._cuts[f"{path}.k_proj"] = self._cuts[f"{path}.v_proj"] = Cut(_ROWS, kept)
            self._cuts[f"{path}.o_proj"] = Cut(_COLUMNS, heads)
            _check_columns(config, f"{path}.o_proj", layer.head_dim, ends)
            layers[index] = replace(layer, num_kv_heads=kept.size)
        self.config = replace(self.config, num_attention_heads=heads.size, layers=tuple(layers))

    def _split_feed_forward(self, config: TargetConfig) -> None:
        layers, text = list(self.config.layers), config.text
        for index, layer in enumerate(layers):
            path = f"layers.{index}.mlp"
            units = self._split_block(config, path, layer.intermediate_size)
            layers[index] = replace(layer, intermediate_size=layer.intermediate_size * units.size // units.total)
        self.config = replace(self.config, layers=tuple(layers))
        if text.num_experts:
            of_layers = (f"layers.{index}.experts.switch_glu" for index in self.layers)
            sizes = [self._split_block(config, path, text.moe_intermediate_size) for path in of_layers]
            most = max(units.size * text.moe_intermediate_size // units.total for units in sizes)
            self.config = replace(self.config, moe_intermediate_size=most)

    def _split_block(self, config: TargetConfig, path: str, width: int) -> Range:
        """Give the rank a part of a feed-forward block of this width. Return the part, in units that are not cut."""
        unit = _unit(config, f"{path}.down_proj", width, self.split.size)
        ends = self.split.ends(width // unit)
        if any(start == end for start, end in pairwise(ends)):
            raise OptionError(
                f"{path} has {width // unit} quantization groups of {unit}, which cannot be split over "
                f"{self.split.size} machines so that each has at least one"
            )
        units = Range(ends[self.rank], ends[self.rank + 1], width // unit)
        self._cuts[f"{path}.gate_proj"] = self._cuts[f"{path}.up_proj"] = Cut(_ROWS, units)
        self._cuts[f"{path}.down_proj"] = Cut(_COLUMNS, units)
        return units


def _kv_heads(text: TextConfig, layer: LayerConfig, ends: Sequence[int]) -> list[Range]:
    """Return the K/V heads of a layer to which the query heads of each rank attend.

    Attention needs the same number of query heads for each K/V head.
    """
    per_head = text.num_attention_heads // layer.num_kv_heads
    found = []
    for start, end in pairwise(ends):
        heads = Range(start // per_head, -(-end // per_head), layer.num_kv_heads)
        if start == end or (heads.size > 1 and heads.size * per_head != end - start):
            raise OptionError(
                f"{text.num_attention_heads} attention heads with {layer.num_kv_heads} K/V heads cannot be split over "
                f"{len(ends) - 1} machines: use --split feed-forward or pipeline"
            )
        found.append(heads)
    return found


def _unit(config: TargetConfig, path: str, width: int, size: int) -> int:
    """Return the number of columns of a projection that stay together, if `size` ranks share the columns."""
    if group_size := _group_size(config, path):
        return group_size
    return _UNIT if width % _UNIT == 0 and width // _UNIT >= size else 1


def _group_size(config: TargetConfig, path: str) -> int | None:
    """Return the group size of a projection's quantization, or None without quantization."""
    if config.quantization is None:
        return None
    overrides = {plain_name(name): choice for name, choice in config.quantization.overrides.items()}
    chosen = overrides.get(path, config.quantization)
    return chosen.group_size if chosen else None


def _check_columns(config: TargetConfig, path: str, head_dim: int, ends: Sequence[int]) -> None:
    """Raise OptionError if a part of an output projection would end inside a quantization group."""
    group_size = _group_size(config, path)
    if group_size and any(end * head_dim % group_size for end in ends):
        raise OptionError(
            f"{path} has quantization groups of {group_size}, which attention heads of {head_dim} would cut: "
            "use --split feed-forward or pipeline"
        )


def _own_layers(text: TextConfig, split: Split, rank: int) -> range:
    """Return the layers of a rank of a pipeline. Rank 0 has the last layers."""
    if text.per_layer_input_size:
        raise OptionError(
            "E2B and E4B share K/V between layers, which a pipeline cannot split: use --split tensor or feed-forward"
        )
    reverse = Split("pipeline", split.size, split.bandwidths[::-1])
    ends = reverse.ends(len(text.layers))
    layers = range(*ends[split.size - 1 - rank : split.size + 1 - rank])
    if not layers:
        raise OptionError(f"{len(text.layers)} layers cannot be split over {split.size} machines")
    kinds = {text.layers[index].layer_type for index in layers}
    if not rank and len(kinds) < len({layer.layer_type for layer in text.layers}):
        raise OptionError(
            f"the first machine would have the last {len(layers)} of {len(text.layers)} layers: expected a sliding and "
            "a full-attention layer among them, whose K/V the drafter reads"
        )
    return layers


def _config_of_layers(text: TextConfig, layers: range) -> TextConfig:
    own = (replace(text.layers[index], kv_layer=text.layers[index].kv_layer - layers.start) for index in layers)
    return replace(text, layers=tuple(own))
