"""Typed configuration of a run: one YAML file, dotted overrides, no unknown key.

`schema` says what can be set, `loading` how a file and overrides become a `Config`.
"""

from common.config.loading import ConfigError, load_config, to_yaml
from common.config.schema import Config

__all__ = ["Config", "ConfigError", "load_config", "to_yaml"]
