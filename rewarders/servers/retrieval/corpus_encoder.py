"""A small encoder made from a corpus alone, in seconds: latent semantic analysis in the shape of a BERT.

For tests and laptops, where no trained encoder is at hand. Deerwester et al. 1990 (Indexing by Latent Semantic
Analysis): documents by terms, weighted (1 + ln tf) · idf and each row of length 1, A ≈ U S Vᵀ. Mean pooling adds up
token vectors, so a token's vector is idf · V S^-1/2 and the sum over a text is its place in the latent space; the
power -1/2 keeps frequent topics from drowning the others. The model has no layer of attention: it is its embeddings.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

VERSION: Final = 1
"""Part of the name of the cached encoder: goes up when the same corpus would give another one."""

_SPECIAL: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_VOCABULARY: Final = 8_000
_HIDDEN: Final = 256
_POSITIONS: Final = 512
# A larger corpus is sampled: the vocabulary and the latent space hardly change any more, time and memory would.
_MOST_TEXTS: Final = 50_000
_OVERSAMPLING: Final = 20
_ITERATIONS: Final = 3
_LAYER_NORM_EPS: Final = 1e-12

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

    tokenizer = _tokenizer(sample())
    vectors = _token_vectors(*_term_counts(tokenizer, sample()), tokenizer.get_vocab_size())
    _model(vectors).save_pretrained(folder)
    _fast(tokenizer).save_pretrained(folder)


def _tokenizer(texts: Iterable[str]) -> Tokenizer:
    """WordPiece (Schuster and Nakajima 2012) with BERT's normalisation, trained on the texts."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=_VOCABULARY, special_tokens=list(_SPECIAL), show_progress=False)
    )
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def _term_counts(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For every text, its distinct tokens and how often each occurs, without the special ones."""
    tokens, counts = [], []
    remaining = iter(texts)
    while block := list(itertools.islice(remaining, 1024)):
        for encoding in tokenizer.encode_batch_fast(block, add_special_tokens=False):
            ids = np.asarray(encoding.ids, np.int64)
            there, times = np.unique(ids[ids >= len(_SPECIAL)], return_counts=True)
            tokens.append(there)
            counts.append(times)
    return tokens, counts


def _token_vectors(tokens: list[np.ndarray], counts: list[np.ndarray], vocabulary: int) -> torch.Tensor:
    """float32 [vocabulary, _HIDDEN - 2]: idf · V S^-1/2, zeros for special tokens and where the corpus is too small."""
    document_frequency = torch.from_numpy(np.bincount(np.concatenate(tokens), minlength=vocabulary))
    idf = torch.log((len(tokens) + 1) / (document_frequency + 1.0)).float()
    idf[: len(_SPECIAL)] = 0
    weights = [(1 + torch.log(torch.from_numpy(n).float())) * idf[t] for t, n in zip(tokens, counts, strict=True)]
    rows = np.repeat(np.arange(len(tokens)), [len(t) for t in tokens])
    values = torch.cat([w / w.norm().clamp_min(1e-9) for w in weights])
    right, strength = _right_singular(rows, np.concatenate(tokens), values, (len(tokens), vocabulary))
    vectors = torch.zeros(vocabulary, _HIDDEN - 2)
    vectors[:, : right.shape[1]] = idf[:, None] * right * strength.rsqrt()
    return vectors


def _right_singular(
    rows: np.ndarray, columns: np.ndarray, values: torch.Tensor, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading right singular vectors [columns, k] and values [k] of a sparse matrix, k <= _HIDDEN - 2.

    Randomised subspace iteration: Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1.
    """
    wanted = min(_HIDDEN - 2, *shape)
    there = torch.from_numpy(np.stack([rows, columns]))
    matrix = torch.sparse_coo_tensor(there, values, shape, check_invariants=False).coalesce()
    transposed = matrix.t().coalesce()
    basis = torch.randn(shape[1], min(wanted + _OVERSAMPLING, *shape), generator=torch.Generator().manual_seed(0))
    for _ in range(_ITERATIONS):
        basis, _ = torch.linalg.qr(torch.sparse.mm(transposed, torch.sparse.mm(matrix, basis)))
    _, strength, small = torch.linalg.svd(torch.sparse.mm(matrix, basis), full_matrices=False)
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
    """[n, d] to [n, d + 2]: two coordinates x, y with x + y = -sum(v) and x² + y² = R² - |v|², R common to all."""
    total, square = vectors.double().sum(1), vectors.double().square().sum(1)
    # x and y are real for R² >= |v|² + sum(v)² / 2.
    radius = (square + total.square() / 2).max() * 1.01 + 1e-6
    half = torch.sqrt((2 * (radius - square) - total.square()).clamp_min(0)) / 2
    pair = torch.stack([-total / 2 + half, -total / 2 - half], 1)
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
