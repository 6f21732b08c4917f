"""Connections of the engines: names are looked up once, certificates are checked, concurrency is the config's."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from common.config import Config
from deploy.engines import ctgov_settings, pubmed_settings, retrieval_settings
from rewarders.engines.base import EngineUnavailable, SearchRequest
from rewarders.engines.connections import tls_context
from rewarders.engines.pubmed import PubMedEngine, PubMedSettings
from tests.rewarders.fake_ncbi import FakeNcbi

SEARCH = SearchRequest("a", retmax=3)


async def test_a_name_is_looked_up_once(ncbi: FakeNcbi, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    lookups: list[Any] = []
    look_up = loop.getaddrinfo

    async def counted(host: Any, *arguments: Any, **options: Any) -> Any:
        lookups.append(host)
        return await look_up(host, *arguments, **options)

    monkeypatch.setattr(loop, "getaddrinfo", counted)
    url = ncbi.url.replace("127.0.0.1", "localhost")
    async with PubMedEngine(PubMedSettings(base_url=url, api_key_env=None)) as engine:
        for _ in range(3):
            await asyncio.gather(*(engine.search(SEARCH) for _ in range(10)))
    assert len(ncbi.connections) >= 10
    assert lookups.count("localhost") == 1


def test_tls_is_set_up_once_and_checks_who_answers() -> None:
    context = tls_context()
    assert context is tls_context()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
async def test_a_certificate_that_nobody_signed_is_refused(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    own.load_cert_chain(certificate, key)
    heard: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(1))
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0, ssl=own)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        async with PubMedEngine(PubMedSettings(base_url=url, api_key_env=None)) as engine:
            with pytest.raises(EngineUnavailable, match="CertificateError"):
                await engine.search(SEARCH)
    finally:
        server.close()
    assert not any(heard), "nothing was said to a stranger"


@pytest.mark.parametrize(("most", "expected"), [(None, (None, 16, 4)), (7, (7, 7, 7))])
def test_the_config_bounds_the_concurrency_of_every_engine(
    most: int | None, expected: tuple[int | None, int, int]
) -> None:
    config = Config.model_validate({"search": {"url": "http://127.0.0.1:1", "max_connections": most}})
    bounds = (pubmed_settings(config).max_connections, ctgov_settings(config).max_connections)
    assert (*bounds, retrieval_settings(config).max_requests) == expected
