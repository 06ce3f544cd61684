"""The networks of a pair: modules filled from their folders, with weights arranged for fast passes."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_mtp.checkpoints.config import DrafterConfig, TargetConfig
from mlx_mtp.checkpoints.layouts import drafter_names, target_names
from mlx_mtp.checkpoints.weights import count_bytes, fill_module, token_ids
from mlx_mtp.decoding.exact import check_exact, make_exact
from mlx_mtp.decoding.prefill import Progress
from mlx_mtp.gemma4.device_checks import check_products
from mlx_mtp.gemma4.disk_table import MappedEmbedding
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.fused_attention import choose_fused_attention
from mlx_mtp.gemma4.kernels import use_kernels
from mlx_mtp.gemma4.layers import fuse_projections, lay_out_weights, spread_layer_scalars
from mlx_mtp.gemma4.target import Target

if TYPE_CHECKING:
    # A process that is alone does not import this package.
    from mlx_mtp.group.shared_target import SharedTarget
    from mlx_mtp.group.split import Part

_TABLE = "embed_tokens_per_layer."


def load_target(config: TargetConfig, *, mapped: bool = False, on_read: Callable[[int], None] | None = None) -> Target:
    """Load the target from the folder that its config was read from.

    `mapped` leaves the per-layer table in its files. `on_read` is called with the number of bytes of each read.

    Raises WeightsError if the tensors do not fit the config.
    """
    target = Target(config.text)
    target.suppress(config.suppress_tokens)
    names = partial(target_names, config=config)
    unread = fill_module(
        target, config.path.parent, names, config.quantization, is_unread=_unread(mapped, None), on_read=on_read
    )
    if mapped:
        tensors = {name.removeprefix(_TABLE): tensor for name, tensor in unread.items()}
        target.embed_tokens_per_layer = MappedEmbedding(target.embed_tokens_per_layer, tensors)
    return target


def load_shared_target(
    target: "SharedTarget", config: TargetConfig, on_read: Callable[[int], None] = lambda _: None
) -> None:
    """Load the part of a target that this rank of a group holds. See `load_target`.

    The tensors are read in steps, so that the memory holds little more than the part.
    """
    target.suppress(config.suppress_tokens)
    names = partial(target_names, config=config)
    part = target.part
    fill_module(
        target,
        config.path.parent,
        names,
        config.quantization,
        is_unread=_unread(False, part),
        cut=part.of,
        on_read=on_read,
    )
    target.take_part()


def load_drafter(config: DrafterConfig, dtype: mx.Dtype, on_read: Callable[[int], None] | None = None) -> Drafter:
    """Load the drafter from the folder that its config was read from. It computes in the target's `dtype`.

    With mixed types, every draft step would convert the target's whole K/V.

    Raises WeightsError as `load_target` does.
    """
    drafter = Drafter(config)
    names = partial(drafter_names, config=config)
    fill_module(drafter, config.path.parent, names, config.quantization, on_read=on_read)
    # The published ids are int64, but draft tokens are compared with the target's int32 ids.
    folder, vocab_size, head = config.path.parent, config.text.vocab_size, drafter.masked_embedding
    if head is not None:
        name = "masked_embedding.token_ordering"
        head.token_ordering = token_ids(folder, name, head.token_ordering, vocab_size)
    if drafter.draft_vocab_ids is not None:
        drafter.draft_vocab_ids = token_ids(folder, "draft_vocab_ids", drafter.draft_vocab_ids, vocab_size)
    drafter.set_dtype(dtype)
    mx.eval(drafter.parameters())
    return drafter


def prepare_target(target: Target, exact: bool) -> None:
    """Arrange the weights of a loaded target for fast passes and, with `exact`, for passes with the bits of plain ones.

    Raises DeviceError if the device computes products with the weights wrong, or if passes cannot be made exact.
    """
    check_products(target, target.dtype)
    fuse_projections(target.layers)
    spread_layer_scalars(target.layers)
    lay_out_weights(target)
    choose_fused_attention(target.layers, target.dtype)
    use_kernels(target)
    if exact:
        make_exact(target)
        check_exact(target)


def prepare_drafter(drafter: Drafter, target: TargetConfig) -> None:
    """Arrange the weights of a loaded drafter for fast steps. It never drafts what the target never generates.

    Raises DeviceError if the device computes products with the weights wrong.
    """
    check_products(drafter, drafter.model.norm.weight.dtype)
    drafter.suppress(target.suppress_tokens)
    fuse_projections(drafter.model.layers)
    spread_layer_scalars(drafter.model.layers)
    lay_out_weights(drafter)
    choose_fused_attention(drafter.model.layers, drafter.model.norm.weight.dtype)
    use_kernels(drafter)


def count_read_bytes(
    on_load: Progress,
    config: TargetConfig,
    drafter: DrafterConfig | None,
    *,
    mapped: bool = False,
    part: "Part | None" = None,
) -> Callable[[int], None]:
    """Return a callback for `fill_module` that adds up the bytes read of target and drafter."""
    done, total = 0, count_bytes(config.path.parent, partial(target_names, config=config), _unread(mapped, part))
    if drafter is not None:
        total += count_bytes(drafter.path.parent, partial(drafter_names, config=drafter))

    def report(size: int) -> None:
        nonlocal done
        done += size
        on_load(done, total)

    return report


def _unread(mapped: bool, part: "Part | None") -> Callable[[str], bool]:
    """Return whether a parameter of a target, by its name, is not read but stays in its files."""
    return lambda name: (mapped and name.startswith(_TABLE)) or (part is not None and not part.holds(name))
