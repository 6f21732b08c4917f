"""What a step knows before it updates: order of the streams, shaped rewards, and which models are run for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from learner.batch import MicroBatch, build_rows, micro_batches
from learner.experience import Experience, StepSamples, collect_experience, gather_step, shaped_rewards, value_figures
from learner.samples import TrainSample
from learner.settings import TrainerSettings
from learner.trainer import Trainer

SampleMaker = Callable[..., list[TrainSample]]


def batches_of(samples: list[TrainSample]) -> list[MicroBatch]:
    """Micro-batches whose order is not the samples' order."""
    for index, sample in enumerate(samples):
        sample.index = index
    return [*micro_batches(build_rows(samples, 40), 60), MicroBatch.placeholder()]


def say_the_targets(batch: MicroBatch) -> dict[str, Tensor]:
    return {"values": batch.targets.float()}


def test_streams_come_in_the_order_of_the_samples(mesh: DeviceMesh, make_samples: SampleMaker) -> None:
    samples = make_samples(groups=5)
    batches = batches_of(samples)
    assert [index for batch in batches for index in batch.indices.tolist()] != list(range(len(samples)))
    step = gather_step(batches, samples, [say_the_targets(batch) for batch in batches])
    assert step.lengths.tolist() == [len(sample.response_ids) for sample in samples]
    assert step.groups.tolist() == [sample.group for sample in samples]
    assert step.rewards.tolist() == [sample.reward for sample in samples]
    tokens = [token for sample in samples for token in sample.response_ids.tolist()]
    assert step.scores["values"].tolist() == tokens
    assert step.behaviour.tolist() == [p for sample in samples for p in sample.behaviour_logprobs.tolist()]
    assert step.sequences.tolist() == [sample.index for sample in samples for _ in sample.response_ids]


def test_every_micro_batch_gets_its_own_tokens_back(mesh: DeviceMesh, make_samples: SampleMaker) -> None:
    samples = make_samples(groups=5)
    batches = batches_of(samples)
    settings = TrainerSettings(advantage="gae", critic="separate", gae_lambda=0.0, gamma=1.0, kl_coef=0.0)
    experience = collect_experience(batches, samples, say_the_targets, settings)
    for batch in batches[:-1]:
        streams = experience.of(batch)
        assert streams.values is not None
        assert streams.returns is not None
        assert torch.equal(streams.values, batch.targets.float())
        assert streams.advantages.shape == streams.returns.shape == batch.targets.shape
        assert (streams.proximal, streams.reference) == (None, None)
        # At lambda 0 the target of a state is the reward plus the value of the state after it.
        last = torch.cat([batch.sequences[1:] != batch.sequences[:-1], torch.tensor([True])])
        rewards = torch.tensor([samples[index].reward for index in batch.indices.tolist()])[batch.sequences]
        expected = torch.where(last, rewards, batch.targets.float().roll(-1))
        torch.testing.assert_close(streams.returns, expected)
    placeholder = experience.of(batches[-1])
    assert placeholder.advantages.tolist() == [0.0]


def step_samples() -> StepSamples:
    return StepSamples(
        lengths=torch.tensor([2, 1]),
        groups=torch.tensor([0, 0]),
        rewards=torch.tensor([5.0, -1.0], dtype=torch.float64),
        behaviour=torch.tensor([-1.0, -2.0, -3.0]),
        scores={"proximal": torch.tensor([-1.5, -2.0, -2.0]), "reference": torch.tensor([-1.0, -2.5, -4.0])},
    )


@pytest.mark.parametrize(
    ("changes", "expected", "kl"),
    [
        ({"kl_in": "loss", "kl_coef": 0.1}, [0.0, 5.0, -1.0], None),
        ({"kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.1}, [0.05, 4.95, -1.2], [-0.5, 0.5, 2.0]),
        ({"kl_in": "reward", "kl_estimator": "k2", "kl_coef": 1.0}, [-0.125, 4.875, -3.0], [0.125, 0.125, 2.0]),
    ],
)
def test_the_reward_falls_on_the_last_token_and_the_kl_on_every_one(
    changes: dict[str, Any], expected: list[float], kl: list[float] | None
) -> None:
    rewards, counted = shaped_rewards(step_samples(), TrainerSettings(**changes))
    assert rewards.tolist() == pytest.approx(expected)
    assert (None if counted is None else counted.tolist()) == (None if kl is None else pytest.approx(kl))


def test_without_a_proximal_score_the_kl_is_that_of_the_behaviour_policy() -> None:
    step = step_samples()
    del step.scores["proximal"]
    _, kl = shaped_rewards(step, TrainerSettings(kl_in="reward", kl_estimator="k1", proximal="loglinear"))
    assert kl is not None
    assert kl.tolist() == pytest.approx([0.0, 0.5, 1.0])


def test_explained_variance() -> None:
    returns = torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64)
    assert value_figures(returns + 7, returns)["explained_variance"] == pytest.approx(1.0)
    assert value_figures(torch.full_like(returns, 2.0), returns)["explained_variance"] == pytest.approx(0.0)
    assert value_figures(-returns, returns)["explained_variance"] == pytest.approx(-3.0)
    assert value_figures(returns, torch.ones_like(returns))["explained_variance"] == 0.0


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, {"policy": 0}),
        ({"minibatches": 2}, {"policy": 1}),
        ({"minibatches": 2, "proximal": "loglinear"}, {"policy": 0}),
        ({"kl_coef": 0.1}, {"policy": 0, "reference": 1}),
        ({"kl_coef": 0.1, "kl_in": "reward"}, {"policy": 1, "reference": 1}),
        ({"kl_coef": 0.1, "kl_in": "reward", "proximal": "loglinear"}, {"policy": 0, "reference": 1}),
        ({"advantage": "gae", "critic": "separate"}, {"policy": 0, "critic": 1}),
        ({"advantage": "gae", "critic": "shared", "proximal": "loglinear"}, {"policy": 1}),
    ],
)
def test_only_what_the_algorithm_reads_is_scored(
    mesh: DeviceMesh, model_dir: Path, make_samples: SampleMaker, changes: dict[str, Any], passes: dict[str, int]
) -> None:
    trainer = Trainer(TrainerSettings(**({"kl_coef": 0.0} | changes)), model_dir, mesh)
    counts = dict.fromkeys(passes, 0)
    for name in passes:

        def count(*_: object, name: str = name) -> None:
            counts[name] += not torch.is_grad_enabled()

        getattr(trainer, name).register_forward_hook(count)
    figures = trainer.step(make_samples())
    batches = int(figures["micro_batches"])
    assert counts == {name: number * batches for name, number in passes.items()}


def test_an_experience_knows_nothing_it_was_not_told() -> None:
    experience = Experience([1], {"advantages": torch.ones(1)}, {})
    assert experience.of(MicroBatch.placeholder()).returns is None
