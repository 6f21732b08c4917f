"""The value head: from the hidden state that predicts a token to the value of the state before that token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from learner.sharding import shard


class ValueHead(nn.Module):
    """A linear map to one number. It starts at 0, so that the first advantages are the rewards themselves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Hidden states [N, H] of any float dtype -> values float32 [N], in units of the reward."""
        values: Tensor = self.linear(states.float())
        return values.sum(-1)  # not squeeze: FSDP hangs its hooks on outputs and warns of views


def shard_value_head(head: ValueHead, mesh: DeviceMesh, offload: str = "none") -> None:
    """Make the head an FSDP unit of its own, in float32 whatever the backbone computes in.

    A value is a sum over all hidden channels: bfloat16 would round a return of 5 to steps of 0.03.
    """
    shard(head, (), mesh, torch.float32, offload)
