"""Other runtimes that `bench --peers` compares with, on the same pair, prompts and token counts.

Each runtime is called through its own token generator, without detokenization. The time is from its first token to its
last token, as for `GenerationResponse.generation_tps`.
"""

import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp.checkpoints.tensors import dtype_name
from mlx_mtp.decoding.sampling import Sampling

# A function that decodes a number of tokens after a prompt: (prompt, sampling, count). It returns tokens per second.
Run = Callable[[list[int], Sampling, int], float]
PEERS = ("mlx-lm", "mlx-vlm", "transformers")
# The settings of a runtime by name, for example one for each draft length.
Settings = dict[str, Run]

# mlx-vlm's block size counts the draft tokens and the bonus token together. Hugging Face's default for Gemma 4 is 5
# draft tokens.
VLM_BLOCK_SIZES = (2, 3, 4, 5)
TRANSFORMERS_DRAFT_TOKENS = (3, 5)


def load_peer(name: str, target: Path, drafter: Path | None, dtype: mx.Dtype) -> Settings:
    """Load a pair into another runtime. Raises any exception that the runtime raises."""
    return {"mlx-lm": _mlx_lm, "mlx-vlm": _mlx_vlm, "transformers": _transformers}[name](target, drafter, dtype)


def _mlx_lm(target: Path, drafter: Path | None, dtype: mx.Dtype) -> Settings:
    """Load the target for plain decoding. mlx-lm does not support these drafters."""
    from mlx_lm.generate import generate_step
    from mlx_lm.sample_utils import make_sampler
    from mlx_lm.utils import load_model

    model, _ = load_model(target)
    model.set_dtype(dtype)
    mx.eval(model.parameters())

    def plain(prompt: list[int], sampling: Sampling, count: int) -> float:
        mx.random.seed(sampling.seed)
        sampler = make_sampler(temp=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
        return _rate(generate_step(mx.array(prompt), model, max_tokens=count, sampler=sampler), count)

    return {"mlx-lm": plain}


def _mlx_vlm(target: Path, drafter: Path | None, dtype: mx.Dtype) -> Settings:
    from mlx_vlm.generate.ar import generate_step
    from mlx_vlm.speculative.drafters import load_drafter
    from mlx_vlm.utils import load_model

    # A strict load fails for pairs without a vision tower. The measurement does not need the tower.
    model = load_model(target, strict=False)
    model.set_dtype(dtype)
    mx.eval(model.parameters())

    def run(prompt: list[int], sampling: Sampling, count: int, **drafting: Any) -> float:
        mx.random.seed(sampling.seed)
        options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        ids = mx.array([prompt])
        return _rate(generate_step(ids, model, None, None, max_tokens=count, **options, **drafting), count)

    settings: Settings = {"mlx-vlm": run}
    if drafter is not None:
        draft_model, kind = load_drafter(str(drafter), kind="mtp")
        draft_model.set_dtype(dtype)
        mx.eval(draft_model.parameters())

        def drafting(size: int) -> Run:
            options = {"draft_model": draft_model, "draft_kind": kind, "draft_block_size": size}
            return lambda prompt, sampling, count: run(prompt, sampling, count, **options)

        settings |= {f"mlx-vlm block {size}": drafting(size) for size in VLM_BLOCK_SIZES}
    return settings


def _transformers(target: Path, drafter: Path | None, dtype: mx.Dtype) -> Settings:
    import torch
    import transformers

    def load(folder: Path) -> Any:
        torch_dtype = getattr(torch, dtype_name(dtype))
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype)
        return model.eval()

    model = load(target)

    def run(prompt: list[int], sampling: Sampling, count: int, **drafting: Any) -> float:
        torch.manual_seed(sampling.seed)
        options: dict[str, Any] = {"do_sample": not sampling.is_greedy}
        if not sampling.is_greedy:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        seen: list[tuple[float, int]] = []

        def note(ids: Any, scores: Any, **_: Any) -> Any:
            seen.append((time.perf_counter(), ids.shape[1]))
            return torch.zeros(ids.shape[0], dtype=torch.bool)

        ids = torch.tensor([prompt])
        limits = {"max_new_tokens": count, "min_new_tokens": count, "stopping_criteria": [note]}
        model.generate(ids, attention_mask=torch.ones_like(ids), **limits, **options, **drafting)
        (start, first), (end, last) = seen[0], seen[-1]
        return (last - first) / (end - start)

    settings: Settings = {"transformers": run}
    if drafter is not None:
        assistant = load(drafter)

        def assisted(k: int) -> Run:
            def decode(prompt: list[int], sampling: Sampling, count: int) -> float:
                assistant.generation_config.num_assistant_tokens = k
                assistant.generation_config.num_assistant_tokens_schedule = "constant"
                return run(prompt, sampling, count, assistant_model=assistant)

            return decode

        settings |= {f"transformers assisted {k}": assisted(k) for k in TRANSFORMERS_DRAFT_TOKENS}
    return settings


def _rate(tokens: Iterable[Any], count: int) -> float:
    """Measure the tokens per second after the first token, over at most `count` tokens."""
    iterator = iter(tokens)
    next(iterator)
    start = time.perf_counter()
    rest = sum(1 for _ in islice(iterator, count - 1))
    return rest / (time.perf_counter() - start)
