"""What the trainer can be told: checks, schedules, and that the configuration offers what the learner has."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from common.config import Config, algorithm
from learner import advantages
from learner.corrections import CORRECTIONS
from learner.losses import DENOMINATORS, KL_ESTIMATORS, LOSSES
from learner.main import trainer_settings
from learner.optimizer import learning_rate
from learner.settings import CRITICS, KL_PLACES, PROXIMALS, TrainerSettings


def test_the_configuration_offers_what_the_learner_has() -> None:
    def choices(field: str) -> set[str]:
        annotation = algorithm.AlgorithmConfig.model_fields[field].annotation
        nested = [get_args(part) for part in get_args(annotation)]
        return {value for part in (nested if any(nested) else [get_args(annotation)]) for value in part}

    assert choices("advantage") == set(advantages.ADVANTAGES)
    assert choices("loss") == set(LOSSES)
    assert choices("correction") == set(CORRECTIONS)
    assert choices("kl_estimator") == set(KL_ESTIMATORS)
    assert choices("denominator") == set(DENOMINATORS)
    assert choices("critic") == set(CRITICS)
    assert choices("proximal") == set(PROXIMALS)
    assert choices("kl_in") == set(KL_PLACES)
    assert algorithm.GROUP_RELATIVE == advantages.GROUP_RELATIVE
    assert algorithm.NEEDS_CRITIC == advantages.NEEDS_CRITIC


def test_the_trainer_is_told_what_the_configuration_says() -> None:
    config = Config.model_validate(
        {
            "algorithm": {"advantage": "gae", "critic": "shared", "critic_lr": 0.5, "kl_in": "reward", "dual_clip": 3},
            "learner": {"lr": 0.25, "minibatches": 4},
            "sampling": {"temperature": 0.6, "max_tokens": 77},
        }
    )
    settings = trainer_settings(config)
    assert (settings.advantage, settings.critic, settings.critic_lr) == ("gae", "shared", 0.5)
    assert (settings.kl_in, settings.kl_estimator, settings.dual_clip) == ("reward", "k1", 3.0)
    assert (settings.lr, settings.minibatches, settings.temperature, settings.max_response_tokens) == (0.25, 4, 0.6, 77)
    defaults = trainer_settings(Config())
    for name in (
        "clip_low",
        "value_clip",
        "value_coef",
        "critic_epochs",
        "importance_low",
        "importance_cap",
        "gae_lambda",
        "critic_lambda",
        "whitening",
    ):
        assert getattr(defaults, name) == getattr(TrainerSettings(), name), name


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]),
    ],
)
def test_learning_rate(schedule: str, expected: list[float]) -> None:
    settings = TrainerSettings(warmup_steps=4, total_steps=8, lr_schedule=schedule)
    rates = [learning_rate(step, 2.0, settings) / 2.0 for step in range(8)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "ppo"}, "unknown loss 'ppo': choose one of ppo_clip, decoupled_ppo"),
        ({"advantage": "gea"}, "unknown advantage 'gea'"),
        ({"critic": "both"}, "unknown critic 'both': choose one of none, separate, shared"),
        ({"value_clip": 0.0}, "value_clip must be positive"),
        ({"gamma": 1.5}, "gamma"),
        ({"critic_lambda": -0.1}, "critic_lambda must be in"),
        ({"whitening": "batch"}, "unknown whitening 'batch': choose one of step, group"),
        ({"critic_epochs": 0}, "critic_epochs must be positive"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"kl_coef": -1.0}, "kl_coef must not be negative"),
        ({"lr_schedule": "linear"}, "needs total_steps"),
        ({"clip_low": 2.0}, "clip_low"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerSettings(**changes)
