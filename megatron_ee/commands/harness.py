"""``megatron-ee harness``: the command line of lm-evaluation-harness, in which the model ``megatron_ee`` is known."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from megatron_ee.commands import Parser
from megatron_ee.errors import ConfigError, UserError, first_line

MODEL = "megatron_ee"
DESCRIPTION = f"""Run tasks of lm-evaluation-harness (extra: eval). All arguments are those of its command lm_eval, with
--model {MODEL} by default: --model_args pretrained=DIR,adapter=DIR,mode=threshold,threshold=0.8 --tasks NAME.
docs/harness.md lists the arguments of the model, and "megatron-ee harness run --help" those of lm_eval."""


class _PassingParser(Parser):
    """Passes all arguments on, except for ``--help`` alone."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]  # has overloads
        """A namespace whose ``arguments`` are all of ``args``."""
        given = list(args or ())
        if given in (["-h"], ["--help"]):
            return super().parse_args(given, namespace)
        return argparse.Namespace(arguments=given)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = _PassingParser("harness", DESCRIPTION)
    result.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of lm_eval")
    return result


def run(arguments: argparse.Namespace) -> int:
    """Register the model and run the harness's command line."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("needs lm-evaluation-harness: pip install 'megatron-ee[eval]'")
    import megatron_ee.evaluation.harness as registered

    assert registered.NAME == MODEL
    from lm_eval.__main__ import HarnessCLI, cli_evaluate

    from megatron_ee.config.validation import validated
    from megatron_ee.evaluation.harness_settings import WHERE, HarnessArguments

    sys.argv = ["lm_eval", *with_model(arguments.arguments)]
    asked = HarnessCLI().parse_args()
    if getattr(asked, "model", None) == MODEL:  # first: the harness makes its models after it has read its tasks
        settings = validated(HarnessArguments, asked.model_args or {}, where=WHERE)
        settings.check_paths()
        if settings.calibration is not None and asked.cache_requests and asked.apply_chat_template:
            raise ConfigError(
                "--cache_requests: does not record which requests went through the chat template, which a certificate "
                "depends on; leave it out, or leave out calibration"
            )
    try:
        cli_evaluate()
    except UserError:
        raise
    except ValueError as error:
        if _of_its_arguments(error):
            raise ConfigError(first_line(error)) from None
        raise
    finally:
        registered.close_loaded()
    return 0


def _of_its_arguments(error: ValueError) -> bool:
    """Whether the harness raised an error where it reads its arguments, such as an unknown task."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("lm_eval.config.")


def with_model(arguments: Sequence[str]) -> list[str]:
    """The arguments of a run, with the model's name if they give neither a model nor a configuration file."""
    given = [argument.partition("=")[0] for argument in arguments]
    others = bool(given) and given[0] in ("ls", "validate")
    named = any(each in ("--model", "--config", "--help") or each[:2] in ("-M", "-C", "-h") for each in given)
    return list(arguments) if others or named or not given else [*arguments, "--model", MODEL]
