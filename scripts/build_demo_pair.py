"""Build a small Gemma 4 target and its drafter, trained on the source of Python's standard library and of packages.

    pip install -c constraints.txt -e '.[test]'
    python scripts/build_demo_pair.py --output build/demo

The steps are: tokenizer (seconds), target (PyTorch, 12 million tokens, about two hours on two cores), drafter
(`mlx_mtp.train`, about an hour; on Linux with OpenBLAS, see `fast_blas`), and conversion to `pair/`. A step is skipped
if its output exists. `mlx_mtp/demo/` holds the result, `pair/`.
"""

import argparse
import ast
import ctypes.util
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.utils import tqdm
from measuring import held_out

# Tables of character codes, and tests. Tests are more than half of all source, and much of their text is similar.
LEFT_OUT = {"test", "tests", "idle_test", "encodings", "site-packages", "_vendor"}
# Packages of the extra `test`, under MIT, BSD or Apache licences. PACKAGE_SIZE is the most characters of each.
PACKAGES = (
    "_pytest", "anyio", "fsspec", "jinja2", "jsonschema", "mypy", "networkx", "pip", "pydantic", "pygments", "rich",
    "safetensors", "setuptools", "torch", "transformers",
)  # fmt: skip
PACKAGE_SIZE = 700_000

VOCAB_SIZE = 1024
SPECIAL_TOKENS = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>",
    "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
    "<|think|>", "<|channel>", "<channel|>", "<|turn>", "<turn|>",
)  # fmt: skip
PAD, EOS, BOS, TURN_END, RESPONSE = (
    SPECIAL_TOKENS.index(token) for token in ("<pad>", "<eos>", "<bos>", "<turn|>", "<|tool_response>")
)

CHAT_TEMPLATE = """\
{%- macro value(x) -%}
{%- if x is mapping -%}
{{ '{' }}{% for key, item in x | dictsort %}{{ key }}:{{ value(item) }}{{ ',' if not loop.last }}{% endfor %}{{ '}' }}
{%- elif x is string -%}<|"|>{{ x }}<|"|>
{%- elif x is boolean -%}{{ 'true' if x else 'false' }}
{%- elif x is none -%}null
{%- elif x is iterable -%}[{% for item in x %}{{ value(item) }}{{ ',' if not loop.last }}{% endfor %}]
{%- else -%}{{ x }}
{%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- set thinks = enable_thinking is defined and enable_thinking -%}
{%- set system = messages and messages[0]['role'] in ('system', 'developer') -%}
{%- if thinks or tools or system -%}
<|turn>system
{% if thinks %}<|think|>
{% endif %}
{{- messages[0]['content'] if system }}
{%- for tool in tools or [] -%}
{%- set function = tool['function'] or tool -%}
<|tool>declaration:{{ function['name'] }}{{ value({
  'description': function['description'] or '', 'parameters': function['parameters'] or {}}) }}<tool|>
{%- endfor -%}
<turn|>
{% endif -%}
{%- for message in messages[1 if system else 0:] -%}
{%- if message['role'] == 'tool' -%}
<|tool_response>response:{{ message['name'] or 'tool' }}{{ value({'value': message['content']}) }}<tool_response|>
{%- else -%}
{%- set answer = message['role'] == 'assistant' -%}
{%- if not (answer and loop.previtem and loop.previtem['role'] == 'tool') -%}
<|turn>{{ 'model' if answer else message['role'] }}
{% endif -%}
{{- message['content'] or '' }}
{%- for call in message['tool_calls'] or [] -%}
<|tool_call>call:{{ call['function']['name'] }}{{ value(call['function']['arguments']) }}<tool_call|>
{%- endfor -%}
{%- if not message['tool_calls'] %}<turn|>
{% endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and (not messages or messages[-1]['role'] != 'tool') -%}
<|turn>model
{% endif -%}
"""

# A small E2B: per-layer inputs, 4 sliding layers to 1 full layer. Half of the layers share K/V, with twice the width.
# On a CPU, a pass costs its number of operations, so a deep and narrow target gains most by a drafter of four layers.
TEXT_CONFIG: dict[str, Any] = {
    "model_type": "gemma4_text",
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size": 128,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": 128,
    "use_double_wide_mlp": True,
    "num_hidden_layers": 25,
    "num_kv_shared_layers": 15,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "num_global_key_value_heads": None,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 64,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    "hidden_activation": "gelu_pytorch_tanh",
    "final_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "num_experts": None,
    "tie_word_embeddings": True,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}
DRAFTER_CONFIG: dict[str, Any] = {
    "architectures": ["Gemma4AssistantForCausalLM"],
    "model_type": "gemma4_assistant",
    "backbone_hidden_size": TEXT_CONFIG["hidden_size"],
    "use_ordered_embeddings": True,
    "num_centroids": 128,
    "centroid_intermediate_top_k": 32,
    "tie_word_embeddings": True,
    "text_config": TEXT_CONFIG
    | {
        "hidden_size": 128,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "intermediate_size": 128,
        "use_double_wide_mlp": False,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "final_logit_softcapping": None,
    },
}

CARD = f"""\
# A small pair to try mlx-mtp with

A target of 3.8 million parameters in the shape of Gemma 4 E2B (per-layer inputs, shared K/V, wider layers there,
sliding window, tied embeddings) and its drafter (four layers, centroid head), with a tokenizer of {VOCAB_SIZE} tokens
and a chat template. They write text that looks like Python, no more: what is real is the speculation.

Trained from nothing on the source of Python {platform.python_version()}'s standard library (copyright Python Software
Foundation, PSF licence), but for its tests, tables of character codes and a few files to measure with, and on part of
the source of packages under the MIT, BSD and Apache licences: {", ".join(PACKAGES)}.
`scripts/build_demo_pair.py` in mlx-mtp's repository does it. Apache-2.0, as mlx-mtp.
"""
LENGTH = 256
BATCH = 16
# The training of the target saves its state after this number of updates.
SAVE_EVERY = 100


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a small pair of target and drafter.")
    parser.add_argument("--output", type=Path, required=True, help="Folder to build in.")
    parser.add_argument("--target-tokens", type=float, default=12e6, help="Tokens to train the target on (12e6).")
    parser.add_argument(
        "--drafter-updates",
        type=int,
        nargs=2,
        default=(1500, 1200),
        help="Updates with two and with four draft steps.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of data order and weights (0).")
    args = parser.parse_args()
    pin_threads()
    target = args.output / "target"
    if not (target / "tokenizer.json").is_file():
        write_tokenizer(target)
    if not (target / "model.safetensors").is_file():
        train_target(target, int(args.target_tokens), args.seed)
    train_drafter(args.output, args.drafter_updates, args.seed)
    if not (args.output / "pair").is_dir():
        convert(args.output)


def convert(folder: Path) -> None:
    command = [sys.executable, "-m", "mlx_mtp.convert", "--hf-path", str(folder / "target")]
    # The type of Gemma's published weights. On Linux, more rows also cost less in bfloat16 than in float32.
    command += ["--drafter", str(folder / "drafter"), "--mlx-path", str(folder / "pair"), "--dtype", "bfloat16"]
    if subprocess.run(command).returncode:
        sys.exit("the pair is not converted")
    (folder / "pair" / "README.md").write_text(CARD)


def train_drafter(folder: Path, updates: tuple[int, int], seed: int) -> None:
    """Write the drafter's training texts, and train the drafter in two runs."""
    config, data = folder / "drafter-config", folder / "data"
    for path in (config, data):
        path.mkdir(exist_ok=True)
    (config / "config.json").write_text(json.dumps(DRAFTER_CONFIG, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / "target" / name, config / name)
    lines = [{"text": source} for source in sources()]
    lines += [{"prompt": prompt, "completion": text} for source in sources() for prompt, text in functions(source)]
    random.Random(seed).shuffle(lines)
    # In pieces of LENGTH tokens, these lines are more data than the updates use.
    (data / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:9000]))
    valid = [{"text": file.read_text()} for file in held_out.stdlib_files()]
    (data / "valid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in valid))
    # Two draft steps cost half as much as four, and teach nearly as much. The second run trains the last two steps.
    common = ["--model", str(folder / "target"), "--data", str(data), "--optimizer", "muon"]
    common += ["--max-seq-length", str(LENGTH), "--batch-size", "2", "--val-batches", "12", "--steps-per-eval", "250"]
    first = ["--drafter-config", str(config), "--iters", str(updates[0]), "--seed", str(seed)]
    distil([*common, *first, "--num-draft-tokens", "2", "--learning-rate", "1e-2"], folder / "drafter-2")
    second = ["--drafter", str(folder / "drafter-2"), "--iters", str(updates[1]), "--seed", str(seed + 1)]
    distil([*common, *second, "--num-draft-tokens", "4", "--learning-rate", "5e-3"], folder / "drafter")


def distil(options: list[str], output: Path) -> None:
    """Distil a drafter with the command `mlx_mtp.train`, unless the drafter exists."""
    if output.is_dir():
        return
    command = [sys.executable, "-m", "mlx_mtp.train", "--output", str(output), *options]
    if (output.with_name(f"{output.name}.training") / "state.json").is_file():
        command.append("--resume")
    if subprocess.run(command, env=os.environ | fast_blas()).returncode:
        sys.exit("the drafter is not trained; start again to go on")


def fast_blas() -> dict[str, str]:
    """Return the environment variables that replace MLX's BLAS with OpenBLAS on Linux.

    MLX's CPU build for Linux links the reference BLAS. OpenBLAS multiplies seven times faster.
    """
    library = ctypes.util.find_library("openblas") if sys.platform == "linux" else None
    if library is None:
        print(
            "without OpenBLAS (Debian's libopenblas0-pthread) the drafter takes much longer on Linux", file=sys.stderr
        )
        return {}
    return {"LD_PRELOAD": library}


def pin_threads() -> None:
    """Restart this program with pinned threads, unless they are pinned.

    Two threads that move between cores make PyTorch twenty times slower.
    """
    wanted = {"GOMP_CPU_AFFINITY": f"0-{(os.cpu_count() or 1) - 1}", "MALLOC_MMAP_MAX_": "0"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)


def sources() -> Iterator[str]:
    """Yield the source of the modules in the standard library and the packages, without LEFT_OUT, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for file, text in modules(root):
        if file.relative_to(root).as_posix() not in held_out.STDLIB:
            yield text
    for package in PACKAGES:
        texts = [text for _, text in modules(Path(sysconfig.get_path("purelib")) / package)]
        if not texts:
            sys.exit(f"no source of {package}: pip install -c constraints.txt -e '.[test]'")
        random.Random(package).shuffle(texts)
        ends = np.cumsum([len(text) for text in texts])
        yield from texts[: 1 + int(np.searchsorted(ends, PACKAGE_SIZE))]


def modules(root: Path) -> Iterator[tuple[Path, str]]:
    for file in sorted(root.rglob("*.py")):
        text = file.read_text(encoding="utf-8", errors="ignore")
        if text.strip() and not LEFT_OUT & set(file.relative_to(root).parts):
            yield file, text


def functions(source: str) -> Iterator[tuple[str, str]]:
    """Yield the signature and the whole text of each function at the top level of a module or class."""
    try:
        module = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines()
    bodies = [module.body, *(node.body for node in module.body if isinstance(node, ast.ClassDef))]
    for node in (node for body in bodies for node in body if isinstance(node, ast.FunctionDef)):
        text = [line[node.col_offset :] for line in lines[node.lineno - 1 : node.end_lineno]]
        head = node.body[0].lineno - node.lineno
        if 0 < head < len(text) and 40 < sum(map(len, text)) < 1200:
            yield "\n".join(text[:head]), "\n".join(text)


def write_tokenizer(folder: Path) -> None:
    """Train a BPE tokenizer in Gemma's format: "▁" replaces a blank, and unknown characters become byte tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Without this split, merges can cross words and lines. Gemma's tokenizer splits at blanks.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        pattern=__import__("tokenizers").Regex("▁*[A-Za-z]+|▁*[0-9]|▁*[^▁A-Za-z0-9\n]+|\n+▁*|▁+"), behavior="isolated"
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["\n", "▁"],
        limit_alphabet=110,
    )
    tokenizer.train_from_iterator(sources(), trainer)
    content = json.loads(tokenizer.to_str())
    # The byte tokens are ordinary tokens. Only Gemma's own markers are special.
    content["added_tokens"] = content["added_tokens"][: len(SPECIAL_TOKENS)]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    config = names | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def training_tokens(folder: Path, seed: int) -> np.ndarray:
    """Return the token ids of all texts in one array, in random order.

    The texts are modules, and functions as answers to their signatures in the chat format.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    chooser = random.Random(seed)
    texts = []
    for source in sources():
        texts.append(f"<bos>{source}<eos>")
        texts += [
            f"<bos><|turn>user\n{signature}<turn|>\n<|turn>model\n{function}<turn|>\n"
            for signature, function in functions(source)
            if chooser.random() < 0.4
        ]
    chooser.shuffle(texts)
    return np.concatenate([np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch(texts)])


def train_target(folder: Path, budget: int, seed: int) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    torch.manual_seed(seed)
    torch.set_num_threads(os.cpu_count() or 1)
    tokens = training_tokens(folder, seed)
    model = Gemma4ForCausalLM(Gemma4TextConfig(**TEXT_CONFIG))
    model.train()
    updates = budget // (LENGTH * BATCH)
    optimizers = target_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min((i + 1) / 100, 0.05 + 0.95 * (1 + math.cos(math.pi * i / updates)) / 2)
        )
        for optimizer in optimizers
    ]
    rng = np.random.default_rng(seed)
    starts = np.concatenate([epoch_starts(tokens.size, rng) for _ in range(1 + budget // tokens.size)])
    parts: list[Any] = [model, *optimizers, *schedules]
    state = folder / "training.pt"
    first, mean = 0, None
    if state.is_file():
        saved = torch.load(state)
        first, mean = saved["update"], saved["mean"]
        for part, content in zip(parts, saved["parts"], strict=True):
            part.load_state_dict(content)
    compiled: Callable[..., Any] = torch.compile(model)
    bar = tqdm(range(first, updates), desc="Target", unit="update", initial=first, total=updates, disable=None)
    began = time.perf_counter()
    for update in bar:
        rows = [tokens[start : start + LENGTH + 1] for start in starts[update * BATCH : (update + 1) * BATCH]]
        batch = torch.from_numpy(np.stack(rows).astype(np.int64))
        logits = compiled(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepped in (*optimizers, *schedules):
            stepped.step()
        model.zero_grad(set_to_none=True)
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        bar.set_postfix(loss=f"{mean:.3f}")
        if update % 100 == 0:
            speed = (update + 1 - first) * LENGTH * BATCH / (time.perf_counter() - began)
            print(f"update {update} of {updates}: loss {mean:.3f}, {speed:.0f} tokens/s", flush=True)
        if (update + 1) % SAVE_EVERY == 0:
            contents = [part.state_dict() for part in parts]
            torch.save({"parts": contents, "update": update + 1, "mean": mean}, state.with_suffix(".part"))
            os.replace(state.with_suffix(".part"), state)
    (folder / "config.json").write_text(json.dumps(target_config(), indent=2))
    generation = {"bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": [EOS, TURN_END, RESPONSE]}
    generation |= {"do_sample": True, "temperature": 0.7, "top_k": 64, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    weights = {
        name.replace("model.", "model.language_model.", 1): value.detach().contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors.part", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
    state.unlink(missing_ok=True)


def target_optimizers(model: Any) -> list[Any]:
    """Return the optimizers: AdamW for the embedding tables and all vectors, Muon for the other matrices."""
    import torch

    named = list(model.named_parameters())
    tables = [p for name, p in named if p.ndim == 2 and "embed_tokens" in name]
    matrices = [p for name, p in named if p.ndim == 2 and "embed_tokens" not in name]
    vectors = [p for _, p in named if p.ndim < 2]
    groups = [{"params": tables, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95)),
        muon(matrices, lr=1e-2, weight_decay=0.05),
    ]


def muon(matrices: list[Any], *, lr: float, weight_decay: float, momentum: float = 0.95) -> Any:
    """Return an optimizer that does as `torch.optim.Muon` with the learning rates of AdamW, in float32.

    That one multiplies in bfloat16, matrix by matrix. On a CPU without such products, it took half of the training.
    """
    import torch

    class Muon(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                shapes: dict[Any, list[Any]] = {}
                for matrix in group["params"]:
                    shapes.setdefault(matrix.shape, []).append(matrix)
                for shape, same in shapes.items():
                    updates = torch.stack([self._momentum(matrix) for matrix in same])
                    # This factor gives an update the size of one of AdamW.
                    step = group["lr"] * 0.2 * math.sqrt(max(shape))
                    for matrix, update in zip(same, orthogonal(updates), strict=True):
                        matrix.mul_(1 - group["lr"] * weight_decay).add_(update, alpha=-step)

        def _momentum(self, matrix: Any) -> Any:
            state = self.state[matrix]
            if not state:
                state["mean"] = torch.zeros_like(matrix)
            mean = state["mean"]
            mean.lerp_(matrix.grad, 1 - momentum)
            return matrix.grad.lerp(mean, momentum)

    return Muon(matrices, {"lr": lr})


def orthogonal(matrices: Any) -> Any:
    """Return the nearest orthogonal matrices of a batch, roughly: five Newton-Schulz steps with Muon's coefficients."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.mT if is_tall else matrices
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = found @ found.mT
        found = 3.4445 * found + (-4.775 * gram + 2.0315 * gram @ gram) @ found
    return found.mT if is_tall else found


def epoch_starts(size: int, rng: np.random.Generator) -> np.ndarray:
    """Return the start of each window in one pass over the tokens, in random order and with a random first start."""
    return rng.permutation(np.arange(rng.integers(LENGTH), size - LENGTH - 1, LENGTH))


def target_config() -> dict[str, Any]:
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": "float32",
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": True,
        "eos_token_id": [EOS, TURN_END],
        "text_config": TEXT_CONFIG,
    }


if __name__ == "__main__":
    main()
