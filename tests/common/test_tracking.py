"""Metrics, samples, summary and W&B: nothing lost, nothing counted twice, nothing secret sent."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.tracking.dispositions_log import read_dispositions
from common.tracking.heldout import (
    HeldoutResult,
    HeldoutRow,
    read_evaluation,
    read_heldout,
    write_baselines,
    write_heldout,
)
from common.tracking.jsonl import JsonlFile, read_jsonl
from common.tracking.metrics_log import MetricsLog, read_metrics, series
from common.tracking.redaction import HIDDEN, redact
from common.tracking.samples_log import read_samples
from common.tracking.summary import REQUIRED_KEYS, missing_keys, read_summary, update_summary
from common.tracking.tracker import Tracker
from common.tracking.wandb_tracker import (
    WandbOptions,
    WandbTracker,
    has_credentials,
    resolve_mode,
    run_id,
)
from tests.wandb_files import wandb_records

ROOT = Path(__file__).parents[2]
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")

values = st.one_of(st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False), st.text())
records = st.dictionaries(st.text(min_size=1, max_size=12), values, max_size=5)


@pytest.fixture(autouse=True)
def _no_wandb_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@given(written=st.lists(records, max_size=6), cut=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_a_file_torn_anywhere_keeps_every_whole_line_and_takes_new_ones(
    tmp_path_factory: pytest.TempPathFactory, written: list[dict[str, object]], cut: int
) -> None:
    path = tmp_path_factory.mktemp("torn") / "log.jsonl"
    with JsonlFile(path) as log:
        for record in written:
            log.append(record)
    content = path.read_bytes()
    torn = content[: cut % (len(content) + 1)]
    path.write_bytes(torn)
    kept = torn.count(b"\n")
    if not torn.endswith(b"\n") and torn and len(torn) == len(b"\n".join(content.split(b"\n")[: kept + 1])):
        kept += 1  # only the line end was torn off: the line itself is whole
    with JsonlFile(path) as log:
        log.append({"after": "the crash"})
    assert read_jsonl(path) == [*written[:kept], {"after": "the crash"}]


def test_a_reader_leaves_out_the_line_being_written_and_names_a_broken_one(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":2')
    assert read_jsonl(path) == [{"a": 1}]
    path.write_bytes(b'{"a":1}\n{"a":\n{"a":3}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2: not a JSON object"):
        read_jsonl(path)


def test_numbers_of_other_libraries_and_values_without_json_form(tmp_path: Path) -> None:
    with JsonlFile(tmp_path / "log.jsonl") as log:
        log.append({"a": np.float32(0.5), "b": np.arange(2), "c": float("nan"), "d": "lone \ud800 surrogate"})
        with pytest.raises(TypeError, match="object has no JSON form"):
            log.append({"a": object()})
    (line,) = read_jsonl(tmp_path / "log.jsonl")
    assert (line["a"], line["b"], line["c"]) == (0.5, [0, 1], None)


def test_a_write_that_does_not_fit_leaves_a_whole_file(tmp_path: Path) -> None:
    """A file size limit stands in for a full disk: the write ends half-way in the same manner."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.log(1, {"reward/mean": 1.0})
    before = path.read_bytes()
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, old_limit[1]))
        with pytest.raises(OSError, match="too large") as caught:
            log.log(2, {"reward/mean": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    log.log(2, {"reward/mean": 2.0})
    assert series(read_metrics(path), "reward/mean") == [(1, 1.0), (2, 2.0)]


def test_resume_cuts_what_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 8):
        log.log(step, {"reward/mean": float(step)})
    log.close()
    with open(path, "ab") as file:
        file.write(b'{"step":8,"rew')  # killed while writing
    resumed = MetricsLog(path)
    assert resumed.last_step == 7
    with pytest.raises(ValueError, match=r"step 6 after step 7.*resume_at\(5\)"):
        resumed.log(6, {})
    assert resumed.resume_at(5) == 2
    resumed.log(6, {"reward/mean": 60.0})
    assert series(read_metrics(path), "reward/mean")[-2:] == [(5, 5.0), (6, 60.0)]


def test_two_lines_of_one_step_become_one(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.log(3, {"reward/mean": 1.0, "loss/policy": None})
    log.log(3, {"recall/heldout": 0.4})
    (merged,) = read_metrics(tmp_path / "m.jsonl")
    assert (merged["step"], merged["reward/mean"], merged["recall/heldout"]) == (3, 1.0, 0.4)
    assert series([merged], "loss/policy") == []


def test_killed_while_logging_then_resumed(tmp_path: Path) -> None:
    """A process killed by SIGKILL in the middle of logging: all lines it had written are there, and whole."""
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys; from common.tracking.metrics_log import MetricsLog\n"
        "log = MetricsLog(sys.argv[1]); step = 0\n"
        "while True:\n    step += 1; log.log(step, {'x': 'y' * 5000}); print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 50:
        pass
    process.kill()
    acknowledged = 50 + len(process.stdout.read().splitlines()[:-1])  # the last may be cut off itself
    process.wait()
    process.stdout.close()
    resumed = MetricsLog(path)
    assert resumed.last_step >= acknowledged
    assert [line["step"] for line in read_metrics(path)] == list(range(1, resumed.last_step + 1))


def test_redaction_by_name_and_inside_urls() -> None:
    config = {
        "search": {"api_key": "abc", "url": "https://me:pw@host/x?db=pubmed&api_key=abc", "retmax": 50},
        "actors": [{"auth_token": "t", "client_secret": 7}],
        "sampling": {"max_tokens": 512, "tokenizer": "qwen"},
        "password": None,
    }
    clean = redact(config)
    assert clean == {
        "search": {
            "api_key": HIDDEN,
            "url": f"https://{HIDDEN}@host/x?db=pubmed&api_key={HIDDEN}",
            "retmax": 50,
        },
        "actors": [{"auth_token": HIDDEN, "client_secret": HIDDEN}],
        "sampling": {"max_tokens": 512, "tokenizer": "qwen"},
        "password": None,
    }
    assert config["search"]["api_key"] == "abc", "the config itself must not change"


@given(
    name=st.sampled_from(["api_key", "apiKey", "NCBI_KEY", "hf_token", "Secret", "x_password", "tokens_secret"]),
    depth=st.integers(0, 4),
    secret=st.text("0123456789abcdef", min_size=16, max_size=16),
)
def test_no_secret_survives_at_any_depth(name: str, depth: int, secret: str) -> None:
    nested: object = {name: secret, "lists": [{name: [secret]}]}
    for level in range(depth):
        nested = {f"level{level}": nested} if level % 2 else [nested]
    assert secret not in json.dumps(redact(nested))


@pytest.mark.parametrize(
    ("configured", "environment", "mode"),
    [
        ("off", {}, "off"),
        ("online", {"WANDB_MODE": "offline"}, "offline"),
        ("off", {"WANDB_MODE": "online"}, "online"),
        ("online", {"WANDB_MODE": "disabled"}, "off"),
        ("offline", {"WANDB_MODE": ""}, "offline"),
    ],
)
def test_the_environment_decides_the_mode(configured: str, environment: dict[str, str], mode: str) -> None:
    assert resolve_mode(configured, environment) == mode


def test_an_unknown_mode_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="WANDB_MODE='maybe': choose online, offline or off"):
        resolve_mode("off", {"WANDB_MODE": "maybe"})


def test_credentials_are_found_without_asking(tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / "netrc").chmod(0o600)
    assert has_credentials({"WANDB_API_KEY": "x"})
    assert has_credentials({"NETRC": str(tmp_path / "netrc")})
    assert not has_credentials({"NETRC": str(tmp_path / "netrc"), "WANDB_BASE_URL": "https://wandb.example.org"})
    assert not has_credentials({"NETRC": str(tmp_path / "none")})


def test_the_run_id_is_kept(tmp_path: Path) -> None:
    assert run_id(tmp_path / "a") == run_id(tmp_path / "a") != run_id(tmp_path / "b")


def test_tracker_writes_resumes_and_finishes(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, name="demo")
    for step in (1, 2, 3):
        tracker.log(step, {"reward/mean": step / 2, "step": step})
        tracker.sample(step, version=step - 1, request="asthma", query="asthma[ti]", reward=1.0, recall=0.5)
    tracker.finish({"steps": 3})
    resumed = Tracker(tmp_path, name="demo", resume_step=2)
    resumed.log(3, {"reward/mean": 9.0})
    resumed.finish({"wall_s": 1.5})
    assert series(read_metrics(tmp_path / "metrics.jsonl"), "reward/mean") == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert [sample["step"] for sample in read_samples(tmp_path / "samples.jsonl")] == [1, 2]
    assert read_summary(tmp_path / "summary.json") == {"steps": 3, "wall_s": 1.5}


def test_dispositions_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, name="demo")
    for ticket in range(4):
        tracker.disposition(ticket, f"q{ticket}", "trained", version=0)
    assert tracker.dispositions == 4
    tracker.finish({})
    resumed = Tracker(tmp_path, name="demo", resume_step=0, resume_dispositions=2)
    resumed.disposition(2, "q2", "zero_variance", version=1)
    assert resumed.dispositions == 3
    resumed.finish({})
    lines = read_dispositions(tmp_path / "dispositions.jsonl")
    assert [(line["ticket"], line["disposition"]) for line in lines] == [
        (0, "trained"),
        (1, "trained"),
        (2, "zero_variance"),
    ]


def test_dispositions_that_are_missing_are_an_error(tmp_path: Path) -> None:
    Tracker(tmp_path, name="demo").disposition(0, "q0", "trained", version=0)
    with pytest.raises(ValueError, match=r"dispositions\.jsonl has 1 lines, 2 were written"):
        Tracker(tmp_path, name="demo", resume_step=0, resume_dispositions=2)


def test_a_new_run_sets_the_earlier_one_aside(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        tracker = Tracker(tmp_path, name="demo")
        tracker.log(1, {"reward/mean": value})
        tracker.finish({"steps": value})
    assert series(read_metrics(tmp_path / "metrics.jsonl"), "reward/mean") == [(1, 2.0)]
    assert read_summary(tmp_path / "previous" / "summary.json") == {"steps": 1.0}


def test_summary_is_merged_in_the_order_of_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    update_summary(path, {"extra": 1, "wall_s": 2.0})
    summary = update_summary(path, {"engine": "vllm", "wall_s": 3.0})
    assert list(summary) == ["engine", "wall_s", "extra"]
    assert json.loads(path.read_text()) == {"engine": "vllm", "wall_s": 3.0, "extra": 1}
    assert missing_keys(summary) == [key for key in REQUIRED_KEYS if key not in ("engine", "wall_s")]
    path.write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json: not valid JSON"):
        update_summary(path, {})


@needs_wandb
def test_wandb_offline_writes_the_metrics_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real wandb, offline, with a proxy that refuses every connection: a network call would show."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    # On a loaded machine wandb may well need more than the ten seconds that a run grants it at its end.
    monkeypatch.setattr("common.tracking.tracker.WandbOptions", partial(WandbOptions, finish_timeout_s=120.0))
    warnings: list[str] = []
    config = {"learner": {"lr": 0.00075}, "search": {"api_key": "SECRET-OF-THE-RUN"}}
    tracker = Tracker(tmp_path, name="demo", config=config, wandb_mode="online", warn=warnings.append)
    for step in range(1, 6):
        tracker.log(step, {"reward/mean": 0.125 * step, "recall/heldout": None, "queue/score": 7})
    tracker.finish({"heldout_recall_trained": 0.53125})
    assert warnings == []
    (record,) = (tmp_path / "wandb").glob(f"offline-run-*-{run_id(tmp_path)}/*.wandb")
    written = wandb_records(record)
    assert [row["reward/mean"] for row in written["history"]] == [0.125 * step for step in range(1, 6)]
    assert written["summary"]["heldout_recall_trained"] == 0.53125
    assert written["config"]["learner"] == {"lr": 0.00075}
    everything = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*") if path.is_file())
    assert b"SECRET-OF-THE-RUN" not in everything


@needs_wandb
def test_wandb_that_never_answers_neither_blocks_nor_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that accepts and stays silent: one warning, recorded offline, all calls return at once."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        warnings: list[str] = []
        options = WandbOptions(tmp_path, "demo", mode="online", init_timeout_s=2.0, finish_timeout_s=20.0)
        started = time.monotonic()
        tracker = WandbTracker(options, warnings.append)
        for step in range(100):
            tracker.log(step, {"reward/mean": 1.0})
        assert time.monotonic() - started < 1.0
        tracker.finish({})
        assert time.monotonic() - started < 20.0
    (warning,) = warnings
    assert "could not start online, recording offline instead" in warning
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@needs_wandb
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux' /proc")
def test_wandb_that_hangs_at_the_end_holds_up_neither_run_nor_exit(tmp_path: Path) -> None:
    """W&B's own process is stopped (SIGSTOP) in the middle: finish gives up in time, the exit is quick and quiet."""
    code = (
        "import os, signal, sys, time; from pathlib import Path\n"
        "from common.tracking.wandb_tracker import WandbOptions, WandbTracker\n"
        "options = WandbOptions(Path(sys.argv[1]), 'demo', mode='offline', finish_timeout_s=1.0)\n"
        "tracker = WandbTracker(options, lambda warning: print(warning, flush=True))\n"
        "tracker.log(1, {'a': 1})\n"
        "def services():\n"
        "    for stat in Path('/proc').glob('[0-9]*/stat'):\n"
        "        name, _, rest = stat.read_text().partition('(')[2].rpartition(')')\n"
        "        if name.startswith('wandb-core') and int(rest.split()[1]) == os.getpid():\n"
        "            yield int(stat.parent.name)\n"
        "while not (found := list(services())) or not list(Path(sys.argv[1]).rglob('*.wandb')):\n"
        "    time.sleep(0.05)\n"
        "os.kill(found[0], signal.SIGSTOP)\n"
        "started = time.monotonic(); tracker.finish({}); assert time.monotonic() - started < 6\n"
        "assert not list(services())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "W&B did not finish in 1 s and was cut off; `wandb sync` uploads the rest\n"


@needs_wandb
def test_wandb_online_without_key_records_offline(tmp_path: Path) -> None:
    warnings: list[str] = []
    tracker = WandbTracker(WandbOptions(tmp_path, "demo", mode="online"), warnings.append)
    tracker.log(1, {"reward/mean": 1.0})
    tracker.finish({})
    assert len(warnings) == 1
    assert "no API key" in warnings[0]
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_not_installed_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    warnings: list[str] = []
    tracker = Tracker(tmp_path, name="demo", wandb_mode="offline", warn=warnings.append)
    tracker.log(1, {"reward/mean": 1.0})
    tracker.finish({})
    assert warnings == ["W&B is not installed: pip install -e '.[tracking]'; figures are in metrics.jsonl"]
    assert series(read_metrics(tmp_path / "metrics.jsonl"), "reward/mean") == [(1, 1.0)]


def test_wandb_that_breaks_in_the_middle_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class BrokenRun:
        def log(self, values: dict[str, float], step: int) -> None:
            raise RuntimeError("the service\nis gone")

    class Wandb:
        Settings = dict

        @staticmethod
        def init(**_: object) -> BrokenRun:
            return BrokenRun()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    warnings: list[str] = []
    tracker = WandbTracker(WandbOptions(tmp_path, "demo", mode="offline"), warnings.append)
    for step in range(20):
        tracker.log(step, {"reward/mean": 1.0})
    tracker.finish({})
    assert warnings == ["W&B stopped recording (RuntimeError: the service is gone)"]
    assert "wandb" not in {thread.name for thread in threading.enumerate()}


def row(identity: str, recall: float, query: str | None = "q") -> HeldoutRow:
    return HeldoutRow(identity, f"request {identity}", "<answer>…", query, recall, relevant=4, hits=["1"])


def test_heldout_results_round_trip_and_evaluation_orders_versions(tmp_path: Path) -> None:
    start = HeldoutResult(0, [row("a", 0.0, None), row("b", 0.5)])
    trained = HeldoutResult(20, [row("a", 1.0), row("b", 0.5)])
    write_heldout(tmp_path / "start.json", start)
    write_heldout(tmp_path / "trained.json", trained)
    write_heldout(tmp_path / "v10.json", HeldoutResult(10, [row("a", 0.5)]))
    write_baselines(tmp_path / "baselines.json", {"rarest_1": [0.5, 0.5], "rarest_2": [0.5, 0.5], "and_all": [0, 0]})
    evaluation = read_evaluation(tmp_path)
    assert (evaluation.start, evaluation.trained) == (start, trained)
    assert [result.version for result in evaluation.history] == [0, 10, 20]
    assert trained.interval().mean == 0.75
    assert list(evaluation.shown_baselines()) == ["rarest_1", "and_all"], "of equal rarest_k the smallest k"


def test_a_broken_heldout_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "start.json").write_text('{"version": 0, "rows": [{"id": 5}]}')
    with pytest.raises(ValueError, match=r"start\.json: Expected `str`, got `int`.*evaluate again"):
        read_heldout(tmp_path / "start.json")
    assert read_evaluation(tmp_path / "none").history == ()
