"""Service of one model to many requests: the queue, the metrics, and the errors in the form of OpenAI's API."""

import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mlx_mtp.decoding.prefill import Progress
from mlx_mtp.decoding.prompt_media import PreparedPrompt
from mlx_mtp.errors import (
    BusyError,
    ClosedError,
    ConfigError,
    ContextLengthError,
    GroupError,
    MTPError,
    OptionError,
    PromptError,
)
from mlx_mtp.generation import Generation
from mlx_mtp.model import Model
from mlx_mtp.options import GenerationOptions
from mlx_mtp.responses import GenerationResponse
from mlx_mtp.scheduler import Scheduler
from mlx_mtp.text.tokenizer import encode_text
from mlx_mtp.threads.job_thread import CancelledJob, Job, Worker

from .openai_requests import ENDPOINTS, Task, field_names

logger = logging.getLogger(__name__)

# The server tells a client to wait _FIRST_RETRY seconds if no generation has ended yet, and at most _MOST_RETRY.
_FIRST_RETRY = 1
_MOST_RETRY = 60
# The bounds of the histogram of rows per pass.
_ROWS = (1, 2, 4, 8, 16, 32, 64)
_FIELDS = field_names(*ENDPOINTS)


class ApiError(Exception):
    """Error for a client: an HTTP status and the fields of OpenAI's error object."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        """Return the JSON body with OpenAI's error object."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def api_error(error: BaseException) -> ApiError:
    """Convert an error to an ApiError.

    An error of no known kind is logged. The client gets its message only if it is an MTPError.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, OptionError | PromptError):
        # A message about an option begins with the option's name. Other messages begin with any word.
        name = re.split(r"[\s.:\[]", str(error), maxsplit=1)[0]
        return ApiError(400, str(error), code="invalid_value", param=name if name in _FIELDS else None)
    if isinstance(error, BusyError):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, GroupError):
        return ApiError(503, str(error), code="machine_lost")
    if isinstance(error, ClosedError):
        return ApiError(503, "the server is shutting down", code="shutting_down")
    logger.error("a generation failed", exc_info=error)
    return ApiError(
        500, str(error) if isinstance(error, MTPError) else "the generation failed; the server's log says why"
    )


@dataclass(frozen=True)
class Prefill:
    """Progress of a prefill: the number of prompt tokens that are read, and their total."""

    done: int
    total: int


# The job yields the responses of a generation, and before them the progress of its prefill.
GenerationJob = Job[GenerationResponse | Prefill]


class Metrics:
    """Prometheus metrics of one server, for `/metrics`."""

    def __init__(self, worker: Worker, scheduler: Scheduler, model: Model) -> None:
        self.registry = CollectorRegistry()

        def add(kind: Any, name: str, text: str, **options: Any) -> Any:
            return kind(f"mlx_mtp_{name}", text, registry=self.registry, **options)

        self.requests = add(Counter, "requests", "Requests by end: stop, length, cancelled, error.", labelnames=["end"])
        self.prompt_tokens = add(Counter, "prompt_tokens", "Tokens of prompts.")
        self.cached_tokens = add(Counter, "cached_prompt_tokens", "Tokens of prompts that were in the prompt cache.")
        self.generation_tokens = add(Counter, "generation_tokens", "Tokens generated.")
        self.rounds = add(Counter, "rounds", "Verify passes.")
        self.drafted = add(Counter, "draft_tokens", "Draft tokens.")
        self.accepted = add(Counter, "accepted_draft_tokens", "Draft tokens accepted.")
        self.copied = add(Counter, "copied_draft_tokens", "Draft tokens copied from the text.")
        self.accepted_copies = add(Counter, "accepted_copied_draft_tokens", "Copied draft tokens accepted.")
        self.unreadable_calls = add(
            Counter, "unreadable_tool_calls", "Tool calls whose arguments were passed on as the model wrote them."
        )
        self.first_token = add(Histogram, "time_to_first_token_seconds", "Seconds from the request to its first token.")
        self.token = add(Histogram, "time_per_token_seconds", "Mean seconds per token of a generation after its first.")
        self.rows = add(Histogram, "rows_per_pass", "Rows of a verify pass, of all texts.", buckets=_ROWS)
        self.parked = add(Gauge, "texts_without_drafts", "Texts without draft tokens in the last pass.")
        self.duration = add(Histogram, "generation_seconds", "Seconds from the start of a generation to its end.")
        self.tokens_per_second = add(Gauge, "tokens_per_second", "Tokens per second of the last generation.")
        self.acceptance_length = add(Gauge, "acceptance_length", "Tokens per round of the last generation.")
        for name, text, value in (
            ("requests_running", "Generations running.", lambda: worker.running),
            ("requests_waiting", "Generations waiting.", lambda: worker.waiting),
            ("memory_active_bytes", "Memory of MLX in use.", mx.get_active_memory),
            ("memory_peak_bytes", "Largest memory of MLX in use so far.", mx.get_peak_memory),
            ("prompt_cache_bytes", "Memory of the prompt cache.", lambda: model.prompt_cache.nbytes),
        ):
            add(Gauge, name, text).set_function(value)
        # The rows of each text in the last pass.
        self.last_rows: list[int] = []
        scheduler.batch.on_round = self.note_round

    def text(self) -> bytes:
        """Return the metrics in the text format of Prometheus."""
        return generate_latest(self.registry)

    def note_round(self, rows: list[int]) -> None:
        """Record the rows of each text in a round."""
        self.last_rows = rows
        self.rows.observe(sum(rows))
        self.parked.set(rows.count(1))

    def count(self, last: GenerationResponse | None, end: str) -> None:
        """Add the counts of a generation. `last` is its last response, None if there is no response."""
        self.requests.labels(end).inc()
        if last is None:
            return
        self.prompt_tokens.inc(last.prompt_tokens)
        self.cached_tokens.inc(last.cached_tokens)
        self.generation_tokens.inc(last.generation_tokens)
        self.rounds.inc(last.stats.rounds)
        self.drafted.inc(last.stats.drafted)
        self.accepted.inc(last.stats.accepted)
        self.copied.inc(last.stats.copied.drafted)
        self.accepted_copies.inc(last.stats.copied.accepted)
        if last.generation_tps:
            self.tokens_per_second.set(last.generation_tps)
        if last.stats.acceptance_length is not None:
            self.acceptance_length.set(last.stats.acceptance_length)


@dataclass
class Service:
    """A model on its worker's thread.

    `scheduler` is the schedule of the worker. `options` are the default options of requests. Prompts of more than
    `max_prompt_tokens` tokens are refused.
    """

    model: Model
    worker: Worker
    scheduler: Scheduler
    name: str
    options: GenerationOptions
    max_prompt_tokens: int | None = None
    metrics: Metrics = field(init=False)
    # This is a running mean of the seconds that a generation takes.
    _seconds: float | None = None

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.worker, self.scheduler, self.model)

    def submit(self, task: Task) -> GenerationJob:
        """Queue a generation. The worker encodes its prompt and checks its options between two turns.

        Raises BusyError if too many generations wait.
        """
        return self.worker.submit(_Request(self, task).start)

    def submit_choices(self, task: Task, count: int) -> list[GenerationJob]:
        """Queue several generations of a task, with different seeds.

        Raises BusyError if not all of them may wait now, and OptionError if they never may.
        """
        most = self.worker.most
        if most is not None and count > most:
            raise OptionError(
                f"n is {count}: at most {most} answers run and wait here (--decode-concurrency and --max-queue)"
            )
        jobs: list[GenerationJob] = []
        try:
            for index in range(count):
                jobs.append(self.submit(task.choice(index)))
        except BaseException:
            for job in jobs:
                job.cancel()
            raise
        return jobs

    def retry_after(self) -> int:
        """Return the seconds until the queue may have room: the mean time of a generation, rounded up."""
        if self._seconds is None:
            return _FIRST_RETRY
        return min(_MOST_RETRY, max(1, math.ceil(self._seconds / self.scheduler.concurrency)))

    def note(self, seconds: float | None, last: GenerationResponse | None, end: str) -> None:
        """Record the end of a generation. `last` is its last response, if there is one.

        It took so many seconds after its wait, or None if it ended before it began.
        """
        if seconds is not None:
            self._seconds = seconds if self._seconds is None else 0.8 * self._seconds + 0.2 * seconds
            self.metrics.duration.observe(seconds)
        self.metrics.count(last, end)

    @property
    def max_input_tokens(self) -> int:
        """Largest number of tokens in a prompt."""
        return min(self.max_prompt_tokens or self.model.max_context, self.model.max_context)

    @property
    def modalities(self) -> list[str]:
        """The kinds of content that requests may have: text, and the media that the checkpoint reads."""
        try:
            kinds = self.model.parts.media.kinds
        # The checkpoint's media parts cannot be used, and a request with media says why.
        except ConfigError:
            kinds = ()
        return ["text", *(kind for kind in kinds if kind != "video")]

    def prepare(self, task: Task) -> PreparedPrompt:
        """Return the tokens and media of a task's prompt. Raises PromptError as `Model.prepare` does."""
        prompt = self.model.prepare(
            task.prompt,
            enable_thinking=task.options.enable_thinking,
            tools=task.tools,
            template_options=task.template_options,
        )
        return prompt.with_tokens(encode_text(self.model.tokenizer, task.prefill))

    def generation(self, task: Task, on_prefill: Progress, check: Callable[[], None]) -> Generation:
        """Return the generation of a task. Raises PromptError and OptionError as `Model.stream_generate` does."""
        prompt = self.prepare(task)
        found, most = len(prompt.tokens), self.max_prompt_tokens
        if most is not None and found > most:
            raise ContextLengthError(f"the prompt has {found} tokens, but at most {most} are taken here")
        return self.model.begin(prompt, task.options, on_prefill, check, is_seeded=task.is_seeded)


class _Request:
    """One generation of a service from its request to its end, for the metrics."""

    def __init__(self, service: Service, task: Task) -> None:
        self._service = service
        self._task = task
        self._asked = time.monotonic()
        self._began: float | None = None
        self._first = self._asked
        self._last: GenerationResponse | None = None

    def start(self, job: GenerationJob) -> Generation:
        """Make the generation, and watch the items of its job."""
        job.on_begin, job.on_item, job.on_end = self._on_begin, self._on_item, self._on_end

        def check() -> None:
            self._service.model.life.check()
            job.check()

        return self._service.generation(self._task, lambda done, total: job.put(Prefill(done, total)), check)

    def _on_begin(self) -> None:
        self._began = time.monotonic()

    def _on_item(self, item: GenerationResponse | Prefill) -> None:
        if isinstance(item, Prefill):
            return
        if self._last is None:
            self._first = time.monotonic()
            self._service.metrics.first_token.observe(self._first - self._asked)
        self._last = item

    def _on_end(self, error: BaseException | None) -> None:
        end = "error" if isinstance(error, Exception) and not isinstance(error, CancelledJob) else "cancelled"
        if error is None and self._last is not None and self._last.finish_reason is not None:
            end = self._last.finish_reason
        now = time.monotonic()
        if self._last is not None and self._last.generation_tokens > 1:
            self._service.metrics.token.observe((now - self._first) / (self._last.generation_tokens - 1))
        self._service.note(None if self._began is None else now - self._began, self._last, end)
