"""Rules: which requests leave early, by certificate, rules file, key and the request's own words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.config.exits import ExitSpec
from megatron_ee.errors import ConfigError
from megatron_ee.inference.certificate import Calibration
from megatron_ee.inference.policy import GatePolicy, ThresholdPolicy
from megatron_ee.inference.requests import Draft, Request
from megatron_ee.inference.sampling import Sampling
from megatron_ee.serving.access import Key
from megatron_ee.serving.rules.rules import Controls, Decision, Rules

Calibrate = Callable[..., Calibration]
EXITS = (ExitSpec(2, "mlp", "own"), ExitSpec(4, "mlp", "own"))
REQUEST = Request(prompt=(1, 2, 3), max_tokens=32)


def open_rules(path: Path | None = None, *calibrations: Calibration, keys: tuple[str, ...] | None = None) -> Rules:
    return Rules(path, calibrations, exits=EXITS, num_layers=6, key_names=keys)


def decided(rules: Rules, key: str | None = None, *, request: Request = REQUEST, **controls: Any) -> Decision:
    return rules.decide(request, Controls(**controls), None if key is None else Key(key), chat=True)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "rules.yaml").write_text(text)
        return tmp_path / "rules.yaml"

    return write


Write = Callable[[str], Path]


def test_without_rules_and_certificates_everything_runs_in_full_mode() -> None:
    found = decided(open_rules())
    assert (found.request.mode, found.task, found.policy, found.tier) == ("full", "other", "full", "default")
    assert found.request.coverage is found.certificate is found.reason is None


def test_the_only_certificate_is_the_default(calibrate: Calibrate) -> None:
    found = decided(open_rules(None, calibrate()))
    assert found.request.mode == "threshold" and found.request.exits == (2, 4)
    assert found.request.policy == calibrate().certificate.policy
    assert found.request.coverage is not None and found.request.coverage.status == "certified"
    assert (found.task, found.policy, found.certificate) == ("inquiries", "certificate inquiries", "a" * 64)


def test_several_certificates_are_chosen_by_task(calibrate: Calibrate) -> None:
    rules = open_rules(None, calibrate(), calibrate("orders", "b"))
    assert rules.tasks == ("inquiries", "orders")
    assert decided(rules).request.mode == "full"
    assert decided(rules, task="orders").certificate == "b" * 64
    with pytest.raises(ConfigError, match="task: there is no task 'order' here; possible: inquiries, orders"):
        decided(rules, task="order")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"max_tokens": 33}, "max_tokens: 33, but it was calibrated with 32"),
        ({"sampling": Sampling(temperature=1.0)}, "temperature: 1.0, but it was calibrated with 0.0"),
        ({"stop": ("\n",)}, "stop: "),
    ],
)
def test_outside_the_settings_of_the_certificate_it_is_full_mode(
    calibrate: Calibrate, change: dict[str, Any], reason: str
) -> None:
    rules, request = open_rules(None, calibrate()), REQUEST.model_copy(update=change)
    found = decided(rules, request=request)
    assert found.request.mode == "full" and found.certificate is None
    assert found.reason is not None and found.reason.startswith(reason)
    assert found.request.coverage is not None and found.request.coverage.status == "full"
    allowed = decided(rules, request=request, uncertified=True)
    assert allowed.request.mode == "threshold" and allowed.certificate is None
    assert allowed.request.coverage is not None and allowed.request.coverage.status == "uncertified"


def test_the_settings_of_a_certificate_are_known_before_the_decision(calibrate: Calibrate, write: Write) -> None:
    rules = open_rules(write("tasks: {drafts: {mode: full}}"), calibrate())
    decoding = rules.decoding(Controls(), None)
    assert decoding is not None and decoding.max_tokens == 32
    assert rules.decoding(Controls(task="drafts"), None) is None


def test_important_requests_run_in_full_mode(calibrate: Calibrate) -> None:
    found = decided(open_rules(None, calibrate()), important=True)
    assert (found.request.mode, found.tier, found.task) == ("full", "important", "inquiries")
    assert found.reason == "priority: important" and found.certificate is None
    assert found.request.coverage is not None and found.request.coverage.status == "full"


def test_a_key_may_be_important_and_have_a_task(calibrate: Calibrate, write: Write) -> None:
    path = write(
        """
        default: {mode: full}
        important: {mode: speculative, draft: {exit: 2, length: 3}}
        tasks: {drafts: {mode: threshold, threshold: 0.7, exits: [4]}}
        keys:
          back-office: {priority: important}
          website: {task: inquiries, tasks: [inquiries]}
          both: {tasks: [inquiries, drafts]}
        """
    )
    rules = open_rules(path, calibrate(), keys=("back-office", "website", "both", "other"))
    office = decided(rules, "back-office", policy=ThresholdPolicy(threshold=0.1))
    assert (office.request.mode, office.tier, office.policy) == ("speculative", "important", "speculative")
    assert office.request.draft == Draft(exit=2, length=3)
    assert decided(rules, "website").task == "inquiries"
    with pytest.raises(ConfigError, match="task: there is no task 'drafts' here; possible: inquiries$"):
        decided(rules, "website", task="drafts")
    with pytest.raises(ConfigError, match="task: this API key needs one; possible: inquiries, drafts"):
        decided(rules, "both")
    drafts = decided(rules, "other", task="drafts")
    assert drafts.request.policy == ThresholdPolicy(threshold=0.7) and drafts.request.exits == (4,)
    assert (drafts.policy, drafts.request.coverage, drafts.certificate) == ("threshold 0.7", None, None)
    assert decided(rules, "other").request.mode == "full"


@pytest.mark.parametrize(
    "controls, field",
    [
        ({"mode": "threshold"}, "mode"),
        ({"policy": ThresholdPolicy(threshold=0.5)}, "policy"),
        ({"exits": (2,)}, "exits"),
        ({"mode": "speculative", "draft": Draft(length=2)}, "draft"),
    ],
)
def test_important_contradicts_early_exit(controls: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: an important request gets full mode"):
        decided(open_rules(), important=True, **controls)


def test_requests_may_ask_for_full_mode_or_speculative_mode(calibrate: Calibrate) -> None:
    rules = open_rules(None, calibrate())
    for mode, draft in (("full", None), ("speculative", Draft(length=2))):
        found = decided(rules, mode=mode, draft=draft)
        assert (found.request.mode, found.request.draft, found.certificate) == (mode, draft or Draft(), None)
        assert found.request.coverage is not None and found.request.coverage.status == "full"
        assert found.reason == f"mode {mode} was asked for"
    assert decided(rules, mode="speculative", exits=(4,)).request.exits == (4,)
    for mode in ("full", "threshold"):
        with pytest.raises(ConfigError, match=f"^draft: has no effect in mode {mode}; leave it out"):
            decided(rules, mode=mode, draft=Draft(length=2))
    with pytest.raises(ConfigError, match="exits: have no effect in mode full"):
        decided(rules, mode="full", exits=(4,))
    with pytest.raises(ConfigError, match="policy: .* no effect in mode speculative"):
        decided(rules, mode="speculative", policy=ThresholdPolicy())


def test_requests_choose_thresholds_where_there_is_no_certificate() -> None:
    rules, policy = open_rules(), ThresholdPolicy(threshold=0.6)
    found = decided(rules, policy=policy, exits=(2,))
    assert (found.request.mode, found.request.policy, found.request.exits) == ("threshold", policy, (2,))
    assert found.request.coverage is None and found.policy == "threshold 0.6"
    assert decided(rules, mode="threshold").request.policy == ThresholdPolicy()
    assert decided(rules, policy=ThresholdPolicy(thresholds={2: 0.5})).policy == "threshold by exit"


@pytest.mark.parametrize(
    "controls, field",
    [
        ({"policy": ThresholdPolicy(threshold=0.5)}, "policy"),
        ({"mode": "threshold", "exits": (2,)}, "exits"),
    ],
)
def test_thresholds_of_a_request_need_its_word_under_a_certificate(
    calibrate: Calibrate, controls: dict[str, Any], field: str
) -> None:
    rules = open_rules(None, calibrate())
    with pytest.raises(ConfigError, match=f"^{field}: task 'inquiries' has a certificate.*uncertified: true") as error:
        decided(rules, **controls)
    assert "json" not in str(error.value), "no path of the server"
    found = decided(rules, **controls, uncertified=True)
    assert found.request.mode == "threshold" and found.certificate is None
    coverage = found.request.coverage
    assert (
        coverage is not None
        and coverage.status == "uncertified"
        and coverage.reason == f"{field}: the request chose it"
    )


def test_a_task_may_be_switched_to_full_mode(calibrate: Calibrate, write: Write) -> None:
    rules = open_rules(write("tasks: {inquiries: {mode: full}}"), calibrate())
    found = decided(rules)
    assert found.request.mode == "full" and found.reason == "the server's rules say mode full"
    with pytest.raises(ConfigError, match="^mode: task 'inquiries' has a certificate"):
        decided(rules, mode="threshold")


def test_clients_may_be_kept_from_choosing(calibrate: Calibrate, write: Write) -> None:
    path = write("may_choose: false\nkeys: {lab: {may_choose: true}}\ntasks: {plain: {mode: full}}")
    rules, policy = open_rules(path, calibrate()), ThresholdPolicy(threshold=0.2)
    for controls, field in (
        ({"policy": policy}, "policy"),
        ({"exits": (2,)}, "exits"),
        ({"uncertified": True}, "uncertified"),
        ({"task": "plain", "mode": "threshold"}, "mode"),
    ):
        with pytest.raises(ConfigError, match=f"^{field}: this server's rules set it"):
            decided(rules, **controls)
    assert decided(rules, mode="threshold").certificate == "a" * 64
    assert decided(rules, mode="full").request.mode == "full"
    assert decided(rules, "lab", policy=policy, uncertified=True).request.policy == policy


def test_certificates_by_group_need_the_group(calibrate: Calibrate) -> None:
    policy = {"name": "threshold", "threshold": 2.0, "thresholds": {2: 0.9}}
    groups = {"de": {"n": 99, "needed": 10, "policy": policy}, "ja": {"n": 3, "needed": 10}}
    rules = open_rules(None, calibrate(per_group="own", policy=None, groups=groups))
    assert decided(rules, group="de").request.exits == (2,)
    assert decided(rules, group="ja").reason == "no threshold was safe enough"
    assert decided(rules).reason == "group: none was given"
    with pytest.raises(ConfigError, match="^group: task 'orders' has no thresholds by group; leave it out$"):
        decided(open_rules(None, calibrate("orders")), task="orders", group="de", important=True)


def test_after_an_alarm_requests_run_in_full_mode(calibrate: Calibrate) -> None:
    rules = open_rules(None, calibrate(), calibrate("orders", "b"))
    rules.set_alarms("a" * 64, 1)
    found = decided(rules, task="inquiries", uncertified=True)
    assert (found.request.mode, found.certificate) == ("full", None)
    assert found.reason is not None and found.reason.startswith("drift: ")
    assert found.request.coverage is not None and found.request.coverage.status == "full"
    outside = decided(rules, task="inquiries", uncertified=True, request=REQUEST.model_copy(update={"max_tokens": 40}))
    assert outside.request.mode == "full"
    assert decided(rules, task="orders").request.mode == "threshold"
    assert str(rules.fallback("inquiries")) == "full mode" and rules.fallback("orders") is None
    own = decided(rules, task="inquiries", uncertified=True, policy=ThresholdPolicy())
    assert own.request.mode == "threshold", "who asks for it by name gets it"
    rules.set_alarms("a" * 64, 0)
    assert decided(rules, task="inquiries").request.mode == "threshold"


def test_after_an_alarm_the_next_safer_setting_runs_where_the_rules_say_so(calibrate: Calibrate, write: Write) -> None:
    rules = open_rules(write("on_alarm: safer"), calibrate())
    first, certified = decided(rules), calibrate().certificate
    rules.set_alarms("a" * 64, 1)
    found = decided(rules)
    assert found.request.mode == "threshold" and found.certificate == "a" * 64 and found.alarms == 1
    for layer, value in certified.policy.thresholds.items():  # type: ignore[union-attr]
        assert found.request.policy.thresholds[layer] > value  # type: ignore[attr-defined]
    coverage = found.request.coverage
    assert coverage is not None and coverage.status == "uncertified" and "drift" in (coverage.reason or "")
    assert first.request.coverage is not None and first.request.coverage.status == "certified"
    rules.set_alarms("a" * 64, 2)
    assert decided(rules).request.mode == "full"


def test_reload_changes_the_rules_for_what_comes(calibrate: Calibrate, write: Write) -> None:
    rules = open_rules(write("default: {mode: full}"), calibrate())
    rules.set_alarms("a" * 64, 1)
    assert decided(rules).task == "other"
    write("default: {task: inquiries}\non_alarm: safer\nkeys: {new: {priority: important}}")
    rules.use(rules.read(["new"]))
    assert decided(rules).task == "inquiries" and decided(rules, "new").tier == "important"
    assert decided(rules).alarms == 1, "the alarm stays, and now has another effect"


@pytest.mark.parametrize(
    "text, message",
    [
        ("default: {mode: ful}", r"rules.yaml: default.mode: must be one of 'full', 'threshold' or 'speculative'"),
        ("defaults: {mode: full}", "rules.yaml: defaults: unknown key; did you mean 'default'"),
        ("- default", "rules.yaml: expected keys such as default, important"),
        ("default: {mode: full}\ndefault: {mode: full}", r"rules.yaml:2: not valid YAML: key 'default' twice"),
        ("default: {mode: [full", r"rules.yaml:\d: not valid YAML"),
        ("default: {task: inquiries, mode: full}", "default: give either the task"),
        ("default: {}", "default: give either the task"),
        ("default: {task: orders}", "default.task: there is no task 'orders'; there are: inquiries"),
        ("default: {threshold: 0.5}", "default: threshold: has an effect in mode threshold only"),
        ("default: {mode: threshold, threshold: 0}", "default.threshold: must be above 0"),
        ("default: {mode: threshold, threshold: 0.5, policy: {name: gate}}", "default: policy: sets the thresholds"),
        ("default: {mode: threshold, policy: {name: gate}}", "default: policy: the exit after layer 2 has no gate"),
        ("default: {mode: threshold, policy: {name: gates}}", "default.policy.name: must be one of threshold, gate"),
        ("default: {mode: threshold, exits: [3]}", "default: exits: there is no exit after layer 3"),
        ("default: {mode: full, exits: [2]}", "default: exits: have an effect"),
        ("default: {mode: full, draft: {length: 2}}", "default: draft: has an effect"),
        ("important: {mode: threshold}", "important.mode: must be one of 'full' or 'speculative'"),
        ("important: {mode: speculative, draft: {exit: 5}}", "important: draft.exit: there is no exit after layer 5"),
        ("tasks: {orders: {}}", "tasks.orders: give its mode, or a certificate"),
        ("tasks: {orders: {mode: full, on_alarm: full}}", "tasks.orders.on_alarm: the task has no certificate"),
        ("tasks: {inquiries: {mode: threshold}}", "tasks.inquiries.mode: the task's certificate sets"),
        ("tasks: {inquiries: {on_alarm: half}}", "tasks.inquiries.on_alarm: must be one of 'full' or 'safer'"),
        ("tasks: {other: {mode: full}}", "tasks.other: the name other stands for"),
        ("keys: {nobody: {priority: important}}", "keys.nobody: there is no API key of this name; there are: website"),
        ("keys: {website: {priority: urgent}}", "keys.website.priority: must be one of 'important'"),
        ("keys: {website: {task: orders}}", "keys.website.task: there is no task 'orders'"),
        ("keys: {website: {tasks: [inquiries, orders]}}", "keys.website.tasks: there is no task 'orders'"),
        ("tasks: {a: {mode: full}}\nkeys: {website: {task: a, tasks: [inquiries]}}", "keys.website.task: 'a' is not"),
        ("may_choose: no thanks", "may_choose: must be true or false"),
    ],
)
def test_wrong_rules_are_refused_by_key_and_the_old_ones_stay(
    calibrate: Calibrate, write: Write, text: str, message: str
) -> None:
    rules = open_rules(write("default: {mode: full}"), calibrate(), keys=("website",))
    path = write(text)
    with pytest.raises(ConfigError, match=message) as refused:
        rules.use(rules.read(["website"]))
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError):
        open_rules(path, calibrate(), keys=("website",))
    assert decided(rules, "website").request.mode == "full"


def test_an_empty_file_has_no_rules(calibrate: Calibrate, write: Write) -> None:
    assert decided(open_rules(write("# nothing yet\n"), calibrate())).task == "inquiries"


def test_certificates_must_fit_each_other_and_the_model(calibrate: Calibrate) -> None:
    with pytest.raises(ConfigError, match="--calibration: /inquiries.json and /inquiries.json are both for task"):
        open_rules(None, calibrate(), calibrate("inquiries", "b"))
    with pytest.raises(ConfigError, match="the name other stands for"):
        open_rules(None, calibrate("other"))
    with pytest.raises(ConfigError, match="/inquiries.json: exits: there is no exit after layer 4"):
        Rules(None, [calibrate()], exits=EXITS[:1], num_layers=6)
    gated = calibrate(policy={"name": "gate", "threshold": 2.0, "thresholds": {2: 0.5}})
    with pytest.raises(ConfigError, match="/inquiries.json: policy: the exit after layer 2 has no gate"):
        open_rules(None, gated)
    assert GatePolicy(thresholds={2: 0.5}).gated


def test_the_description_has_certificates_and_no_keys_or_paths(calibrate: Calibrate, write: Write) -> None:
    rules = open_rules(write("keys: {website: {task: inquiries}}\ntasks: {drafts: {mode: full}}"), calibrate())
    found = rules.describe()
    assert found["default"] == {"task": "inquiries"} and found["tasks"]["drafts"] == {"mode": "full"}
    certificate = found["tasks"]["inquiries"]["certificate"]
    assert certificate["risk"] == 0.05 and certificate["sha256"] == "a" * 64
    assert certificate["decoding"]["max_tokens"] == 32 and found["tasks"]["inquiries"]["fallback"] is None
    assert "website" not in str(found) and "/inquiries" not in str(found)
    rules.set_alarms("a" * 64, 1)
    assert rules.describe()["tasks"]["inquiries"]["fallback"] == "full mode"


def test_the_description_is_what_holds_for_the_key_that_asks(calibrate: Calibrate, write: Write) -> None:
    path = write(
        """
        default: {task: inquiries}
        may_choose: false
        tasks: {drafts: {mode: full}, notes: {mode: full}}
        keys:
          lab: {task: drafts, may_choose: true}
          office: {priority: important}
          both: {tasks: [drafts, notes]}
        """
    )
    rules = open_rules(path, calibrate())
    found = {
        name: [rules.describe(Key(name))[each] for each in ("default", "priority", "may_choose", "may_name")]
        for name in ("lab", "office", "both", "other")
    }
    every = ["inquiries", "drafts", "notes"]
    assert found == {
        "lab": [{"task": "drafts"}, "default", True, every],
        "office": [{"task": "inquiries"}, "important", False, every],
        "both": [None, "default", False, ["drafts", "notes"]],
        "other": [{"task": "inquiries"}, "default", False, every],
    }
