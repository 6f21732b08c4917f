"""Raw files over a real HTTP connection that is cut, damaged and refused; and from a server that poses as the hub."""

from __future__ import annotations

import hashlib
import io
import os
import random
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from common.data.catalogue import DATASETS, Source
from deploy.downloads import http_file
from deploy.downloads.dataset import download
from deploy.downloads.http_file import fetch_file
from deploy.downloads.manifest import DownloadError, Manifest
from tests.deploy.file_server import COMMIT, FileServer, git_hash, serving

CONTENT = random.Random(0).randbytes(1 << 20)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving(FileServer({"/set.bin": CONTENT})) as running:
        yield running


def fetch(server: FileServer, path: Path, **options: object) -> None:
    fetch_file(f"{server.url}/set.bin", path, pause_s=0.0, **options)  # type: ignore[arg-type]


def ranges(server: FileServer) -> list[str]:
    return [asked for _, _, asked in server.asked]


def test_a_cut_connection_is_gone_on_with(server: FileServer, tmp_path: Path) -> None:
    server.cuts["/set.bin"] = [300_000, 400_000]
    told: list[tuple[int, int]] = []
    path = tmp_path / "raw" / "set.bin"
    fetched = fetch_file(
        f"{server.url}/set.bin",
        path,
        md5=hashlib.md5(CONTENT).hexdigest(),
        progress=lambda done, total: told.append((done, total)),
        pause_s=0.0,
    )
    assert path.read_bytes() == CONTENT
    assert ranges(server) == ["", "bytes=300000-", "bytes=700000-"]
    assert (fetched.bytes, fetched.sha256) == (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    assert fetched.checked == f"md5:{hashlib.md5(CONTENT).hexdigest()}"
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["set.bin"]


def test_another_process_goes_on_where_the_first_was_ended(server: FileServer, tmp_path: Path) -> None:
    server.cuts["/set.bin"] = [500_000] + [0] * http_file.FRUITLESS
    with pytest.raises(DownloadError, match=r"try again later, or fetch .*set\.bin elsewhere"):
        fetch(server, tmp_path / "set.bin")
    assert not (tmp_path / "set.bin").exists()
    server.asked.clear()
    fetch(server, tmp_path / "set.bin")
    assert ranges(server) == ["bytes=500000-"]
    assert (tmp_path / "set.bin").read_bytes() == CONTENT


def test_all_was_here_but_its_name(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "set.bin.part").write_bytes(CONTENT)
    (tmp_path / "set.bin.part.version").write_text(f'"{hashlib.sha256(CONTENT).hexdigest()}"')
    fetch(server, tmp_path / "set.bin")
    assert ranges(server) == [f"bytes={len(CONTENT)}-"]
    assert (tmp_path / "set.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("ranged", [True, False])
def test_a_file_that_changed_meanwhile_is_begun_anew(server: FileServer, tmp_path: Path, ranged: bool) -> None:
    """Also where the server knows no ranges."""
    server.cuts["/set.bin"] = [300_000] + [0] * http_file.FRUITLESS
    with pytest.raises(DownloadError):
        fetch(server, tmp_path / "set.bin")
    server.ranges = ranged
    server.files["/set.bin"] = new = CONTENT[::-1]
    fetch(server, tmp_path / "set.bin")
    assert (tmp_path / "set.bin").read_bytes() == new


def test_a_file_that_does_not_fit_its_checksum_is_not_kept(server: FileServer, tmp_path: Path) -> None:
    server.damaged.add("/set.bin")
    with pytest.raises(DownloadError, match="arrived with MD5"):
        fetch(server, tmp_path / "set.bin", md5=hashlib.md5(CONTENT).hexdigest())
    assert list(tmp_path.iterdir()) == []
    server.damaged.clear()
    fetch(server, tmp_path / "set.bin", md5=hashlib.md5(CONTENT).hexdigest())
    assert (tmp_path / "set.bin").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again_and_one_that_refuses_is_not(server: FileServer, tmp_path: Path) -> None:
    server.statuses = [503, 429]
    fetch(server, tmp_path / "set.bin")
    assert len(server.asked) == 3
    server.statuses = [403]
    with pytest.raises(DownloadError, match="refused with status 403"):
        fetch(server, tmp_path / "other.bin")
    assert len(server.asked) == 4


def test_offline_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/scifact.zip"
        with pytest.raises(DownloadError, match=r"127\.0\.0\.1 cannot be reached .*: try again later, or fetch"):
            fetch_file(url, tmp_path / "scifact.zip", pause_s=0.0)
    with pytest.raises(DownloadError, match=r"no-such-host\.invalid cannot be reached"):
        fetch_file("http://no-such-host.invalid/x.zip", tmp_path / "x.zip", pause_s=0.0)


# ---------------------------------------------------------------------- whole sets


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_archives_are_unpacked_noted_and_not_fetched_again(server: FileServer, tmp_path: Path) -> None:
    inner = zipped({"train_databases/office/office.sqlite": b"a database"})
    server.files["/train.zip"] = zipped({"train/train.json": b"[]", "train/train_databases.zip": inner})
    sources = (Source("http", f"{server.url}/train.zip"),)
    dataset = msgspec.structs.replace(DATASETS["bird"], sources=sources)
    manifest = download(dataset, tmp_path)
    assert (tmp_path / "train" / "train_databases" / "office" / "office.sqlite").read_bytes() == b"a database"
    assert sorted(path.name for path in tmp_path.rglob("*.zip")) == []
    noted = Manifest(tmp_path).files["train.zip"]
    assert noted == manifest.files["train.zip"]
    assert noted.unpacked
    assert noted.sha256 == hashlib.sha256(server.files["/train.zip"]).hexdigest()
    assert noted.etag == f'"{noted.sha256}"'
    asked = len(server.asked)
    download(dataset, tmp_path)
    assert len(server.asked) == asked


def test_an_archive_must_stay_in_its_folder(server: FileServer, tmp_path: Path) -> None:
    server.files["/evil.zip"] = zipped({"../outside.txt": b"x"})
    dataset = msgspec.structs.replace(DATASETS["bird"], sources=(Source("http", f"{server.url}/evil.zip"),))
    with pytest.raises(DownloadError, match="outside its folder"):
        download(dataset, tmp_path / "raw")
    assert not (tmp_path / "outside.txt").exists()


def test_an_archive_put_there_by_hand_is_checked_and_unpacked(server: FileServer, tmp_path: Path) -> None:
    content = zipped({"scifact/corpus.jsonl": b"{}"})
    (tmp_path / "scifact.zip").write_bytes(content)
    source = Source("http", f"{server.url}/scifact.zip", md5=hashlib.md5(content).hexdigest())
    download(msgspec.structs.replace(DATASETS["scifact"], sources=(source,)), tmp_path)
    assert (tmp_path / "scifact" / "corpus.jsonl").read_bytes() == b"{}"
    assert server.asked == []


def test_what_a_person_must_fetch_is_said(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"spider cannot be fetched by a program: get spider_data\.zip"):
        download(DATASETS["spider"], tmp_path / "spider")
    with pytest.raises(DownloadError, match="has no mirror"):
        download(DATASETS["spider"], tmp_path / "spider", mirror=True)


# ---------------------------------------------------------------------- the hub


def download_command(server_url: str, folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it: HF_ENDPOINT is read when huggingface_hub is imported."""
    # A vLLM engine that an earlier test started in this process has said that it needs no hub.
    own = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment = {**own, "HF_ENDPOINT": server_url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "deploy.cli", "data", "download", *names, "--folder", str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_sets_of_the_hub(server: FileServer, tmp_path: Path) -> None:
    train = CONTENT * 24  # the hub's client writes blocks of 10 MiB
    files = {"raw_data/ctgov/train.jsonl": train, "raw_data/ctgov/dev.jsonl": b"{}\n", "sql/bird/x.parquet": b"no"}
    server.host_repository("DeepRetrieval/datasets", files, large={"raw_data/ctgov/train.jsonl"})
    server.cuts[f"/datasets/DeepRetrieval/datasets/resolve/{COMMIT}/raw_data/ctgov/train.jsonl"] = [15_000_000]
    done = download_command(server.url, tmp_path, "ctgov")
    assert done.returncode == 0, done.stderr
    assert [asked for asked in ranges(server) if asked] == [f"bytes={10 << 20}-"], "the cut file was gone on with"
    raw = tmp_path / "raw" / "ctgov"
    assert done.stdout.splitlines()[-1] == str(raw)
    assert (raw / "raw_data" / "ctgov" / "train.jsonl").read_bytes() == train
    assert not (raw / "sql").exists()
    noted = Manifest(raw).files
    assert sorted(noted) == ["raw_data/ctgov/dev.jsonl", "raw_data/ctgov/train.jsonl"]
    assert noted["raw_data/ctgov/train.jsonl"].checked == f"sha256:{hashlib.sha256(train).hexdigest()}"
    assert noted["raw_data/ctgov/dev.jsonl"].checked == f"git-sha1:{git_hash(b'{}' + bytes([10]))}"
    assert {each.source for each in noted.values()} == {f"DeepRetrieval/datasets@{COMMIT}"}


def test_without_a_hub_there_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        done = download_command(f"http://127.0.0.1:{taken.getsockname()[1]}", tmp_path, "pubmed")
    assert done.returncode == 1
    assert "cannot get DeepRetrieval/datasets from the hub" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
