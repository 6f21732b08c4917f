"""CURVE keys of one run: made once, mode 0600, one pair per role.

The broker's and the weight server's public keys are pinned by every client; servers admit only the public
keys of the run (`allow list`). A peer without a key of the run never gets past the handshake.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
import zmq.auth.thread

KEY_NAMES = ("broker", "learner", "actor", "rewarder", "monitor")


class KeyFileError(Exception):
    """Keys are missing, unreadable or broken; the message says what to do."""


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair in Z85 (40 characters each)."""

    public: bytes
    secret: bytes


@dataclass(frozen=True)
class RunKeys:
    """What one process knows: its own pair and everybody's public key."""

    own: KeyPair
    public: dict[str, bytes]

    @property
    def allow_list(self) -> list[bytes]:
        """Public keys that servers of this run admit."""
        return list(self.public.values())

    def role_of(self, public: bytes) -> str | None:
        """The role a public key was made for."""
        return next((name for name, key in self.public.items() if key == public), None)


def create_run_keys(directory: Path) -> None:
    """Make the keys of a run in `directory` (mode 0700, files 0600); keys already there are kept."""
    if not zmq.has("curve"):
        raise KeyFileError(
            "this libzmq has no CURVE: install pyzmq from its wheel (pip install --force-reinstall pyzmq)"
        )
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    if (directory / "public.json").exists():
        return
    public = {}
    for name in KEY_NAMES:
        pair = zmq.curve_keypair()
        public[name] = pair[0].decode()
        _write_private(directory / f"{name}.key", {"public": pair[0].decode(), "secret": pair[1].decode()})
    _write_private(directory / "public.json", public)


def load_run_keys(directory: Path, name: str) -> RunKeys:
    """Read the pair of `name` and the public keys of the run.

    Raises:
        KeyFileError: missing or broken files, or a secret that others on this machine can read.
    """
    path = directory / f"{name}.key"
    own = _read(path)
    if path.stat().st_mode & 0o077:
        raise KeyFileError(f"{path} can be read by others: chmod 600 {path}")
    public = {role: key.encode() for role, key in _read(directory / "public.json").items()}
    try:
        return RunKeys(KeyPair(own["public"].encode(), own["secret"].encode()), public)
    except KeyError as error:
        raise KeyFileError(f"{path} lacks {error}: copy the keys folder of the run again") from None


def secure_server(socket: zmq.Socket[Any], keys: RunKeys) -> None:
    """Make `socket` a CURVE server before it is bound."""
    socket.curve_server = True
    socket.curve_publickey = keys.own.public
    socket.curve_secretkey = keys.own.secret
    socket.zap_domain = b"run"


def secure_client(socket: zmq.Socket[Any], keys: RunKeys, server_public: bytes) -> None:
    """Make `socket` a CURVE client that pins the server's key, before it connects."""
    socket.curve_serverkey = server_public
    socket.curve_publickey = keys.own.public
    socket.curve_secretkey = keys.own.secret


class AllowList:
    """Admits only the given public keys to CURVE servers of a context, for as long as it is open (ZAP)."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], public_keys: Iterable[bytes]) -> None:
        self._authenticator = zmq.auth.thread.ThreadAuthenticator(context)
        self._allowed = frozenset(public_keys)

    def callback(self, domain: str, key: bytes) -> bool:
        """Decide on one client key in Z85 (called by pyzmq)."""
        return key in self._allowed

    def __enter__(self) -> AllowList:
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain="run", credentials_provider=self)
        return self

    def __exit__(self, *_: object) -> None:
        self._authenticator.stop()


def _write_private(path: Path, content: dict[str, str]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(content, file)


def _read(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise KeyFileError(f"cannot read {path}: {error.strerror}; copy the keys folder of the run here") from None
    except ValueError:
        raise KeyFileError(f"{path} is not a key file: copy the keys folder of the run again") from None
    if not isinstance(content, dict):
        raise KeyFileError(f"{path} is not a key file: copy the keys folder of the run again")
    return content
