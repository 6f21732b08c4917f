"""Keeps secrets out of whatever leaves the machine: W&B configs and what is printed."""

from __future__ import annotations

import re
from collections.abc import Mapping

HIDDEN = "<redacted>"
_SECRET_NAMES = ("key", "token", "secret", "password", "passwd", "credential")
_HARMLESS_NAME = re.compile(r"tokenizer")
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_URL_SECRET = re.compile(r"(?i)([?&][^=&\s]*(?:key|token|secret|password)[^=&\s]*=)[^&\s]+")


def redact(value: object, name: str = "") -> object:
    """A copy of `value` in which every entry with a telling name, at any depth, is replaced by `<redacted>`.

    Telling are names that contain key, token, secret, password or credential. Counts of tokens
    (`max_tokens: 512`) and tokenizers stay. Logins and keys inside URLs are replaced wherever they stand.
    """
    if name and value is not None and _is_secret(name, value):
        return HIDDEN
    if isinstance(value, Mapping):
        return {str(key): redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if isinstance(value, str):
        return _URL_SECRET.sub(rf"\1{HIDDEN}", _URL_LOGIN.sub(f"{HIDDEN}@", value))
    return value


def _is_secret(name: str, value: object) -> bool:
    stem = _HARMLESS_NAME.sub("", name.lower())
    found = [word for word in _SECRET_NAMES if word in stem]
    counts_tokens = found == ["token"] and "tokens" in stem and isinstance(value, int | float)
    return bool(found) and not counts_tokens
