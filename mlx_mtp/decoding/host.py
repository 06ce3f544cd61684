"""The host's part in the rounds of one text."""

from typing import Any

import mlx.core as mx

from mlx_mtp.gemma4.disk_table import PerLayerRows
from mlx_mtp.gemma4.drafter import Draft
from mlx_mtp.gemma4.kv_cache import Cache
from mlx_mtp.gemma4.target import Target

from .constraints import Guide, RowMasks, stack_masks, unpack
from .draft_length import COPY_LENGTHS
from .report import Logprobs
from .round import RoundParts, Steps, draft_tokens
from .state import RoundState


class Host:
    """The host's part in a round: device reads, the guide, and the rows of mapped per-layer embeddings.

    `reads` counts how often the host waited for the device. Logits processors read the text so far, see `text`.
    """

    def __init__(self, guide: Guide | None, *, has_processors: bool = False) -> None:
        self.guide = guide
        self._has_processors = has_processors
        self.reads = 0
        self._copied = mx.zeros(0, mx.int32)

    @property
    def has_part(self) -> bool:
        """True if a guide or a logits processor must follow the text before each round."""
        return self.guide is not None or self._has_processors

    def wait_for(self, values: mx.array) -> list[Any]:
        """Read an array of the device as a list, and count the read.

        Only a guide reads draft tokens in another way (see `RowMasks`).
        """
        self.reads += 1
        found: list[Any] = values.tolist()  # type: ignore[assignment]
        return found

    def first_mask(self, bonus: mx.array) -> mx.array | None:
        """Return the guide's mask for the first token after the prompt, bool [1, vocab].

        The mask is None if all tokens are allowed.
        """
        if self.guide is None:
            return None
        masks = RowMasks(self.guide, 1)
        masks(bonus)
        return masks.stack()

    def draft(
        self, parts: RoundParts, layout: Cache, state: RoundState, steps: Steps, k: int
    ) -> tuple[Draft, mx.array | None]:
        """Draft k tokens, and return the draft with the guide's masks.

        The masks are bool [k + 1, vocab], one for each row to verify. They are None if all tokens are allowed.
        """
        masks = self.masks(k)
        if masks is None:
            return steps.draft(state), None
        draft = draft_tokens(parts, layout, state, k, masks)
        return draft, self.stack(masks, draft, state)

    def masks(self, k: int) -> RowMasks | None:
        """Return the guide's masks for a round of k draft tokens, or None without a guide."""
        return None if self.guide is None else RowMasks(self.guide, k + 1)

    def stack(self, masks: RowMasks, draft: Draft, state: RoundState) -> mx.array | None:
        """Return the masks of all rows to verify, bool [k + 1, vocab]. They are None if all tokens are allowed."""
        masks(draft.tokens[:, -1:] if draft.tokens.size else state.bonus)
        self.reads += masks.host_reads
        return masks.stack()

    def cut(self, copied: list[int]) -> tuple[list[int], mx.array | None]:
        """Return the copied tokens before the first token that the guide forbids, and the masks as `draft` does.

        Copies that are cut have the lengths of other copies, so that few shapes of rounds are compiled.
        """
        if self.guide is None:
            return copied, None
        masks = self.guide.masks_along(copied)
        allowed = len(masks) - 1
        if allowed < len(copied):
            allowed = max((k for k in COPY_LENGTHS if k <= allowed), default=allowed)
        rows = [None if mask is None else unpack(mask, self.guide.vocab_size) for mask in masks[: allowed + 1]]
        return copied[:allowed], stack_masks(rows, self.guide.vocab_size)

    def per_layer_rows(self, target: Target, last: int, draft: Draft) -> PerLayerRows | None:
        """Read the rows of mapped per-layer embeddings for a verify pass over the last token and the draft.

        Returns None if the embeddings are not mapped. The draft tokens determine the rows, so the host waits for them.
        """
        if target.mapped is None:
            return None
        drafted: list[int] = []
        if draft.tokens.size:
            # Evaluate the whole draft. A part that is not evaluated holds the K/V buffers, and MLX then copies them.
            mx.eval(*(part for part in draft if part is not None))
            drafted = self.wait_for(draft.tokens[0])
        return target.read_per_layer_rows([last, *drafted])

    def logprobs(self, logprobs: mx.array, n: int | None, count: int) -> list[Logprobs] | None:
        """Read the first `count` rows of `token_logprobs`, with n most likely tokens each.

        Returns None if n is None.
        """
        if n is None:
            return None
        rows: list[list[float]] = self.wait_for(logprobs[:count])
        return [
            Logprobs(row[0], [(int(i), p) for i, p in zip(row[1 : n + 1], row[n + 1 :], strict=True)]) for row in rows
        ]

    def text(self, tokens: list[int]) -> mx.array | None:
        """Return the tokens of the text so far for the logits processors, int32 [n]. Return None without processors.

        Only new tokens are copied to the device. To copy a long text in each round would take milliseconds.
        """
        if not self._has_processors:
            return None
        self._copied = mx.concatenate([self._copied, mx.array(tokens[self._copied.size :], mx.int32)])
        return self._copied

    def note(self, tokens: list[int]) -> None:
        """Tell the guide which tokens were emitted."""
        if self.guide is not None:
            for token in tokens:
                self.guide.consume(token)
