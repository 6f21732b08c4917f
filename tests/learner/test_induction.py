"""The start weights copy before any training, and nothing else."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from learner.warm_start.induction import write_induction_circuit
from learner.warm_start.pretrain import ModelShape, new_model
from learner.warm_start.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([f"word{n} and another thing {n * n}" for n in range(400)], vocabulary=800)


def model_with_circuit(tokenizer: PreTrainedTokenizerFast, shape: ModelShape | None = None) -> Qwen2ForCausalLM:
    model = new_model(tokenizer, shape or ModelShape(), seed=0)
    write_induction_circuit(model, tokenizer, seed=0)
    return model.eval()


def copy_accuracy(model: Qwen2ForCausalLM, vocabulary: int, length: int = 24) -> float:
    """Share of tokens predicted right in the second of two equal random strings."""
    ids = torch.stack([torch.randperm(vocabulary - 40)[:length] + 20 for _ in range(32)])  # no control tokens
    with torch.no_grad():
        predicted = model(torch.cat([ids, ids], dim=1)).logits.argmax(-1)
    return float((predicted[:, length:-1] == ids[:, 1:]).float().mean())


def test_a_repeated_string_is_continued_without_training(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    plain = new_model(tokenizer, ModelShape(), seed=0).eval()
    assert copy_accuracy(plain, len(tokenizer)) < 0.05
    assert copy_accuracy(model_with_circuit(tokenizer), len(tokenizer)) > 0.5


def test_the_first_layer_looks_one_token_back(tokenizer: PreTrainedTokenizerFast) -> None:
    model = model_with_circuit(tokenizer)
    model.config._attn_implementation = "eager"
    ids = torch.arange(100, 140).unsqueeze(0)
    with torch.no_grad():
        attention = model(ids, output_attentions=True).attentions[0][0]
    previous = attention[:2].diagonal(offset=-1, dim1=1, dim2=2)
    assert float(previous.min()) > 0.9


def test_a_model_that_cannot_hold_the_circuit_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="two layers"):
        model_with_circuit(tokenizer, ModelShape(layers=1))
