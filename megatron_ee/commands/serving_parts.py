"""What ``serve`` puts together: keys, rules and exit log before the model is loaded, and the application after."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry

from megatron_ee.inference.certificate import Calibration
from megatron_ee.inference.released import Released
from megatron_ee.serving.access import Access
from megatron_ee.serving.api.translate import RequestLimits
from megatron_ee.serving.app import build_app
from megatron_ee.serving.audits.audit_file import AuditFile, adopt_old_state, begin_audits, state_path
from megatron_ee.serving.audits.auditor import Auditor
from megatron_ee.serving.console import say
from megatron_ee.serving.engine_loop import EngineLoop
from megatron_ee.serving.exit_log import ExitLog
from megatron_ee.serving.metrics import Metrics
from megatron_ee.serving.rules.rules import Rules
from megatron_ee.serving.server import ServedApp
from megatron_ee.serving.service import Service

CLOSE_SECONDS = 5.0
"""Seconds for the last lines of the exit log."""


@dataclass(frozen=True)
class ServingParts:
    """The parts of a server that need no loaded model. They are on the first rank only."""

    arguments: argparse.Namespace
    released: Released
    access: Access
    rules: Rules
    exit_log: ExitLog | None
    audits: AuditFile | None

    @classmethod
    def open(
        cls, arguments: argparse.Namespace, released: Released, calibrations: Sequence[Calibration]
    ) -> ServingParts:
        """Read the files that the command line names.

        Raises:
            ConfigError: a file is wrong, or does not fit the model.
        """
        access = Access(arguments.api_key_file)
        rules = Rules(
            arguments.rules,
            calibrations,
            exits=released.exits,
            num_layers=released.model.architecture.num_layers,
            key_names=access.names if access.required else None,
        )
        for calibration in calibrations:
            if (reason := calibration.engine_outside) is not None:
                task = calibration.certificate.task
                line = f"{task}: the certificate covers no request of this server, which all run in full mode: {reason}"
                say(f"task {line}")
        exit_log = audits = None
        if arguments.exit_log is not None:
            exit_log = ExitLog(
                arguments.exit_log,
                max_bytes=arguments.log_size * 10**6,
                when=arguments.log_period,
                backups=arguments.log_backups,
                text=arguments.log_text,
            )
            adopt_old_state(exit_log.path)
            if calibrations:
                audits = begin_audits(
                    state_path(exit_log.path),
                    calibrations,
                    arguments.audit,
                    alarm_level=arguments.alarm_level,
                    reset=arguments.reset_audits,
                )
        return cls(arguments, released, access, rules, exit_log, audits)

    def serve(self, engine_loop: EngineLoop) -> ServedApp:
        """The application over a loop."""
        given, name = self.arguments, self.arguments.model_name or _name(self.arguments.model)
        layers = [spec.layer for spec in engine_loop.exits]
        metrics = Metrics(
            CollectorRegistry(),
            layers,
            engine_loop.num_layers,
            self.rules.tasks,
            name,
            max_positions=engine_loop.max_positions,
        )
        auditor = None
        if self.exit_log is not None and self.audits is not None:
            path = state_path(self.exit_log.path)
            auditor = Auditor(self.rules, engine_loop, path, self.audits, given.audit)
        limits = RequestLimits(
            max_body=given.max_body * 2**20,
            max_prompt_tokens=given.max_prompt_tokens,
            max_tokens=given.max_tokens,
            max_outputs=given.max_samples,
            deadline=given.deadline,
            default_temperature=given.default_temperature,
        )
        service = Service(
            engine_loop=engine_loop,
            tokenizer=self.released.tokenizer,
            model_name=name,
            created=int(time.time()),
            access=self.access,
            rules=self.rules,
            auditor=auditor,
            exit_log=self.exit_log,
            metrics=metrics,
            limits=limits,
            max_requests=given.max_connections,
        )

        async def close() -> None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(service.close(), CLOSE_SECONDS)
            if self.exit_log is not None:
                self.exit_log.close()

        return ServedApp(build_app(service), service.reload, close)


def _name(model: Path) -> str:
    return model.resolve().name
