from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rewarders.servers.hosting import SearchServerError
from rewarders.servers.retrieval.dense_wire import Pooling
from rewarders.servers.retrieval.encoder import Encoder
from rewarders.servers.retrieval.encoder_files import encoder_folder, encoder_identity
from tests.rewarders.dense.tiny_bert import build_tiny_bert, random_texts, reference_vectors


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bert(tmp_path_factory.mktemp("bert"))


def _encoder(folder: Path, pooling: Pooling = "mean", normalize: bool = True, batch: int = 64, **more: int) -> Encoder:
    max_tokens = more.get("max_tokens")
    return Encoder(folder, pooling=pooling, normalize=normalize, max_tokens=max_tokens, batch=batch, device="cpu")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_batch_gives_what_every_text_gives_alone(bert: Path, pooling: Pooling, normalize: bool) -> None:
    texts = random_texts(60)
    vectors = _encoder(bert, pooling, normalize).encode(texts)
    reference = reference_vectors(bert, texts, pooling, normalize)
    np.testing.assert_allclose(vectors, reference, rtol=1e-4, atol=2e-5)
    # The check can fail: these texts differ by far more than the tolerance.
    assert np.abs(reference[0] - reference[1]).max() > 0.01


def test_neighbours_do_not_change_a_vector(bert: Path) -> None:
    texts = random_texts(50, seed=1)
    together = _encoder(bert).encode(texts)
    in_threes = _encoder(bert, batch=3).encode(texts)
    backwards = _encoder(bert).encode(texts[::-1])[::-1]
    np.testing.assert_allclose(in_threes, together, atol=1e-6)
    np.testing.assert_allclose(backwards, together, atol=1e-6)


def test_long_texts_are_cut_at_the_models_length_or_the_wanted_one(bert: Path) -> None:
    long = " ".join(random_texts(4, longest=60))
    words = long.split()
    encoder = _encoder(bert)
    np.testing.assert_allclose(encoder.encode([long]), encoder.encode([" ".join(words[:46])]), atol=1e-6)
    shorter = _encoder(bert, max_tokens=10)
    np.testing.assert_allclose(shorter.encode([long]), encoder.encode([" ".join(words[:8])]), atol=1e-6)


def test_no_texts_give_no_vectors(bert: Path) -> None:
    assert _encoder(bert).encode([]).shape == (0, 32)


def test_the_identity_is_that_of_the_content(bert: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bert, copy)
    assert encoder_identity(copy) == encoder_identity(bert)
    weights = load_file(copy / "model.safetensors")
    weights["embeddings.LayerNorm.bias"][3] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert encoder_identity(copy) != encoder_identity(bert)


def _without_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _half_the_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layer.1" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "of_my_own", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('this code must not run')")


def _truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _dense_layer(folder: Path) -> None:
    (folder / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_without_weights, "no safetensors weights"),
        (_half_the_weights, "weights are missing"),
        (_own_code, "cannot be loaded"),
        (_truncated, "cannot be loaded"),
        (_dense_layer, "Dense layer"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_what_is_no_encoder_is_refused_in_one_line(bert: Path, tmp_path: Path, damage: object, expected: str) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(bert, folder)
    damage(folder)  # type: ignore[operator]
    with pytest.raises(SearchServerError, match=expected) as raised:
        _encoder(encoder_folder(str(folder)))
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


def test_a_hub_id_that_cannot_be_had_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SearchServerError, match="the hub does not give it") as raised:
        encoder_folder("nobody/no-such-encoder")
    assert "\n" not in str(raised.value)
