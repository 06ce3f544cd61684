"""The guides of a model's generations."""

from copy import copy
from typing import TYPE_CHECKING

from mlx_mtp.checkpoints.config import TargetConfig
from mlx_mtp.decoding.constraints import Guide
from mlx_mtp.text.tokenizer import thought_channel

from .errors import OptionError
from .options import GenerationOptions

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from mlx_lm.tokenizer_utils import TokenizerWrapper


class GuideMaker:
    """Maker of the guides for one model's generations. It keeps the tokenizer in the form that grammars need."""

    def __init__(self, tokenizer: "TokenizerWrapper", config: TargetConfig) -> None:
        self.channel = thought_channel(tokenizer)
        self._tokenizer = tokenizer
        self._config = config
        self._grammar_tokenizer: LLTokenizer | None = None

    def guide(self, options: GenerationOptions, thought: int | None, stop_ids: frozenset[int]) -> Guide | None:
        """Return the guide that constrains the tokens of a text, or None if there is no constraint.

        `thought` has the same meaning as in `Guide`.

        Raises OptionError if thinking is enabled but the tokenizer has no tokens for thoughts, or if the grammar
        accepts no text.
        """
        if options.enable_thinking and self.channel is None:
            raise OptionError("enable_thinking is set, but the tokenizer has no <|channel> token for thoughts")
        grammar = options.compiled_grammar()
        if grammar is None and options.thinking_budget is None:
            return None
        matcher = None
        if grammar is not None:
            from llguidance import LLMatcher

            matcher = LLMatcher(self._tokenizer_of_grammars(), grammar, log_level=0)
        guide = Guide(
            self._config.text.vocab_size,
            stop_ids,
            matcher=matcher,
            channel=self.channel if options.enable_thinking or thought is not None else None,
            thought_budget=options.thinking_budget,
            thought=thought,
            suppressed=self._config.suppress_tokens,
        )
        # A grammar that accepts no text raises an error here, before the prompt is read.
        guide.mask()
        return guide

    def _tokenizer_of_grammars(self) -> "LLTokenizer":
        """Return the tokenizer in llguidance's form. The first call takes seconds for a vocabulary of 262144."""
        if self._grammar_tokenizer is None:
            try:
                self._grammar_tokenizer = grammar_tokenizer(self._tokenizer, self._config.text.vocab_size)
            except ValueError as error:
                folder = self._config.path.parent
                raise OptionError(f"{folder}: the tokenizer cannot follow a grammar: {error}") from None
        return self._grammar_tokenizer


def grammar_tokenizer(tokenizer: "TokenizerWrapper", vocab_size: int) -> "LLTokenizer":
    """Return a tokenizer in llguidance's form.

    Raises ValueError if the tokenizer is not from Hugging Face's library `tokenizers`.
    """
    from llguidance import LLTokenizer

    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError("it is not from the library tokenizers")
    backend = copy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    return LLTokenizer(backend.to_str(), n_vocab=vocab_size, eos_token=sorted(tokenizer.eos_token_ids))
