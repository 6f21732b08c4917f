"""From a YAML file and dotted overrides to a validated `Config`, or to one clear error."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from common.config.schema import Config


class ConfigError(ValueError):
    """The configuration cannot be used; the message says which key and what to do."""


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read `path` (None: nothing but the defaults), apply `key.path=value` overrides (values are YAML) and validate.

    An empty `run.name` becomes the file's stem, so that the run's folder is found by its config.

    Raises:
        ConfigError: unreadable file, broken YAML, malformed override, unknown key or bad value.
    """
    tree = {} if path is None else _read_yaml(path)
    for override in overrides:
        _apply_override(tree, override)
    _reject_unknown_keys(tree, Config, prefix="")
    run = tree.setdefault("run", {})
    if not run.get("name"):
        run["name"] = "unnamed" if path is None else path.stem
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_first_problem(error, path)) from None


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config {path} is not UTF-8 text") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path} must be a mapping of sections, not a {type(tree).__name__}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, raw = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        raise ConfigError(f"the value of override {override!r} is not valid YAML: quote it") from None
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
    tree[leaf] = value


def _reject_unknown_keys(tree: dict[str, Any], model: type[BaseModel], prefix: str) -> None:
    for key, value in tree.items():
        field = model.model_fields.get(str(key))
        if field is None:
            raise ConfigError(_unknown_key_message(f"{prefix}{key}", model, prefix))
        section = _section_type(field.annotation)
        if section is not None and isinstance(value, dict):
            _reject_unknown_keys(value, section, prefix=f"{prefix}{key}.")


def _section_type(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _unknown_key_message(key: str, model: type[BaseModel], prefix: str) -> str:
    siblings = [f"{prefix}{name}" for name in model.model_fields]
    close = difflib.get_close_matches(key, [*siblings, *_all_keys(Config, "")], n=1, cutoff=0.5)
    leaf = key.rpartition(".")[2]
    close = close or [known for known in _all_keys(Config, "") if known.rpartition(".")[2] == leaf]
    hint = f"did you mean {close[0]!r}?" if close else f"valid here: {', '.join(siblings)}"
    return f"unknown config key {key!r}: {hint}"


def _all_keys(model: type[BaseModel], prefix: str) -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(f"{prefix}{name}")
        section = _section_type(field.annotation)
        if section is not None:
            keys.extend(_all_keys(section, f"{prefix}{name}."))
    return keys


def _first_problem(error: ValidationError, path: Path | None) -> str:
    problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    where = f"{key}: " if key else ""
    given = f" (got {problem['input']!r})" if key else ""
    return f"{'overrides' if path is None else f'config {path}'}: {where}{message}{given}"
