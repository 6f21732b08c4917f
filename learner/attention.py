"""Attention over packed rows: a token sees its own past in its own document, and no other response.

Token i sees token j if both are of one document, j <= i, and j is of the prompt or of i's own response.

Registered with transformers as the attention implementation ``PACKED``. What it has to know of the row is
prepared once per micro-batch (``prepare_layout``) and goes through the model's forward as the keyword ``packed``.

On a CPU every segment (a prompt, a response) attends to itself causally, segments of equal length in one
call, so that nothing is padded and no masked score is computed. Then all responses of a document attend to
their prompt in one call without a mask, and both parts are merged by their log-sum-exp as in ring attention
(Liu et al. 2023, arXiv 2310.01889). On a GPU it is one call of FlexAttention (Dong et al. 2024, arXiv
2412.05496), whose block mask skips the blocks that nobody sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

PACKED = "deepretrieval_packed"

# Arguments by which a transformers model asks its attention for something that this one does not do.
_UNSUPPORTED_ARGUMENTS = ("sliding_window", "s_aux", "softcap", "position_bias")
_CHOOSE_ANOTHER = (
    "The learner's packed rows have full causal attention only: choose a model that has no more (Qwen, Llama)"
)


@dataclass(frozen=True)
class Document:
    """Input tokens of a prompt and of each response behind it; a response of one token has none."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Input tokens of the document."""
        return self.prompt + sum(self.responses)


@dataclass(frozen=True)
class PackedLayout:
    """The documents of a packed row, in order and without gaps."""

    documents: tuple[Document, ...]
    _prepared: dict[torch.device, Spans | BlockMask] = field(default_factory=dict, repr=False, compare=False)

    @property
    def tokens(self) -> int:
        """Input tokens of the row."""
        return sum(document.tokens for document in self.documents)


# Rows of a [S, ...] tensor, picked as [B, L, ...]: an int64 tensor [B, L], or (None, slice) for one span.
_Rows = Any


@dataclass(frozen=True)
class Spans:
    """A packed row cut for the CPU kernel.

    Attributes:
        causal: batches of segments of equal length. Each sees itself causally; together they are the whole row.
            A document with one response is one segment.
        shared: per document with several responses, the rows of all of them and the rows of their prompt.
    """

    causal: tuple[_Rows, ...]
    shared: tuple[tuple[_Rows, _Rows], ...]

    @staticmethod
    def of(layout: PackedLayout) -> Spans:
        """Cut a layout."""
        by_length: dict[int, list[int]] = {}
        shared: list[tuple[_Rows, _Rows]] = []
        start = 0
        for document in layout.documents:
            edges = list(accumulate((document.prompt, *document.responses), initial=start))
            if len(document.responses) == 1:
                del edges[1]
            elif edges[1] < edges[-1]:
                shared.append(((None, slice(edges[1], edges[-1])), (None, slice(edges[0], edges[1]))))
            for first, last in pairwise(edges):
                by_length.setdefault(last - first, []).append(first)
            start = edges[-1]
        by_length.pop(0, None)  # responses of one token have no inputs
        batches = (torch.tensor(starts)[:, None] + torch.arange(length) for length, starts in sorted(by_length.items()))
        return Spans(tuple(batches), tuple(shared))


class _SpanAttention(torch.autograd.Function):
    """Attention over ``Spans``: query [S, heads, D], key and value [S, key heads, D] -> like query.

    One function for the whole row, because autograd would fill a gradient of the whole row with zeros for
    every slice of it. The parts' gradients add up: given the merged output and log-sum-exp, the backward
    kernel rebuilds each weight as a share of all that the query saw.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float) -> Tensor:
        """Attend inside segments, then to shared prompts."""
        output = torch.empty_like(query)
        normaliser = query.new_empty(query.shape[:2], dtype=torch.float32)
        for rows in spans.causal:
            output[rows], normaliser[rows] = _attend(query[rows], key[rows], value[rows], True, scale)
        for rows, prompt in spans.shared:
            part, extra = _attend(query[rows], key[prompt], value[prompt], False, scale)
            merged = torch.logaddexp(normaliser[rows], extra)
            share = (extra - merged).exp().unsqueeze(-1).to(part.dtype)
            output[rows] = torch.lerp(output[rows], part, share)
            normaliser[rows] = merged
        ctx.save_for_backward(query, key, value, output, normaliser)
        ctx.spans, ctx.scale = spans, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, output, normaliser = ctx.saved_tensors
        (gradient,) = gradients

        def parts(rows: _Rows, keys: _Rows, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            seen = (gradient[rows], query[rows], key[keys], value[keys], output[rows], normaliser[rows])
            return _attend_backward(seen, causal, ctx.scale)

        results = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        for rows in ctx.spans.causal:
            for result, part in zip(results, parts(rows, rows, causal=True), strict=True):
                result[rows] = part
        for rows, prompt in ctx.spans.shared:
            for result, where, part in zip(
                results, (rows, prompt, prompt), parts(rows, prompt, causal=False), strict=True
            ):
                result[where] += part
        return *results, None, None


def _attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """[B, L, heads, D] each -> output like query, log-sum-exp float32 [B, L, heads].

    The kernel behind ``scaled_dot_product_attention``, which keeps the log-sum-exp to itself.
    """
    output, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), 0.0, causal, scale=scale
    )
    return output.transpose(1, 2), normaliser.transpose(1, 2)


def _attend_backward(seen: Sequence[Tensor], causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient, query, key, value, output, log-sum-exp), as in ``_attend`` -> gradients of query, key, value."""
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(tensor.transpose(1, 2) for tensor in seen), 0.0, causal, scale=scale
    )
    query, key, value = (gradient.transpose(1, 2) for gradient in gradients)
    return query, key, value


def block_mask(layout: PackedLayout, device: torch.device) -> BlockMask:
    """The layout for FlexAttention, [1, 1, S, S]."""
    owns, prompts = (torch.from_numpy(ids).to(device) for ids in _segment_ids(layout))

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & ((owns[key] == owns[query]) | (owns[key] == prompts[query]))

    # Compiled, the whole [S, S] mask never exists.
    build = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    mask: BlockMask = build(visible, None, None, layout.tokens, layout.tokens, device=device)
    return mask


def _segment_ids(layout: PackedLayout) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """int64 [S] each: the segment of every token, and the segment of its prompt. No two segments share an id."""
    lengths = [length for document in layout.documents for length in (document.prompt, *document.responses)]
    firsts = np.cumsum([0] + [len(document.responses) + 1 for document in layout.documents[:-1]])
    prompts = firsts.repeat([len(document.responses) + 1 for document in layout.documents])
    return np.arange(len(lengths)).repeat(lengths), prompts.repeat(lengths)


def prepare_layout(layout: PackedLayout, device: torch.device) -> Spans | BlockMask:
    """What the model's forward takes as ``packed``: made once for all layers and passes, and kept by the layout."""
    if device not in layout._prepared:
        layout._prepared[device] = Spans.of(layout) if device.type == "cpu" else block_mask(layout, device)
    return layout._prepared[device]


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function)
    return compiled


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed: Spans | BlockMask | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over a packed row; transformers calls it.

    Args:
        query: [1, heads, S, D].
        key, value: [1, key heads, S, D]; key heads divide heads (grouped-query attention).
        packed: from ``prepare_layout``. The mask of transformers is not read: it knows nothing of the packing.

    Returns:
        [1, S, heads, D], and None for the weights, which never exist.

    Raises:
        ValueError: no layout was passed, or the layer asks for what packed rows do not have.
    """
    asked = [name for name in _UNSUPPORTED_ARGUMENTS if others.get(name) is not None] + ["dropout"] * (dropout > 0)
    if asked:
        raise ValueError(f"{type(module).__name__} asks its attention for {', '.join(asked)}: {_CHOOSE_ANOTHER}")
    if packed is None:
        raise ValueError("a policy reads packed rows only: pass packed=prepare_layout(layout, device) to its forward")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(packed, Spans):
        return _attend_spans(query, key, value, packed, scale), None
    # Uncompiled, as in tests on a CPU, FlexAttention writes out all scores.
    attend: Any = flex_attention if query.device.type == "cpu" else _compiled(flex_attention)
    output = attend(query, key, value, block_mask=packed, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return output.transpose(1, 2).contiguous(), None


@torch.compiler.disable  # the lengths of the spans differ in every micro-batch: compiled code would never be used again
def _attend_spans(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float) -> Tensor:
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output: Tensor = _SpanAttention.apply(query, key, value, spans, scale)
    return output[None]


def check_attention(model: Any) -> None:
    """Refuse a Hugging Face model whose attention is another than causal softmax attention over all earlier tokens.

    Raises:
        ValueError: naming the configuration key that asks for something else.
    """
    config = model.config
    other_layers = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    # With layer_types, the window is of those layers only that are named so.
    window = None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)
    reasons = {
        f"layer_types has {', '.join(other_layers)}": other_layers,
        f"sliding_window is {window}": window is not None,
        "attn_logit_softcapping is set": getattr(config, "attn_logit_softcapping", None) is not None,
        "attention_dropout is above 0": getattr(config, "attention_dropout", 0.0),
        f"model_type {config.model_type} has attention sinks": any("sinks" in n for n, _ in model.named_parameters()),
        f"model_type {config.model_type} brings its own attention": not model._supports_attention_backend,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"config.json: {reason}. {_CHOOSE_ANOTHER}")


AttentionInterface.register(PACKED, packed_attention)
