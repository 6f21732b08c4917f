"""From scored groups to training samples, and the figures of one step that describe them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common import messages as m
from common.scores import InvalidOutput
from learner.samples import TrainSample

LENGTHS = {"length/think": "think_words", "length/query": "query_words"}


def is_zero_variance(group: m.ScoredGroup) -> bool:
    """Whether all samples earned the same: then every group-relative advantage is 0 and nothing is learned."""
    rewards = [score.reward for score in group.scores.scores]
    return max(rewards) - min(rewards) < 1e-9


def train_samples(group: m.ScoredGroup) -> list[TrainSample]:
    """The samples of a group as the trainer takes them; the arrays are views."""
    samples = []
    start = 0
    for header, score in zip(group.rollout.header.samples, group.scores.scores, strict=True):
        end = start + header.tokens
        samples.append(
            TrainSample(
                prompt_ids=group.rollout.prompt_ids,
                response_ids=group.rollout.token_ids[start:end],
                behaviour_logprobs=group.rollout.logprobs[start:end],
                versions=token_versions(header),
                reward=score.reward,
                group=group.ticket.ticket_id,
            )
        )
        start = end
    return samples


def token_versions(header: m.SampleHeader) -> NDArray[np.int32]:
    """int32 [T]: the policy version that drew each token of a sample."""
    versions = np.array([span.version for span in header.spans], dtype=np.int32)
    lengths = np.array([span.end - span.start for span in header.spans], dtype=np.int64)
    return versions.repeat(lengths)


def staleness_histogram(groups: Sequence[m.ScoredGroup], version: int) -> Counter[int]:
    """Tokens by staleness: version they are trained at minus version they were sampled with."""
    histogram: Counter[int] = Counter()
    for group in groups:
        for sample in group.rollout.header.samples:
            for span in sample.spans:
                histogram[version - span.version] += span.end - span.start
    return histogram


def describe_groups(groups: Sequence[m.ScoredGroup], version: int, metric: str) -> dict[str, float]:
    """Reward, the task's metric, lengths and staleness of the groups of one step.

    metric: the key of a score's metrics that is logged as `<metric>/train`; a sample without it counts 0.
    """
    scores = [score for group in groups for score in group.scores.scores]
    headers = [header for group in groups for header in group.rollout.header.samples]
    rewards = np.array([score.reward for score in scores])
    values = [score.metrics.get(metric, 0.0) for score in scores]
    histogram = staleness_histogram(groups, version)
    tokens = sum(histogram.values())
    figures = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/invalid_share": sum(isinstance(score, InvalidOutput) for score in scores) / len(scores),
        f"{metric}/train": float(np.mean(values)),
        "length/response_tokens": float(np.mean([header.tokens for header in headers])),
        "staleness/mean": sum(age * count for age, count in histogram.items()) / max(tokens, 1),
        "staleness/max": float(max(histogram, default=0)),
    }
    for name, key in LENGTHS.items():
        lengths = [score.metrics[key] for score in scores if key in score.metrics]
        if lengths:
            figures[name] = float(np.mean(lengths))
    for name in sorted({name for score in scores for name in score.metrics} - set(LENGTHS.values())):
        # Over the samples that have it: `format` over all of them, a rank over those that found something.
        figures[f"metric/{name}"] = float(np.mean([score.metrics[name] for score in scores if name in score.metrics]))
    reasons = Counter(score.reason for score in scores if isinstance(score, InvalidOutput))
    figures |= {f"invalid/{reason}": count / len(scores) for reason, count in reasons.items()}
    figures |= {f"staleness/tokens_at_{age}": float(count) for age, count in sorted(histogram.items())}
    return figures
