"""A model that writes a given text."""

from collections.abc import Iterator
from typing import Any

import mlx_mtp
from mlx_mtp import DEMO_PAIR, GenerationOptions, GenerationResponse, Model
from mlx_mtp.decoding.report import Logprobs, Stats
from mlx_mtp.text.answer import TextStream


def load_demo_pair() -> Model:
    """Load the demo pair."""
    return mlx_mtp.load(DEMO_PAIR)


class ScriptedModel:
    """A model that writes a given text. It gives tests answers that a small model does not write."""

    def __init__(self, model: Model, text: str, logprobs: Logprobs | None = None) -> None:
        self._model = model
        self._logprobs = logprobs
        self._tokens = model.tokenizer.encode(text, add_special_tokens=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def begin(
        self, prompt: Any, options: GenerationOptions, on_prefill: Any, *_: Any, **__: Any
    ) -> "ScriptedGeneration":
        """Return a generation that writes the given text."""
        return ScriptedGeneration(self, self._responses(prompt, options, on_prefill))

    def _responses(self, prompt: Any, options: GenerationOptions, on_prefill: Any) -> Iterator[GenerationResponse]:
        """Yield the given text token by token, and a stop token."""
        count = len(prompt.tokens)
        on_prefill(count, count)
        text = TextStream(self._model.tokenizer, self._model.parts.guides.channel, options.stop_strings)
        stop = self._model.tokenizer.convert_tokens_to_ids("<turn|>")
        for index, token in enumerate([*self._tokens, stop]):
            is_last = index == len(self._tokens)
            piece = text.add(None if is_last else token, is_last=is_last)
            yield GenerationResponse(
                text=piece.text,
                token=token,
                from_draft=False,
                prompt_tokens=count,
                prompt_tps=1.0,
                generation_tokens=index + 1,
                generation_tps=1.0,
                peak_memory=0.0,
                finish_reason="stop" if is_last else None,
                stats=Stats(),
                thought=piece.thought,
                in_thought=piece.in_thought,
                logprobs=self._logprobs,
            )


class ScriptedGeneration:
    """A generation with known responses. All of them come with its first chunk."""

    is_reading, is_ended, unread = True, False, 1
    growth, work, is_held = 0, 0, False

    def __init__(self, model: ScriptedModel, responses: Iterator[GenerationResponse]) -> None:
        self.model = model
        self._responses = responses

    def read_chunk(self) -> Iterator[GenerationResponse]:
        """Yield all responses."""
        yield from self._responses
        self.is_reading, self.is_ended = False, True

    def share(self, other: Any) -> None:
        """Read the whole prompt."""

    def close(self) -> None:
        """Do nothing."""
