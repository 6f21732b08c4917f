"""PPO with a critic as one writes it for one sample at a time: no packing, no streams, nothing of the learner's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from learner.samples import TrainSample
from learner.settings import TrainerSettings


class PlainPPO:
    """Clipped PPO, GAE whitened over the step, KL k1 in the reward, clipped value loss, AdamW without weight decay.

    The critic's targets have their own lambda, and a separate critic its own number of passes.
    """

    def __init__(self, settings: TrainerSettings, model_dir: Path) -> None:
        self.settings = settings
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self.frozen = copy.deepcopy(self.model)
        self.backbone = self.model.model if settings.critic == "shared" else copy.deepcopy(self.model.model)
        self.head = nn.Linear(self.model.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        critic = list(self.head.parameters())
        if settings.critic == "separate":
            critic += list(self.backbone.parameters())
        self.optimizers = [
            self._adam(list(self.model.parameters()), settings.lr),
            self._adam(critic, settings.critic_lr),
        ]

    def step(self, samples: Sequence[TrainSample], minibatches: Sequence[Sequence[int]]) -> None:
        """Train on ``samples``; ``minibatches`` says which ones each update reads, by place."""
        with torch.no_grad():
            old = [self._logprobs(self.model, sample) for sample in samples]
            values = [self._values(sample) for sample in samples]
            rewards = []
            for sample, logprobs in zip(samples, old, strict=True):
                reward = -self.settings.kl_coef * (logprobs - self._logprobs(self.frozen, sample))
                reward[-1] += sample.reward
                rewards.append(reward)
        lam, critic_lam = self.settings.gae_lambda, self.settings.critic_lambda
        raw = [self._gae(reward, value, lam) for reward, value in zip(rewards, values, strict=True)]
        returns = [
            value + self._gae(reward, value, lam if critic_lam is None else critic_lam)
            for reward, value in zip(rewards, values, strict=True)
        ]
        every = torch.cat(raw)
        mean, std = every.mean(), every.std(correction=0)
        for chosen in minibatches:
            advantages = [(one - mean) / (std + 1e-6) for one in raw]
            self._update(samples, old, values, advantages, returns, chosen)
        for _ in range(1, self.settings.critic_epochs):
            for chosen in minibatches:
                self._descend(self.optimizers[1:], self._value_loss(samples, values, returns, chosen))

    def _gae(self, rewards: Tensor, values: Tensor, lam: float) -> Tensor:
        advantages = torch.zeros_like(rewards)
        following_advantage = following_value = 0.0
        for t in reversed(range(len(rewards))):
            delta = float(rewards[t]) + self.settings.gamma * following_value - float(values[t])
            following_advantage = delta + self.settings.gamma * lam * following_advantage
            following_value = float(values[t])
            advantages[t] = following_advantage
        return advantages

    def _update(
        self,
        samples: Sequence[TrainSample],
        old: Sequence[Tensor],
        values: Sequence[Tensor],
        advantages: Sequence[Tensor],
        returns: Sequence[Tensor],
        chosen: Sequence[int],
    ) -> None:
        settings = self.settings
        tokens = sum(len(samples[i].response_ids) for i in chosen)
        policy_loss = torch.zeros(())
        for i in chosen:
            ratio = (self._logprobs(self.model, samples[i]) - old[i]).exp()
            clipped = ratio.clip(1 - settings.clip_low, 1 + settings.clip_high)
            policy_loss = policy_loss + torch.max(-advantages[i] * ratio, -advantages[i] * clipped).sum() / tokens
        weight = settings.value_coef if settings.critic == "shared" else 1.0
        self._descend(self.optimizers, policy_loss + weight * self._value_loss(samples, values, returns, chosen))

    def _value_loss(
        self, samples: Sequence[TrainSample], values: Sequence[Tensor], returns: Sequence[Tensor], chosen: Sequence[int]
    ) -> Tensor:
        clip = self.settings.value_clip
        assert clip is not None
        tokens = sum(len(samples[i].response_ids) for i in chosen)
        loss = torch.zeros(())
        for i in chosen:
            now = self._values(samples[i])
            near = values[i] + (now - values[i]).clip(-clip, clip)
            loss = loss + 0.5 * torch.max((now - returns[i]) ** 2, (near - returns[i]) ** 2).sum() / tokens
        return loss

    def _descend(self, optimizers: Sequence[torch.optim.Optimizer], loss: Tensor) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], self.settings.grad_clip)
            optimizer.step()

    def _logprobs(self, model: nn.Module, sample: TrainSample) -> Tensor:
        table = model(_ids(sample)).logits[0, len(sample.prompt_ids) - 1 : -1].log_softmax(-1)
        return table.gather(1, torch.from_numpy(sample.response_ids).long()[:, None])[:, 0]

    def _values(self, sample: TrainSample) -> Tensor:
        states = self.backbone(_ids(sample)).last_hidden_state[0, len(sample.prompt_ids) - 1 : -1]
        values: Tensor = self.head(states)[:, 0]
        return values

    def _adam(self, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=lr, eps=self.settings.adam_epsilon, weight_decay=0.0)


def _ids(sample: TrainSample) -> Tensor:
    return torch.cat([torch.from_numpy(sample.prompt_ids), torch.from_numpy(sample.response_ids)]).long()[None]
