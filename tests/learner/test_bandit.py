"""Every advantage with every loss learns which token pays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM

from learner.advantages import ADVANTAGES, NEEDS_CRITIC
from learner.losses import LOSSES
from learner.samples import TrainSample
from learner.settings import TrainerSettings
from learner.trainer import Trainer

PROMPT = np.array([5, 6, 9], dtype=np.int32)
WANTED = 7
VERSION = np.zeros(1, dtype=np.int32)
ROUNDS, DRAWS = 10, 128


def settings_of(advantage: str, loss: str) -> TrainerSettings:
    return TrainerSettings(
        advantage=advantage,
        loss=loss,
        critic="shared" if advantage in NEEDS_CRITIC else "none",
        denominator="sequence_mean" if loss == "gspo" else "token_mean",
        lr=0.01,
        critic_lr=0.01,
        kl_coef=0.0,
        weight_decay=0.0,
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_a_reward_for_one_token_makes_it_probable(mesh: DeviceMesh, model_dir: Path, advantage: str, loss: str) -> None:
    trainer = Trainer(settings_of(advantage, loss), model_dir, mesh)
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(ROUNDS):
        plain.load_state_dict(trainer.full_state_dict(), strict=False)
        with torch.no_grad():
            table = plain(torch.from_numpy(PROMPT).long()[None]).logits[0, -1].log_softmax(-1)
        # Half of the samples explore uniformly: the correction has to make up for it.
        behaviour = (0.5 * table.exp() + 0.5 / len(table)).log()
        tokens = torch.multinomial(behaviour.exp(), DRAWS, replacement=True, generator=generator)
        tokens[0] = WANTED
        samples = [
            TrainSample(
                PROMPT, token[None].int().numpy(), behaviour[token][None].numpy(), VERSION, float(token == WANTED), 0
            )
            for token in tokens
        ]
        trainer.step(samples)
        shares.append(float(table[WANTED].exp()))
    assert shares[0] < 0.05
    assert shares[-1] > 0.5
