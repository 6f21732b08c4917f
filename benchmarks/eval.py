"""What does searching and scoring cost an evaluation whose texts come from vLLM?

The requests of the demo world (its training split, as it has the most) are evaluated as `deepretrieval eval` does:
texts by the actors' vLLM engine, each searched on a local PubMed server as soon as it is there, scored, and written to
disk. The rival is vLLM's offline `LLM.generate` on the same prompts with the same sampling, and nothing else. Greedy,
so that both generate the same tokens. Each has a process of its own, is warmed up on a few prompts first, and they take
turns; starting engine and server is in neither time. Prints one JSON line:

* `eval_per_s`, `vllm_per_s`: requests per second, medians over the rounds; `ratio`: median over the rounds of the two
  of the same round (1: searching is free);
* `requests`, `tokens`: how many, and tokens of all texts (of both, which must be about the same);
* `calls`: searches the engine was asked: well-formed and distinct ones; `format`: share of well-formed texts;
* `model`, `device`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.loop import STOP
from actors.prompts import chat_encoder
from common.config import Config, load_config
from common.messages import ChatMessage
from common.tasks.from_config import task_of
from deploy.assets import prepare_assets
from deploy.engines import answerer_of
from deploy.evaluation.methods import Judge, ModelAnswers
from deploy.evaluation.plan import Plan, Sampling, read_rows
from deploy.evaluation.progress import EvaluationProgress
from deploy.evaluation.records import RecordFile
from deploy.evaluation.run import Work, record_all
from deploy.generation import generator_of
from deploy.models import ModelSource
from deploy.search_process import own_search_server
from rewarders.scoring import Scorer

ROOT = Path(__file__).parents[1]
WARM_UP = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Hugging Face folder; default: the demo's, built on first use")
    parser.add_argument("--requests", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=["eval", "vllm"], help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of the demo's config, e.g. actor.dtype=bfloat16"
    )
    arguments = parser.parse_intermixed_args()
    plan = plan_of(arguments)
    if arguments.side is None:
        print(json.dumps(compare(plan, arguments)))
    elif arguments.side == "eval":
        print(json.dumps(asyncio.run(evaluate(plan))))
    else:
        print(json.dumps(generate(plan)))


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The demo's task and world with the model that is asked for."""
    given = [f"model.path={arguments.model.resolve()}"] if arguments.model else []
    fixed = ["actor.engine=vllm", "actor.concurrent_groups=64", "sampling.group_size=2", "data.heldout_split=train"]
    config = load_config(ROOT / "configs" / "demo.yaml", [*fixed, *given, *arguments.overrides])
    config = prepare_assets(config)
    model = Path(str(config.model.path))
    task = task_of(config)
    rows, _, data = read_rows(config, task, arguments.requests)
    sampling = Sampling(1, 0.0, 1.0, config.sampling.max_tokens, 0)
    return Plan(config, task, rows, data, ModelSource(model.name, model), sampling, "task", False, False)


def compare(plan: Plan, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turns."""
    rounds = []
    for number in range(arguments.rounds):
        sides = ["eval", "vllm"] if number % 2 == 0 else ["vllm", "eval"]
        found = {side: measured(side) for side in sides}
        rounds.append(found)
        rates = ", ".join(f"{side} {found[side]['per_s']:.1f}/s" for side in ("eval", "vllm"))
        print(f"round {number}: {rates}", file=sys.stderr)
    last = rounds[-1]
    assert last["eval"]["requests"] == last["vllm"]["requests"] == len(plan.rows)
    return {
        "eval_per_s": round(statistics.median(each["eval"]["per_s"] for each in rounds), 1),
        "vllm_per_s": round(statistics.median(each["vllm"]["per_s"] for each in rounds), 1),
        "ratio": round(statistics.median(each["eval"]["per_s"] / each["vllm"]["per_s"] for each in rounds), 3),
        "requests": len(plan.rows),
        "tokens": [last["eval"]["tokens"], last["vllm"]["tokens"]],
        "calls": last["eval"]["calls"],
        "format": round(last["eval"]["format"], 3),
        "model": plan.name,
        "device": last["vllm"]["device"],
    }


def measured(side: str) -> dict[str, Any]:
    """One side in a process of its own, with the same arguments."""
    command = [sys.executable, "-m", "benchmarks.eval", *sys.argv[1:], "--side", side]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=dict(os.environ))
    # vLLM has last words of its own.
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    found: dict[str, Any] = json.loads(line)
    return found


async def evaluate(plan: Plan) -> dict[str, Any]:
    """Ours: generate, search, score, write. What the warm-up searched is known, and not searched again."""
    assert plan.model is not None
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        async with (
            own_search_server(plan.config, base / "server.log") as config,
            generator_of(plan.model, plan.config) as texts,
            answerer_of(config, plan.task) as answerer,
        ):
            judge = Judge(Scorer(plan.task, answerer), config.rewarder.concurrent_groups)
            method = ModelAnswers(plan, texts, judge, None)
            await asyncio.gather(*(method.record(row, number) for number, row in enumerate(plan.rows[:WARM_UP])))
            judge.take_calls()
            work = Work(None, RecordFile(base / "queries.jsonl"), list(enumerate(plan.rows)), {})
            began = time.perf_counter()
            with EvaluationProgress("eval", len(plan.rows), len(plan.rows), Console(stderr=True)) as progress:
                await record_all(work, method, judge, progress)
            seconds = time.perf_counter() - began
            work.file.close()
        samples = [record.samples[0] for record in work.file.records.values()]
        return {
            "per_s": len(samples) / seconds,
            "requests": len(samples),
            "tokens": sum(sample.tokens for sample in samples),
            "calls": sum(record.calls for record in work.file.records.values()),
            "format": statistics.fmean(sample.metrics.get("format", 0.0) for sample in samples),
        }


def generate(plan: Plan) -> dict[str, Any]:
    """The rival: vLLM's offline generation, and nothing else."""
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    assert plan.model is not None
    assert plan.model.folder is not None
    prompts = prompts_of(plan, plan.model.folder)
    llm = LLM(str(plan.model.folder), **offline_options(plan.config, current_platform.is_cpu()))
    sampling = SamplingParams(
        temperature=0.0, max_tokens=plan.sampling.max_tokens, stop=[STOP], include_stop_str_in_output=True
    )
    llm.generate(prompts[:WARM_UP], sampling, use_tqdm=False)
    began = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    device = current_platform.get_device_name() if not current_platform.is_cpu() else "CPU"
    return {"per_s": len(outputs) / seconds, "requests": len(outputs), "tokens": tokens, "device": device}


def prompts_of(plan: Plan, model: Path) -> list[Any]:
    """Token ids, rendered before the clock starts."""
    encode = chat_encoder(model, plan.task.response_prefix)
    chats = [[ChatMessage(**message) for message in plan.task.messages(row)] for row in plan.rows]
    return [{"prompt_token_ids": encode(chat)} for chat in chats]


def offline_options(config: Config, on_cpu: bool) -> dict[str, Any]:
    """As the actors' engine is given them, where they matter for speed."""
    actor = config.actor
    common = {
        "dtype": actor.dtype,
        "max_model_len": actor.max_model_len,
        "max_num_seqs": actor.concurrent_groups * config.sampling.group_size,
        "enable_prefix_caching": True,
        "enforce_eager": on_cpu,
    }
    if on_cpu:
        return {**common, "kv_cache_memory_bytes": int(actor.kv_cache_gib * 2**30)}
    return {**common, "gpu_memory_utilization": actor.gpu_memory_share}


if __name__ == "__main__":
    main()
