"""The policy: a Hugging Face causal language model, sharded with FSDP2, that scores responses.

Only the hidden states that predict a response token are scored, and their logits never exist whole
(``learner.logprobs``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from learner.adapters import Adapter, adapters_off, find_adapters, merge, original_name
from learner.attention import prepare_layout
from learner.batch import MicroBatch
from learner.logprobs import check_linear_output, linear_logprobs
from learner.value_head import ValueHead


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
        check_linear_output(causal_lm)
        self.causal_lm = causal_lm
        self.value_head = value_head
        self.device = device
        self._shards: dict[str, nn.Parameter] = {}
        self._adapters: dict[str, Adapter] = {}
        self.note_shards()

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
        # Not by calling the layer, but here, inside the root's forward pass, where FSDP has its weight gathered.
        head = self.causal_lm.get_output_embeddings()
        logprobs, entropy = linear_logprobs(predicting, head.weight, batch.targets, temperature, head.bias)
        return ResponseScores(logprobs, entropy, None if self.value_head is None else self.value_head(predicting))

    def score(self, batch: MicroBatch, temperature: float) -> ResponseScores:
        """``forward`` through the module's hooks, which is what gathers the FSDP shards."""
        scores: ResponseScores = self(batch, temperature)
        release_gathered(self)
        return scores

    @torch.no_grad()
    def reference_logprobs(self, batch: MicroBatch, temperature: float) -> Tensor:
        """Log-probabilities, float32 [N] and without gradient, under the weights that training leaves alone.

        With adapters these are the weights without them; in a frozen model, all. All ranks call this together.
        """
        with adapters_off(self.causal_lm):
            return self.score(batch, temperature).logprobs

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
