"""README.md of an exported policy: what it is, how good it was, how it was trained, how it is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from common.config import Config
from common.statistics import Interval
from common.tasks import Row
from common.tasks.from_config import task_of
from common.tracking.heldout import Evaluation, HeldoutResult
from deploy.plots import baseline_label

# Where the hub's client keeps what it downloads.
_HUB_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")


def model_card(config: Config, step: int, parameters: int, dtype: str, evaluation: Evaluation) -> str:
    """The card, as Markdown with the hub's metadata on top. It names no path, address or mail of the run's machine.

    Args:
        step: training steps done.
        parameters: number of weights.
        dtype: of the exported weights.
        evaluation: the run's held-out results.

    Raises:
        ConfigError: the run's task, where it is the user's own, cannot be imported here.
    """
    parts = (
        _metadata(config),
        _introduction(config, step, parameters, dtype),
        _heldout(step, evaluation),
        _prompt(config),
        _loading(config),
        _training(config),
        "## Licence\n\nTo be filled in by whoever publishes this: the base model's licence holds for these weights.\n",
    )
    return "\n".join(parts)


def base_model_name(path: str) -> tuple[str, bool]:
    """What the model trained from is called, and whether that is its id on the hub."""
    if found := _HUB_CACHE.search(f"{Path(path).as_posix()}/"):
        return f"{found[1]}/{found[2]}", True
    return Path(path).name, False


def _metadata(config: Config) -> str:
    base, on_hub = base_model_name(config.model.path or "")
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if on_hub:
        fields["base_model"] = base
    fields["tags"] = ["deepretrieval", "reinforcement-learning", "query-rewriting", config.task.name]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}# license: fill in, the base model's\n---\n"


def _introduction(config: Config, step: int, parameters: int, dtype: str) -> str:
    task, search = task_of(config), config.search
    reasoning = "with a <think> part" if task.reasoning else "without reasoning"
    facts = {
        "base model": base_model_name(config.model.path or "")[0],
        "parameters": f"{parameters:,} ({dtype})",
        "task": task.name,
        "search engine": f"{search.engine}, first {task.top_k:,} results by {search.sort}",
        "prompt": f"{config.task.prompt}, {reasoning}",
        "training": f"{step} steps of {_samples_per_step(config)} samples, {config.algorithm.advantage} with "
        f"{config.algorithm.loss}, at most {config.learner.max_staleness} policy versions behind",
    }
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    return (
        f"# {config.run.name}, step {step}\n\nWrites the query that makes a search engine return what a request asks "
        "for. Trained by reinforcement learning against the engine itself, after "
        f"[DeepRetrieval](https://arxiv.org/abs/2503.00223).\n\n| | |\n| --- | --- |\n{rows}"
    )


def _samples_per_step(config: Config) -> int:
    return config.learner.groups_per_step * config.sampling.group_size


def _heldout(step: int, evaluation: Evaluation) -> str:
    measured = [result for result in evaluation.history if result.rows and result.version <= step]
    if not measured:
        return "## Held-out results\n\nNot measured.\n"
    newest = measured[-1]
    rows = [(baseline_label(name), item) for name, item in evaluation.shown_baselines().items()]
    if measured[0].version == 0 < newest.version:
        rows.append(("before training", measured[0].interval()))
    rows.append((f"**step {newest.version}**", newest.interval()))
    return (
        f"## Held-out results\n\nMean {newest.metric} over {len(newest.rows)} requests that were never trained on, "
        f"greedy decoding, 95 % bootstrap interval.{_other_step(step, newest)}\n\n"
        f"| | {newest.metric} | interval |\n| --- | ---: | --- |\n" + "".join(map(_row, rows))
    )


def _other_step(step: int, newest: HeldoutResult) -> str:
    return "" if newest.version == step else f" The newest one measured is {step - newest.version} steps older."


def _row(entry: tuple[str, Interval]) -> str:
    name, item = entry
    return f"| {name} | {item.mean:.4f} | {item.low:.4f} to {item.high:.4f} |\n"


def _prompt(config: Config) -> str:
    task = task_of(config)
    messages = task.messages(Row("example", "THE REQUEST", tables="CREATE TABLE …" if "database" in task.needs else ""))
    opened = f" The prompt opens the answer itself, with {task.response_prefix!r}." if task.response_prefix else ""
    return (
        "## Prompt\n\nThese chat messages, through the tokenizer's chat template; the answer is a JSON object with the "
        f"key `{task.answer_key}` in `<answer>` tags.{opened}\n\n"
        f"```json\n{json.dumps(messages, indent=1, ensure_ascii=False)}\n```\n"
    )


def _loading(config: Config) -> str:
    tokens = config.sampling.max_tokens
    return f"""\
## Loading it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**prompt, do_sample=False)
print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```

```python
from vllm import LLM, SamplingParams

output = LLM(FOLDER).chat(messages, SamplingParams(temperature=0, max_tokens={tokens}))
print(output[0].outputs[0].text)
```

`deepretrieval train CONFIG model.path=FOLDER` trains on from here. `generation_config.json` holds the sampling of the
training rollouts; the results above are greedy.
"""


def _training(config: Config) -> str:
    sections = ("task", "sampling", "algorithm", "learner")
    shown: dict[str, Any] = {name: getattr(config, name).model_dump(mode="json") for name in sections}
    shown["task"] = {key: value for key, value in shown["task"].items() if key != "reward"} | {
        "reward": {key: value for key, value in shown["task"]["reward"].items() if value is not None}
    }
    shown["data"] = {
        "corpus": Path(config.data.corpus).name,
        "train_split": config.data.train_split,
        "heldout_split": config.data.heldout_split,
    }
    shown["search"] = config.search.model_dump(mode="json", include={"engine", "retmax", "sort"})
    text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
    return f"## Training configuration\n\n```yaml\n{text}```\n"
