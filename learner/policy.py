"""The policy: a Hugging Face causal language model, sharded with FSDP2, that scores responses.

Only the hidden states that predict a response token go through the output layer, so no [batch, sequence,
vocabulary] tensor ever exists for prompt or padding positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from learner.adapters import Adapter, adapters_off, find_adapters, merge, original_name
from learner.batch import MicroBatch


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
        self._shards: dict[str, nn.Parameter] = {}
        self._adapters: dict[str, Adapter] = {}
        self.note_shards()

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

    @torch.no_grad()
    def reference_logprobs(self, batch: MicroBatch, temperature: float) -> Tensor:
        """Log-probabilities, float32 [N] and without gradient, under the weights that training leaves alone.

        With adapters these are the weights without them; in a frozen model, all. All ranks call this together.
        """
        with adapters_off(self.causal_lm):
            return self.response_logprobs(batch, temperature)[0]

    def note_shards(self) -> None:
        """Remember the parameters as they are now: to be called once they are sharded, before any forward pass."""
        self._shards = dict(self.causal_lm.named_parameters())
        self._adapters = find_adapters(self.causal_lm)

    def named_shards(self) -> dict[str, nn.Parameter]:
        """This rank's float32 master weights (DTensors once sharded) by name: those that are trained.

        A parameter under several names, as an output layer tied to the input embedding, comes once. Unlike
        ``named_parameters()`` these never are the gathered weights in the compute dtype.
        """
        return {name: parameter for name, parameter in self._shards.items() if parameter.requires_grad}

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole model under its Hugging Face names, float32 on the CPU, as copies; adapters are added in.

        All ranks call this together; rank 0 gets the tensors, the others an empty dict. An output layer tied
        to the input embedding is left out, as in Hugging Face checkpoints.
        """
        leads = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        added = {name for adapter in self._adapters.values() for name in (adapter.down, adapter.up)}
        state: dict[str, Tensor] = {}
        for name in self._shards:
            if name in added:
                continue
            weight = self._gathered(name)
            adapter = self._adapters.get(name)
            if adapter is not None:
                down, up = self._gathered(adapter.down), self._gathered(adapter.up)
                weight = merge(weight, down, up, adapter.scale) if leads else weight
            if leads:
                state[original_name(name)] = weight.to("cpu", torch.float32, copy=True)
        return state

    def _gathered(self, name: str) -> Tensor:
        parameter = self._shards[name].detach()
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
