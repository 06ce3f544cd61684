"""The public class `Model`: a loaded target and drafter that generate text from prompts."""

import logging
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import mlx.core as mx

from mlx_mtp.checkpoints.output_files import check_file
from mlx_mtp.checkpoints.weights import fingerprint
from mlx_mtp.decoding.draft_length import MAX_DRAFT_TOKENS, Costs
from mlx_mtp.decoding.prefill import Progress
from mlx_mtp.decoding.prompt_media import PreparedPrompt
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.decoding.shared_calibration import MOST_TEXTS, STREAMS
from mlx_mtp.decoding.shared_lengths import SharedCosts
from mlx_mtp.decoding.text_loop import token_budget
from mlx_mtp.decoding.timing import MeasuringPlan
from mlx_mtp.text.tokenizer import Prompt, prepare
from mlx_mtp.threads.job_thread import Job, Worker

from .batch import DEFAULT_CONCURRENCY, together
from .decoding import prompt_cache
from .errors import OptionError, PromptError
from .generation import Generation, checked, responses
from .loaded_model import LoadedModel
from .memory_plan import TextMemory, usable_memory
from .options import DEFAULT_KV_GROUP_SIZE, GenerationOptions, OptionChanges
from .prompt_files import load_entry, read_ahead
from .responses import GenerationResponse, GenerationResult, whole
from .scheduler import Scheduler

logger = logging.getLogger(__name__)


class Model(LoadedModel):
    """A loaded target with its tokenizer and, except for plain decoding, its drafter. `mlx_mtp.load` makes it.

    With `exact`, a verify pass gives the same bits as plain decoding. Compiled rounds keep the weights that they were
    compiled with: do not change a weight after the first generation.

    Any thread may use the model. Threads take turns: the whole prompt of a generation is one turn, and then each round
    is one turn. A `with` statement or `close` releases the memory. After that, only the facts from the model's folder
    are available, such as `config` and `max_context`. Every other use raises ClosedError.
    """

    def encode(
        self,
        prompt: Prompt,
        *,
        enable_thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of a prompt as `prepare` does, without the media.

        A picture or sound has one id for each of its soft tokens. To decode a prompt with media, use `prepare`.
        """
        return self.prepare(
            prompt, enable_thinking=enable_thinking, tools=tools, template_options=template_options
        ).tokens

    def prepare(
        self,
        prompt: Prompt,
        *,
        enable_thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> PreparedPrompt:
        """Return the token ids and media of a prompt, for the methods that take prompts.

        Messages go through the chat template; text is encoded as it is. For messages, `tools` are function definitions
        in the format of OpenAI's API. `template_options` are other variables of the chat template, such as
        `preserve_thinking`.

        A user's message may have media: its content is then a list of parts, such as `{"type": "image", "path":
        "cat.jpg"}` and `{"type": "text", "text": "What is this?"}`. The types are image, audio and video. The data of a
        part is under the name of its type, `path` or `url`: a path, bytes, a `data:` URL, a PIL image or array for a
        picture, or (samples, rate) for a sound. `max_soft_tokens` of a picture is 70, 140, 280, 560 or 1120; the
        default is that of the model's makers, or 280.

        Raises PromptError if messages cannot be rendered, or if a token id is not in the vocabulary. Raises MediaError
        if a medium cannot be read.
        """
        loaded = self.parts
        return prepare(
            loaded.tokenizer,
            prompt,
            loaded.target.config.vocab_size,
            loaded.media,
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
        """Return a generator that decodes a prompt and yields one response per token.

        `prepare` describes the kinds of prompt. `changes` are fields of `GenerationOptions`, as in
        `stream_generate(prompt, max_tokens=100)`. This call checks the prompt and the options before the first token is
        requested. Closing the generator ends the generation.

        Raises PromptError if the prompt is empty or too long, OptionError if an option cannot be used, and ClosedError
        if the model is closed.
        """
        with self.life:
            chosen = replace(options or GenerationOptions(), **changes)
            return self.life.guard(responses(self.begin(prompt, chosen, on_prefill, self.life.check)))

    def stream_generate_batch(
        self,
        prompts: Iterable[Prompt],
        options: GenerationOptions | Sequence[GenerationOptions] | None = None,
        *,
        concurrency: int = DEFAULT_CONCURRENCY,
        **changes: Unpack[OptionChanges],
    ) -> Generator[tuple[int, GenerationResponse], None, None]:
        """Return a generator that decodes prompts together, and yields pairs of a prompt's index and a response.

        The weights are read once for the rounds of all texts, so that they take less time together than one after the
        other. Each text is what `stream_generate` would make of it: it does not depend on its neighbours, up to the
        rounding of sums over more rows. `options` are those of all prompts, or a list with those of each. `changes` are
        made to all. At most `concurrency` texts decode at the same time; the next prompt follows when one has ended. An
        exact model decodes one after the other.

        This call checks all prompts and options. If a generation fails later, all end, and its error is raised.

        Raises PromptError, OptionError and ClosedError as `stream_generate` does, and OptionError if `options` is a
        list of another length or `concurrency` is less than 1.
        """
        with self.life:
            return self.life.guard(self._stream_batch(prompts, options, concurrency, changes))

    async def astream_generate(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        on_prefill: Progress | None = None,
        **changes: Unpack[OptionChanges],
    ) -> AsyncGenerator[GenerationResponse, None]:
        """Yield one response per token, as `stream_generate` does, for callers on an event loop.

        The model computes on a thread of its own. Generations that run at the same time decode together, as with
        `stream_generate_batch`: at most 8, in the order in which their first items were requested. `on_prefill` is
        called on the event loop, so it may update a user interface. If it raises, the generation ends and the exception
        is raised here. The generation also ends if the iterator is closed (`aclose` or `contextlib.aclosing`), or if
        the task that waits for it is cancelled. It ends within a round, or between two chunks of the prompt.

        Raises the errors of `stream_generate` when the first item is requested, and ClosedError if the model is closed
        during the generation.
        """

        def start(job: Job[GenerationResponse]) -> Generation:
            def check() -> None:
                self.life.check()
                job.check()

            with self.life:
                chosen = replace(options or GenerationOptions(), **changes)
                report = None if on_prefill is None else job.on_loop(on_prefill)
                return self.begin(prompt, chosen, report, check)

        job: Job[GenerationResponse] = self.worker().submit(start)
        try:
            async for response in job:
                yield response
        finally:
            job.cancel()

    def generate(
        self, prompt: Prompt, options: GenerationOptions | None = None, **changes: Unpack[OptionChanges]
    ) -> GenerationResult:
        """Decode a prompt as `stream_generate` does, and return the whole result at the end."""
        return whole(list(self.stream_generate(prompt, options, **changes)))

    def generate_batch(
        self,
        prompts: Iterable[Prompt],
        options: GenerationOptions | Sequence[GenerationOptions] | None = None,
        *,
        concurrency: int = DEFAULT_CONCURRENCY,
        **changes: Unpack[OptionChanges],
    ) -> list[GenerationResult]:
        """Decode several prompts together as `stream_generate_batch` does, and return their results in order."""
        prompts = _as_list(prompts)
        responses: list[list[GenerationResponse]] = [[] for _ in prompts]
        for index, response in self.stream_generate_batch(prompts, options, concurrency=concurrency, **changes):
            responses[index].append(response)
        return [whole(each) for each in responses]

    async def agenerate(
        self, prompt: Prompt, options: GenerationOptions | None = None, **changes: Unpack[OptionChanges]
    ) -> GenerationResult:
        """Decode a prompt as `astream_generate` does, and return the whole result at the end.

        The generation ends if the task that waits for it is cancelled.
        """
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
        """Read a prompt and write its K/V to a safetensors file for `load_prompt`. Return its number of tokens.

        Only the K/V quantization and `prefill_step_size` matter among the options. `load_prompt` needs the same K/V
        quantization.

        Raises PromptError and OptionError as `stream_generate` does, OptionError if the model is exact, and OutputError
        if the file cannot be written.
        """
        with self.life:
            chosen = replace(options or GenerationOptions(), **changes)
            check_file(Path(file))
            prepared = self.prepare(prompt)
            if prepared.media.spans:
                raise PromptError("a prompt with media cannot be saved: expected text")
            tokens = prepared.tokens
            token_budget(tokens, 1, self.max_context)
            identity, report = self._identity(), checked(on_prefill, self.life.check)
            entry = read_ahead(self.target, tokens, chosen.prefill_step_size, chosen.kv_quantization, report)
            prompt_cache.save(entry, Path(file), identity)
            return len(tokens)

    def load_prompt(
        self, file: str | Path, options: GenerationOptions | None = None, **changes: Unpack[OptionChanges]
    ) -> list[int]:
        """Add a saved prompt to the prompt cache. Return its tokens.

        A later prompt resumes from it if the prompt begins with these tokens and has at least one more token. The later
        prompt must have the same options of K/V quantization, and at most 8 draft tokens. Otherwise, the whole prompt
        is read.

        Raises PromptCacheError if the file is damaged, belongs to another model or another format version, or was made
        with other options of K/V quantization. Raises OptionError if the model is exact.
        """
        with self.life:
            expected = replace(options or GenerationOptions(), **changes).kv_quantization
            entry = load_entry(Path(file), self._identity(), expected)
            self.prompt_cache.limit = max(self.prompt_cache.limit, entry.nbytes)
            self.prompt_cache.put(entry)
            return list(entry.tokens)

    def _identity(self) -> str:
        """Return the name of these weights in prompt files. Raises OptionError if the model is exact."""
        if self.exact:
            raise OptionError("an exact model reuses no prompts: how its sums round depends on how they were read")
        if self.target.sharing is not None:
            raise OptionError("several machines share the model: a prompt file has the K/V of one machine")
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
    ) -> Costs:
        """Return the costs of rounds after a short prompt on this machine, for this sampling (default: greedy).

        The costs are in seconds, and include those of copied tokens. With `kv_bits`, they are the costs of rounds over
        quantized K/V. Without a drafter, they are those of plain rounds and copies.

        The measurement takes a few seconds. It is made once for all pairs with the same shapes, and is kept in the
        user's cache directory (see `kept_costs.cache_directory`). Without this call, the first generation that needs
        the cost measures it in its first rounds. With a grammar, a thinking budget or logits processors, it measures it
        before its text. `remeasure` measures the cost again.

        Raises OptionError if a K/V option cannot be used. Raises CalibrationError if the clock gives nonsense.
        """
        with self.life:
            kv = GenerationOptions(kv_bits=kv_bits, kv_group_size=kv_group_size, quantized_kv_start=0).kv_quantization
            costs = self.parts.costs
            return costs.read(sampling or Sampling(), kv, remeasure=remeasure, on_progress=on_progress)

    def calibrate_together(self, *, remeasure: bool = False, on_progress: Progress | None = None) -> SharedCosts | None:
        """Return the costs of passes that several texts share on this machine, in seconds.

        Texts that decode together choose their draft lengths by these costs. They are measured with up to 8 texts, once
        for a pair, and are kept as those of `calibrate`. Without this call, they are estimated from the costs of one
        text. `remeasure` measures them again.

        Return None, and measure nothing, if the model is exact, or if the K/V of these texts do not fit in the memory.

        Raises CalibrationError if the clock gives nonsense.
        """
        with self.life:
            costs = self.parts.costs
            text = TextMemory(self.config.text, self.target.dtype.size, MeasuringPlan.context, MAX_DRAFT_TOKENS + 1)
            limit = usable_memory() if self.memory_limit is None else self.memory_limit
            needed = STREAMS * text.kept + MOST_TEXTS * text.more_work
            if self.exact:
                return None
            if (in_use := mx.get_active_memory() + needed) > limit:
                logger.info(
                    "the costs of passes of several texts are estimated: to measure them takes %.3g GB, and the limit "
                    "is %.3g GB",
                    in_use / 1e9,
                    limit / 1e9,
                )
                return None
            return costs.read_shared(remeasure=remeasure, on_progress=on_progress)

    def _most_together(self, concurrency: int) -> int:
        """Return the largest number of texts that decode together. Those of an exact model decode alone."""
        return 1 if self.exact else concurrency

    def begin(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        on_prefill: Progress | None,
        check: Callable[[], None],
        *,
        is_seeded: bool = True,
    ) -> Generation:
        """Return the generation of a prompt. Nothing is read yet. `Generation` explains the parameters.

        Raises PromptError and OptionError as `stream_generate` does, and ClosedError if the model is closed.
        """
        with self.life:
            prepared = self.prepare(prompt, enable_thinking=options.enable_thinking)
            return Generation(self, prepared.tokens, options, on_prefill, check, prepared.media, is_seeded=is_seeded)

    def worker(self) -> Worker:
        """Return the thread of the asynchronous generations. Raises ClosedError if the model is closed."""
        schedule = Scheduler(self._most_together(DEFAULT_CONCURRENCY))
        return self.life.worker(lambda: Worker("mlx-mtp", schedule=schedule))

    def _stream_batch(
        self,
        prompts: Iterable[Prompt],
        options: GenerationOptions | Sequence[GenerationOptions] | None,
        concurrency: int,
        changes: OptionChanges,
    ) -> Generator[tuple[int, GenerationResponse], None, None]:
        """Check prompts and options, and return the generator of `stream_generate_batch`."""
        prompts = _as_list(prompts)
        given = GenerationOptions() if options is None else options
        chosen = [given] * len(prompts) if isinstance(given, GenerationOptions) else list(given)
        if len(chosen) != len(prompts):
            raise OptionError(f"there are {len(prompts)} prompts, but options for {len(chosen)}")
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise OptionError(f"concurrency must be an integer of at least 1, found {concurrency!r}")
        for index, each in enumerate(chosen):
            if not isinstance(each, GenerationOptions):
                raise OptionError(f"options[{index}] must be GenerationOptions, found {each!r}")
        chosen = [replace(each, **changes) for each in chosen]
        waiting: list[Generation] = []
        for index, (prompt, each) in enumerate(zip(prompts, chosen, strict=True)):
            if prompt is None or isinstance(prompt, int | float | Mapping):
                raise PromptError(f"prompts[{index}] must be text, token ids or messages, found {prompt!r}")
            try:
                waiting.append(self.begin(prompt, each, None, self.life.check))
            except (PromptError, OptionError) as error:
                raise type(error)(f"prompts[{index}]: {error}") from None
        return together(waiting, self._most_together(concurrency))


def _as_list(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Return a list of prompts. Raises PromptError for a single prompt that is text, and for other values."""
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        raise PromptError(f"prompts must be a list of prompts, found {type(prompts).__name__}")
    return list(prompts)
