"""A run on NCBI's own service: not without a quota, and not without a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.config import Config
from common.tasks import Row
from common.tasks.from_config import task_of
from deploy.engines import answerer_of
from deploy.errors import LaunchError
from deploy.service_rules import check_service
from rewarders.answerers.search import SearchAnswerer
from rewarders.engines.base import EngineUnavailable

NCBI = "https://eutils.ncbi.nlm.nih.gov/entrez/eutils/"
QUOTA = {"requests": 3}


def config(**search: Any) -> Config:
    return Config.model_validate({"data": {"corpus": "corpus"}, "search": {"url": NCBI, **search}})


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCBI_API_KEY", raising=False)


def test_without_a_quota_it_is_refused_and_the_right_one_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchError, match=r"3 requests per second without an API key: set search\.quota\.requests=3$"):
        check_service(config())
    monkeypatch.setenv("NCBI_API_KEY", "0123")
    with pytest.raises(LaunchError, match=r"with the key in NCBI_API_KEY: set search\.quota\.requests=10$") as raised:
        check_service(config())
    assert "0123" not in str(raised.value)


def test_own_servers_and_other_engines_are_not_concerned() -> None:
    assert check_service(config(url="http://127.0.0.1:8000")) == []
    assert check_service(config(url=None)) == []
    assert check_service(config(engine="ctgov")) == []


def test_who_asks_should_be_known() -> None:
    (warning,) = check_service(config(quota=QUOTA))
    assert "search.email" in warning
    assert check_service(config(quota=QUOTA, email="me@example.org")) == []


def test_more_than_is_allowed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ten = {"requests": 10}
    (warning,) = check_service(config(quota=ten, email="me@example.org"))
    assert "NCBI 3 per second" in warning
    monkeypatch.setenv("NCBI_API_KEY", "0123")
    assert check_service(config(quota=ten, email="me@example.org")) == []


def test_several_keys_have_to_be_there_and_to_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def asking(mode: str = "strict") -> list[str]:
        quota = {"requests": 10, "mode": mode}
        return check_service(config(quota=quota, email="me@example.org", more_api_keys_env=["KEY_OF_A_FRIEND"]))

    monkeypatch.setenv("NCBI_API_KEY", "0123")
    with pytest.raises(LaunchError, match="KEY_OF_A_FRIEND holds no API key"):
        asking()
    monkeypatch.setenv("KEY_OF_A_FRIEND", "0123")
    with pytest.raises(LaunchError, match="the same key"):
        asking()
    monkeypatch.setenv("KEY_OF_A_FRIEND", "4567")
    assert asking() == []
    with pytest.raises(LaunchError, match="mode strict"):
        asking("adaptive")


def test_a_key_file_is_read_before_the_run(tmp_path: Path) -> None:
    path = tmp_path / "ncbi.key"
    path.write_text("0123")
    path.chmod(0o644)
    with pytest.raises(LaunchError, match=r"^search\.api_key_file: .*chmod 600"):
        check_service(config(quota=QUOTA, api_key_file=str(path)))
    path.chmod(0o600)
    with pytest.raises(LaunchError, match=r"with the key in .*ncbi\.key: set search\.quota\.requests=10$"):
        check_service(config(api_key_file=str(path)))


async def test_an_outage_opens_the_breaker_of_the_config() -> None:
    one = config(url="http://127.0.0.1:9", breaker={"failures": 2, "pause_s": 60.0}, attempts=1)
    async with answerer_of(one, task_of(one)) as answerer:
        assert isinstance(answerer, SearchAnswerer)
        for _ in range(2):
            with pytest.raises(EngineUnavailable, match="network error"):
                await answerer.search("aspirin", Row("r", "a request", ("1",)))
        with pytest.raises(EngineUnavailable, match="left alone") as raised:
            await answerer.search("aspirin", Row("r", "a request", ("1",)))
        assert raised.value.retry_after_s is not None
        assert answerer.counters()["breaker_state"] == 2.0
