"""What the public search services ask of those who use them, checked before anything is sent."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final
from urllib.parse import urlsplit

from common.config import Config
from common.off_peak import TimeZoneMissingError, is_open
from deploy.errors import LaunchError
from rewarders.engines.api_keys import ApiKeyError, key_from_environment, key_from_file

NCBI_HOST: Final = "eutils.ncbi.nlm.nih.gov"
_PER_S_WITHOUT_KEY: Final = 3
_PER_S_WITH_KEY: Final = 10


def check_service(config: Config) -> list[str]:
    """Warnings, one line each, about a run on NCBI's own service; none for other servers.

    Raises:
        LaunchError: the run has no quota, which NCBI answers by blocking the address; or it has hours that this machine
            cannot tell; or a key is not where the config says.
    """
    search = config.search
    if search.quota is not None and search.quota.off_peak:
        _check_hours()
    has_key = bool(first_key(config))
    if search.more_api_keys_env:
        _check_keys(config)
    if search.engine != "pubmed" or urlsplit(search.url or "").hostname != NCBI_HOST:
        return []
    allowed = _PER_S_WITH_KEY if has_key else _PER_S_WITHOUT_KEY
    key = f"with the key in {search.api_key_file or search.api_key_env}" if has_key else "without an API key"
    if search.quota is None:
        raise LaunchError(
            f"{NCBI_HOST} allows {allowed} requests per second {key}: set search.quota.requests={allowed}"
        )
    warnings = []
    if not search.email:
        warnings.append("search.email is not set: NCBI blocks heavy users whom it cannot write to first")
    if search.quota.requests > allowed * search.quota.window_s:
        asked = f"{search.quota.requests} requests per {search.quota.window_s:g} s"
        warnings.append(f"search.quota allows {asked}, NCBI {allowed} per second {key} unless agreed otherwise")
    return warnings


def _check_keys(config: Config) -> None:
    """Several keys: each is there, no two are the same, and the quota is one that can be shared out."""
    search = config.search
    if search.engine != "pubmed" or search.quota is None or search.quota.mode != "strict":
        raise LaunchError("search.more_api_keys_env needs search.engine=pubmed and a search.quota of mode strict")
    names = (search.api_key_env or "search.api_key_env", *search.more_api_keys_env)
    keys = [first_key(config), *map(key_from_environment, search.more_api_keys_env)]
    missing = [name for name, key in zip(names, keys, strict=True) if not key]
    if missing:
        raise LaunchError(f"{missing[0]} holds no API key: set it, or take it out of search.more_api_keys_env")
    if len(set(keys)) < len(keys):
        raise LaunchError("two of the variables of search.more_api_keys_env hold the same key: name each once")


def first_key(config: Config) -> str:
    """The key of `search.api_key_file` or `search.api_key_env`, "" for none.

    Raises:
        LaunchError: the file is named, and unusable.
    """
    if config.search.api_key_file is None:
        return key_from_environment(config.search.api_key_env)
    try:
        return key_from_file(config.search.api_key_file)
    except ApiKeyError as error:
        raise LaunchError(f"search.api_key_file: {error.reason}") from None


def _check_hours() -> None:
    try:
        is_open(datetime.now(UTC))
    except TimeZoneMissingError as error:
        raise LaunchError(f"search.quota.off_peak: {error}") from None
