"""The policy: a Hugging Face causal language model, sharded with FSDP2, that scores responses.

Only the hidden states that predict a response token go through the output layer, so no [batch, sequence,
vocabulary] tensor ever exists for prompt positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from learner.attention import PACKED, prepare_layout
from learner.batch import MicroBatch
from learner.value_head import ValueHead, shard_value_head

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class SelectedLogprobs(torch.autograd.Function):
    """Log-probability of one token per row of logits, and the entropy of every row, from a single softmax.

    Plain autograd keeps the log-softmax and its exponential; this keeps the softmax only and builds the
    gradient in one
    pass: d logp_y / d z = onehot(y) - p,  d H / d z = -p (log p + H).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """logits [N, V] of any float dtype, targets int64 [N] -> (logprobs, entropy), both float32 [N]."""
        scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
        probabilities = torch.softmax(scaled, dim=-1)
        # The largest probability is at least 1/V, so this log-normaliser is exact where others would
        # underflow.
        normaliser = scaled.amax(-1) - probabilities.amax(-1).log()
        logprobs = scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - normaliser
        expected = torch.linalg.vecdot(probabilities, scaled)
        entropy = normaliser - expected
        ctx.save_for_backward(probabilities, targets, entropy)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        """Gradient with respect to the logits, [N, V] in their dtype."""
        probabilities, targets, entropy = ctx.saved_tensors
        logprob_gradient, entropy_gradient = gradients
        scale = torch.zeros_like(entropy) if logprob_gradient is None else logprob_gradient
        if entropy_gradient is None:
            gradient = probabilities * (-scale / ctx.temperature).unsqueeze(-1)
        else:
            surprise = probabilities.clamp(min=torch.finfo(torch.float32).tiny).log() + entropy.unsqueeze(-1)
            gradient = -probabilities * (scale.unsqueeze(-1) + surprise * entropy_gradient.unsqueeze(-1))
            gradient /= ctx.temperature
        gradient.scatter_add_(-1, targets.unsqueeze(-1), (scale / ctx.temperature).unsqueeze(-1))
        return gradient.to(ctx.dtype), None, None


class ResponseScores(NamedTuple):
    """What a policy says of response tokens, each float32 [N].

    ``logprobs`` is their log-probability, ``entropy`` that of their distribution in nats, ``values`` the value
    of the state before them, None where the policy has no value head.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None


class Policy(nn.Module):
    """A causal language model whose forward pass scores response tokens, with a value head where critics share it."""

    causal_lm: Any  # a transformers model: untyped

    def __init__(self, causal_lm: nn.Module, device: torch.device, value_head: ValueHead | None = None) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.value_head = value_head
        self.device = device
        self._named_shards = dict(causal_lm.named_parameters())

    @property
    def config(self) -> Any:
        """The model's Hugging Face configuration."""
        return self.causal_lm.config

    def forward(self, batch: MicroBatch, temperature: float) -> ResponseScores:
        """Score the responses of ``batch`` (already on the policy's device).

        Args:
            temperature: the sampling temperature of the behaviour policy, > 0; logits are divided by it in
                float32 as the engine does, so that both sides speak of the same distribution.
        """
        predicting = predicting_states(self.causal_lm.base_model, batch)
        logits = self.causal_lm.get_output_embeddings()(predicting)
        logprobs, entropy = SelectedLogprobs.apply(logits, batch.targets, temperature)
        return ResponseScores(logprobs, entropy, None if self.value_head is None else self.value_head(predicting))

    def score(self, batch: MicroBatch, temperature: float) -> ResponseScores:
        """``forward`` through the module's hooks, which is what gathers the FSDP shards."""
        scores: ResponseScores = self(batch, temperature)
        release_gathered(self)
        return scores

    def named_shards(self) -> dict[str, nn.Parameter]:
        """This rank's float32 master weights (DTensors once sharded) by Hugging Face name.

        A parameter under several names, as an output layer tied to the input embedding, comes once. Unlike
        ``named_parameters()`` these never are the gathered weights in the compute dtype.
        """
        return self._named_shards

    def note_shards(self) -> None:
        """Remember the parameters as they are once sharded."""
        self._named_shards = dict(self.causal_lm.named_parameters())

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole model under its Hugging Face names, float32 on the CPU, as copies.

        All ranks call this together; rank 0 gets the tensors, the others an empty dict. An output layer tied
        to the input embedding is left out, as in Hugging Face checkpoints.
        """
        leads = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        state: dict[str, Tensor] = {}
        for name, parameter in self._named_shards.items():
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if leads:
                state[name] = full.detach().to("cpu", copy=True)
        return state


def predicting_states(backbone: Any, batch: MicroBatch) -> Tensor:
    """The hidden states of ``batch`` that predict its response tokens, [N, H] in the compute dtype."""
    hidden = backbone(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        packed=prepare_layout(batch.layout, batch.input_ids.device),
        use_cache=False,
    ).last_hidden_state
    predicting: Tensor = hidden[0].index_select(0, batch.predictors)
    return predicting


def release_gathered(module: nn.Module) -> None:
    """After a forward pass without gradient: drop the gathered weights, which no backward pass will.

    FSDP would keep them, and use them after the next update.
    """
    if not torch.is_grad_enabled():
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def load_policy(
    model_dir: str | Path,
    mesh: DeviceMesh,
    compute_dtype: str = "float32",
    trainable: bool = True,
    value_head: bool = False,
) -> Policy:
    """Load a Hugging Face causal language model from a local folder and shard it over ``mesh``.

    Master weights stay float32; with "bfloat16" FSDP casts them for the forward and backward pass and reduces
    the gradients in float32.

    Args:
        value_head: add one, for a critic that shares this model.

    Raises:
        FileNotFoundError: the folder holds no config.json.
        ValueError: unknown compute dtype.
    """
    if compute_dtype not in COMPUTE_DTYPES:
        raise ValueError(f"unknown compute dtype {compute_dtype!r}: choose one of {', '.join(COMPUTE_DTYPES)}")
    causal_lm = read_causal_lm(model_dir)
    device = torch.device(f"cuda:{torch.cuda.current_device()}" if mesh.device_type == "cuda" else "cpu")
    policy = Policy(causal_lm, device, ValueHead(causal_lm.config.hidden_size) if value_head else None)
    policy.requires_grad_(trainable).train(trainable)
    if policy.value_head is not None:
        shard_value_head(policy.value_head, mesh)
    shard(policy, causal_lm.base_model.layers, mesh, COMPUTE_DTYPES[compute_dtype])
    policy.note_shards()
    return policy


def read_causal_lm(model_dir: str | Path) -> Any:
    """The transformers model in ``model_dir``, float32 on the CPU.

    Raises:
        FileNotFoundError: the folder holds no config.json.
    """
    directory = Path(model_dir)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"no model in {directory}: config.json is missing; point the model path at a HF folder")
    transformers_logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation=PACKED,
        local_files_only=True,
        use_safetensors=True,
    )


def shard(module: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Apply FSDP2 to every decoder layer and to the root ``module``, in place."""
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    # With one rank there is nothing to free between forward and backward: resharding would only copy.
    reshard = mesh.size() > 1
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
    fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
