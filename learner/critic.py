"""The critic as a model of its own (`algorithm.critic: separate`); a shared one is the policy's `value_head`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from learner.batch import MicroBatch
from learner.loading import DEFAULT, LoadSettings, prepare_layers, read_causal_lm
from learner.policy import predicting_states, release_gathered
from learner.sharding import COMPUTE_DTYPES, shard
from learner.value_head import ValueHead, shard_value_head


class Critic(nn.Module):
    """A language model's backbone under a value head."""

    backbone: Any  # a transformers model: untyped

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = ValueHead(int(self.backbone.config.hidden_size))
        self._named_shards = dict(self.named_parameters())

    def forward(self, batch: MicroBatch) -> Tensor:
        """Value of the state before each response token of ``batch``, float32 [N]."""
        values: Tensor = self.head(predicting_states(self.backbone, batch))
        return values

    def values(self, batch: MicroBatch) -> Tensor:
        """``forward`` through the module's hooks, which is what gathers the FSDP shards."""
        values: Tensor = self(batch)
        release_gathered(self)
        return values

    def named_shards(self) -> dict[str, nn.Parameter]:
        """This rank's float32 master weights; see ``Policy.named_shards``."""
        return self._named_shards

    def note_shards(self) -> None:
        """Remember the parameters as they are once sharded."""
        self._named_shards = dict(self.named_parameters())


def load_critic(model_dir: str | Path, mesh: DeviceMesh, settings: LoadSettings = DEFAULT) -> Critic:
    """A critic that starts from the language model in ``model_dir``, as the original's does, sharded like the policy.

    All its weights are trained, also where the policy trains adapters only.

    Raises:
        FileNotFoundError: the folder holds no config.json.
    """
    critic = Critic(read_causal_lm(model_dir, torch.float32).base_model)
    critic.train()
    layers = critic.backbone.layers
    prepare_layers(layers, settings)
    shard_value_head(critic.head, mesh, settings.offload)
    shard(critic, layers, mesh, COMPUTE_DTYPES[settings.compute_dtype], settings.offload)
    critic.note_shards()
    return critic
