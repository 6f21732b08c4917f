"""A small encoder made from a corpus alone, in seconds: latent semantic analysis in the shape of a BERT.

For tests and laptops, where no trained encoder is at hand. Deerwester et al. 1990 (Indexing by Latent Semantic
Analysis): documents by terms, weighted (1 + ln tf) · idf and each row of length 1, A ≈ U S Vᵀ. Mean pooling adds up
token vectors, so a token's vector is idf · V S^-1/2 and the sum over a text is its place in the latent space; the
power -1/2 keeps frequent topics from drowning the others. The model has no layer of attention: it is its embeddings.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

VERSION: Final = 1
"""Part of the name of the cached encoder: goes up when the same corpus would give another one."""

_SPECIAL: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MERGES: Final = 8_000
_MOST_LETTERS: Final = 1_000
_HIDDEN: Final = 256
_POSITIONS: Final = 512
# A larger corpus is sampled: the vocabulary and the latent space hardly change any more, time and memory would.
_MOST_TEXTS: Final = 50_000
_OVERSAMPLING: Final = 20
_ITERATIONS: Final = 3
_LAYER_NORM_EPS: Final = 1e-12

IntArray = NDArray[np.int64]
Texts = Callable[[], Iterable[str]]


def build_corpus_encoder(texts: Texts, count: int, folder: Path) -> None:
    """Write a BERT without layers to `folder`, for mean pooling and unit vectors, as AutoModel reads it.

    texts: begins the texts again at every call. count: how many there are; at most 50,000 of them, evenly spread, are
    used. About 10 s on one core for 5,000 abstracts; memory some 1.2 GB at the most. Only float rounding differs
    between machines.
    """
    step = -(-count // _MOST_TEXTS)

    def sample() -> Iterator[str]:
        return itertools.islice(iter(texts()), 0, None, step)

    tokenizer = _tokenizer(sample)
    texts_of, tokens, counts = _term_counts(tokenizer, sample())
    vectors = _token_vectors(texts_of, tokens, counts, (-(-count // step), tokenizer.get_vocab_size()))
    _model(vectors).save_pretrained(folder)
    _fast(tokenizer).save_pretrained(folder)


def _tokenizer(texts: Texts) -> Tokenizer:
    """WordPiece (Schuster and Nakajima 2012) with BERT's normalisation, trained on the texts.

    The trainer numbers the pieces of a word in the order of a hash table and breaks ties by these numbers. So that
    equal corpora give equal encoders, every piece of one letter is numbered before it begins, as a special token; the
    tokenizer is then built anew from the vocabulary, in which they are ordinary.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    letters = _letters(normalizer.normalize_str(text) for text in texts())
    pieces = [*_SPECIAL, *letters, *("##" + letter for letter in letters)]
    trained = _empty_tokenizer(normalizer, {})
    trainer = trainers.WordPieceTrainer(
        vocab_size=len(pieces) + _MERGES,
        special_tokens=pieces,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    trained.train_from_iterator(texts(), trainer)
    tokenizer = _empty_tokenizer(normalizer, trained.get_vocab())
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def _empty_tokenizer(normalizer: normalizers.Normalizer, vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _letters(texts: Iterable[str]) -> list[str]:
    """The most frequent letters, in a fixed order."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    ordered = sorted(counts, key=lambda letter: (-counts[letter], letter))
    return [letter for letter in ordered if not letter.isspace()][:_MOST_LETTERS]


def _term_counts(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[IntArray, IntArray, IntArray]:
    """Text, token and how often the one holds the other, ordered by text; without special tokens."""
    lengths, tokens, counts = [], [], []
    remaining = iter(texts)
    while block := list(itertools.islice(remaining, 1024)):
        for encoding in tokenizer.encode_batch_fast(block, add_special_tokens=False):
            ids = np.asarray(encoding.ids, np.int64)
            there, times = np.unique(ids[ids >= len(_SPECIAL)], return_counts=True)
            lengths.append(len(there))
            tokens.append(there)
            counts.append(times)
    return np.repeat(np.arange(len(lengths)), lengths), np.concatenate(tokens), np.concatenate(counts)


def _token_vectors(texts: IntArray, tokens: IntArray, counts: IntArray, shape: tuple[int, int]) -> torch.Tensor:
    """float32 [vocabulary, _HIDDEN - 2]: idf · V S^-1/2, zeros for special tokens and where the corpus is too small.

    shape: numbers of texts and of tokens.
    """
    idf = np.log((shape[0] + 1) / (np.bincount(tokens, minlength=shape[1]) + 1))
    idf[: len(_SPECIAL)] = 0
    weights = (1 + np.log(counts)) * idf[tokens]
    lengths = np.sqrt(np.bincount(texts, weights**2, minlength=shape[0]))
    values = weights / np.maximum(lengths, 1e-9)[texts]
    right, strength = _right_singular(texts, tokens, values, shape)
    vectors = torch.zeros(shape[1], _HIDDEN - 2)
    vectors[:, : right.shape[1]] = torch.from_numpy(idf).float()[:, None] * right * strength.rsqrt()
    return vectors


def _right_singular(
    rows: IntArray, columns: IntArray, values: NDArray[np.float64], shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading right singular vectors [columns, k] and values [k] of a sparse matrix, k <= _HIDDEN - 2.

    Randomised subspace iteration: Halko, Martinsson and Tropp 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1.
    """
    wanted = min(_HIDDEN - 2, *shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that compressed rows are new in torch
        there = torch.from_numpy(np.stack([rows, columns]))
        numbers = torch.from_numpy(values).float()
        matrix = torch.sparse_coo_tensor(there, numbers, shape).coalesce().to_sparse_csr()
        transposed = torch.sparse_coo_tensor(there.flip(0), numbers, shape[::-1]).coalesce().to_sparse_csr()
    basis = torch.randn(shape[1], min(wanted + _OVERSAMPLING, *shape), generator=torch.Generator().manual_seed(0))
    for _ in range(_ITERATIONS):
        basis, _ = torch.linalg.qr(transposed @ (matrix @ basis))
    _, strength, small = torch.linalg.svd(matrix @ basis, full_matrices=False)
    kept = strength[:wanted] > 1e-4 * strength[0].clamp_min(1e-9)
    return (basis @ small.T)[:, :wanted][:, kept], strength[:wanted][kept]


def _model(vectors: torch.Tensor) -> BertModel:
    """A BERT whose output for a token is `vectors[token]` (and two zeros), up to one common factor.

    BERT ends its embeddings with a LayerNorm, which would take the idf away by making all tokens equally long. Two
    more coordinates give every row mean 0 and the same variance, so that the norm only scales; its weight for these
    two is 0.
    """
    config = BertConfig(
        vocab_size=len(vectors),
        hidden_size=_HIDDEN,
        num_hidden_layers=0,
        num_attention_heads=1,
        intermediate_size=1,
        max_position_embeddings=_POSITIONS,
        layer_norm_eps=_LAYER_NORM_EPS,
    )
    model = BertModel(config, add_pooling_layer=False)
    state = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
    state["embeddings.word_embeddings.weight"] = _balanced(vectors)
    state["embeddings.LayerNorm.weight"][:-2] = 1
    model.load_state_dict(state)
    return model


def _balanced(vectors: torch.Tensor) -> torch.Tensor:
    """[n, d] to [n, d + 2]: two coordinates x, y with x + y = -sum(v) and x² + y² = R² - |v|², R common to all.

    A row of zeros stays one, and the norm leaves it so exactly.
    """
    total, square = vectors.double().sum(1), vectors.double().square().sum(1)
    # x and y are real for R² >= |v|² + sum(v)² / 2.
    radius = (square + total.square() / 2).max() * 1.01 + 1e-6
    half = torch.sqrt((2 * (radius - square) - total.square()).clamp_min(0)) / 2
    pair = torch.stack([-total / 2 + half, -total / 2 - half], 1) * (square > 0)[:, None]
    return torch.cat([vectors.double(), pair], 1).float()


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=_POSITIONS,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
