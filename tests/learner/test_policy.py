"""Log-probabilities of responses against the plain Hugging Face model, and the way weights leave the
policy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from common.weights import file_checksum
from learner.batch import MicroBatch, build_rows, micro_batches
from learner.loading import LoadSettings, load_policy
from learner.policy import Policy
from learner.samples import TrainSample
from learner.snapshot import write_snapshot
from tests.learner.conftest import VOCAB
from tests.tiny_model import build_tiny_model


@pytest.fixture(scope="module")
def policy(mesh: DeviceMesh, model_dir: Path) -> Policy:
    return load_policy(model_dir, mesh)


@pytest.fixture(scope="module")
def plain(model_dir: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def expected_scores(model: torch.nn.Module, sample: TrainSample, temperature: float) -> tuple[Tensor, Tensor]:
    """One sample alone, without padding or sharing, through the whole model and float64 log-softmax."""
    prompt, response = torch.from_numpy(sample.prompt_ids).long(), torch.from_numpy(sample.response_ids).long()
    with torch.no_grad():
        logits = model(torch.cat([prompt, response])[None]).logits[0].double() / temperature
    table = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return table.gather(1, response[:, None])[:, 0].float(), -(table.exp() * table).sum(-1).float()


def scores_by_sample(
    policy: Policy, samples: list[TrainSample], share: bool, temperature: float
) -> dict[int, tuple[Tensor, Tensor]]:
    """Scores through micro-batches of about 60 tokens, keyed by the sample's place in ``samples``."""
    for index, sample in enumerate(samples):
        sample.index = index
    batches = micro_batches(build_rows(samples, 60, share), 60)
    order = [index for batch in batches for index in batch.indices.tolist()]
    with torch.no_grad():
        scored = [policy.score(batch, temperature)[:2] for batch in batches]
    lengths = [len(samples[index].response_ids) for index in order]
    logprobs = torch.cat([logprobs for logprobs, _ in scored]).split(lengths)
    entropies = torch.cat([entropy for _, entropy in scored]).split(lengths)
    return dict(zip(order, zip(logprobs, entropies, strict=True), strict=True))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_match_the_plain_model(
    policy: Policy,
    plain: torch.nn.Module,
    make_samples: Callable[..., list[TrainSample]],
    share: bool,
    temperature: float,
) -> None:
    samples = make_samples(seed=1, groups=4, size=5)
    scored = scores_by_sample(policy, samples, share, temperature)
    assert len(scored) == len(samples)
    for index, sample in enumerate(samples):
        logprobs, entropy = expected_scores(plain, sample, temperature)
        torch.testing.assert_close(scored[index][0], logprobs, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(scored[index][1], entropy, atol=2e-5, rtol=1e-5)


def padded_logprobs(model: torch.nn.Module, samples: list[TrainSample]) -> list[Tensor]:
    """Per sample [T]: one rectangle padded on the right, with transformers' own attention and mask."""
    sequences = [torch.from_numpy(np.concatenate([s.prompt_ids, s.response_ids])).long() for s in samples]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in sequences], batch_first=True)
    table = model(ids, attention_mask=mask).logits.log_softmax(-1)
    picked = table[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return [picked[row, len(s.prompt_ids) - 1 :][: len(s.response_ids)] for row, s in enumerate(samples)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_packed_rows_give_the_padded_models_scores_and_gradients(
    mesh: DeviceMesh,
    tmp_path: Path,
    make_samples: Callable[..., list[TrainSample]],
    family: str,
    checkpointing: bool,
) -> None:
    folder = build_tiny_model(tmp_path, family=family, num_attention_heads=4, num_key_value_heads=2)
    packed, plain = (
        load_policy(folder, mesh, LoadSettings(activation_checkpointing=checkpointing)),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    )
    samples = make_samples(seed=2, groups=3, size=4)
    expected = padded_logprobs(plain, samples)
    for index, sample in enumerate(samples):
        sample.index = index
    (batch,) = micro_batches(build_rows(samples, 1000), 1000)
    logprobs = packed.score(batch, 1.0).logprobs
    torch.testing.assert_close(logprobs, torch.cat([expected[i] for i in batch.indices]), atol=1e-5, rtol=1e-5)
    weights = torch.randn(len(samples), generator=torch.Generator().manual_seed(0))
    (logprobs * weights[batch.indices][batch.sequences]).mean().backward()
    (sum((expected[i] * weights[i]).sum() for i in range(len(samples))) / len(logprobs)).backward()
    for name, parameter in packed.named_shards().items():
        gradient = parameter.grad.full_tensor()
        torch.testing.assert_close(gradient, plain.get_parameter(name).grad, atol=2e-6, rtol=1e-4, msg=name)


class LogitRows(TorchDispatchMode):
    """Rows of every matrix product whose result is as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name == "aten::mm" and result.shape[-1] == VOCAB:
            self.seen.append(result.shape[0])
        return result


def test_logits_of_response_positions_only(policy: Policy, make_samples: Callable[..., list[TrainSample]]) -> None:
    batch = MicroBatch.from_rows(build_rows(make_samples(), 100))
    with LogitRows() as rows:
        policy.score(batch, 1.0)
    assert rows.seen == [batch.tokens]


def test_bfloat16_compute_is_close_and_keeps_float32_weights(
    mesh: DeviceMesh, model_dir: Path, policy: Policy, make_samples: Callable[..., list[TrainSample]]
) -> None:
    lower = load_policy(model_dir, mesh, LoadSettings("bfloat16"))
    batch = MicroBatch.from_rows(build_rows(make_samples(), 100))
    with torch.no_grad():
        exact = policy.score(batch, 1.0).logprobs
    approximate = lower.score(batch, 1.0).logprobs
    assert approximate.dtype == torch.float32
    assert 0 < float((exact - approximate.detach()).abs().mean()) < 0.1
    # The forward pass above left the gathered bfloat16 weights in place; what is saved must not be those.
    saved = policy.full_state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in lower.full_state_dict().items())


def test_scoring_sees_weights_that_changed_after_the_last_scoring(
    mesh: DeviceMesh, model_dir: Path, make_samples: Callable[..., list[TrainSample]]
) -> None:
    changing = load_policy(model_dir, mesh)
    batch = MicroBatch.from_rows(build_rows(make_samples(), 100))
    with torch.no_grad():
        before = changing.score(batch, 1.0).logprobs
        for shard in changing.named_shards().values():
            shard.mul_(0.9)
        after = changing.score(batch, 1.0).logprobs
    assert float((before - after).abs().min()) > 0


def test_full_state_dict_is_the_saved_model(policy: Policy, model_dir: Path) -> None:
    state = policy.full_state_dict()
    saved = load_file(model_dir / "model.safetensors")
    assert set(state) == set(saved)
    assert "lm_head.weight" not in state
    assert all(torch.equal(state[name], saved[name]) for name in saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_snapshot_loads_as_a_hugging_face_model(
    policy: Policy, model_dir: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    target = tmp_path / "model.safetensors"
    checksum = write_snapshot(policy.full_state_dict(), target, dtype)
    assert checksum == hashlib.sha256(target.read_bytes()).hexdigest() == file_checksum(target)
    assert checksum == write_snapshot(policy.full_state_dict(), tmp_path / "again.safetensors", dtype)
    assert {tensor.dtype for tensor in load_file(target).values()} == {dtype}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, policy.full_state_dict()[name].to(dtype))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_an_untied_output_layer_is_written(mesh: DeviceMesh, tmp_path: Path) -> None:
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    state = load_policy(tmp_path, mesh).full_state_dict()
    assert not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    write_snapshot(state, tmp_path / "copy.safetensors", torch.float32)
    written = load_file(tmp_path / "copy.safetensors")
    assert torch.equal(written["lm_head.weight"], state["lm_head.weight"])


def test_missing_model_and_unknown_dtype_are_named(mesh: DeviceMesh, model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_policy(tmp_path, mesh)
    with pytest.raises(ValueError, match="unknown compute_dtype 'float8'"):
        LoadSettings("float8")
