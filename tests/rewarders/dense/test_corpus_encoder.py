from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from rewarders.servers.retrieval.corpus_encoder import _balanced, _right_singular, build_corpus_encoder
from rewarders.servers.retrieval.encoder import Encoder
from rewarders.servers.retrieval.encoder_files import encoder_folder, encoder_identity

TOPICS = {
    "heart": "heart stroke aspirin artery cardiac pressure vessel clot",
    "sugar": "insulin glucose diabetes pancreas sugar obesity metformin diet",
    "sleep": "sleep insomnia night melatonin rest apnea circadian dream",
}


def _texts(each: int = 40) -> list[str]:
    random = np.random.default_rng(0)
    words = [topic.split() for topic in TOPICS.values()]
    common = ["the", "of", "in", "a", "study", "patients", "and", "results"]
    return [
        " ".join([*random.choice(words[number % 3], 4), *random.choice(common, 8)]) + "." for number in range(3 * each)
    ]


def _encoder(folder: Path) -> Encoder:
    return Encoder(encoder_folder(str(folder)), pooling="mean", normalize=True, max_tokens=None, batch=16, device="cpu")


def test_texts_of_a_topic_lie_together(tmp_path: Path) -> None:
    texts = _texts()
    build_corpus_encoder(lambda: texts, len(texts), tmp_path)
    encoder = _encoder(tmp_path)
    passages, queries = encoder.encode(texts), encoder.encode(list(TOPICS.values()))
    nearest = np.argsort(-queries @ passages.T, axis=1)[:, :30]
    assert (nearest % 3 == np.arange(3)[:, None]).mean() > 0.95


def test_it_is_an_ordinary_model_folder(tmp_path: Path) -> None:
    texts = _texts()
    build_corpus_encoder(lambda: texts, len(texts), tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)
    output = model(**tokenizer(["Insulin and glucose", "☃"], padding=True, return_tensors="pt")).last_hidden_state
    assert output[0, 1:3].abs().max() > 0
    assert not output[1].any(), "special and unknown tokens carry nothing"


def test_equal_corpora_give_equal_encoders(tmp_path: Path) -> None:
    texts = _texts()
    for name in ("a", "b"):
        build_corpus_encoder(lambda: texts, len(texts), tmp_path / name)
    assert encoder_identity(tmp_path / "a") == encoder_identity(tmp_path / "b")


def test_a_single_empty_document_is_enough(tmp_path: Path) -> None:
    build_corpus_encoder(lambda: [""], 1, tmp_path)
    assert _encoder(tmp_path).encode(["anything"]).shape == (1, 256)


def test_layer_norm_only_scales_balanced_vectors() -> None:
    vectors = torch.randn(50, 30) * torch.rand(50, 1) * 5
    vectors[3] = 0
    balanced = _balanced(vectors)
    assert not balanced[3].any(), "any other row without meaning is left at 0 by luck only"
    normed = torch.nn.functional.layer_norm(balanced, (32,), eps=1e-12)[:, :30]
    scale = normed[0, 0] / vectors[0, 0]
    torch.testing.assert_close(normed, vectors * scale, rtol=1e-4, atol=1e-5)
    assert not normed[3].any()


def test_singular_vectors_are_those_of_numpy() -> None:
    random = np.random.default_rng(2)
    # Falling singular values, as of text: a flat spectrum has no leading vectors to find.
    dense = random.standard_normal((40, 60)) * 0.7 ** np.arange(60)
    rows, columns = (index.astype(np.int64) for index in np.nonzero(dense))
    right, strength = _right_singular(rows, columns, dense[rows, columns], (40, 60))
    _, expected_strength, expected = np.linalg.svd(dense, full_matrices=False)
    np.testing.assert_allclose(strength[:10], expected_strength[:10], rtol=1e-3)
    np.testing.assert_allclose(np.abs((right[:, :10].numpy() * expected[:10].T).sum(0)), 1, atol=1e-3)
