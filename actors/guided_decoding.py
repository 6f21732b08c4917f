"""Guided decoding of the transformers engine: tokens that lead out of a regular expression cannot be drawn.

vLLM does the same by itself, with the same library (XGrammar: Dong et al., arXiv 2411.15100).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from actors.engine import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class PatternCompiler:
    """Compiles regular expressions for one vocabulary, each once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocabulary: int, eos_ids: Sequence[int]) -> None:
        """vocabulary: width of the logits, which may be more than the tokenizer has tokens."""
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._eos_ids = list(eos_ids)
        self._compiler: Any = None

    def compile(self, pattern: str) -> Any:
        """The grammar of one expression.

        Raises:
            EngineError: XGrammar is not installed. ValueError: it does not take the expression.
        """
        try:
            import xgrammar
        except ModuleNotFoundError:
            raise EngineError("guided decoding needs XGrammar: pip install xgrammar") from None
        if self._compiler is None:
            info = xgrammar.TokenizerInfo.from_huggingface(
                self._tokenizer, vocab_size=self._vocabulary, stop_token_ids=self._eos_ids
            )
            self._compiler = xgrammar.GrammarCompiler(info)
        try:
            return self._compiler.compile_regex(pattern)
        except RuntimeError as error:
            raise ValueError(f"XGrammar does not take the pattern {pattern!r}: {error}") from error


class Guide:
    """Where every row of a batch stands in its expression; None for a row without one."""

    def __init__(self, grammars: Sequence[Any], vocabulary: int) -> None:
        import xgrammar

        self._xgrammar = xgrammar
        self._matchers = [None if grammar is None else xgrammar.GrammarMatcher(grammar) for grammar in grammars]
        self._bitmask: Tensor = xgrammar.allocate_token_bitmask(1, vocabulary)

    def restrict(self, logits: Tensor) -> Tensor:
        """Logits [B, V] with -inf at every token that its row's expression does not allow next."""
        logits = logits.clone()
        for row, matcher in enumerate(self._matchers):
            if matcher is not None and not matcher.is_terminated():
                matcher.fill_next_token_bitmask(self._bitmask)
                self._xgrammar.apply_token_bitmask_inplace(logits[row : row + 1], self._bitmask.to(logits.device))
        return logits

    def accept(self, tokens: Sequence[int]) -> None:
        """Go on by the tokens that were drawn, one per row. A row past its end takes what comes."""
        for matcher, token in zip(self._matchers, tokens, strict=True):
            if matcher is not None and not matcher.is_terminated() and not matcher.accept_token(token):
                raise AssertionError(f"token {token} was drawn although the pattern does not allow it")


def guide_of(grammars: Sequence[Any], vocabulary: int) -> Guide | None:
    """The guide of a batch; None where no row has a grammar, which costs nothing then."""
    return None if all(grammar is None for grammar in grammars) else Guide(grammars, vocabulary)
