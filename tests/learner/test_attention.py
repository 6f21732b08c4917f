"""Attention over packed rows against a dense softmax with the rule written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from learner.attention import (
    PACKED,
    Document,
    PackedLayout,
    block_mask,
    check_attention,
    packed_attention,
    prepare_layout,
)
from tests.tiny_model import build_tiny_model

CPU = torch.device("cpu")


@st.composite
def layouts(draw: st.DrawFn) -> PackedLayout:
    """Up to 4 documents of up to 4 responses; some responses have no inputs."""
    lengths = st.lists(st.integers(0, 6), min_size=1, max_size=4)
    documents = draw(st.lists(st.tuples(st.integers(1, 7), lengths), min_size=1, max_size=4))
    return PackedLayout(tuple(Document(prompt, tuple(responses)) for prompt, responses in documents))


def allowed(layout: PackedLayout) -> Tensor:
    """bool [S, S] by the rule: same document, no later, and of the prompt or of the same response."""
    names = [
        (place, response)
        for place, document in enumerate(layout.documents)
        for response, length in enumerate((document.prompt, *document.responses))
        for _ in range(length)
    ]
    return torch.tensor(
        [
            [key <= query and names[key] in (names[query], (names[query][0], 0)) for key in range(len(names))]
            for query in range(len(names))
        ]
    )


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def inputs(layout: PackedLayout, key_heads: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, layout.tokens, 16) for heads in (4, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def with_gradients(output: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return [output, *torch.autograd.grad((output.float() * weights).sum(), tensors)]


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@settings(max_examples=30, deadline=None)
@given(layout=layouts())
def test_spans_give_the_dense_attention(
    layout: PackedLayout, key_heads: int, dtype: torch.dtype, tolerance: float
) -> None:
    tensors = inputs(layout, key_heads, dtype)
    output, weights = packed_attention(nn.Module(), *tensors, None, packed=prepare_layout(layout, CPU), scaling=0.3)
    exact = [tensor.detach().float().requires_grad_() for tensor in tensors]
    expected = dense(*exact, allowed(layout), 0.3)
    assert weights is None
    assert output.shape == (1, layout.tokens, 4, 16)
    for got, wanted in zip(with_gradients(output, tensors), with_gradients(expected, exact), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize(
    "documents",
    [[(3, (2, 0, 5)), (4, (6,)), (2, (1, 1))], [(100, (90, 30, 60)), (140, (20,)), (1, (129, 0))]],
)
def test_the_block_mask_of_the_gpu_gives_the_same(documents: list[tuple[int, tuple[int, ...]]], key_heads: int) -> None:
    layout = PackedLayout(tuple(Document(*document) for document in documents))
    tensors = [tensor.detach() for tensor in inputs(layout, key_heads, torch.float32)]
    flex, _ = packed_attention(nn.Module(), *tensors, None, packed=block_mask(layout, CPU))
    spans, _ = packed_attention(nn.Module(), *tensors, None, packed=prepare_layout(layout, CPU))
    torch.testing.assert_close(flex, spans, atol=1e-5, rtol=1e-5)


@given(layouts())
@settings(max_examples=20, deadline=None)
def test_the_block_mask_follows_the_rule(layout: PackedLayout) -> None:
    place = torch.arange(layout.tokens)
    zero = torch.zeros((), dtype=torch.int64)
    mask = block_mask(layout, CPU).mask_mod(zero, zero, place[:, None], place[None, :])
    assert torch.equal(mask, allowed(layout))


def test_blocks_that_nobody_sees_are_skipped() -> None:
    layout = PackedLayout((Document(256, (256, 256)), Document(256, (0,))))
    # Blocks of 128: the prompt sees 1 + 2 of them, each response 2 more for the prompt, the last document 1 + 2.
    assert int((block_mask(layout, CPU).to_dense() > 0).sum()) == 3 + 7 + 7 + 3


def test_a_layout_is_prepared_once() -> None:
    layout = PackedLayout((Document(2, (1, 1)),))
    assert prepare_layout(layout, CPU) is prepare_layout(layout, CPU)


def test_equal_lengths_share_a_call() -> None:
    layout = PackedLayout((Document(3, (2, 2, 0)), Document(3, (2, 5)), Document(1, (2,))))
    spans = prepare_layout(layout, CPU)
    # Length 2: three responses; length 3: two prompts and the document with one response; length 5: one response.
    assert [tuple(rows.shape) for rows in spans.causal] == [(3, 2), (3, 3), (1, 5)]
    assert len(spans.shared) == 2


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mistral", {"sliding_window": 8}, "sliding_window is 8"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "layer_types has sliding_attention"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "attn_logit_softcapping is set"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout is above 0"),
        (
            "gpt_oss",
            {"layer_types": ["full_attention"] * 2, "num_local_experts": 2, "num_experts_per_tok": 1},
            "model_type gpt_oss has attention sinks",
        ),
        ("bloom", {}, "model_type bloom brings its own attention"),
    ],
)
def test_other_attention_is_refused(family: str, changes: dict[str, Any], message: str) -> None:
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small | heads | changes))
    with pytest.raises(ValueError, match=message):
        check_attention(model)


def test_a_window_that_no_layer_uses_is_accepted(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path, use_sliding_window=True, max_window_layers=2, sliding_window=8)
    check_attention(AutoModelForCausalLM.from_pretrained(folder))


def test_a_layer_that_asks_for_more_is_refused_when_it_runs() -> None:
    layout = PackedLayout((Document(3, (2,)),))
    tensors = inputs(layout, 4, torch.float32)
    packed = prepare_layout(layout, CPU)
    with pytest.raises(ValueError, match="Module asks its attention for sliding_window, dropout"):
        packed_attention(nn.Module(), *tensors, None, packed=packed, sliding_window=8, dropout=0.1)


def test_a_forward_without_a_layout_is_refused(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation=PACKED)
    with pytest.raises(ValueError, match="pass packed=prepare_layout"):
        model(torch.zeros(1, 3, dtype=torch.int64))
