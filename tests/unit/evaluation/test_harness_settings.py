"""Arguments of the model for lm-evaluation-harness, without the harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_ee.commands.harness import with_model
from megatron_ee.commands.main import main
from megatron_ee.config.validation import validated
from megatron_ee.errors import ConfigError, UserError
from megatron_ee.evaluation.harness_settings import WHERE, HarnessArguments
from megatron_ee.inference.policy import ThresholdPolicy


def arguments(**given: Any) -> HarnessArguments:
    return validated(HarnessArguments, given, where=WHERE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "pretrained: missing"),
        ({"mode": "fast"}, "mode: must be one of 'full', 'threshold' or 'speculative', not 'fast'"),
        ({"treshold": 0.8}, "treshold: unknown key; did you mean 'threshold'?"),
        ({"trust_remote_code": True}, "trust_remote_code: unknown key; possible: pretrained, adapter, mode, exit, "),
        ({"policy": "margin"}, "policy: must be one of threshold, gate, not 'margin'"),
        ({"mode": "full", "threshold": 0.8}, "threshold: has no effect in mode full; leave it out, or use mode=thres"),
        ({"mode": "full", "exits": [2]}, "exits: has no effect in mode full, which asks none; leave it out, or use an"),
        ({"mode": "threshold", "draft_exit": 2}, "draft_exit: has no effect in mode threshold; leave it out, or use "),
        ({"exit": 2, "mode": "threshold"}, "mode: has no effect with exit, which answers alone; leave out one of the "),
        ({"exit": 2, "threshold": 0.8}, "threshold: has no effect with exit, which answers alone; leave out one of t"),
        ({"mode": "full", "calibration": "c"}, "calibration: has no effect in mode full; leave it out, or use mode=t"),
        ({"calibration": "c", "threshold": 0.8}, "threshold: has no effect with calibration, which sets the threshold"),
        ({"calibration_group": "a"}, "calibration_group: has an effect with calibration only; give it too, or leave"),
        ({"exits": "8,16"}, "exits: must be a list, not '8,16'"),
        ({"batch_size": "many"}, "batch_size: must be a whole number or auto, not 'many'"),
        ({"batch_size": 0}, "batch_size: must be at least 1, not 0"),
        ({"enable_thinking": True}, "enable_thinking: give think_end_token too, so that the thinking is cut off answ"),
    ],
)
def test_refusals_are_one_line_that_names_the_argument(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        arguments(**({"pretrained": "model", **given} if given else {}))
    assert str(raised.value).startswith(f"model_args: {message}") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pretrained": "owner/name"}, "model_args: pretrained: no such directory: owner/name; give one on this mach"),
        ({"adapter": "nowhere"}, "model_args: adapter: no such directory: nowhere; give one on this machine"),
        ({"calibration": "no.json"}, "model_args: calibration: no such file: no.json; give one on this machine"),
        ({"adapter": None, "exit": 1}, "model_args: exit: there are no exits; give their adapter"),
        ({"exit": 3}, "no exit after layer 3; it has them after 1, 2"),
        ({"exits": [1, 3]}, "model_args: exits: there is no exit after layer 3; there are: 1, 2"),
        ({"exits": []}, "model_args: exits: mode threshold needs at least one"),
        ({"mode": "speculative", "draft_exit": 3}, "model_args: draft_exit: there is no exit after layer 3"),
        ({"draft_exit": 1}, "model_args: draft_exit: has no effect in mode threshold"),
        ({"adapter": None, "threshold": 0.8}, "model_args: threshold: has no effect in mode full"),
        ({"adapter": None, "exits": [1]}, "model_args: exits: has no effect in mode full"),
        ({"adapter": None, "mode": "threshold"}, "model_args: mode: threshold needs exits; give their adapter"),
        ({"threshold": 0}, "model_args: threshold: must be above 0, not 0"),
        ({"policy": "gate"}, "model_args: policy: the exit after layer 1 has no gate"),
        ({"measure": "luck"}, "model_args: measure: must be one of probability, margin, entropy, not 'luck'"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    given: dict[str, Any], message: str, byte_model: Path, adapter: Path
) -> None:
    asked = arguments(**{"pretrained": str(byte_model), "adapter": str(adapter), **given})
    with pytest.raises(UserError) as raised:
        released = asked.open()
        asked.options(released, asked.setting(released))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_defaults_are_those_of_generate(byte_model: Path, adapter: Path) -> None:
    asked = arguments(pretrained=str(byte_model), adapter=str(adapter))
    released = asked.open()
    setting = asked.setting(released)
    assert (setting.mode, setting.policy, setting.exits) == ("threshold", ThresholdPolicy(), None)
    assert asked.options(released, setting).max_num_seqs == 16
    asked = arguments(pretrained=str(byte_model))
    assert asked.setting(asked.open()).mode == "full"


def test_policy_exits_and_batch_are_taken(byte_model: Path, adapter: Path) -> None:
    policy = {"threshold": 0.8, "thresholds": {"2": 0.7}, "measure": "margin", "min_full": 3}
    asked = arguments(pretrained=str(byte_model), adapter=str(adapter), exits=2, batch_size="4", **policy)
    released = asked.open()
    setting = asked.setting(released)
    assert setting.policy == ThresholdPolicy(threshold=0.8, thresholds={2: 0.7}, measure="margin", min_full=3)
    assert setting.exits == (2,) and asked.options(released, setting).exits == (2,)
    assert asked.num_seqs == 4
    assert arguments(pretrained="m", batch_size="auto:2", max_batch_size=6).num_seqs == 6


def test_an_exit_alone_is_a_shallower_model(byte_model: Path, adapter: Path) -> None:
    alone = arguments(pretrained=str(byte_model), adapter=str(adapter), exit=2).open()
    assert alone.model.architecture.num_layers == 3 and alone.exits == ()  # body "layer" has one of its own
    assert arguments(pretrained=str(byte_model), adapter=str(adapter), exit=1).open().model.architecture.num_layers == 1


def test_the_command_runs_this_model_unless_another_is_named() -> None:
    assert with_model(["--tasks", "a"]) == ["--tasks", "a", "--model", "megatron_ee"]
    assert with_model(["-Mhf", "--tasks", "a"]) == ["-Mhf", "--tasks", "a"]
    assert with_model(["--model_args", "pretrained=m"])[-1] == "megatron_ee"
    for others in (["--model=hf", "--tasks", "a"], ["-C", "run.yaml"], ["ls", "tasks"], ["run", "--help"], []):
        assert with_model(others) == others


def test_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["harness", "--tasks", "a"]) == 2
    assert capsys.readouterr().err == (
        "megatron-ee harness: error: needs lm-evaluation-harness: pip install 'megatron-ee[eval]'\n"
    )
