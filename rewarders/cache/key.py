"""Under which name a result is kept."""

from __future__ import annotations

import hashlib
import json

import msgspec

from rewarders.engines.base import SearchRequest

FORMAT = 1  # of keys and of what is kept under them; another number finds nothing of before


class SearchKey(msgspec.Struct, frozen=True):
    """A search of one state of one engine's data; equal keys have equal results.

    source: what is searched, whatever its address is at the moment. version: of its data, "" where the engine does
    not say. request: the query with whitespace collapsed and otherwise as it was written, because engines care for
    case, order and punctuation in ways of their own.
    """

    source: str
    version: str
    request: SearchRequest

    @property
    def digest(self) -> bytes:
        """BLAKE2b, 32 bytes, of everything that the result depends on."""
        asked = self.request
        parts = (
            FORMAT,
            self.source,
            self.version,
            asked.term.encode("utf-8", "surrogatepass"),  # JSON can hold what UTF-8 cannot
            asked.retmax,
            asked.sort,
            asked.min_date,
            asked.max_date,
            asked.with_texts,
        )
        return hashlib.blake2b(msgspec.msgpack.encode(parts), digest_size=32).digest()

    @property
    def readable(self) -> str:
        """The same for people: one line of JSON, only ASCII."""
        asked = {name: value for name, value in msgspec.structs.asdict(self.request).items() if value}
        return json.dumps({"source": self.source, "version": self.version, **asked})
