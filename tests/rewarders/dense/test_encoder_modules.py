"""Folders as sentence-transformers writes them: pooling and normalisation are the folder's, unless the config's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewarders.servers.hosting import SearchServerError
from rewarders.servers.retrieval.dense_index import open_index
from rewarders.servers.retrieval.dense_wire import DenseSettings
from rewarders.servers.retrieval.encoder_files import encoder_folder
from rewarders.servers.retrieval.encoder_modules import refuse_other_layers, with_folders_own
from tests.rewarders.dense.tiny_bert import build_tiny_bert, random_texts, reference_vectors

MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def sentence_folder(folder: Path, *kinds: str, modes: tuple[str, ...] = ("mean_tokens",), **config: Any) -> Path:
    """Adds to a folder what sentence-transformers would: a module of each kind, one subfolder for all but the first."""
    modules = []
    for number, kind in enumerate(("Transformer", *kinds)):
        place = f"{number}_{kind}" if number else ""
        (folder / place).mkdir(exist_ok=True, parents=True)
        modules.append(
            {"idx": number, "name": str(number), "path": place, "type": f"sentence_transformers.models.{kind}"}
        )
        if kind == "Pooling":
            stated = {f"pooling_mode_{mode}": mode in modes for mode in MODES}
            stated |= {"word_embedding_dimension": 32, "include_prompt": True}
            (folder / place / "config.json").write_text(json.dumps(stated))
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {}, **config}))
    return folder


@pytest.mark.parametrize(("mode", "pooling"), [("mean_tokens", "mean"), ("cls_token", "cls"), ("lasttoken", "last")])
@pytest.mark.parametrize("unit", [True, False])
def test_vectors_are_pooled_and_shortened_as_the_folder_says(
    tmp_path: Path, mode: str, pooling: str, unit: bool
) -> None:
    encoder = build_tiny_bert(tmp_path / "encoder")
    sentence_folder(encoder, "Pooling", *(["Normalize"] if unit else []), modes=(mode,))
    texts = random_texts(5)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    lines = [json.dumps({"_id": str(number), "title": "", "text": text}) for number, text in enumerate(texts)]
    (corpus / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    made = open_index(corpus, DenseSettings(encoder=str(encoder)), tmp_path / "cache", lambda done, total: None).made
    expected = reference_vectors(encoder, texts, pooling, unit)
    np.testing.assert_allclose(np.load(made.vectors), expected, rtol=1e-4, atol=2e-5)


def test_the_config_overrides_the_folder(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path, "Pooling", modes=("cls_token",))
    settled = with_folders_own(DenseSettings(pooling="mean", normalize=True), folder)
    assert (settled.pooling, settled.normalize) == ("mean", True)
    settled = with_folders_own(DenseSettings(), folder)
    assert (settled.pooling, settled.normalize) == ("cls", False)


def test_vectors_that_are_compared_by_their_angle_are_shortened(tmp_path: Path) -> None:
    settled = with_folders_own(DenseSettings(), sentence_folder(tmp_path, "Pooling", similarity_fn_name="cosine"))
    assert settled.normalize is True
    settled = with_folders_own(DenseSettings(), sentence_folder(tmp_path, "Pooling", similarity_fn_name="dot"))
    assert settled.normalize is False


def test_a_pooling_that_is_named_is_understood(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path, "Pooling")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "lasttoken"}))
    assert with_folders_own(DenseSettings(), folder).pooling == "last"


def test_a_plain_folder_gets_the_mean_and_unit_vectors(tmp_path: Path) -> None:
    settled = with_folders_own(DenseSettings(), tmp_path)
    assert (settled.pooling, settled.normalize) == ("mean", True)


@pytest.mark.parametrize("modes", [("max_tokens",), ("cls_token", "mean_tokens"), ()])
def test_a_pooling_that_is_not_done_here_is_refused_unless_the_config_names_one(
    tmp_path: Path, modes: tuple[str, ...]
) -> None:
    folder = sentence_folder(tmp_path, "Pooling", "Normalize", modes=modes)
    with pytest.raises(SearchServerError, match=r"pools by .*: set search\.dense\.pooling") as raised:
        with_folders_own(DenseSettings(), folder)
    assert "\n" not in str(raised.value)
    assert with_folders_own(DenseSettings(pooling="mean"), folder).normalize is True


@pytest.mark.parametrize("kind", ["Dense", "LayerNorm", "CNN"])
def test_layers_behind_the_pooling_are_refused(tmp_path: Path, kind: str) -> None:
    folder = sentence_folder(build_tiny_bert(tmp_path), "Pooling", kind)
    with pytest.raises(SearchServerError, match=f"adds a {kind} layer, which is not applied here"):
        refuse_other_layers(encoder_folder(str(folder)))


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1]", '[{"path": ""}]'])
def test_a_broken_list_of_modules_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(SearchServerError, match=r"modules\.json") as raised:
        with_folders_own(DenseSettings(), tmp_path)
    assert "\n" not in str(raised.value)
