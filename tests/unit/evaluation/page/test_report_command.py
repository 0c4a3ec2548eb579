"""``megatron-ee report``: which files it takes, and what it refuses."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.checkpoint.digest import file_sha256
from megatron_ee.checkpoint.ownership import MARKER
from megatron_ee.evaluation.calibration.report import statement
from megatron_ee.inference.certificate import read_certificate


def refusal(files: Any, capsys: pytest.CaptureFixture[str], *options: object, status: int) -> str:
    """The one line of a refusal."""
    assert files.report(*options) == status
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("megatron-ee report: error: ")
    assert not files.path("report.html").exists()
    return err.removeprefix("megatron-ee report: error: ")


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        ("certificate.json", "model_sha256", "is about another model (9999999999999999...) than"),
        ("certificate.json", "adapter_sha256", "is about other exits"),
        ("certificate.json", "tokenizer_sha256", "is about another tokenizer or chat template"),
        ("evaluation.json", "model_sha256", "is about another model"),
        ("eval/tasks.json", "model_sha256", "is about another model"),
    ],
)
def test_files_of_another_model_are_refused(
    files: Any, capsys: pytest.CaptureFixture[str], name: str, key: str, message: str
) -> None:
    files.change(name, **{key: "9" * 64})
    error = refusal(files, capsys, *files.all(), status=1)
    assert message in error and f"{key}: " in error and str(files.path(name)) in error


def test_exits_that_are_not_those_of_the_run_are_refused(files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    files.change("eval/tasks.json", adapter_sha256="9" * 64)
    error = refusal(files, capsys, "--run", files.path("run"), "--evaluation", files.path("eval"), status=1)
    assert "the exits that were measured (9999999999999999...) are none of its own (adapter-best)" in error


def test_files_without_hashes_are_accepted(files: Any) -> None:
    files.change("evaluation.json", model_sha256=None, adapter_sha256=None)
    assert "42.0%" in files.page("--run", files.path("run"), "--evaluation", files.path("evaluation.json"))


def test_audits_under_another_certificate_are_refused(files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    files.change("drift.json", certificates=["9" * 64])
    error = refusal(files, capsys, *files.all(), status=1)
    assert "drift.json: its requests ran under the certificate 9999999999999999..." in error


def test_answers_without_the_certificate_are_pointed_out(files: Any) -> None:
    told = "were measured with other thresholds than the certificate"
    assert told not in files.page(*files.all())
    info = files.path("eval/answers.jsonl.info.json")
    info.write_text(json.dumps({"settings": {"calibration_sha256": None}}))
    assert told in files.page(*files.all())


@pytest.mark.slow
def test_answers_under_another_certificate_are_pointed_out(files: Any) -> None:
    info = files.path("eval/answers.jsonl.info.json")
    info.write_text(json.dumps({"settings": {"calibration_sha256": "9" * 64}}))
    assert "thresholds of another certificate (9999999999999999…)" in files.page(*files.all())


def test_a_certificate_that_is_not_given_is_not_called_missing(files: Any) -> None:
    digest = file_sha256(files.path("certificate.json"))[:16]
    page = unescape(files.page("--evaluation", files.path("eval")))
    told = f"The certificate of these answers ({digest}…) was not given; give it with --calibration."
    assert page.count(told) == 3 and "No certificate was given" not in page
    assert unescape(files.page("--run", files.path("run"))).count("No certificate was given") == 3


def test_each_certificate_and_each_audit_has_its_own_level(files: Any) -> None:
    """Full mode promises nothing that a sample could mislead about."""
    content, drift = (json.loads(files.path(name).read_text()) for name in ("certificate.json", "drift.json"))
    others = {"other": {**content, "delta": 0.2}, "full": {**content, "policy": None, "delta": 0.3}}
    for name, values in {**others, "audits": {**drift, "certificates": [], "alarm_level": 0.03}}.items():
        files.path(f"{name}.json").write_text(json.dumps(values))
    certificates = [files.path(f"{name}.json") for name in ("certificate", *others)]
    drifts = [files.path(f"{name}.json") for name in ("drift", "audits")]
    page = files.page("--calibration", *certificates, "--drift", *drifts)
    assert re.findall(r"Of 100 calibrations like this one, at most (\d+) on average", page) == ["10", "20"]
    assert re.findall(r"a false alarm with a probability of at most ([\d.]+%)", page) == ["1%", "3%"]


def test_many_small_groups_are_counted(files: Any) -> None:
    content = json.loads(files.path("eval/tasks.json").read_text())
    small = {"members": 3, "too_small": True, "largest_loss": None}
    names = ["(none)", *(f"group-{number}" for number in range(34))]
    content["groups"]["calibrated"]["groups"][2:] = [{"name": name, **small} for name in names]
    files.change("eval/tasks.json", **content)
    page = files.page("--evaluation", files.path("eval"))
    assert "Too small to be judged: no group given (3), group-0 (3), " in page and "group-28 (3) and 5 more." in page


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ((), 2, "--run, --evaluation, --calibration: give at least one of them"),
        (("--evaluation", "none"), 2, "--evaluation: no such file or directory: none"),
        (("--run", "{root}/eval"), 2, "--run: {root}/eval is not a run's directory; give what was --output of tune"),
        (("--evaluation", "{root}/run"), 2, "--evaluation: {root}/run holds neither tasks.json nor evaluation.json"),
        (("--evaluation", "{root}/plan.json"), 1, "{root}/plan.json: is not a result of megatron-ee evaluate"),
        (("--calibration", "{root}/plan.json"), 1, "{root}/plan.json: is not a certificate"),
        (
            ("--run", "{root}/run", "--drift", "{root}/plan.json"),
            1,
            "{root}/plan.json: is not the output of megatron-ee drift --json: ",
        ),
        (
            ("--run", "{root}/run", "--plan", "{root}/drift.json"),
            1,
            "{root}/drift.json: is not the output of megatron-ee plan --json: gpus: missing",
        ),
        (
            ("--evaluation", "{root}/eval", "--setting", "threshold 0.5"),
            2,
            "--setting: 'threshold 0.5' is not a setting of threshold mode in {root}/eval/tasks.json; it has "
            "threshold 0.8",
        ),
        (("--run", "{root}/run", "--setting", "x"), 2, "--setting: no evaluation of tasks was given"),
        (("--run", "{root}/run", "--language", "fr"), 2, "argument --language: invalid choice: 'fr'"),
        (("--run", "{root}/run", "--examples", "-1"), 2, "argument --examples: must be at least 0, not -1"),
    ],
)
def test_mistakes_are_one_line(
    files: Any, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], status: int, message: str
) -> None:
    given = [each.replace("{root}", str(files.root)) for each in options]
    error = refusal(files, capsys, *given, status=status)
    assert message.replace("{root}", str(files.root)) in error


def test_the_output_must_be_a_page_and_nobody_elses(
    files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_ee.commands.main import main

    run = ["report", "--run", str(files.path("run")), "--output"]
    assert main([*run, str(tmp_path / "report.pdf")]) == 2
    assert "report.pdf must end in .html" in capsys.readouterr().err
    theirs = tmp_path / "theirs.html"
    theirs.write_text("<p>mine")
    assert main([*run, str(theirs)]) == 2
    assert "megatron-ee did not write it" in capsys.readouterr().err and theirs.read_text() == "<p>mine"
    assert files.report("--run", files.path("run")) == 0 and files.report("--run", files.path("run")) == 0
    assert capsys.readouterr().out == f"{files.path('report.html')}\n" * 2


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("overall", {}, "overall and tasks do not have the settings"),
        ("timing", None, "timing: missing"),
        ("settings", [], "settings: must be a list of at least 1"),
        ("rows", [{"id": 3, "task": "t", "settings": {}}], "rows[0].id: must be text"),
        ("groups", {"calibrated": {"by": "x", "risk": "y", "overall": {}, "groups": []}}, "'y' is not among its"),
    ],
)
def test_an_edited_evaluation_is_refused_by_its_key(
    files: Any, capsys: pytest.CaptureFixture[str], name: str, change: Any, message: str
) -> None:
    files.change("eval/tasks.json", **{name: change})
    assert message in refusal(files, capsys, "--evaluation", files.path("eval"), status=1)


VALIDATION = {"final_loss": 1.5, "exits": [{"layer": 2, "loss": 3.0, "agreement": 0.4}]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"tokens_seen": "x", "validation": VALIDATION}, "tokens_seen: must be a whole number, not 'x'"),
        (
            {"tokens_seen": 1, "validation": {**VALIDATION, "final_loss": "x"}},
            "validation.final_loss: must be a number",
        ),
        (
            {"tokens_seen": 1, "validation": {"exits": [{"layer": 2, "loss": 3.0, "agreement": "x"}]}},
            "validation.exits[0].agreement: must be a number, not 'x'",
        ),
        ({"tokens_seen": 1, "validation": {"exits": []}}, "validation.exits: must be a list of at least 1, not []"),
        ({"session": {"seconds": "x", "processes": 1, "device": "CPU"}}, "session.seconds: must be a number, not 'x'"),
    ],
)
def test_an_edited_log_is_refused_by_its_line_and_key(
    files: Any, capsys: pytest.CaptureFixture[str], line: dict[str, Any], message: str
) -> None:
    log = files.path("run/log.jsonl")
    log.write_text(f"{json.dumps({'step': 30, **line})}\n")
    assert f"{log}:1: not a line of a tuning log: {message}" in refusal(
        files, capsys, "--run", files.path("run"), status=1
    )


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("drift.json", {"restarting": {"alarms": 5}}, "restarting.alarms: must be a list, not 5"),
        ("drift.json", {"from_start": {"alarm": 5}}, "from_start.alarm: must be "),
        ("evaluation.json", {"final_accuracy": "x"}, "final_accuracy: must be "),
    ],
)
def test_edited_figures_are_refused_by_their_key(
    files: Any, capsys: pytest.CaptureFixture[str], name: str, changes: dict[str, Any], message: str
) -> None:
    files.change(name, **changes)
    error = refusal(files, capsys, *files.all(), status=1)
    assert f"{files.path(name)}: " in error and message in error


def test_speeds_without_full_modes_are_refused(files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(files.path("eval/tasks.json").read_text())
    content["overall"]["full"]["speed"] = None
    files.change("eval/tasks.json", **content)
    error = refusal(files, capsys, "--evaluation", files.path("eval"), status=1)
    assert "tasks.json: overall.full.speed: missing, but others have it" in error


def test_damaged_answers_are_refused_with_their_line(files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    answers = files.path("eval/answers.jsonl")
    answers.write_text('{"setting": "full", "id": "q1", "answer": {"text": 1}}\n')
    assert f"{answers}:1: text: must be text, not 1" in refusal(
        files, capsys, "--evaluation", files.path("eval"), status=1
    )


def test_an_unfinished_evaluation_says_how_to_end_it(files: Any, capsys: pytest.CaptureFixture[str]) -> None:
    files.path("eval/tasks.json").unlink()
    error = refusal(files, capsys, "--evaluation", files.path("eval"), status=2)
    assert "eval is unfinished; end it with evaluate --resume" in error


def test_a_quickstart_brings_its_evaluation(files: Any) -> None:
    out = files.path("out")
    out.mkdir()
    (out / MARKER).write_text('{"made_by": "quickstart"}')
    files.path("run").rename(out / "tuning")
    (out / "evaluation").mkdir()
    files.path("evaluation.json").rename(out / "evaluation" / "evaluation.json")
    page = files.page("--run", out)
    assert "A short measurement of speed" in page and "How often each exit says the same" in page


def test_a_run_without_sessions_gives_the_time_of_its_steps(files: Any) -> None:
    log = files.path("run/log.jsonl")
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines() if "session" not in line))
    page = files.page("--run", files.path("run"))
    assert "5.0 s" in page and "of 1 logged steps alone, without loading, checking and saving" in page


def test_a_run_that_is_not_finished_or_not_validated_is_pointed_out(files: Any) -> None:
    files.path("run/status.json").write_text(json.dumps({"state": "interrupted", "step": 5, "steps": 20}))
    files.path("run/log.jsonl").unlink()
    page = files.page("--run", files.path("run"))
    assert "The tuning run is not finished: 5 of 20 steps are done." in page
    assert "No held-out text was set aside in tuning" in page


def test_full_mode_as_a_certificate_is_said_plainly(files: Any) -> None:
    files.change("certificate.json", loss_interval=None, mean_exit_layer=None)
    content = json.loads(files.path("certificate.json").read_text())
    files.path("certificate.json").write_text(json.dumps({**content, "policy": None}))
    page = files.page("--calibration", files.path("certificate.json"))
    assert "No guarantee could be given: no setting of the exits" in page and "uses full mode, without any gain" in page


def test_the_certificates_own_setting_stands_out(files: Any) -> None:
    """The safest levels are not all 100%, and a setting for all groups has to pass in each."""
    content = json.loads(files.path("certificate.json").read_text())
    content["tested"]["all"][0]["level"] = 0.9999987
    first, second, last = content["tested"].pop("all")
    content["tested"] = {"a": [first, second, last], "b": [first, {**second, "passed": False}]}
    files.path("certificate.json").write_text(json.dumps({**content, "per_group": "worst"}))
    page = files.page("--calibration", files.path("certificate.json"))
    assert "99.99987%" in page and ">90.000%" in page
    rows = re.findall(r'<tr class="chosen">.*?</tr>', page, re.DOTALL)
    assert len(rows) == 2 and all("99.99987%" in row for row in rows)
    assert page.count("it is taken only if it passes in every group.") == 2


def test_a_guarantee_that_wrong_answers_would_keep_is_pointed_out(files: Any) -> None:
    files.change("certificate.json", loss="quality", metric="f1", full_quality=0.04)
    certificate = read_certificate(files.path("certificate.json"))
    assert "f1 of full mode's own answers: 0.040. That is at most the risk, so even answers" in statement(certificate)
    page = files.page("--calibration", files.path("certificate.json"))
    assert "Even answers that are all wrong would keep this guarantee." in page
    enough = certificate.model_copy(update={"full_quality": 0.4})
    assert statement(enough).endswith("f1 of full mode's own answers: 0.400.")


def test_tasks_are_compared_in_the_chosen_setting_alone(files: Any) -> None:
    """A later evaluation has the first one's setting or no such table, as an evaluation of speculative mode alone."""
    content = json.loads(files.path("eval/tasks.json").read_text())
    page = files.page("--evaluation", files.path("eval"), files.path("eval/tasks.json"))
    assert page.count("By task: full mode beside certified thresholds.") == 2
    kept = ("full", "speculative")
    for found in (content["overall"], *content["tasks"].values()):
        for name in found.keys() - kept:
            del found[name]
    content["settings"] = [each for each in content["settings"] if each["name"] in kept]
    later = files.path("later.json")
    later.write_text(json.dumps({**content, "groups": {}}))
    assert files.page("--evaluation", files.path("eval"), later).count("By task: ") == 1
    assert "By task: " not in files.page("--evaluation", later)


@pytest.mark.slow
def test_the_setting_is_chosen_by_rule(files: Any) -> None:
    assert "1.40×" in files.page("--evaluation", files.path("eval"), "--setting", "threshold 0.8")
    content = json.loads(files.path("eval/tasks.json").read_text())
    for found in (content["overall"], *content["tasks"].values()):
        del found["calibrated"]
    content["settings"] = [each for each in content["settings"] if each["name"] != "calibrated"]
    files.change("eval/tasks.json", **content)
    page = files.page("--evaluation", files.path("eval"))
    assert "setting whose quality is by no score measurably below full mode's: threshold 0.8." in unescape(page)
    for found in (content["overall"], *content["tasks"].values()):
        found["threshold 0.8"]["scores"]["f1"]["high"] = -0.01
    files.change("eval/tasks.json", **content)
    page = files.page("--evaluation", files.path("eval"))
    assert "the setting that agrees most with full mode: threshold 0.8." in page
    for found in (content["overall"], *content["tasks"].values()):
        found["threshold 0.8"]["scores"]["contains"]["high"] = -0.01
    files.change("eval/tasks.json", **content)
    page = files.page("--evaluation", files.path("eval"))
    assert "the setting that agrees most with full mode: threshold 0.8." in page
    assert "Answers get measurably worse." in page


def test_a_group_alone_is_not_called_harmless(files: Any) -> None:
    content = json.loads(files.path("eval/tasks.json").read_text())
    for compared in content["groups"].values():
        for group in compared["groups"]:
            for each in (value for value in group.values() if isinstance(value, dict)):
                each.update(p=None, rest=None, worse=False)
    files.change("eval/tasks.json", **content)
    page = files.page("--evaluation", files.path("eval"))
    assert "No group could be tested against the others" in page and "No group was found" not in page
