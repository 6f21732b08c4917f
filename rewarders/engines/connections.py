"""The connections of every engine behind HTTP: kept alive, names looked up and TLS set up once."""

from __future__ import annotations

import ssl
from functools import cache
from typing import Final

import aiohttp

_KEEP_ALIVE_S: Final = 30.0
# Services behind a load balancer change their addresses now and then; between two searches they do not.
_DNS_TTL_S: Final = 300


@cache
def tls_context() -> ssl.SSLContext:
    """Certificates and host names are checked, TLS 1.2 at least. One for the process: loading the system's
    certificates takes longer than many a search.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def connector(url: str) -> aiohttp.TCPConnector:
    """Connections to the host of `url`, as many as there are requests: the engine bounds those, before they ask for a
    permit. In a full pool, requests would wait while they hold a slot of the quota.
    """
    return aiohttp.TCPConnector(
        limit=0,
        keepalive_timeout=_KEEP_ALIVE_S,
        use_dns_cache=True,
        ttl_dns_cache=_DNS_TTL_S,
        ssl=tls_context() if url.startswith("https://") else True,
    )
