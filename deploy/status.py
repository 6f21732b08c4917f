"""`deepretrieval status RUN`: how every role and queue of a run is doing, asked of its broker."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.config import Config, load_config
from common.messages import StatusReply
from common.run_folder import RunFolder
from common.tracking.progress_state import duration, quantity
from common.tracking.progress_view import STATE_STYLE, plain
from common.transport.client import BrokerClient, BrokerUnreachableError
from common.transport.keys import load_run_keys
from deploy.errors import LaunchError
from deploy.live_run import is_live, read_report
from deploy.role_states import TROUBLED, RoleState, peer_state

WAIT_S = 5.0
PIPE_COLUMNS = 140  # where the output is no terminal
STALLED, NO_ANSWER = 1, 2  # exit statuses


class RunStatus(msgspec.Struct, frozen=True):
    """What `--json` prints. `stages` by name; `quota` is None where the run has none.

    `quota_waits_for`: what has to happen before a request is granted; "" where nothing has to.
    `launched`: a launcher holds the run; only then the roles that do not report to the broker are known.
    """

    run: str
    broker: str
    answers: bool
    launched: bool
    roles: list[RoleState]
    stages: dict[str, dict[str, int]] = {}
    quota: dict[str, float] | None = None
    quota_phase: str = ""
    quota_waits_for: str = ""
    rejected_frames: int = 0

    @property
    def troubled(self) -> list[RoleState]:
        """The roles that are stalled or silent."""
        return [role for role in self.roles if role.state in TROUBLED]

    @property
    def exit_status(self) -> int:
        """0: all is well."""
        return NO_ANSWER if not self.answers else STALLED if self.troubled else 0


def run(folder: Path, endpoint: str | None, as_json: bool) -> int:
    """Ask, print, and return the exit status.

    Raises:
        LaunchError: this is not the folder of a run. KeyFileError: its keys cannot be read.
    """
    status = asyncio.run(ask(RunFolder(folder), endpoint))
    if as_json:
        print(msgspec.json.encode(status).decode())
    else:
        console = Console()
        print_status(status, console if console.is_terminal else Console(width=PIPE_COLUMNS))
    return status.exit_status


async def ask(folder: RunFolder, endpoint: str | None = None) -> RunStatus:
    """The status of the run in `folder`. Raises LaunchError, KeyFileError."""
    if not folder.config.is_file():
        raise LaunchError(f"{folder.path} is not a run's folder: config.yaml is missing")
    config = load_config(folder.config)
    address = endpoint or _address(config)
    client = BrokerClient(address, load_run_keys(folder.keys, "monitor"), "monitor", f"status-{os.getpid()}")
    live = is_live(folder.path)
    report = read_report(folder.path) if live else None
    launched = report.roles if report is not None else []
    try:
        await client.start(WAIT_S)
    except BrokerUnreachableError:
        return RunStatus(config.run.name, address, False, live, launched)
    try:
        reply = await client.fleet_status(WAIT_S)
    except BrokerUnreachableError:
        return RunStatus(config.run.name, address, False, live, launched)
    finally:
        await client.close()
    return RunStatus(
        run=config.run.name,
        broker=address,
        answers=True,
        launched=live,
        roles=merge(launched, reply),
        stages={name: msgspec.structs.asdict(stage) for name, stage in reply.stages.items()},
        quota=_quota(config, reply),
        quota_phase=reply.quota_phase,
        quota_waits_for=reply.quota_waits_for,
        rejected_frames=reply.rejected_frames,
    )


def merge(launched: list[RoleState], reply: StatusReply) -> list[RoleState]:
    """The launcher's roles, and those that others have started elsewhere."""
    known = {role.peer or role.name for role in launched}
    # A learner has a new name at every start, and a run has one learner: another one is the launcher's, before it died.
    others = {"monitor", "learner"} if any(role.role == "learner" for role in launched) else {"monitor"}
    strangers = [peer for peer in reply.peers if peer.role not in others and peer.name not in known]
    return [*launched, *map(peer_state, strangers)]


def _address(config: Config) -> str:
    if config.broker.port == 0:
        raise LaunchError("the config leaves the broker's port open: name its address with --connect")
    host = "127.0.0.1" if config.broker.host in ("0.0.0.0", "*") else config.broker.host
    return f"tcp://{host}:{config.broker.port}"


def _quota(config: Config, reply: StatusReply) -> dict[str, float] | None:
    quota = config.search.quota
    if quota is None:
        return None
    return {
        "requests": quota.requests,
        "window_s": quota.window_s,
        "in_use": reply.slots_in_use,
        "granted": reply.slots_granted,
        "refused": reply.slots_refused,
    }


# ---------------------------------------------------------------------- for people


def print_status(status: RunStatus, console: Console) -> None:
    """Tables of roles and stages, quota, and what is wrong."""
    if status.roles:
        console.print(_roles_table(status.roles))
    if not status.answers:
        console.print(Text(f"the broker at {status.broker} does not answer", style="bold red"))
        hint = "its launcher starts it again" if status.launched else "nobody has launched this run: is it over?"
        console.print(Text(hint))
        return
    console.print(_stages_table(status.stages))
    if status.quota is not None:
        figures = {name: f"{value:.0f}" for name, value in status.quota.items()}
        used = f"{figures['in_use']} of {figures['requests']} slots in use"
        told = f"{figures['granted']} requests granted, {figures['refused']} refused by the service"
        console.print(Text(f"quota ({status.quota_phase}): {used}, {told}"))
    if status.quota_waits_for:
        console.print(Text(f"the quota waits for {status.quota_waits_for}", style="yellow"))
    for role in status.troubled:
        console.print(Text(plain(f"{role.name} is {role.state}: {role.trouble}"), style="yellow"))


def _roles_table(roles: list[RoleState]) -> Table:
    table = Table(title="Roles", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("name", "role", "state"):
        table.add_column(heading, no_wrap=True)
    for heading in ("phase", "waits for"):
        table.add_column(heading, ratio=1)
    for heading in ("last progress", "leases"):
        table.add_column(heading, justify="right")
    for role in roles:
        table.add_row(
            Text(plain(role.name)),
            role.role,
            Text(role.state, style=STATE_STYLE.get(role.state, "")),
            Text(plain(role.phase)),
            Text(plain(role.waits_for)),
            duration(role.since_s),
            str(role.leases),
        )
    return table


def _stages_table(stages: dict[str, Any]) -> Table:
    table = Table(title="Queues (groups)", title_justify="left", box=box.SIMPLE)
    table.add_column("stage")
    for heading in ("queued", "leased", "bytes", "expired", "late"):
        table.add_column(heading, justify="right")
    for name, stage in stages.items():
        sizes = [str(stage["queued"]), str(stage["leased"]), quantity(stage["bytes"])]
        table.add_row(name, *sizes, str(stage["expired"]), str(stage["late"]))
    return table
