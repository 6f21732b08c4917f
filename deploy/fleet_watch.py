"""The launcher's eyes: asks the broker how everybody is doing, and the search server whether it is there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from urllib.parse import urlsplit

from common.messages import StatusReply
from common.transport.client import BrokerClient, BrokerUnreachableError
from common.transport.keys import RunKeys
from deploy.errors import LaunchError
from deploy.fleet import Kind
from deploy.live_run import FleetWish, RunReport, read_wish, write_report
from deploy.role_states import Health, RoleState, RoleView
from deploy.supervisor import Supervisor

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
WISH_EVERY_S = 0.5
ANSWER_WITHIN_S = 3.0
DEAF_ROLES = ("broker", "search-server")


class FleetWatch:
    """Keeps `states` (one per role) and `fleet` (the broker's newest status) up to date while it runs.

    Args:
        server_url: of the run's own search server, or None.
        report_to: the run folder, for `roles.json`.

    It also tells the fleet when the learner has announced the end of the run.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        endpoint: str,
        keys: RunKeys,
        server_url: str | None,
        report_to: Path,
    ) -> None:
        self.states: list[RoleState] = []
        self.fleet: StatusReply | None = None
        self._supervisor = supervisor
        self._endpoint = endpoint
        self._keys = keys
        self._server = urlsplit(server_url) if server_url else None
        self._folder = report_to
        self._answered_at = dict.fromkeys(DEAF_ROLES, float("-inf"))
        self._health = Health()
        self._wish = 0  # serial of the newest one taken up

    async def run(self) -> None:
        """Watch until cancelled. Nothing that goes wrong here ends the run."""
        async with asyncio.TaskGroup() as group:  # which cancels each once: a second time would interrupt a goodbye
            for work in (self._ask_broker(), self._ask_server(), self._judge()):
                group.create_task(work)

    async def follow_wishes(self) -> None:
        """Fulfil what `deepretrieval scale` wishes for, until cancelled."""
        problem = ""
        while True:
            try:
                wish = read_wish(self._folder)
            except (LaunchError, OSError) as error:
                if str(error) != problem:
                    logger.warning("%s", error)
                problem, wish = str(error), None
            if wish is not None and wish.serial != self._wish:
                self._fulfil(wish)
            await asyncio.sleep(WISH_EVERY_S)

    def _fulfil(self, wish: FleetWish) -> None:
        fleet = self._supervisor.fleet
        wanted: tuple[tuple[Kind, int | None], ...] = (("actor", wish.actors), ("rewarder", wish.rewarders))
        for kind, count in wanted:
            if count is not None:
                logger.info("%d %ss are wished for instead of %d", count, kind, len(fleet.present(kind)))
                fleet.scale(kind, count)
        self._wish = wish.serial

    def look(self) -> list[RoleState]:
        """The states at this moment, of roles that have only just been added too."""
        now = time.monotonic()
        return self._health.states(self._views(now), self.fleet, now - self._answered_at["broker"])

    async def _ask_broker(self) -> None:
        while True:
            client = BrokerClient(self._endpoint, self._keys, "monitor", "launcher")
            try:
                await client.start()
                await self._ask(client)
            except BrokerUnreachableError:
                continue
            finally:
                await client.close()

    async def _wait_for_end(self, client: BrokerClient) -> None:
        await client.wait_for_state(lambda state: state.finished)
        self._supervisor.fleet.finish()

    async def _ask(self, client: BrokerClient) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._wait_for_end(client))
            while True:
                with contextlib.suppress(BrokerUnreachableError):
                    self.fleet = await client.fleet_status(ANSWER_WITHIN_S)
                    self._answered_at["broker"] = time.monotonic()
                _end_if_cancelled()
                await asyncio.sleep(LOOK_EVERY_S)

    async def _ask_server(self) -> None:
        if self._server is None:
            return
        host, port = self._server.hostname or "", self._server.port or 80
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ANSWER_WITHIN_S):
                    if await accepts(host, port):
                        self._answered_at["search-server"] = time.monotonic()
            await asyncio.sleep(LOOK_EVERY_S)

    async def _judge(self) -> None:
        problem = ""
        while True:
            self.states = self.look()
            for line in self._health.news(self.states, time.monotonic()):
                logger.warning(line)
            try:
                write_report(self._folder, RunReport(self.states, self._wish))
            except OSError as error:
                if str(error) != problem:
                    logger.warning("cannot write the report of the roles: %s", error)
                problem = str(error)
            await asyncio.sleep(LOOK_EVERY_S)

    def _views(self, now: float) -> list[RoleView]:
        views = []
        for name, member in self._supervisor.fleet.members.items():
            role = self._supervisor.roles.get(name)
            if role is None:
                views.append(RoleView(name, member.kind, None, 0.0, note="is being started"))
                continue
            views.append(
                RoleView(
                    name=name,
                    role=member.kind,
                    returncode=role.returncode,
                    lived_s=now - member.started_at,
                    leaving=member.phase == "draining",
                    deaf_s=now - self._answered_at[name] if name in DEAF_ROLES else None,
                    note=role.note,
                    where=role.where,
                    pid=role.pid,
                )
            )
        return views


def _end_if_cancelled() -> None:
    """Python 3.11's `wait_for`, at work in the client, can swallow a cancellation that meets an answer."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def accepts(host: str, port: int) -> bool:
    """Whether somebody accepts connections there."""
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    writer.close()
    return True
