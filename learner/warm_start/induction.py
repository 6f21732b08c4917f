"""Start weights with an induction circuit in them, so that copying need not be discovered.

Copying from the prompt takes two attention layers that fit together (induction heads: Olsson et al., arXiv
2209.11895): the first writes into each position which token stands *before* it, the second looks for the position
whose previous token is the present one and repeats what stands there. A randomly initialised model finds this only
after a million tokens and suddenly; written into the start weights, training begins with copying and only has to
learn format and choice. It holds no knowledge of words, requests or queries.

Qwen2 makes it easy: its queries and keys have biases. Under rotary embeddings (Su et al., arXiv 2104.09864) a constant
query turned back by one position and a constant key score highest at distance one, whatever the tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from learner.warm_start.tokenizer import JOINERS, QUERY_OPENING

EMBEDDING_STD = 0.1
POSITION_STRENGTH = 7.0  # of the constant queries and keys: attention to the previous token of about 0.99
MATCH_STRENGTH = 2.0  # of "the same token": about 9 logits above another one
COPY_STRENGTH = 0.5
SLOW_ROTATION = 0.05  # radians per position: pairs that turn no faster still agree 60 tokens apart
# A word may begin after any of these as after a space; alike embeddings make the circuit look there.
BEGINNINGS = (*JOINERS, QUERY_OPENING, "(", "<|user|>", "<think>")


@torch.no_grad()
def write_induction_circuit(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, beginnings: Sequence[str] = BEGINNINGS
) -> None:
    """Write the circuit into the first two layers of a freshly initialised model.

    Needs at least two layers and two heads per layer; the other heads and layers keep their random weights.
    beginnings: pieces after which a word may begin as after a space.

    Raises:
        ValueError: the model is too small to hold the circuit.
    """
    config = model.config
    width, heads = config.hidden_size, config.num_attention_heads
    if config.num_hidden_layers < 2 or heads < 2 or config.num_key_value_heads != heads:
        raise ValueError("an induction circuit needs two layers of at least two heads, with a key head for each")
    generator = torch.Generator().manual_seed(seed)
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0.0, EMBEDDING_STD, generator=generator)
    # The first half of the basis reads the token itself, the second half holds the record of the previous token.
    basis = _orthogonal(width, generator)
    half = (heads // 2) * (width // heads)
    _write_previous_token_heads(model, basis, half)
    _write_matching_heads(model, basis, half, generator)
    _liken(embedding, tokenizer, beginnings)


def _write_previous_token_heads(model: Qwen2ForCausalLM, basis: Tensor, half: int) -> None:
    attention = model.model.layers[0].self_attn
    size = attention.head_dim
    speeds = _rotation_speeds(model)
    key = torch.cat([torch.full_like(speeds, POSITION_STRENGTH), torch.zeros_like(speeds)])
    query = POSITION_STRENGTH * torch.cat([speeds.cos(), -speeds.sin()])
    for first in range(0, half, size):
        rows = slice(first, first + size)
        attention.q_proj.weight[rows] *= 0.1
        attention.k_proj.weight[rows] *= 0.1
        attention.q_proj.bias[rows] = query
        attention.k_proj.bias[rows] = key
        attention.v_proj.weight[rows] = basis[rows]
        attention.o_proj.weight[:, rows] = EMBEDDING_STD * basis[half + first : half + first + size].T


def _write_matching_heads(model: Qwen2ForCausalLM, basis: Tensor, half: int, generator: torch.Generator) -> None:
    attention = model.model.layers[1].self_attn
    size = attention.head_dim
    slow = (_rotation_speeds(model) < SLOW_ROTATION).nonzero().flatten()
    channels = torch.cat([slow, slow + size // 2])
    for first in range(0, attention.q_proj.weight.shape[0], size):
        chosen = torch.randperm(half, generator=generator)[: len(channels)]
        rows = first + channels[: len(chosen)]
        attention.q_proj.weight[first : first + size] *= 0.1
        attention.k_proj.weight[first : first + size] *= 0.1
        attention.q_proj.weight[rows] += MATCH_STRENGTH * basis[chosen]
        attention.k_proj.weight[rows] += MATCH_STRENGTH * basis[half + chosen]
    rotation = _orthogonal(basis.shape[0], generator)
    attention.v_proj.weight.copy_(COPY_STRENGTH * rotation)
    attention.o_proj.weight.copy_(COPY_STRENGTH * rotation.T)


def _liken(embedding: Tensor, tokenizer: PreTrainedTokenizerFast, beginnings: Sequence[str]) -> None:
    """Move the embeddings of `beginnings` near that of the space, keeping their length."""
    space = embedding[tokenizer.convert_tokens_to_ids(" ")].clone()
    for piece in beginnings:
        index = tokenizer.convert_tokens_to_ids(piece)
        if index is not None and index != tokenizer.unk_token_id:
            embedding[index] = 0.8 * space + 0.6 * embedding[index]


def _rotation_speeds(model: Qwen2ForCausalLM) -> Tensor:
    """Radians per position of each rotary pair, fastest first; float32 [head_dim / 2]."""
    return model.model.rotary_emb.inv_freq.float()


def _orthogonal(width: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
