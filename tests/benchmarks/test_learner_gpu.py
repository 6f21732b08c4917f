"""The GPU benchmark at toy size, and its count of FLOPs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.learner_gpu import model_config, step_flops

ROOT = Path(__file__).parents[2]


def test_it_runs_without_a_gpu() -> None:
    options = "--model toy --device cpu --samples 4 --prompt 5 --response 7 --micro-batch-tokens 32 --steps 1"
    command = [sys.executable, "-m", "benchmarks.learner_gpu", *options.split(), "--lora-rank", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert (figures["model"], figures["device"], figures["ranks"], figures["mfu"]) == ("toy", "cpu", 1, None)
    assert figures["tokens_per_s"] == pytest.approx(4 * 12 / figures["step_s"], rel=0.01)


@pytest.mark.parametrize(("model", "billions"), [("0.5B", 0.494), ("1.5B", 1.544), ("3B", 3.086)])
def test_flops_are_six_per_parameter_and_token_and_attention(model: str, billions: float) -> None:
    config = model_config(model)
    short, long = step_flops(config, 1, 0, 1), step_flops(config, 1, 0, 1000)
    attention = 6 * config.num_hidden_layers * config.hidden_size
    assert short == pytest.approx(6 * billions * 1e9 + attention, rel=1e-3)
    assert long == pytest.approx(1000 * 6 * billions * 1e9 + attention * 1000**2, rel=1e-3)
    prompt_only = step_flops(config, 2, 1000, 0)
    assert prompt_only == pytest.approx(2 * (long - 6000 * config.vocab_size * config.hidden_size))
