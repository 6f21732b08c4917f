"""Which model a word on the command line means."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from deploy.errors import LaunchError
from deploy.models import resolve_model
from tests.tiny_model import build_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def test_a_folder_is_itself(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve_model(str(model))
    assert (source.name, source.folder, source.endpoint) == ("tiny", model.resolve(), None)
    monkeypatch.setenv("MODELS", str(model.parent))
    assert resolve_model("$MODELS/tiny") == source


def test_other_weights_under_the_same_name_are_another_model(model: Path, tmp_path: Path) -> None:
    copy = build_tiny_model(tmp_path / "tiny")
    assert resolve_model(str(copy)).fingerprint() == resolve_model(str(model)).fingerprint()
    tensors = load_file(copy / "model.safetensors")
    name = sorted(tensors)[3]
    tensors[name] = tensors[name] * 1.001
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert resolve_model(str(copy)).fingerprint() != resolve_model(str(model)).fingerprint()


def test_an_endpoint_takes_its_key_from_the_environment_or_a_private_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    endpoint = resolve_model("openai:some/model", "http://127.0.0.1:8000/v1/").endpoint
    assert endpoint is not None
    assert (endpoint.base_url, endpoint.model) == ("http://127.0.0.1:8000/v1", "some/model")
    assert endpoint.api_key == "from-the-environment"
    assert "from-the-environment" not in repr(endpoint)
    key = tmp_path / "key"
    key.write_text("from-the-file\n")
    os.chmod(key, 0o644)
    with pytest.raises(LaunchError, match="chmod 600"):
        resolve_model("openai:m", None, str(key))
    os.chmod(key, 0o600)
    endpoint = resolve_model("openai:m", None, str(key)).endpoint
    assert endpoint is not None
    assert endpoint.api_key == "from-the-file"
    assert endpoint.base_url == "https://api.openai.com/v1"


@pytest.mark.parametrize(
    ("text", "base_url", "message"),
    [
        ("openai:", None, "names no model"),
        ("openai:m", "ftp://host", "must begin with http"),
        ("./nowhere", None, "is no model"),
        ("tests", None, "is no model"),
        ("some/model", "http://127.0.0.1:1", "--base-url is for an endpoint"),
    ],
)
def test_what_is_no_model_is_said_in_one_line(text: str, base_url: str | None, message: str) -> None:
    with pytest.raises(LaunchError, match=message) as caught:
        resolve_model(text, base_url)
    assert "\n" not in str(caught.value)


def test_a_hub_id_that_cannot_be_fetched_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LaunchError, match="cannot download the model nobody/nothing") as caught:
        resolve_model("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_run_without_that_checkpoint_names_those_that_are_there(tmp_path: Path) -> None:
    from learner.checkpoint import CheckpointError

    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("run: {name: demo}\n")
    with pytest.raises(CheckpointError, match="holds no valid checkpoint"):
        resolve_model(str(run))
    with pytest.raises(LaunchError, match="the step of a checkpoint"):
        resolve_model(f"{run}@newest")
