"""A command line whose unknown options are overrides of a configuration file."""

from __future__ import annotations

from typing import Any

from megatron_ee.commands import Parser


class ConfigParser(Parser):
    """Collects unknown options as overrides, and documents the configuration in its help."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Arguments, with everything unknown in ``overrides``; ``load_config`` checks that."""
        arguments, overrides = self.parse_known_args(args, namespace)
        arguments.overrides = overrides
        return arguments

    def format_help(self) -> str:
        """Own options, then every key of the configuration."""
        from megatron_ee.config.load import config_help

        return f"{super().format_help()}\nconfiguration keys, in the YAML file or as options:\n\n{config_help()}"
