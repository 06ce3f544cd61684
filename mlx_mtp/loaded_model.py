"""The parts of a loaded model, and how they are released."""

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

import mlx.core as mx

from mlx_mtp.checkpoints.config import DrafterConfig, TargetConfig
from mlx_mtp.decoding.calibration import RoundCosts
from mlx_mtp.decoding.compiled import CompiledRounds
from mlx_mtp.decoding.prompt_cache import PromptCache
from mlx_mtp.decoding.sampling import Sampling, default_sampling
from mlx_mtp.gemma4.disk_table import EmbeddingStats
from mlx_mtp.gemma4.drafter import Drafter
from mlx_mtp.gemma4.kv_cache import KVQuantization
from mlx_mtp.gemma4.target import Target
from mlx_mtp.threads.model_lock import Lifetime

from .errors import ClosedError
from .guides import GuideMaker
from .media_reader import MediaReader
from .memory_plan import memory_size

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

logger = logging.getLogger(__name__)

# The first limit of the prompt cache is this share of the machine's memory.
_PROMPT_CACHE_SHARE = 0.1


@dataclass
class Parts:
    """The parts of a loaded model. `LoadedModel.close` releases them."""

    target: Target
    drafter: Drafter | None
    tokenizer: "TokenizerWrapper"
    prompt_cache: PromptCache
    rounds: CompiledRounds
    guides: GuideMaker
    costs: RoundCosts
    media: MediaReader
    # The fingerprint of the weights; None until it is needed.
    fingerprint: str | None = None
    # The K/V quantizations that were checked on this device.
    checked: set[KVQuantization] = field(default_factory=set)


class LoadedModel:
    """A loaded target with its tokenizer and, except for plain decoding, its drafter, until it is closed.

    A `with` statement or `close` releases the memory. After that, the parts raise ClosedError.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        tokenizer: "TokenizerWrapper",
        config: TargetConfig,
        drafter_config: DrafterConfig | None,
        *,
        exact: bool = False,
        context_limit: int | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self.config = config
        self.drafter_config = drafter_config
        self.exact = exact
        self.context_limit = context_limit
        # The bytes that the weights, the K/V of all texts and their work may take together, or None without a limit.
        self.memory_limit = memory_limit
        self.life = Lifetime()
        self._parts: Parts | None = Parts(
            target,
            drafter,
            tokenizer,
            PromptCache(int(_PROMPT_CACHE_SHARE * memory_size())),
            # An accelerator may round compiled and uncompiled rounds differently. A text's second run would then differ
            # from its first. The CPU gives the same bits, and its compiler takes seconds.
            CompiledRounds(always=exact or mx.default_device() != mx.Device(mx.cpu)),
            GuideMaker(tokenizer, config),
            RoundCosts(target, drafter, config, drafter_config, exact=exact),
            MediaReader(config, self.max_context),
        )

    def close(self) -> None:
        """Release the memory: weights, the K/V of prompts, compiled rounds, and MLX's cache of freed buffers.

        Running and waiting generations end with a ClosedError, in any thread. Open iterators raise it at their next
        item. The call waits for the round, or the chunk of a prompt, that is being computed. A second call does
        nothing.
        """
        if not self.life.end():
            return
        self.parts.prompt_cache.clear()
        self.parts.target.close()
        self._parts = None
        mx.clear_cache()
        logger.info("closed %s", self.config.path.parent)

    @property
    def parts(self) -> Parts:
        """The loaded parts. Raises ClosedError if the model is closed."""
        if self._parts is None:
            raise ClosedError("the model is closed: load it again")
        return self._parts

    @property
    def is_closed(self) -> bool:
        """True after `close` was called."""
        return self.life.is_closed

    def __enter__(self) -> Self:
        self.life.check()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def target(self) -> Target:
        """The target network."""
        return self.parts.target

    @property
    def drafter(self) -> Drafter | None:
        """The drafter network; None for plain decoding."""
        return self.parts.drafter

    @property
    def tokenizer(self) -> "TokenizerWrapper":
        """mlx-lm's tokenizer."""
        return self.parts.tokenizer

    @property
    def prompt_cache(self) -> PromptCache:
        """The K/V of earlier prompts."""
        return self.parts.prompt_cache

    @property
    def max_context(self) -> int:
        """The largest number of tokens of prompt and answer together.

        It is `context_limit` if that is given, and at most the config field `max_position_embeddings`.
        """
        most = self.config.text.max_position_embeddings
        return most if self.context_limit is None else min(most, self.context_limit)

    @property
    def per_layer_embeddings(self) -> Literal["resident", "mapped"] | None:
        """The place of the per-layer table: "resident" is in memory, "mapped" is in its files.

        It is None for a target without a per-layer table.
        """
        if not self.config.text.per_layer_input_size:
            return None
        return "resident" if self.target.mapped is None else "mapped"

    @property
    def embedding_stats(self) -> EmbeddingStats | None:
        """Row counts of the mapped per-layer embeddings since loading; None if they are in memory."""
        return None if self.target.mapped is None else self.target.mapped.stats

    @property
    def default_sampling(self) -> Sampling:
        """The sampling options of the model's makers (`generation_config.json`).

        The command lines use them as defaults.
        """
        return default_sampling(self.config.sampling, self.max_context)
