"""A small byte-level BPE tokenizer, trained on one corpus, that makes copying a word from a request easy.

A word is the same token sequence wherever it stands: a space is a token of its own instead of being glued to the word
that follows it, so that `metformin` in running text and `metformin` after `(` in a query do not look like two
unrelated symbols to a model that is too small to learn their kinship. The fixed pieces of an answer are one token each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

QUERY_OPENING = '{"query": "'
QUERY_CLOSING = '"}'
JOINERS = (" AND ", " OR ", " NOT ")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
CONTROL_TOKENS = (PADDING, END_OF_TEXT, *ROLE_TOKENS)  # the first ids of the vocabulary, in this order
# Ordinary tokens, not control tokens: decoding keeps them for the answer parser. Being added tokens, they are cut out
# of a text before anything else is split.
PIECES = (*TAGS, QUERY_OPENING, QUERY_CLOSING, *JOINERS, " ", ", ", ". ")
# One token per role marker: at this model size every token of a prompt is paid for in seconds of training.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '" + END_OF_TEXT + "' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# `AutoTokenizer` rebuilds the tokenizer of a folder with `model_type: qwen2` around Qwen2's own split and throws ours
# away. So texts are split that way when encoding, and finer when training: no merge learned from the finer split can
# reach over one of its borders, hence both splits encode every text alike.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TRAINING_SPLIT = r"\s|\p{L}+|\p{N}|[^\s\p{L}\p{N}]"
_LEAST_VOCABULARY = 512
MAX_MODEL_LENGTH = 2048


def train_tokenizer(
    texts: Iterable[str], vocabulary: int = 4096, pieces: Sequence[str] = PIECES
) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the texts of a corpus.

    Args:
        texts: documents and requests; the order does not matter.
        vocabulary: upper bound of the number of tokens, tags and control tokens included (at least 512).
        pieces: texts that are one token each wherever they stand.

    Raises:
        ValueError: the vocabulary is too small to hold the bytes and the format.
    """
    if vocabulary < _LEAST_VOCABULARY:
        raise ValueError(
            f"a vocabulary of {vocabulary} tokens cannot hold bytes and format: give at least {_LEAST_VOCABULARY}"
        )
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _byte_level(_TRAINING_SPLIT)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocabulary - len(pieces),
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = _byte_level(_QWEN2_SPLIT)
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in pieces])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        unk_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_MODEL_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the files that `AutoTokenizer.from_pretrained` and vLLM load."""
    tokenizer.save_pretrained(str(folder))


def prompt_ids(tokenizer: PreTrainedTokenizerFast, request: str) -> list[int]:
    """Token ids of the short prompt: the request as the only user message, ready for generation."""
    messages = [{"role": "user", "content": request}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def _byte_level(split: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
