"""A loaded model: text in, text out."""

from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from mlx_mtp.checkpoints.output_files import check_file
from mlx_mtp.checkpoints.weights import fingerprint
from mlx_mtp.decoding.draft_length import CostCurve
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.decoding.stream import Progress, token_budget
from mlx_mtp.text.tokenizer import Prompt, encode
from mlx_mtp.threads.job_thread import Job

from .decoding import prompt_cache
from .errors import OptionError
from .generation import begin, checked
from .loaded_model import LoadedModel
from .options import DEFAULT_KV_GROUP_SIZE, GenerationOptions, OptionChanges
from .prompt_files import load_entry, read_ahead
from .responses import GenerationResponse, GenerationResult, whole


class Model(LoadedModel):
    """A loaded target with its tokenizer and, unless it decodes plainly, its drafter. `mlx_mtp.load` makes it.

    With `exact`, verify passes have the bits of plain decoding. Rounds are compiled with the weights as they are:
    change none after the first generation.

    Any thread may use it; threads take turns, round by round and chunk by chunk of a prompt. In a `with` statement, or
    with `close`, its memory is released. After that, all but what its folder says raises ClosedError.
    """

    def encode(
        self,
        prompt: Prompt,
        *,
        enable_thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a prompt. Messages go through the chat template; text is encoded as it stands.

        For messages, `tools` are functions as OpenAI's API describes them, and `template_options` are further switches
        of the chat template, such as `preserve_thinking`.

        Raises PromptError for messages that cannot be rendered and for token ids that are not in the vocabulary.
        """
        loaded = self.parts
        return encode(
            loaded.tokenizer,
            prompt,
            loaded.target.config.vocab_size,
            enable_thinking=enable_thinking,
            tools=tools,
            template_options=template_options,
        )

    def stream_generate(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        on_prefill: Progress | None = None,
        **changes: Unpack[OptionChanges],
    ) -> Generator[GenerationResponse, None, None]:
        """Decode, one response per token. For the kinds of prompt see `encode`.

        `changes` are fields of `GenerationOptions`, as in `stream_generate(prompt, max_tokens=100)`. Everything is
        checked here, before the first token is asked for. Closing the generator ends the generation.

        Raises PromptError for a prompt that is empty or too long, OptionError for an option that cannot be honoured,
        ClosedError once the model is closed.
        """
        with self.life:
            chosen = replace(options or GenerationOptions(), **changes)
            return self.life.guard(self._begin(prompt, chosen, on_prefill, self.life.check))

    async def astream_generate(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        on_prefill: Progress | None = None,
        **changes: Unpack[OptionChanges],
    ) -> AsyncGenerator[GenerationResponse, None]:
        """`stream_generate` for an event loop.

        The model computes on a thread of its own, several generations one after the other in the order in which their
        first items were asked for. `on_prefill` is called on the event loop, so that it may touch a user interface; an
        exception from it ends the generation and is raised here. Closing the iterator (`aclose`, or
        `contextlib.aclosing`), and cancelling the task that waits for it, ends the generation within a round or between
        two chunks of the prompt.

        Raises what `stream_generate` raises when the first item is asked for, and ClosedError when the model is closed
        meanwhile.
        """

        def start(job: Job[GenerationResponse]) -> Iterator[GenerationResponse]:
            def check() -> None:
                self.life.check()
                job.check()

            with self.life:
                chosen = replace(options or GenerationOptions(), **changes)
                report = None if on_prefill is None else job.on_loop(on_prefill)
                return self.life.guard(self._begin(prompt, chosen, report, check))

        job = self.life.worker().submit(start)
        try:
            async for response in job:
                yield response
        finally:
            job.cancel()

    def generate(
        self, prompt: Prompt, options: GenerationOptions | None = None, **changes: Unpack[OptionChanges]
    ) -> GenerationResult:
        """The whole of `stream_generate`."""
        return whole(list(self.stream_generate(prompt, options, **changes)))

    async def agenerate(
        self, prompt: Prompt, options: GenerationOptions | None = None, **changes: Unpack[OptionChanges]
    ) -> GenerationResult:
        """The whole of `astream_generate`. Cancelling the task that waits for it ends the generation."""
        async with aclosing(self.astream_generate(prompt, options, **changes)) as responses:
            return whole([response async for response in responses])

    def save_prompt(
        self,
        prompt: Prompt,
        file: str | Path,
        options: GenerationOptions | None = None,
        *,
        on_prefill: Progress | None = None,
        **changes: Unpack[OptionChanges],
    ) -> int:
        """Read a prompt and write its K/V to a safetensors file, for `load_prompt`. Returns its number of tokens.

        Of the options, K/V quantization and `prefill_step_size` matter. `load_prompt` needs the same K/V quantization.

        Raises PromptError and OptionError as `stream_generate` does, OutputError if the file cannot be written.
        """
        with self.life:
            chosen = replace(options or GenerationOptions(), **changes)
            check_file(Path(file))
            tokens = self.encode(prompt)
            token_budget(tokens, 1, self.max_context)
            identity, report = self._identity(), checked(on_prefill, self.life.check)
            entry = read_ahead(self.target, tokens, chosen.prefill_step_size, chosen.kv_quantization, report)
            prompt_cache.save(entry, Path(file), identity)
            return len(tokens)

    def load_prompt(
        self, file: str | Path, options: GenerationOptions | None = None, **changes: Unpack[OptionChanges]
    ) -> list[int]:
        """Take a saved prompt into the prompt cache. Returns its tokens.

        Prompts that begin with these tokens and have at least one more go on from there, if they are generated with the
        same options of K/V quantization.

        Raises PromptCacheError if the file is damaged, of another model or of another version, or was read with other
        such options.
        """
        with self.life:
            expected = replace(options or GenerationOptions(), **changes).kv_quantization
            entry = load_entry(Path(file), self._identity(), expected)
            self.prompt_cache.limit = max(self.prompt_cache.limit, entry.nbytes)
            self.prompt_cache.put(entry)
            return list(entry.tokens)

    def _identity(self) -> str:
        """The name of these weights in files of prompts. Raises OptionError for an exact model, which reuses none."""
        if self.exact:
            raise OptionError("an exact model reuses no prompts: how its sums round depends on how they were read")
        loaded = self.parts
        if loaded.fingerprint is None:
            loaded.fingerprint = fingerprint(loaded.target, repr(self.config.text))
        return loaded.fingerprint

    def calibrate(
        self,
        sampling: Sampling | None = None,
        *,
        kv_bits: int | None = None,
        kv_group_size: int = DEFAULT_KV_GROUP_SIZE,
        remeasure: bool = False,
        on_progress: Progress | None = None,
    ) -> CostCurve:
        """The cost of rounds on this machine with such sampling (default: greedy), in seconds. With `kv_bits`, the cost
        once K/V are quantized.

        It is measured once, in a few seconds, for all pairs of the same shapes, and kept in the user's cache directory
        (see `calibration.cache_directory`). The first generation that needs it measures it otherwise. `remeasure`
        measures again.

        Raises OptionError without a drafter or for K/V options that cannot be honoured, CalibrationError if the clock
        gives nonsense.
        """
        with self.life:
            kv = GenerationOptions(kv_bits=kv_bits, kv_group_size=kv_group_size, quantized_kv_start=0).kv_quantization
            costs = self.parts.costs
            return costs.curve(sampling or Sampling(), kv, remeasure=remeasure, on_progress=on_progress)

    def _begin(
        self, prompt: Prompt, chosen: GenerationOptions, on_prefill: Progress | None, check: Callable[[], None]
    ) -> Generator[GenerationResponse, None, None]:
        tokens = self.encode(prompt, enable_thinking=chosen.enable_thinking)
        return begin(self, tokens, chosen, checked(on_prefill, check))
