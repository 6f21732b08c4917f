"""The policy: a Hugging Face causal language model, sharded with FSDP2, that scores responses.

Only the hidden states that predict a response token are scored, and their logits never exist whole
(``learner.logprobs``).
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

from learner.batch import MicroBatch
from learner.logprobs import check_linear_output, linear_logprobs

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Policy(nn.Module):
    """A causal language model whose forward pass returns the log-probabilities of response tokens."""

    causal_lm: Any  # a transformers model: untyped

    def __init__(self, causal_lm: nn.Module, device: torch.device) -> None:
        super().__init__()
        check_linear_output(causal_lm)
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
            attention_mask=batch.attention_mask(),
            use_cache=False,
        ).last_hidden_state
        predicting = hidden.flatten(0, 1).index_select(0, batch.predictors)
        # Not by calling the layer, but here, inside the root's forward pass, where FSDP has its weight gathered.
        head = self.causal_lm.get_output_embeddings()
        return linear_logprobs(predicting, head.weight, batch.targets, temperature, head.bias)

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
        ValueError: unknown compute dtype, or a model that ``check_linear_output`` refuses.
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
        attn_implementation="sdpa",
        local_files_only=True,
        use_safetensors=True,
    )
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
