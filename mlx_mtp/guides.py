"""The guides of a model's generations."""

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
    """Makes a guide for each generation of one model. It keeps the tokenizer as grammars need it."""

    def __init__(self, tokenizer: "TokenizerWrapper", config: TargetConfig) -> None:
        self.channel = thought_channel(tokenizer)
        self._tokenizer = tokenizer
        self._config = config
        self._grammar_tokenizer: LLTokenizer | None = None

    def guide(self, options: GenerationOptions, thought: int | None, stop_ids: frozenset[int]) -> Guide | None:
        """The guide that constrains the tokens of a text; None if nothing does. `thought` is as for `Guide`.

        Raises OptionError for a thought without its tokens in the tokenizer, and for a grammar without any text.
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
        # A grammar without any text is an error now rather than after the prompt.
        guide.mask()
        return guide

    def _tokenizer_of_grammars(self) -> "LLTokenizer":
        """Making it takes seconds for a vocabulary of 262144."""
        if self._grammar_tokenizer is None:
            from llguidance.hf import from_tokenizer

            eos = sorted(self._tokenizer.eos_token_ids)
            try:
                self._grammar_tokenizer = from_tokenizer(
                    self._tokenizer._tokenizer, n_vocab=self._config.text.vocab_size, eos_token=eos
                )
            except ValueError as error:
                folder = self._config.path.parent
                raise OptionError(f"{folder}: the tokenizer cannot follow a grammar: {error}") from None
        return self._grammar_tokenizer
