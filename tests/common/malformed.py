"""Messages that a broker must survive: random, flipped, cut, of wrong types, too many frames, pickled, replayed."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import msgspec

from common import cache_messages as c
from common import messages as m
from common.broker.server import MAX_FRAMES
from tests.common.broker_world import rollout, scores, ticket

Frames = list[bytes]

FOREIGN = 1 << 40  # items and leases of frames that are replayed: far from those of a test's good peers
TOO_LONG = [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"]
ODD_VALUES: list[Any] = [
    None,
    True,
    -1,
    1 << 63,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x" * 2000,
    b"\x00",
    [],
    [[]],
    {},
]


def valid_messages() -> list[Frames]:
    """One message of every kind that a peer can send, as another peer may have sent it."""
    reference = [m.LeaseRef(stage, FOREIGN, FOREIGN) for stage in ("rollout", "score", "train")]
    status = m.PeerStatus("generating", "weights", 1.0, {"groups": 3.0})
    group: Frames = [bytes(frame) for frame in m.encode_rollout(rollout(FOREIGN, tokens=64))]
    bare: list[m.AnyToBroker] = [
        m.Hello("actor"),
        m.Hello("rewarder"),
        m.Hello("learner", 1),
        m.Serve("rollout", 1),
        m.Serve("score", 1),
        m.Heartbeat(tuple(reference), {"rollout": FOREIGN, "score": 7}, status),
        m.Release(reference[0], 1.0, "no engine"),
        m.Release(reference[1], 0.0, "no search"),
        m.Announce(m.RunState(1, 40, "tcp://127.0.0.1:1", "k" * 40, "c" * 64)),
        m.SlotRequest(1),
        m.SlotReplied(0, 1, 10, 3, 0.001, 0.25),
        m.SlotThrottled(2.0),
        m.StatusRequest(),
        m.Complete(reference[2]),
        m.Bye(),
        c.CacheGet(b"k" * 32),
        c.CacheFailed(b"k" * 32),
        c.CacheRenew((b"k" * 32, b"l" * 32)),
    ]
    return [
        *([m.encode(message)] for message in bare),
        [m.encode(c.CachePut(b"k" * 32)), b"found"],
        [m.encode(m.Submit((FOREIGN,))), m.encode(ticket(FOREIGN))],
        [m.encode(m.Complete(reference[0])), *group],
        [m.encode(m.Complete(reference[1])), m.encode(scores(FOREIGN))],
    ]


class Leaves:
    """Unpickling this makes a folder."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._mark),)


def pickled(mark: Path) -> bytes:
    """A pickle that makes the folder `mark` when it is loaded."""
    return pickle.dumps(Leaves(mark))


class Malformer:
    """Draws malformed messages; the same seed draws the same."""

    def __init__(self, seed: int, mark: Path) -> None:
        self._random = random.Random(seed)
        self._valid = valid_messages()
        self._pickle = pickled(mark)
        self._kinds = [self.random_bytes, self.flipped, self.flipped, self.cut, self.wrong_type, self.wrong_type]
        self._kinds += [self.replayed, self.too_long, self.frames_moved, self.with_pickle]

    def message(self) -> Frames:
        """One message of any kind."""
        return self._random.choice(self._kinds)()

    def random_bytes(self) -> Frames:
        return [self._random.randbytes(self._random.randrange(300)) for _ in range(self._random.randint(1, 6))]

    def replayed(self) -> Frames:
        return list(self._random.choice(self._valid))

    def flipped(self) -> Frames:
        frames = self.replayed()
        index = self._random.randrange(len(frames))
        changed = bytearray(frames[index])
        for _ in range(self._random.choice([1, 1, 2, 8])):
            changed[self._random.randrange(len(changed))] ^= 1 << self._random.randrange(8)
        frames[index] = bytes(changed)
        return frames

    def cut(self) -> Frames:
        frames = self.replayed()
        index = self._random.randrange(len(frames))
        frames[index] = frames[index][: self._random.randrange(len(frames[index]))]
        return frames

    def too_long(self) -> Frames:
        """A container that says it has 2**32 - 1 elements, in the place of something."""
        frames = self.replayed()
        index = self._random.randrange(len(frames))
        at = self._random.randrange(len(frames[index]))
        frames[index] = frames[index][:at] + self._random.choice(TOO_LONG) + frames[index][at:]
        return frames

    def frames_moved(self) -> Frames:
        """Frames left out, repeated or in another order."""
        frames = self.replayed()
        return self._random.choices(frames, k=self._random.randint(1, len(frames) + 3))

    def with_pickle(self) -> Frames:
        frames = self.replayed()
        frames[self._random.randrange(len(frames))] = self._pickle
        return frames

    def wrong_type(self) -> Frames:
        """Right MessagePack with one value of another type, one field too many or too few."""
        frames = self.replayed()
        index = self._random.choice([number for number in range(len(frames)) if self._is_map(frames[number])])
        content = msgspec.msgpack.decode(frames[index])
        self._spoil(content)
        frames[index] = msgspec.msgpack.encode(content)
        return frames

    def too_many_frames(self) -> Frames:
        return [self._valid[0][0]] + [b""] * (MAX_FRAMES + self._random.randrange(2000))

    def _is_map(self, frame: bytes) -> bool:
        return bool(frame) and frame[0] >> 4 == 8

    def _spoil(self, content: Any) -> None:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = self._random.choice(keys)
        if isinstance(content[key], dict | list) and content[key] and self._random.random() < 0.5:
            self._spoil(content[key])
        elif isinstance(content, dict) and self._random.random() < 0.3:
            content["x" * self._random.randint(1, 300)] = content.pop(key)
        else:
            content[key] = self._random.choice(ODD_VALUES)
