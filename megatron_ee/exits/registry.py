"""The exit bodies by the names that a configuration gives them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Set
from importlib import import_module
from typing import get_args

from megatron_ee.config import schema
from megatron_ee.config.architecture import Architecture
from megatron_ee.config.exits import ExitSpec
from megatron_ee.errors import ConfigError
from megatron_ee.exits.body import Body
from megatron_ee.model.traversal import Tap

# The names stand in the schema, since a configuration is checked without torch; each is a file's here.
BODIES: dict[str, type[Body]] = {
    name: import_module(f"megatron_ee.exits.{name}").BODY for name in get_args(schema.Body)
}


def body_of(spec: ExitSpec) -> type[Body]:
    """The body of an exit."""
    return BODIES[spec.body]


def bodies_with(kinds: Set[str]) -> list[str]:
    """Names of the bodies that tensors may belong to, of which the first parts of the names are ``kinds``.

    As a tensor may be missing, those are named that would lack the fewest.
    """
    lacking = {name: len(body.saved - kinds) for name, body in BODIES.items() if kinds <= body.saved}
    return [name for name, count in lacking.items() if count == min(lacking.values())]


def tap_of(spec: ExitSpec) -> Tap:
    """The tap of an exit; all bodies so far read one, of the layer that they stand after."""
    ((layer, tap),) = body_of(spec).taps(spec.layer).items()
    assert layer == spec.layer, "a tap travels under its exit's number"
    return tap


def trains(spec: ExitSpec) -> bool:
    """Whether an exit has a parameter to train: of its body, or of its head."""
    return bool(body_of(spec).saved) or spec.head != "shared"


def resolve_init(specs: Iterable[ExitSpec], architecture: Architecture) -> tuple[ExitSpec, ...]:
    """The exits with ``init: auto`` decided: ``fit`` where the body has a matrix to fit, else ``copy``.

    Raises:
        ConfigError: ``init: fit`` for a body with nothing to fit.
    """
    resolved = []
    for spec in specs:
        rows = body_of(spec).fitted_rows(architecture)
        if spec.init == "fit" and rows is None:
            raise ConfigError(
                f"exits: the exit after layer {spec.layer} has init fit, but body {spec.body} has nothing to fit; "
                "use init auto or copy"
            )
        init: schema.Init = ("fit" if rows else "copy") if spec.init == "auto" else spec.init
        resolved.append(dataclasses.replace(spec, init=init))
    return tuple(resolved)


def check_trains(specs: Iterable[ExitSpec]) -> None:
    """Refuse exits that train nothing.

    Raises:
        ConfigError: names the keys.
    """
    if not any(trains(spec) for spec in specs):
        raise ConfigError(
            "exits: nothing to train: body embedding with head shared has no parameter; choose another body or head"
        )
