"""Texts to vectors by a Hugging Face encoder. Only the process of the dense index imports this."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from rewarders.servers.hosting import SearchServerError
from rewarders.servers.retrieval.dense_wire import Pooling
from rewarders.servers.retrieval.encoder_modules import refuse_other_layers

_UNLIMITED: Final = 1 << 20
_DEFAULT_TOKENS: Final = 512
_TOKENS_AT_ONCE: Final = 16_384


class Encoder:
    """A model and its tokenizer.

    A text's vector does not depend on the texts beside it, but for the last bits of its floats: texts are padded to
    a bucket that follows from their own length alone, the padding is masked, and only the number of rows of a matrix
    product differs. dimension: of the vectors.

    Memory: the weights as float32, and some 100 MB while 16,384 tokens go through a base-sized model.
    """

    def __init__(
        self, folder: Path, *, pooling: Pooling, normalize: bool, max_tokens: int | None, batch: int, device: str
    ) -> None:
        """Load from a folder that `encoder_folder` returned. device: `cpu` or `cuda`.

        Raises:
            SearchServerError: it cannot be loaded, or is no encoder.
        """
        self._pooling = pooling
        self._normalize = normalize
        self._batch = batch
        self._device = device
        self._tokenizer, self._model = _load(folder, device)
        self._pad = self._tokenizer.pad_token_id or 0
        self._max_tokens = _max_tokens(self._tokenizer, self._model.config, max_tokens)
        self.dimension: int = self._model.config.hidden_size

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One vector per text: float32 [texts, dimension], of length 1 or 0 if normalised.

        A text without a single token gets zeros. Raises ValueError if the model gives what is no number.
        """
        tokens: list[list[int]] = self._tokenize(texts)
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for positions, width in _batches([len(ids) for ids in tokens], self._batch, self._max_tokens):
            vectors[positions] = self._pooled([tokens[position] for position in positions], width)
        if not np.isfinite(vectors).all():
            raise ValueError("the encoder gave a vector that is not finite: are its weights damaged?")
        if self._normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
        return vectors

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded: Any = self._tokenizer(
            list(texts), truncation=True, max_length=self._max_tokens, padding=False, return_attention_mask=False
        )
        return encoded["input_ids"]

    def _pooled(self, tokens: list[list[int]], width: int) -> NDArray[np.float32]:
        """Vectors of texts that share a bucket. tokens: none empty. width: of the bucket, in tokens."""
        lengths = np.array([len(ids) for ids in tokens])
        padded = np.full((len(tokens), width), self._pad, np.int64)
        mask = np.arange(width) < lengths[:, None]
        padded[mask] = np.concatenate([np.asarray(ids, np.int64) for ids in tokens])
        with torch.inference_mode():
            attention = torch.from_numpy(mask).to(self._device)
            hidden = self._model(
                input_ids=torch.from_numpy(padded).to(self._device), attention_mask=attention.long()
            ).last_hidden_state
            pooled: NDArray[np.float32] = _pool(hidden, attention, self._pooling).cpu().numpy()
            return pooled


def _pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """hidden: float [texts, tokens, dimension], mask: bool [texts, tokens], padded on the right; [texts, dimension]."""
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def _batches(lengths: list[int], batch: int, limit: int) -> Iterator[tuple[list[int], int]]:
    """Positions of texts of one bucket, at most `batch` and about 16,384 tokens at a time, and the bucket's width."""
    buckets: dict[int, list[int]] = {}
    for position, length in enumerate(lengths):
        if length:
            buckets.setdefault(min(_bucket(length), limit), []).append(position)
    for width, positions in sorted(buckets.items()):
        size = min(batch, max(1, _TOKENS_AT_ONCE // width))
        for start in range(0, len(positions), size):
            yield positions[start : start + size], width


def _bucket(length: int) -> int:
    """The width a text is padded to: multiples of 8 up to 64, then of 32."""
    step = 8 if length <= 64 else 32
    return -(-length // step) * step


def _max_tokens(tokenizer: Any, config: Any, wanted: int | None) -> int:
    """The smallest of what tokenizer, model and user allow; 512 where nobody says."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        # These number positions from the padding id + 1 on, so two of their rows are never used.
        positions -= 2
    known = [n for n in (tokenizer.model_max_length, positions, wanted) if n and 0 < n < _UNLIMITED]
    return int(min(known, default=_DEFAULT_TOKENS))


def _load(folder: Path, device: str) -> tuple[Any, Any]:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    refuse_other_layers(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, report = AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        model = model.to(device).eval()
    except Exception as error:  # whatever is in the folder, there is one thing to say
        message = f"encoder {folder} cannot be loaded ({_one_line(error)}): name the folder of a Hugging Face encoder"
        raise SearchServerError(message) from None
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise SearchServerError(f"encoder {folder}: weights are missing, e.g. {missing[0]}: name a complete encoder")
    if getattr(model.config, "is_encoder_decoder", False):
        raise SearchServerError(f"encoder {folder}: is an encoder and a decoder: name a model that is one of them")
    return tokenizer, model


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
