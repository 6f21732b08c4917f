"""How roles are started: every command line is one that the parser takes, and says what the config says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.config import Config
from common.run_folder import RunFolder
from deploy.cli import _parse
from deploy.fleet import Kind
from deploy.role_specs import RoleSpecs
from deploy.run_setup import with_addresses
from deploy.sites import LocalSite

SECTIONS: dict[str, Any] = {
    "search": {"quota": {"requests": 3, "window_s": 2.0}, "fault_rate": 0.25, "latency_ms": 7.0},
    "learner": {"processes": 2, "threads": 3},
    "actor": {"threads": 4},
    "run": {"seed": 5},
}


def specs(resume: bool = False, host: str = "127.0.0.1", **sections: Any) -> RoleSpecs:
    config = with_addresses(Config.model_validate(SECTIONS | sections), "transformers", LocalSite())
    return RoleSpecs(config, RunFolder(Path("/runs/x")), host, resume, gpu_share=0.5)


@pytest.mark.parametrize("kind", ["search-server", "broker", "learner", "actor", "rewarder"])
def test_the_command_line_takes_what_the_launcher_gives(kind: Kind) -> None:
    spec = specs().of(kind, f"{kind}-0")
    arguments = _parse([*spec.arguments, "--parent", "1", "--parent-grace", "0.0"])
    assert (arguments.parent, arguments.parent_grace) == (1, 0.0)
    assert spec.log == Path(f"/runs/x/logs/{kind}-0.log")
    assert spec.home == (kind not in ("actor", "rewarder")), "who moves must not be one whose address is known"
    if kind != "search-server":
        assert arguments.config == "/runs/x/config.yaml"
    if kind in ("actor", "rewarder"):
        assert arguments.name == f"{kind}-0"


def test_the_learner_resumes_what_there_is() -> None:
    """A new run's folder holds no checkpoint, so the same words serve its first start and every later one."""
    assert _parse(list(specs().of("learner", "learner").arguments)).resume == "auto"
    arguments = _parse(list(specs(resume=True, host="10.0.0.3").of("learner", "learner").arguments))
    assert (arguments.resume, arguments.host, arguments.processes) == ("must", "10.0.0.3", 2)


def test_shares_of_a_machine() -> None:
    made = specs()
    assert (made.of("learner", "l").cpus, made.of("learner", "l").gpus) == (6.0, 1.0)
    assert (made.of("actor", "a").cpus, made.of("actor", "a").gpus) == (4.0, 0.5)
    assert made.of("actor", "a").environment["OMP_NUM_THREADS"] == "4"
    for kind in ("broker", "rewarder", "search-server"):
        spec = made.of(kind, "x")  # type: ignore[arg-type]
        assert spec.cpus < 1
        assert spec.gpus == 0


def test_the_search_server_gets_quota_faults_and_seed() -> None:
    arguments = _parse(list(specs().of("search-server", "s").arguments))
    assert (arguments.quota, arguments.window, arguments.latency_ms) == (3, 2.0, 7.0)
    assert (arguments.fault_rate, arguments.fault_seed) == (0.25, 5)
    assert arguments.port > 0


class FarSite(LocalSite):
    """A site none of whose other machines reaches 127.0.0.1."""

    host = "127.0.0.2"

    def reaches(self, host: str) -> bool:
        return host != "127.0.0.1"


def test_addresses_that_others_reach_are_taken_where_the_config_names_none() -> None:
    config = with_addresses(Config(), "transformers", FarSite())
    assert config.broker.host == "127.0.0.2"
    assert config.search.url == f"http://127.0.0.2:{config.search.port}"
    assert config.actor.engine == "transformers"
    own = Config.model_validate({"broker": {"host": "0.0.0.0", "port": 7}, "search": {"url": "http://elsewhere"}})
    config = with_addresses(own, "transformers", FarSite())
    assert (config.broker.host, config.broker.port, config.search.url) == ("0.0.0.0", 7, "http://elsewhere")
