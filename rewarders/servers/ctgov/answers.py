"""The bodies of the answers of API v2, in the form of recorded ones (2026)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

API_VERSION = "2.0.5"
NOT_FOUND_PAGE = (
    "<html>\r\n<head><title>404 Not Found</title></head>\r\n<body>\r\n<center><h1>404 Not Found</h1></center>\r\n"
    "<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n"
)
TOO_LONG_PAGE = NOT_FOUND_PAGE.replace("404 Not Found", "414 Request-URI Too Large")
ID_PATHS = ("protocolSection.identificationModule.nctId",)

Tree = dict[str, Any]


def version(data_timestamp: str) -> str:
    """The body of /version."""
    return _dump({"apiVersion": API_VERSION, "dataTimestamp": data_timestamp})


def page(studies: list[Any], total: int | None, next_token: str | None) -> str:
    """The body of /studies; a count and a token appear only where there are any."""
    body: dict[str, Any] = {"studies": studies}
    if total is not None:
        body["totalCount"] = total
    if next_token is not None:
        body["nextPageToken"] = next_token
    return _dump(body)


def id_only(trial: str) -> Any:
    """The record as `fields=NCTId` leaves it."""
    return {"protocolSection": {"identificationModule": {"nctId": trial}}}


def projected(record: Any, paths: Iterable[str]) -> Any:
    """The parts of a record at some paths, in their envelopes. A branch that holds none of them is left empty, as the
    service does."""
    tree: Tree = {}
    wanted = set(paths)
    for path in wanted:
        if any(path.startswith(f"{branch}.") for branch in wanted):
            continue  # a wanted branch brings all below it
        node = tree
        for key in path.split("."):
            node = node.setdefault(key, {})
    return _cut(record, tree)


def _cut(value: Any, tree: Tree) -> Any:
    if not tree:
        return value
    if isinstance(value, list):
        return [_cut(entry, tree) for entry in value]
    if isinstance(value, dict):
        return {key: _cut(below, tree[key]) for key, below in value.items() if key in tree}
    return value


def _dump(body: Any) -> str:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))
