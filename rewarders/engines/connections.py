"""The connections of every engine behind HTTP: kept alive, names looked up and TLS set up once, nothing sent late."""

from __future__ import annotations

import socket
import ssl
import struct
from functools import cache
from typing import Final

import aiohttp

_KEEP_ALIVE_S: Final = 30.0
# Services behind a load balancer change their addresses now and then; between two searches they do not.
_DNS_TTL_S: Final = 300
# struct linger: on, zero seconds.
_DISCARD_ON_CLOSE: Final = struct.pack("ii", 1, 0)


@cache
def tls_context() -> ssl.SSLContext:
    """Certificates and host names are checked, TLS 1.2 at least. One for the process: loading the system's
    certificates takes longer than many a search.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def connector(url: str, deliver_within_s: float | None) -> aiohttp.TCPConnector:
    """Connections to the host of `url`, as many as there are requests: the engine bounds those, before they ask for a
    permit. In a full pool, requests would wait while they hold a slot of the quota.

    deliver_within_s: where a quota counts arrivals, no request arrives later than so many seconds after it was sent,
    whatever becomes of this process; None: where nobody counts.
    """
    return aiohttp.TCPConnector(
        limit=0,
        keepalive_timeout=_KEEP_ALIVE_S,
        use_dns_cache=True,
        ttl_dns_cache=_DNS_TTL_S,
        ssl=tls_context() if url.startswith("https://") else True,
        socket_factory=None if deliver_within_s is None else _punctual_sockets(deliver_within_s),
    )


def _punctual_sockets(seconds: float) -> aiohttp.SocketFactoryType:
    """Makes sockets whose kernel does not go on alone.

    Without these options, bytes that lie in a send buffer when their process is killed, or gives up at its deadline,
    are sent again and again for minutes, and may arrive when their slot of the quota is somebody else's.
    """

    def make(address: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, _, _ = address
        made = socket.socket(family, kind, protocol)
        # Closed by whomever, by the kernel after a SIGKILL too: what was not sent is discarded, the peer gets a RST.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _DISCARD_ON_CLOSE)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; RFC 5482
            # And while it is open (a process that is stopped), what is not acknowledged by then is given up.
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, round(1000 * seconds)))
        return made

    return make
