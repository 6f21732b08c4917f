"""One file over HTTP, gone on with where an earlier attempt stopped.

What has arrived lies in NAME.part, beside what the server calls that version of the file (its etag, or the date of its
last change): bytes are only appended where it still is that version (RFC 9110, sections 13.1.5 and 14.2).
"""

from __future__ import annotations

import http.client
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

from deploy.downloads.manifest import DownloadError, Fetched, digests

Progress = Callable[[int, int], None]
"""Called with (bytes here, bytes in all); 0 in all where the server does not say."""

TIMEOUT_S: Final = 60.0
# Attempts in a row that bring no byte.
FRUITLESS: Final = 5
_BLOCK: Final = 1 << 18
_CUT: Final = (OSError, http.client.HTTPException)
# No name, no port, no trust.
_NOBODY: Final = (socket.gaierror, ConnectionRefusedError, ssl.SSLCertVerificationError)


def fetch_file(
    url: str, path: Path, *, md5: str = "", progress: Progress = lambda done, total: None, pause_s: float = 1.0
) -> Fetched:
    """Fetch `url` into `path`.

    Args:
        md5: published checksum. pause_s: before the second attempt; each further one waits twice as long.

    A file that is there already, because somebody has put it there, is held to the checksum and taken.

    Raises:
        DownloadError: the host cannot be reached, refuses, or what arrived does not fit the checksum.
    """
    if path.is_file():
        return _checked(url, path, md5, "")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    fruitless = 0
    while True:
        before = _size(part)
        try:
            version = _attempt(url, part, progress)
            break
        except _CUT as error:
            _give_up_if_hopeless(error, url, path)
            fruitless = 0 if _size(part) > before else fruitless + 1
            if fruitless >= FRUITLESS:
                raise DownloadError(f"{_advice(url, path)} (last reason: {_reason(error)})") from None
            time.sleep(min(60.0, pause_s * 2**fruitless))
    _version_file(part).unlink(missing_ok=True)
    fetched = _checked(url, part, md5, version)
    part.replace(path)
    return fetched


def _attempt(url: str, part: Path, progress: Progress) -> str:
    """Append what is missing; returns what the server calls this version of the file. Raises OSError or HTTPException
    where the connection ends too early.
    """
    here, version = _size(part), _version_of(part)
    headers = {"User-Agent": "deepretrieval-async", "Accept-Encoding": "identity"}
    if here and version:
        headers |= {"Range": f"bytes={here}-", "If-Range": version}
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing after what is here: it is all here, or it is no longer that file
            if error.headers.get("Content-Range", "").endswith(f"/{here}"):
                return version
            part.unlink()
        raise
    with response:
        goes_on = response.status == 206
        total = _total(response.headers, here if goes_on else 0)
        _require_room(part, total - (here if goes_on else 0))
        version = _note_version(part, response.headers)
        done = _append(response, part, "ab" if goes_on else "wb", total, progress)
    if total and done < total:
        raise ConnectionError(f"the connection ended after {done:,} of {total:,} bytes")
    return version


def _append(
    response: http.client.HTTPResponse, part: Path, mode: Literal["ab", "wb"], total: int, progress: Progress
) -> int:
    with part.open(mode) as file:
        done = file.tell()
        while block := response.read(_BLOCK):
            file.write(block)
            done += len(block)
            progress(done, total)
    return done


def _checked(url: str, path: Path, md5: str, version: str) -> Fetched:
    """What is to be noted of a complete file; one that does not fit its checksum is removed. Raises DownloadError."""
    found = digests(path, ("sha256", "md5"))
    if md5 and found["md5"] != md5:
        path.unlink()
        raise DownloadError(f"{url} arrived with MD5 {found['md5']} instead of {md5}: try again; it was removed")
    return Fetched(url, _size(path), found["sha256"], version, f"md5:{md5}" if md5 else "")


def _give_up_if_hopeless(error: BaseException, url: str, path: Path) -> None:
    """Raise DownloadError for what no further attempt will mend."""
    if isinstance(error, urllib.error.HTTPError):
        if error.code in (408, 416, 429) or error.code >= 500:
            return
        raise DownloadError(
            f"{url} is refused with status {error.code} ({error.reason}): {_advice(url, path)}"
        ) from None
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, _NOBODY):
        host = urlsplit(url).hostname
        raise DownloadError(f"{host} cannot be reached ({_reason(error)}): {_advice(url, path)}") from None


def _advice(url: str, path: Path) -> str:
    return f"try again later, or fetch {url} elsewhere and put it at {path}"


def _reason(error: BaseException) -> str:
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(inner).split()) or type(inner).__name__


def _require_room(part: Path, needed: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise DownloadError(f"{part.parent} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed: free some")


def _total(headers: Message, before: int) -> int:
    length = headers.get("Content-Length", "")
    return before + int(length) if length.isdigit() else 0


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _version_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")


def _version_of(part: Path) -> str:
    try:
        return _version_file(part).read_text()
    except OSError:
        return ""


def _note_version(part: Path, headers: Message) -> str:
    etag = headers.get("ETag", "")
    # A weak etag does not promise equal bytes.
    version = headers.get("Last-Modified", "") if not etag or etag.startswith("W/") else etag
    _version_file(part).write_text(version)
    return version
