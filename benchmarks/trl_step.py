"""TRL's side of `benchmarks.learner_vs_trl`; run by the interpreter that has trl, so it imports nothing of ours.

`python benchmarks/trl_step.py MODEL BATCH --rows N --steps N --threads N` trains on the batch with TRL's own
`GRPOTrainer.train()`: its data loader, micro-batches, loss, clipping and optimizer. Only the samples are handed in
where it would have generated and scored them. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from typing import Any

import numpy as np
import psutil
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

GROUP = 8


class GivenSamples(GRPOTrainer):
    """GRPO on samples that are there already."""

    samples: dict[str, torch.Tensor]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.samples.items()}


class StepTimes(TrainerCallback):
    """Seconds of every optimizer step, micro-batches included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def read_samples(path: str) -> dict[str, torch.Tensor]:
    """The batch as GRPOTrainer lays it out: prompts padded on the left, responses on the right."""
    batch = np.load(path, allow_pickle=False)
    lengths = batch["lengths"]
    responses = np.split(batch["responses"].astype(np.int64), np.cumsum(lengths)[:-1])
    completions = np.zeros((len(lengths), lengths.max()), dtype=np.int64)
    mask = np.arange(lengths.max()) < lengths[:, None]
    completions[mask] = np.concatenate(responses)
    prompts = batch["prompts"].astype(np.int64)[batch["groups"]]
    return {
        "prompt_ids": torch.from_numpy(prompts),
        "prompt_mask": torch.ones(prompts.shape, dtype=torch.long),
        "completion_ids": torch.from_numpy(completions),
        "completion_mask": torch.from_numpy(mask.astype(np.int64)),
        "advantages": torch.from_numpy(batch["advantages"].astype(np.float32)),
        "num_items_in_batch": torch.tensor(int(lengths.sum())),
    }


def build_trainer(model_dir: str, folder: str, samples: int, rows: int, steps: int) -> GivenSamples:
    """TRL's defaults but for what both sides share: float32, no checkpointing, one learning rate, no decay."""
    config = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=samples // rows,
        num_generations=GROUP,
        max_steps=steps,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    words = {"<pad>": 0, "<eos>": 1, "word": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    return GivenSamples(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["word"] * samples}),
        processing_class=tokenizer,
    )


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("batch")
    parser.add_argument("--rows", type=int, required=True, help="per_device_train_batch_size")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    samples = read_samples(arguments.batch)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            arguments.model, folder, len(samples["advantages"]), arguments.rows, steps=arguments.steps
        )
        trainer.samples = samples
        times = StepTimes()
        trainer.add_callback(times)
        before = psutil.Process().memory_info().rss
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # Made in the first step, where ours has them from the start.
    moments = 2 * sum(parameter.nbytes for parameter in trainer.model.parameters())
    first = trainer.state.log_history[0]
    versions = {module.__name__: module.__version__ for module in (trl, torch, transformers)}
    result = {
        "seconds": times.seconds,
        "extra": peak - before - moments,
        "loss": first["loss"],
        "grad_norm": first["grad_norm"],
    }
    print(json.dumps(result | {"versions": versions}))


if __name__ == "__main__":
    main()
