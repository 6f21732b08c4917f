"""`deepretrieval eval`: from a config, a run or flags to figures."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from common.config import Config, load_config
from common.tasks.from_config import task_of
from common.tracking.jsonl import replace_file
from deploy.errors import LaunchError
from deploy.evaluation.plan import (
    Plan,
    Sampling,
    for_published_prompts,
    quality_metrics,
    read_rows,
    with_standard_metrics,
)
from deploy.model_choice import (
    MODEL_HELP,
    add_endpoint_arguments,
    add_key_flags,
    config_path,
    flag_overrides,
    model_of,
    settled_config,
)
from deploy.models import ModelSource

if TYPE_CHECKING:
    from rich.console import Console

    from deploy.evaluation.records import EvaluationFolder, QueryRecord
    from deploy.evaluation.results import Results

RAW: Final = "none"
DEFAULT_FOLDER: Final = "evaluations"
# Flags that are keys of the config.
_KEYS: Final = {"task": "task.name", "engine": "search.engine", "corpus": "data.corpus", "split": "data.heldout_split"}


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register it with the command line."""
    parser = commands.add_parser("eval", help="what a model's answers are worth, beside what simple queries are worth")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="CONFIG|RUN key=value",
        help="a config file, or the folder of a run (its newest checkpoint); then dotted overrides",
    )
    _add_subject(parser)
    parser.add_argument("--samples", type=int, default=1, metavar="K", help="answers per request; default: 1")
    parser.add_argument(
        "--temperature",
        type=float,
        help="default: 0 (greedy); with several samples: sampling.temperature of the config",
    )
    parser.add_argument("--limit", type=int, help="the first so many requests only")
    parser.add_argument("--baselines", action="store_true", help="evaluate the fixed queries too, and compare")
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="take all searches from this recording")
    parser.add_argument("--run-file", type=Path, metavar="FILE", help="write what was returned, in TREC's format")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"default: {DEFAULT_FOLDER}/MODEL-TASK-SPLIT")
    parser.set_defaults(handler=_eval, words_anywhere=True)


def _add_subject(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        help=f"{MODEL_HELP}; or {RAW}: the requests themselves as queries; default: the run's, or the config's",
    )
    add_endpoint_arguments(parser)
    parser.add_argument(
        "--prompt",
        choices=["task", "original"],
        default="task",
        help="original: the prompt that was published with each row, for the released checkpoints",
    )
    add_key_flags(parser, _KEYS)


def _eval(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from deploy.evaluation.records import EvaluationFolder

    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    plan = plan_of(arguments, console)
    folder = EvaluationFolder(arguments.out or Path(DEFAULT_FOLDER) / _default_name(plan))
    with folder.alone():
        if folder.claim(plan.fingerprint(), plan.description()):
            console.print(f"Going on with the evaluation in {folder.path}", highlight=False, soft_wrap=True)
        logging.getLogger().handlers = [logging.FileHandler(folder.log)]
        records = _work(plan, folder, console)
        results = _results(plan, records)
        _write(plan, folder, results, records, arguments.run_file)
    console.print(folder.table.read_text(), markup=False, highlight=False, soft_wrap=True)
    console.print(f"{folder.path}: queries.jsonl, results.json, table.md", highlight=False, soft_wrap=True)
    incomplete = any("unavailable" in method.apart for method in results.methods.values())
    return 1 if incomplete or results.methods[plan.name].queries == 0 else 0


def _work(plan: Plan, folder: EvaluationFolder, console: Console) -> dict[str | None, list[QueryRecord]]:
    from deploy.evaluation.run import evaluate

    try:
        return asyncio.run(evaluate(plan, folder, console))
    except KeyboardInterrupt:
        print(f"Stopped; the same command goes on with what is in {folder.path}", file=sys.stderr)
        raise


# ---------------------------------------------------------------------- what is evaluated


def plan_of(arguments: argparse.Namespace, console: Console) -> Plan:
    """The plan that the command line describes; downloads, exports and builds what it needs.

    Raises:
        LaunchError, ConfigError, DataError: it makes no sense; one line that says what to do.
    """
    from deploy.assets import prepare_corpus
    from deploy.run_checks import check_values
    from deploy.service_rules import check_service

    target, config = _config_of(arguments)
    if arguments.prompt == "original":
        config = for_published_prompts(config)
    check_values(config)
    config = with_standard_metrics(config)
    for warning in check_service(config):
        console.print(f"warning: {warning}", style="yellow", highlight=False)
    corpus = prepare_corpus(config)
    config = config.model_copy(update={"data": config.data.model_copy(update={"corpus": str(corpus)})})
    task = task_of(config)
    rows, lacking, data = read_rows(config, task, arguments.limit or config.data.heldout_limit)
    if lacking:
        first = next(iter(lacking.values()))
        console.print(f"{len(lacking)} requests are left out: {first}", style="yellow", highlight=False, soft_wrap=True)
    model = _model_of(arguments, target, config)
    sampling = _sampling(arguments, config)
    rankings = arguments.run_file is not None
    return Plan(config, task, rows, data, model, sampling, arguments.prompt, arguments.baselines, rankings)


def _config_of(arguments: argparse.Namespace) -> tuple[Path | None, Config]:
    """The config file or run that is named, and the config with all overrides."""
    targets = [word for word in arguments.overrides if "=" not in word]
    if len(targets) > 1:
        raise LaunchError(f"name one config or run, not {' and '.join(targets)}")
    target = Path(targets[0]) if targets else None
    path = config_path(target)
    own = load_config(path) if path is not None else None
    overrides = [word for word in arguments.overrides if "=" in word]
    overrides += flag_overrides(arguments, _KEYS)
    if arguments.replay is not None:
        overrides += ["search.cache.mode=replay", f"search.cache.folder={json.dumps(str(arguments.replay.resolve()))}"]
    config = settled_config(target, overrides)
    split = config.data.heldout_split
    updates: dict[str, object] = {"train_split": split}  # nothing is trained: no other split need be there
    if own is not None and own.data.heldout_split != split:
        updates["heldout_limit"] = None  # it was meant for another split
    return target, config.model_copy(update={"data": config.data.model_copy(update=updates)})


def _model_of(arguments: argparse.Namespace, target: Path | None, config: Config) -> ModelSource | None:
    if arguments.model == RAW:
        return None
    return model_of(arguments, target, config, f", or {RAW} for the requests as they are")


def _sampling(arguments: argparse.Namespace, config: Config) -> Sampling:
    samples, temperature = arguments.samples, arguments.temperature
    if temperature is None:
        temperature = config.sampling.temperature if samples > 1 else 0.0
    if samples < 1 or temperature < 0:
        raise LaunchError("--samples must be at least 1 and --temperature not negative")
    if samples > 1 and temperature == 0:
        raise LaunchError("greedy answers are all the same: give --temperature above 0, or one sample")
    if arguments.limit is not None and arguments.limit < 1:
        raise LaunchError("--limit must be at least 1")
    top_p = config.sampling.top_p if temperature > 0 else 1.0
    return Sampling(samples, temperature, top_p, config.sampling.max_tokens, config.run.seed)


def _default_name(plan: Plan) -> str:
    drawn = "" if plan.sampling.temperature == 0 else f"-{plan.sampling.samples}-at-{plan.sampling.temperature:g}"
    words = f"{plan.name}-{plan.config.task.name}-{plan.config.data.heldout_split}{drawn}"
    return re.sub(r"[^A-Za-z0-9._@-]+", "-", words)


# ---------------------------------------------------------------------- what is written


def _results(plan: Plan, records: dict[str | None, list[QueryRecord]]) -> Results:
    from deploy.evaluation.results import Results, differences, results_of_method

    quality = quality_metrics(plan.task, plan.config.task.metrics)
    baselines = {name: found for name, found in records.items() if name is not None}
    methods = {plan.name: records[None], **baselines}
    return Results(
        model=plan.name,
        task=plan.config.task.name,
        engine=plan.config.search.engine,
        split=plan.config.data.heldout_split,
        metric=plan.task.metric,
        quality=quality,
        samples=plan.sampling.samples,
        temperature=plan.sampling.temperature,
        methods={name: results_of_method(found, quality) for name, found in methods.items()},
        differences={name: differences(records[None], found, quality) for name, found in baselines.items()},
    )


def _write(
    plan: Plan,
    folder: EvaluationFolder,
    results: Results,
    records: dict[str | None, list[QueryRecord]],
    run_file: Path | None,
) -> None:
    from deploy.evaluation.table import markdown, run_lines

    replace_file(folder.results, msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    replace_file(folder.table, markdown(results).encode())
    if run_file is not None:
        replace_file(run_file, "".join(run_lines(records[None], plan.name)).encode())
