"""Files of a data set on the Hugging Face hub: fetched by `huggingface_hub`, which resumes; checked here against the
hashes the hub keeps of every file."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.downloads.manifest import DownloadError, Fetched, Manifest, digests

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def fetch_from_hub(repository: str, patterns: tuple[str, ...], manifest: Manifest, folder: str = "") -> int:
    """Fetch the files that match into the manifest's folder (or `folder` below it); returns how many are there now.

    The token is that of `hf auth login` or HF_TOKEN; HF_ENDPOINT names another hub.

    Raises:
        DownloadError: no hub, no such repository, no file that matches, or one that does not fit its hash.
    """
    api = _api()
    commit, files = _listing(api, repository, patterns)
    target = manifest.folder / folder
    prefix = f"{folder}/" if folder else ""
    wanted = [file for file in files if not manifest.holds(prefix + file.rfilename, f"{repository}@{commit}")]
    if wanted:
        _snapshot(repository, commit, [file.rfilename for file in wanted], target)
    for file in wanted:
        path = target / file.rfilename
        manifest.note(prefix + file.rfilename, _checked(file, path, f"{repository}@{commit}"))
    return len(files)


def _api() -> HfApi:
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError:
        message = "the hub needs huggingface_hub: pip install 'deepretrieval-async[data]'"
        raise DownloadError(message) from None
    for client in ("httpx", "httpx2"):  # it says every request
        logging.getLogger(client).setLevel(logging.WARNING)
    return HfApi()


def _listing(api: HfApi, repository: str, patterns: tuple[str, ...]) -> tuple[str, list[Any]]:
    """The commit and the files of it that match."""
    try:
        about = api.dataset_info(repository, files_metadata=True)
    except Exception as error:  # its errors share no base: network, missing, private, and httpx's own
        raise DownloadError(_failure(repository, error)) from None
    there = about.siblings or []
    files = [file for file in there if any(fnmatch(file.rfilename, pattern) for pattern in patterns)]
    if not files:
        folders = ", ".join(_folders(there)) or "nothing"
        raise DownloadError(f"{repository} has no file {' or '.join(patterns)} (there: {folders}): see its page")
    return about.sha or "main", files


def _folders(files: list[Any]) -> Iterator[str]:
    yield from sorted({file.rfilename.rpartition("/")[0] or file.rfilename for file in files})[:40]


def _snapshot(repository: str, commit: str, files: list[str], target: Path) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(repository, repo_type="dataset", revision=commit, allow_patterns=files, local_dir=target)
    except Exception as error:
        raise DownloadError(_failure(repository, error)) from None


def _checked(file: Any, path: Path, source: str) -> Fetched:
    """Hold a file to the hub's hash: SHA-256 of a large file, git's of a small one. Raises DownloadError."""
    size = path.stat().st_size
    sha256 = digests(path, ("sha256",))["sha256"]
    if file.lfs is not None:
        expected, found, kind = file.lfs.sha256, sha256, "sha256"
    else:
        expected, kind = file.blob_id, "git-sha1"
        found = digests(path, ("sha1",), b"blob %d\0" % size)["sha1"]
    if expected != found:
        path.unlink()
        raise DownloadError(f"{path.name} does not fit the hub's {kind} ({found}, not {expected}): try again")
    return Fetched(source, size, sha256, expected, f"{kind}:{expected}")


def _failure(repository: str, error: Exception) -> str:
    said = str(error).strip().splitlines()
    reason = said[0][:200] if said else type(error).__name__
    return (
        f"cannot get {repository} from the hub: {reason}; check the network, `hf auth login` if it is private, or "
        "HF_ENDPOINT if you use a mirror"
    )
