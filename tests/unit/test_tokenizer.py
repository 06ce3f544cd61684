"""Tokenizers: prompts with and without a chat template, streamed text, and checkpoints with tokenizer.model only."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from support.tiny import STOP_IDS, VOCAB_SIZE, make_tokenizer
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from mlx_mtp.errors import PromptError
from mlx_mtp.text.tokenizer import encode_prompt, load_tokenizer

TEXT = "the quick brown fox jumps, naïve café 日本語 🦊\nover 12 lazy dogs"


def streamed(tokenizer: object, ids: list[int]) -> str:
    detokenizer = tokenizer.detokenizer  # type: ignore[attr-defined]
    pieces = []
    for token in ids:
        detokenizer.add_token(token)
        pieces.append(detokenizer.last_segment)
    detokenizer.finalize()
    pieces.append(detokenizer.last_segment)
    assert "\ufffd" not in "".join(pieces)
    return "".join(pieces)


def test_streamed_text_is_the_decoded_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path), STOP_IDS)
    assert set(STOP_IDS) <= set(tokenizer.eos_token_ids)
    ids = encode_prompt(tokenizer, TEXT, use_chat_template=False)
    assert max(ids) < VOCAB_SIZE
    assert streamed(tokenizer, ids) == tokenizer.decode(ids) == TEXT


def test_chat_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path), STOP_IDS)
    chat = tokenizer.decode(encode_prompt(tokenizer, "hi", system_prompt="be brief"))
    # As by default in Gemma's template, thinking is off. The beginning-of-text token appears once.
    assert chat == "<bos><|turn>system\nbe brief<turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\n"
    with pytest.raises(PromptError, match="a system prompt needs a chat template"):
        encode_prompt(tokenizer, "hi", system_prompt="be brief", use_chat_template=False)


def test_a_prompt_that_begins_with_the_beginning_of_text_gets_no_second_one(pair: Path, tmp_path: Path) -> None:
    """The tokenizer adds the token by itself, as published tokenizers do."""
    shutil.copytree(pair / "target", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer.json"
    found = Tokenizer.from_file(str(file))
    found.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", found.token_to_id("<bos>"))])
    found.save(str(file))
    tokenizer = load_tokenizer(tmp_path, (1, 5))
    bare = encode_prompt(tokenizer, "import os", use_chat_template=False)
    assert bare[0] == tokenizer.bos_token_id != bare[1]
    assert encode_prompt(tokenizer, "<bos>import os", use_chat_template=False) == bare


def test_tokenizer_model_alone(tmp_path: Path) -> None:
    """The checkpoint has sentencepiece's own format and no tokenizer.json."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"the quick brown fox jumps over {i} lazy dogs" for i in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400, hard_vocab_limit=False,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | {"tokenizer_class": "GemmaTokenizer"}))
    tokenizer = load_tokenizer(tmp_path, (1,))
    ids = encode_prompt(tokenizer, TEXT, use_chat_template=False)
    assert streamed(tokenizer, ids) == TEXT
