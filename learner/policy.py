"""The policy: a Hugging Face causal language model, sharded with FSDP2, that scores responses.

Only the hidden states that predict a response token go through the output layer, so no [batch, sequence,
vocabulary] tensor ever exists for prompt positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from learner.attention import PACKED, check_attention, prepare_layout
from learner.batch import MicroBatch

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


class Policy(nn.Module):
    """A causal language model whose forward pass returns the log-probabilities of response tokens."""

    causal_lm: Any  # a transformers model: untyped

    def __init__(self, causal_lm: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.device = device
        self._named_shards = dict(causal_lm.named_parameters())

    @property
    def config(self) -> Any:
        """The model's Hugging Face configuration."""
        return self.causal_lm.config

    def forward(self, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """Score the responses of ``batch`` (already on the policy's device).

        Args:
            temperature: the sampling temperature of the behaviour policy, > 0; logits are divided by it in
                float32 as the engine does, so that both sides speak of the same distribution.

        Returns:
            Log-probability of every response token and entropy of its distribution in nats, both float32 [N].
        """
        hidden = self.causal_lm.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            packed=prepare_layout(batch.layout, self.device),
            use_cache=False,
        ).last_hidden_state
        predicting = hidden[0].index_select(0, batch.predictors)
        logits = self.causal_lm.get_output_embeddings()(predicting)
        logprobs, entropy = SelectedLogprobs.apply(logits, batch.targets, temperature)
        return logprobs, entropy

    def response_logprobs(self, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """``forward`` through the module's hooks, which is what gathers the FSDP shards."""
        logprobs, entropy = self(batch, temperature)
        if not torch.is_grad_enabled():
            # Without a backward pass FSDP would keep the gathered weights, and use them after the next
            # update.
            for module in self.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return logprobs, entropy

    def named_shards(self) -> dict[str, nn.Parameter]:
        """This rank's float32 master weights (DTensors once sharded) by Hugging Face name.

        A parameter under several names, as an output layer tied to the input embedding, comes once. Unlike
        ``named_parameters()`` these never are the gathered weights in the compute dtype.
        """
        return self._named_shards

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


def load_policy(
    model_dir: str | Path, mesh: DeviceMesh, compute_dtype: str = "float32", trainable: bool = True
) -> Policy:
    """Load a Hugging Face causal language model from a local folder and shard it over ``mesh``.

    Master weights stay float32; with "bfloat16" FSDP casts them for the forward and backward pass and reduces
    the gradients in float32. Each decoder layer is one FSDP unit, embeddings and output layer belong to the
    root.

    Raises:
        FileNotFoundError: the folder holds no config.json.
        ValueError: unknown compute dtype, or a model with another attention than packed rows have.
    """
    directory = Path(model_dir)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"no model in {directory}: config.json is missing; point the model path at a HF folder")
    if compute_dtype not in COMPUTE_DTYPES:
        raise ValueError(f"unknown compute dtype {compute_dtype!r}: choose one of {', '.join(COMPUTE_DTYPES)}")
    transformers_logging.disable_progress_bar()
    causal_lm = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation=PACKED,
        local_files_only=True,
        use_safetensors=True,
    )
    check_attention(causal_lm)
    device = torch.device(f"cuda:{torch.cuda.current_device()}" if mesh.device_type == "cuda" else "cpu")
    policy = Policy(causal_lm, device)
    policy.requires_grad_(trainable).train(trainable)
    return shard(policy, mesh, COMPUTE_DTYPES[compute_dtype])


def shard(policy: Policy, mesh: DeviceMesh, compute_dtype: torch.dtype) -> Policy:
    """Apply FSDP2 to every decoder layer and to the root, in place."""
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    # With one rank there is nothing to free between forward and backward: resharding would only copy.
    reshard = mesh.size() > 1
    for layer in policy.causal_lm.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
    fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    policy._named_shards = dict(policy.causal_lm.named_parameters())
    return policy
