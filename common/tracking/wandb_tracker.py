"""Weights & Biases, kept at arm's length: nothing it does may slow, block or end a run.

One background thread makes every call to wandb, fed through a bounded queue. What fails there becomes one
warning; metrics.jsonl stays the record.
"""

from __future__ import annotations

import contextlib
import netrc
import os
import queue
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from common.tracking.redaction import redact

Mode = Literal["online", "offline", "off"]
_MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "off": "off",
    "disabled": "off",
}
_QUEUED_STEPS = 10_000
ID_FILE = "wandb_id"


def resolve_mode(configured: str, environ: Mapping[str, str] = os.environ) -> Mode:
    """The mode of the run: WANDB_MODE where it is set, else the config.

    Raises:
        ValueError: the value is none of online, offline, off (or W&B's own other names for them).
    """
    source, value = "tracking.wandb", configured
    if environ.get("WANDB_MODE"):
        source, value = "WANDB_MODE", environ["WANDB_MODE"]
    if value.lower() not in _MODES:
        raise ValueError(f"{source}={value!r}: choose online, offline or off")
    return _MODES[value.lower()]


def has_credentials(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether W&B would find an API key without asking for one on the terminal."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        entries = netrc.netrc(environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return host in entries.hosts


@dataclass(frozen=True)
class WandbOptions:
    """Where and how a run is recorded at W&B.

    Attributes:
        folder: the run's folder; W&B writes into `folder/wandb`, the run id is kept in `folder/wandb_id`.
        name, project, entity: as W&B shows them; `entity=None` is the user's default.
        mode: a resolved mode (see `resolve_mode`).
        config: the resolved config; redacted before it is sent.
        init_timeout_s: seconds to wait for the W&B server before the run is recorded offline instead.
        finish_timeout_s: seconds that the end of the run may spend on uploading what is left.
    """

    folder: Path
    name: str
    project: str = "deepretrieval"
    entity: str | None = None
    mode: Mode = "off"
    config: Mapping[str, object] = field(default_factory=dict)
    init_timeout_s: float = 60.0
    finish_timeout_s: float = 10.0


_Call = tuple[Literal["log", "finish"], int, dict[str, Any]]


class WandbTracker:
    """Sends metrics to W&B from a thread of its own; each method returns at once.

    Args:
        options: run, mode and limits.
        warn: called, once per tracker at most, with a line for the user when W&B fails.
    """

    def __init__(self, options: WandbOptions, warn: Callable[[str], None]) -> None:
        self._options = options
        self._warn = warn
        self._warned = False
        self._calls: queue.Queue[_Call] = queue.Queue(_QUEUED_STEPS)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, object]) -> None:
        """Queue the metrics of `step`; values W&B cannot plot (text, null) are left out."""
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        self._put(("log", step, numbers))

    def finish(self, summary: Mapping[str, object]) -> None:
        """Send the summary and close the run, waiting at most `finish_timeout_s`."""
        self._put(("finish", 0, cast(dict[str, Any], redact(summary))))
        self._thread.join(self._options.finish_timeout_s)
        if self._thread.is_alive():
            limit = self._options.finish_timeout_s
            self._warn_once(f"did not finish in {limit:.0f} s and was cut off; `wandb sync` uploads the rest")
            self._cut_off()

    def _cut_off(self) -> None:
        """Leave nothing behind that the end of this process would wait for."""
        _kill_service()
        self._thread.join(2.0)
        _tear_down()

    def _put(self, call: _Call) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._warn_once(f"is more than {_QUEUED_STEPS} steps behind; steps are left out there")

    def _work(self) -> None:
        run = self._start()
        if run is None:
            return
        try:
            kind, step, values = self._calls.get()
            while kind == "log":
                run.log(values, step=step)
                kind, step, values = self._calls.get()
            run.summary.update(values)
            run.finish()
        except BaseException as error:
            self._warn_once(f"stopped recording ({_one_line(error)})")
        _tear_down()

    def _start(self) -> Any | None:
        mode = self._options.mode
        if mode == "online" and not has_credentials():
            self._warn_once("has no API key (`wandb login`); recording offline, `wandb sync` uploads it later")
            mode = "offline"
        # W&B's reports on its own errors hold up the end of the process for 20 s where no server answers.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb
        except ImportError:
            self._warn_once("is not installed: pip install -e '.[tracking]'; figures are in metrics.jsonl")
            return None
        try:
            return _init(wandb, self._options, mode)
        except BaseException as error:
            instead = "recording offline instead" if mode == "online" else "the figures are in metrics.jsonl"
            self._warn_once(f"could not start {mode}, {instead} ({_one_line(error)})")
        return self._start_offline(wandb) if mode == "online" else None

    def _start_offline(self, wandb: Any) -> Any | None:
        try:
            _tear_down()
            return _init(wandb, self._options, "offline")
        except BaseException:
            return None  # the warning about the failed online start was given

    def _warn_once(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"W&B {message}")


def _init(wandb: Any, options: WandbOptions, mode: Mode) -> Any:
    settings = wandb.Settings(
        silent=True,
        console="off",  # capturing stdout would fight with the live display
        disable_git=True,
        save_code=False,
        x_disable_meta=True,  # metadata hold the command line, and with it any key given there
        init_timeout=options.init_timeout_s,
    )
    return wandb.init(
        dir=str(options.folder),
        project=options.project,
        entity=options.entity,
        name=options.name,
        id=run_id(options.folder),
        resume="allow" if mode == "online" else None,
        mode=mode,
        config=redact(dict(options.config)),
        settings=settings,
    )


def _tear_down() -> None:
    """Wait until W&B's own process has written everything and ended; removes its exit hook, even where it fails."""
    with contextlib.suppress(BaseException):
        sys.modules["wandb"].teardown()


def _kill_service() -> None:
    """End W&B's own process, which would otherwise be waited for, without limit, when ours ends."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text(errors="replace").partition("(")[2].rpartition(")")
            if name.startswith("wandb-core") and int(rest.split()[1]) == os.getpid():
                os.kill(int(stat.parent.name), signal.SIGKILL)
                os.waitpid(int(stat.parent.name), 0)
        except (OSError, ValueError, IndexError):
            continue


def run_id(folder: Path) -> str:
    """The W&B id of the run in `folder`, made on first use and kept, so that a resumed run is the same."""
    path = folder / ID_FILE
    try:
        known = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        known = ""
    if not known:
        known = secrets.token_hex(4)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(known + "\n", encoding="ascii")
    return known


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
