"""What a search came to, as bytes: kept on disk, sent through the broker.

MessagePack behind one byte that says whether it is compressed. Bytes from elsewhere are checked and bounded while
they are read.
"""

from __future__ import annotations

import zlib
from typing import Final

import msgspec

from rewarders.engines.base import BadQuery, SearchResult

MAX_FOUND_BYTES: Final = 64 << 20  # uncompressed: a hundred times the largest answer of an engine
_COMPRESS_FROM: Final = 256  # bytes; less is not worth the time
_PLAIN: Final = b"\x00"
_ZLIB: Final = b"\x01"


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    """The engine refuses the query, and would on every day."""

    reason: str


class _Result(msgspec.Struct, frozen=True, tag="result", array_like=True):
    ids: tuple[str, ...]
    count: int
    translation: str
    warnings: tuple[str, ...]
    texts: tuple[str, ...] | None
    titles: tuple[str, ...] | None


class _Refused(msgspec.Struct, frozen=True, tag="refused", array_like=True):
    reason: str


Found = SearchResult | Refusal

_decoder = msgspec.msgpack.Decoder(_Result | _Refused)


def answer_of(found: Found) -> SearchResult:
    """The result. Raises BadQuery where it is a refusal."""
    if isinstance(found, Refusal):
        raise BadQuery(found.reason)
    return found


def encode_found(found: Found) -> bytes:
    """As bytes. Characters that UTF-8 cannot carry (lone surrogates) become escapes."""
    try:
        raw = msgspec.msgpack.encode(_wire(found))
    except UnicodeEncodeError:
        raw = msgspec.msgpack.encode(_escaped(_wire(found)))
    if len(raw) >= _COMPRESS_FROM:
        packed = zlib.compress(raw, level=1)
        if len(packed) < len(raw):
            return _ZLIB + packed
    return _PLAIN + raw


def decode_found(data: bytes | memoryview) -> Found:
    """The inverse.

    Raises:
        ValueError: not what `encode_found` makes, or more than `MAX_FOUND_BYTES`.
    """
    try:
        wire = _decoder.decode(_unpacked(data))
    except (zlib.error, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"not a kept result: {error}") from None
    if isinstance(wire, _Refused):
        return Refusal(wire.reason)
    if wire.count < 0 or any(part is not None and len(part) != len(wire.ids) for part in (wire.texts, wire.titles)):
        raise ValueError("not a kept result: its parts contradict each other")
    return SearchResult(wire.ids, wire.count, wire.translation, wire.warnings, wire.texts, wire.titles)


def _wire(found: Found) -> _Result | _Refused:
    if isinstance(found, Refusal):
        return _Refused(found.reason)
    return _Result(found.ids, found.count, found.translation, found.warnings, found.texts, found.titles)


def _escaped(wire: _Result | _Refused) -> object:
    """The same as plain MessagePack types, every text made one that UTF-8 can carry."""

    def clean(value: object) -> object:
        if isinstance(value, str):
            return value.encode("utf-8", "backslashreplace").decode()
        return [clean(part) for part in value] if isinstance(value, tuple) else value

    return [type(wire).__struct_config__.tag, *(clean(getattr(wire, name)) for name in wire.__struct_fields__)]


def _unpacked(data: bytes | memoryview) -> bytes:
    marker, body = bytes(data[:1]), bytes(data[1:])
    if marker == _PLAIN:
        return body
    if marker != _ZLIB:
        raise ValueError("not a kept result: it begins with an unknown byte")
    unpacker = zlib.decompressobj()
    raw = unpacker.decompress(body, MAX_FOUND_BYTES)
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"not a kept result: cut off, or more than {MAX_FOUND_BYTES} bytes")
    return raw
