"""The media parts of a checkpoint, read when they are first used, so that a text-only run pays nothing for them."""

from collections.abc import Callable
from functools import cached_property, partial

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.checkpoints.config import TargetConfig
from mlx_mtp.checkpoints.layouts import audio_names, vision_names
from mlx_mtp.checkpoints.media_config import MediaConfig, read_media_config
from mlx_mtp.checkpoints.weights import fill_module, lazy_parameters

from .audio import AudioModel, UnifiedAudioModel, audio_model
from .device_checks import check_products
from .layers import lay_out_weights
from .vision import UnifiedVisionModel, VisionModel, vision_model


class MediaTowers:
    """The networks that turn a picture or a clip into rows of the text decoder.

    The first use of `vision` or `audio` reads its tensors. It raises WeightsError if a tensor is missing, unexpected or
    truncated, or has the wrong shape, and DeviceError if the device computes products with the weights wrong. A network
    is quantized as far as its tensors are.
    """

    def __init__(self, target: TargetConfig, config: MediaConfig) -> None:
        self.config = config
        self._target = target

    @cached_property
    def vision(self) -> VisionModel | UnifiedVisionModel | None:
        """The network for pictures; None if config.json describes none."""
        config = self.config.vision
        if config is None:
            return None
        model = vision_model(config, self.config.hidden_size)
        self._fill(model, partial(vision_names, config=config))
        return model

    @cached_property
    def audio(self) -> AudioModel | UnifiedAudioModel | None:
        """The network for clips; None if config.json describes none."""
        config = self.config.audio
        if config is None:
            return None
        model = audio_model(config, self.config.hidden_size)
        self._fill(model, partial(audio_names, config=config))
        return model

    def _fill(self, model: nn.Module, names: Callable[[str], list[str]]) -> None:
        fill_module(model, self._target.path.parent, names, self._target.quantization)
        check_products(model, _float_type(model))
        lay_out_weights(model)


def _float_type(model: nn.Module) -> mx.Dtype:
    """Return the type of the activations: that of a model's unquantized weights, and of most scales."""
    weights = (array for array in lazy_parameters(model).values() if array.ndim)
    return next(weight.dtype for weight in weights if mx.issubdtype(weight.dtype, mx.floating))


def load_media(target: TargetConfig) -> MediaTowers:
    """Return the media parts of the folder that a target's config was read from. No tensor is read yet.

    Raises ConfigError if config.json does not describe the parts completely.
    """
    return MediaTowers(target, read_media_config(target))
