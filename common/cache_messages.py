"""The messages by which rewarders share search results through the broker; part of `common.messages`.

CacheGet ──► CacheValue (payload: the result) | CacheFetch (you fetch it) | CacheWait (another does; then one of
             the first two, unless the broker goes)
CacheFetch ──► CachePut (payload: the result) | CacheFailed, and CacheRenew while it lasts
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

MAX_RESULT_BYTES = 1 << 20  # of one result as it travels (9,999 ids take 60 kB); larger ones are not shared
MAX_RENEWED = 4096  # keys in one message

Key = Annotated[bytes, Meta(min_length=16, max_length=64)]
_Seconds = Annotated[float, Meta(ge=0, le=1e6)]


class CacheGet(Struct, frozen=True, tag="cache_get", forbid_unknown_fields=True):
    """The result under `key` is wanted. May be repeated while one waits."""

    key: Key


class CachePut(Struct, frozen=True, tag="cache_put", forbid_unknown_fields=True):
    """The result under `key`; one payload frame."""

    key: Key


class CacheFailed(Struct, frozen=True, tag="cache_failed", forbid_unknown_fields=True):
    """This peer will not deliver, or does not want, the result under `key`."""

    key: Key


class CacheRenew(Struct, frozen=True, tag="cache_renew", forbid_unknown_fields=True):
    """This peer is still fetching these keys."""

    keys: Annotated[tuple[Key, ...], Meta(min_length=1, max_length=MAX_RENEWED)]


CacheToBroker = CacheGet | CachePut | CacheFailed | CacheRenew


class CacheValue(Struct, frozen=True, tag="cache_value", forbid_unknown_fields=True):
    """The result under `key`; one payload frame."""

    key: Key


class CacheFetch(Struct, frozen=True, tag="cache_fetch", forbid_unknown_fields=True):
    """Fetch the result under `key`. Others may wait for it: renew within `within_s`, or one of them is told to fetch.
    0: nobody waits."""

    key: Key
    within_s: _Seconds


class CacheWait(Struct, frozen=True, tag="cache_wait", forbid_unknown_fields=True):
    """Another peer is fetching the result under `key`. Ask again after `within_s` without word."""

    key: Key
    within_s: _Seconds


CacheFromBroker = CacheValue | CacheFetch | CacheWait
