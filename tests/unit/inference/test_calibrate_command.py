"""``megatron-ee calibrate`` and ``generate --calibration`` as a user runs them.

The model's last two layers change nothing. So an exit after its second layer is always right, and one after its first
is not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ee.checkpoint.adapter_writing import save_adapter
from megatron_ee.checkpoint.digest import file_sha256
from megatron_ee.checkpoint.initialise import initialise_exit
from megatron_ee.checkpoint.journal import open_journal
from megatron_ee.checkpoint.loading import load_backbone
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.commands.main import main
from megatron_ee.config.exits import ExitSpec
from megatron_ee.errors import ConfigError, DataError
from megatron_ee.evaluation.calibration.run import calibrate
from megatron_ee.evaluation.calibration.sample import CalibrationPlan, draw_sample
from megatron_ee.evaluation.tasks.answers import entry_key
from megatron_ee.exits.stage import Stage
from megatron_ee.inference.certificate import open_calibration, read_certificate
from megatron_ee.inference.loading import open_engine
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.policy import GatePolicy, ThresholdPolicy
from megatron_ee.inference.released import open_released
from megatron_ee.inference.requests import Request
from megatron_ee.inference.sampling import Sampling
from megatron_ee.model.setup import build_setup
from megatron_ee.parallel.groups import process_groups
from megatron_ee.testing.models import save_tiny_model

TOKENS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, save_tokenizer: Callable[..., None]) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model("llama2", path, vocab_size=258, max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
    save_tokenizer(path)
    weights = load_file(path / "model.safetensors")
    for layer in (2, 3):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{layer}.{name}.weight"].zero_()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def make_adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves copied exits of kind ``norm``; those in ``noisy`` are disturbed. Gates have random weights."""

    def make(layers: tuple[int, ...], noisy: tuple[int, ...] = (), seed: int = 0, gate: bool = False) -> Path:
        path = tmp_path_factory.mktemp("adapter") / "adapter"
        opened = open_model(model)
        specs = [ExitSpec(layer, "norm", gate=gate) for layer in layers]
        with process_groups() as groups:
            stage = Stage(build_setup(opened.architecture, torch.float32, groups), range(1, 5), specs, final_exit=True)
            load_backbone(stage, opened)
            generator = torch.Generator().manual_seed(seed)
            for exit_ in stage.exits:
                initialise_exit(exit_, opened, 1)
                if gate:
                    exit_.gate.place(0.3 * torch.randn(len(exit_.gate.weight) + 1, generator=generator))
                if exit_.spec.layer in noisy:
                    with torch.no_grad():
                        weight = exit_.head.matrix.weight
                        weight += 0.05 * torch.randn(weight.shape, generator=generator)
            about = {"base_model": str(model), "backbone_sha256": opened.digest(), "steps": 0, "extra": {}}
            save_adapter(path, stage.exits, specs, groups, **about)
        return path

    return make


@pytest.fixture(scope="module")
def adapter(make_adapter: Callable[..., Path]) -> Path:
    return make_adapter((1, 2))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 prompts of two groups."""
    path = tmp_path_factory.mktemp("data") / "sample.jsonl"
    records = [
        {"id": str(i), "task": "words", "prompt": f"word {i * i} of {i}", "group": "ab"[i % 2], "references": ["a"]}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def run(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs ``calibrate``; exit status, stdout and stderr without progress."""

    def run(adapter: Path, output: Path, *options: object, risk: float = 0.1) -> tuple[int, str, str]:
        fixed: list[object] = ["calibrate", "--model", model, "--adapter", adapter, "--data", data, "--output", output]
        fixed += ["--dtype", "float32", "--max-tokens", TOKENS, "--risk", risk, "--delta", 0.1]
        status = main(list(map(str, [*fixed, *options])))
        found = capsys.readouterr()
        progress = ("loading: ", "hashing the backbone: ", "answering in ", "asking exit ")
        errors = [line for line in found.err.splitlines(True) if not line.startswith(progress)]
        return status, found.out, "".join(errors)

    return run


@pytest.fixture(scope="module")
def certified(model: Path, data: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("certified") / "certificate.json"
    fixed: list[object] = ["calibrate", "--model", model, "--adapter", adapter, "--data", data, "--output", path]
    fixed += ["--dtype", "float32", "--max-tokens", TOKENS, "--risk", 0.1, "--delta", 0.1]
    assert main(list(map(str, fixed))) == 0
    return path


def generate(model: Path, adapter: Path, capsys: pytest.CaptureFixture[str], *options: object) -> tuple[int, Any, str]:
    capsys.readouterr()
    fixed: list[object] = ["generate", "--model", model, "--adapter", adapter, "--dtype", "float32", "--json"]
    status = main(list(map(str, [*fixed, "--prompt", "word 5", *options])))
    found = capsys.readouterr()
    return status, json.loads(found.out) if found.out else None, found.err


def test_safe_exits_are_certified_and_gain(certified: Path, data: Path) -> None:
    certificate = read_certificate(certified)
    assert certificate.n == 32 and certificate.n_fit == 8 and certificate.task == "words"
    assert isinstance(certificate.policy, ThresholdPolicy) and 2 in certificate.policy.thresholds
    tests = certificate.tested["all"]
    assert tests[0].passed and all(each.passed for each in tests[:-1])
    assert certificate.loss_interval is not None and certificate.loss_interval.mean <= 0.1
    assert certificate.mean_exit_layer is not None and certificate.mean_exit_layer.mean < 3.5
    low, high = certificate.mean_exit_layer.low, certificate.mean_exit_layer.high
    assert low is not None and low <= certificate.mean_exit_layer.mean <= high
    assert certificate.overlap == "unknown" and set(certificate.groups) == {"a", "b"}
    assert not list(certified.parent.glob("*.partial*"))


def test_generate_takes_it_as_a_policy_and_says_so(
    model: Path, adapter: Path, certified: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--calibration", certified, "--max-tokens", TOKENS)
    status, answer, told = generate(model, adapter, capsys, *options)
    assert status == 0 and "megatron-ee generate: ran under the certificate for words\n" in told
    sha256 = file_sha256(certified)
    assert answer["calibration"] == {"status": "certified", "task": "words", "certificate": sha256, "reason": None}
    assert answer["statistics"]["calibration"] == answer["calibration"]
    assert 2 in answer["layers"]
    _, explained, _ = generate(model, adapter, capsys, *options, "--explain")
    assert explained["calibration"] == answer["calibration"] and explained["layers"] == answer["layers"]
    policy = read_certificate(certified).policy
    assert isinstance(policy, ThresholdPolicy)
    thresholds = {each["layer"]: each["threshold"] for each in explained["explanation"]["exits"] if not each["final"]}
    assert thresholds == {1: policy.thresholds.get(1), 2: policy.thresholds[2]}
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "a", "threshold": 0.5}) + "\n")
    assert main([*map(str, ["generate", "--model", model, "--adapter", adapter, "--prompts", prompts, *options])]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"megatron-ee generate: error: {prompts}:1: policy: {certified} sets the thresholds; leave")
    _, drafted, told = generate(model, adapter, capsys, *options, "--mode", "speculative")
    assert drafted["calibration"]["status"] == "full"
    assert "generate: answered as full mode does: mode speculative was asked for\n" in told
    _, full, _ = generate(model, adapter, capsys, "--mode", "full", "--max-tokens", TOKENS)
    assert "calibration" not in full and set(full["layers"]) == {4}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (("--max-tokens", TOKENS + 1), "max_tokens: 13, but it was calibrated with 12"),
        (("--temperature", 0.7), "temperature: 0.7, but it was calibrated with 0.0"),
        (("--stop", "x"), "stop: ('x',), but it was calibrated with ()"),
        (("--dtype", "bfloat16"), "dtype: 'bfloat16', but it was calibrated with 'float32'"),
    ],
)
def test_a_request_outside_its_settings_runs_in_full_mode_unless_asked(
    model: Path,
    adapter: Path,
    certified: Path,
    capsys: pytest.CaptureFixture[str],
    changed: tuple[object, ...],
    reason: str,
) -> None:
    options = ("--calibration", certified, "--max-tokens", TOKENS, *changed)
    status, answer, _ = generate(model, adapter, capsys, *options)
    assert status == 0 and (answer["calibration"]["status"], answer["calibration"]["reason"]) == ("full", reason)
    assert set(answer["layers"]) == {4}
    _, answer, _ = generate(model, adapter, capsys, *options, "--uncertified")
    assert (answer["calibration"]["status"], answer["calibration"]["reason"]) == ("uncertified", reason)
    assert 2 in answer["layers"]


def test_a_shorter_answer_is_covered_where_the_loss_is_disagreement(
    model: Path, adapter: Path, certified: Path
) -> None:
    calibration = open_calibration(certified, open_released(model, adapter), EngineOptions(dtype="float32"))
    request = Request(prompt="x", mode="threshold", max_tokens=TOKENS - 1)
    covered = calibration.apply(request, chat=False).coverage
    assert covered is not None and covered.status == "certified"
    for mode in ("full", "speculative"):
        kept = calibration.apply(request.model_copy(update={"mode": mode}), chat=False)
        assert kept.mode == mode and kept.coverage is not None and kept.coverage.status == "full"
    seeded = request.model_copy(update={"sampling": Sampling(seed=5)})
    assert calibration.apply(seeded, chat=False).mode == "threshold"
    chat = calibration.apply(request, chat=True)
    assert chat.mode == "full" and chat.coverage is not None and "chat: True" in (chat.coverage.reason or "")
    for changes in ({"policy": ThresholdPolicy(threshold=0.5)}, {"exits": (1,)}):
        with pytest.raises(ConfigError, match="sets the thresholds"):
            calibration.apply(request.model_copy(update=changes), chat=False)


def test_another_engine_is_known_before_a_request_comes(model: Path, adapter: Path, certified: Path) -> None:
    released = open_released(model, adapter)
    for candidates in (None, (1, 2, 3)):  # which limit drafts alone: no answer changes
        options = EngineOptions(dtype="float32", candidates=candidates)
        assert open_calibration(certified, released, options).engine_outside is None
    other = open_calibration(certified, released, EngineOptions(dtype="bfloat16")).engine_outside
    assert other == "dtype: 'bfloat16', but it was calibrated with 'float32'"


def test_another_model_or_other_exits_are_refused(
    model: Path, make_adapter: Callable[..., Path], certified: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_adapter((1, 2), noisy=(2,))
    status, _, errors = generate(model, other, capsys, "--calibration", certified)
    message = r"adapter_sha256: was made for another adapter: \w{16}\.\.\. was calibrated, \w{16}\.\.\. is given; give"
    assert status == 1 and re.search(message, errors.splitlines()[-1])
    with pytest.raises(DataError, match=r"adapter_sha256: .* was calibrated, none is given; give that one"):
        open_calibration(certified, open_released(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"made_by": "me"}, "is not a certificate"),
        ({"version": 2}, "version 2; this version reads 1"),
        ({"risk": 2.0}, "risk: must be below 1, not 2.0"),
        ({"surprise": 1}, "surprise: unknown key"),
        ({"policy": {"name": "threshold", "threshold": -1}}, "policy.threshold: must be above 0"),
        ({"adapter_sha256": "x"}, "adapter_sha256: must be text like"),
        ({"p_value": "mystery"}, "p_value: "),
        ({"metric": "mystery"}, "metric: "),
        ({"loss": "quality"}, "metric: goes with the loss quality"),
    ],
)
def test_a_changed_certificate_is_refused_by_key(
    certified: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "changed.json"
    path.write_text(json.dumps({**json.loads(certified.read_text()), **change}))
    with pytest.raises(DataError, match=message) as error:
        read_certificate(path)
    assert str(error.value).startswith(str(path))


def test_full_mode_is_the_answer_where_nothing_is_safe(
    run: Callable[..., tuple[int, str, str]],
    make_adapter: Callable[..., Path],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong, output = make_adapter((1,), noisy=(1,)), tmp_path / "certificate.json"
    status, out, _ = run(wrong, output)
    assert (
        status == 0
        and "Not certified: no setting of the exits that saves layers passed" in out
        and "runs full mode" in out
    )
    certificate = read_certificate(output)
    assert certificate.policy is None and certificate.loss_interval is None
    _, answer, _ = generate(model, wrong, capsys, "--calibration", output, "--max-tokens", TOKENS)
    assert set(answer["layers"]) == {4}
    assert answer["calibration"]["status"] == "full"
    assert answer["calibration"]["reason"] == "no threshold was safe enough"


@pytest.mark.parametrize("loss", [pytest.param("quality", marks=pytest.mark.slow), "rouge"])
def test_other_losses(run: Callable[..., tuple[int, str, str]], adapter: Path, tmp_path: Path, loss: str) -> None:
    status, out, _ = run(adapter, tmp_path / "certificate.json", "--loss", loss, "--p-value", "hoeffding-bentkus")
    certificate = read_certificate(tmp_path / "certificate.json")
    assert status == 0 and certificate.loss == loss and certificate.policy is not None
    assert certificate.metric == ("contains" if loss == "quality" else None)
    assert "Certified: with confidence 90%" in out


def test_groups_get_one_bound_or_their_own_thresholds(
    run: Callable[..., tuple[int, str, str]],
    adapter: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "worst.json"
    assert run(adapter, output, "--per-group", risk=0.2)[0] == 0
    worst = read_certificate(output)
    assert worst.per_group == "worst" and worst.policy is not None and set(worst.tested) == {"a", "b"}
    passed = [[each.passed for each in worst.tested[name]] for name in "ab"]
    assert passed[0][0] and passed[1][0]
    assert run(adapter, output, "--per-group", "own", "--json", risk=0.2)[0] == 0
    own = read_certificate(output)
    assert own.policy is None and all(each.policy is not None for each in own.groups.values())
    assert {each.n for each in own.groups.values()} == {16}
    options = ("--calibration", output, "--max-tokens", TOKENS)
    _, answer, _ = generate(model, adapter, capsys, *options, "--calibration-group", "a")
    assert answer["calibration"]["status"] == "certified"
    _, answer, _ = generate(model, adapter, capsys, *options)
    assert answer["calibration"]["reason"] == "group: none was given" and set(answer["layers"]) == {4}


def test_evaluate_runs_each_record_under_the_thresholds_of_its_group(
    model: Path,
    adapter: Path,
    certified: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("megatron_ee.evaluation.tasks.report.plot_tasks", lambda *_: None)  # takes seconds
    content = json.loads(certified.read_text())
    policies = {"a": content["policy"], "b": None}
    groups = {name: {**content["groups"][name], "policy": policy} for name, policy in policies.items()}
    path, tasks = tmp_path / "own.json", tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({**content, "per_group": "own", "policy": None, "groups": groups}))

    def evaluate(*names: str | None) -> tuple[int, Any, str]:
        lines = [{"prompt": f"word {n}"} | ({"group": name} if name else {}) for n, name in enumerate(names)]
        lines.append({"prompt": "or", "choices": ["yes", "no"], "answer": 0, "task": "choices"} | lines[0])
        tasks.write_text("".join(json.dumps(line) + "\n" for line in lines))
        fixed: list[object] = ["--model", model, "--adapter", adapter, "--tasks", tasks, "--calibration", path]
        fixed += ["--dtype", "float32", "--max-tokens", TOKENS, "--thresholds", 2, "--json"]
        output = tmp_path / "out"
        status = main(list(map(str, ["evaluate", *fixed, "--output", output])))
        rows = json.loads((output / "tasks.json").read_text())["rows"] if status == 0 else None
        return status, rows, capsys.readouterr().err

    status, rows, told = evaluate("a", "b", None, "a", "c")
    early = [row["settings"]["calibrated"]["mean_exit_layer"] < 4 for row in rows[:5]]
    assert status == 0 and early == [True, False, False, True, False]
    line = "calibrated: 3 of 6 records run in full mode: there are no thresholds for their group: 'b', (none), 'c'"
    assert line in told.splitlines()
    setting = json.loads((tmp_path / "out" / "tasks.json").read_text())["settings"][-1]
    assert setting["policy"] is None and list(setting["groups"]) == ["a"]
    assert setting["groups"]["a"]["policy"] == content["policy"]
    status, _, told = evaluate(None, None)
    assert status == 2 and "no record of --tasks has a group; give them the field group" in told.splitlines()[-1]
    status, _, told = evaluate("c", "b")
    assert status == 2 and "answers in full mode here: no threshold was safe enough" in told.splitlines()[-1]


def test_a_group_with_a_handful_of_members_is_stated_and_stays_in_full_mode(
    run: Callable[..., tuple[int, str, str]],
    adapter: Path,
    model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    few = [{**line, "group": "few" if index < 3 else "many"} for index, line in enumerate(lines)]
    sample, output = tmp_path / "sample.jsonl", tmp_path / "certificate.json"
    sample.write_text("".join(json.dumps(line) + "\n" for line in few))
    status, out, errors = run(adapter, output, "--data", sample, "--per-group", "own", risk=0.2)
    assert status == 0 and "group 'few': 2 records to test on, 14 needed: it stays in full mode" in errors
    assert "full mode: too few to say anything" in out
    certificate = read_certificate(output)
    assert certificate.groups["few"].policy is None and certificate.groups["many"].policy is not None
    assert (certificate.groups["few"].n, certificate.groups["few"].needed) == (2, 14)
    options = ("--calibration", output, "--max-tokens", TOKENS, "--calibration-group", "few")
    assert set(generate(model, adapter, capsys, *options)[1]["layers"]) == {4}
    status, _, errors = run(adapter, output, "--data", sample, "--per-group", risk=0.2)
    assert status == 2 and "lines of group 'few' leave 2" in errors


@pytest.mark.slow
def test_gates_are_calibrated_too(
    run: Callable[..., tuple[int, str, str]], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    gated, output = make_adapter((1, 2), gate=True), tmp_path / "certificate.json"
    assert run(gated, output, "--policy", "gate", "--loss", "rouge", risk=0.5)[0] == 0
    certificate = read_certificate(output)
    assert isinstance(certificate.policy, GatePolicy)
    assert certificate.mean_exit_layer is not None and certificate.mean_exit_layer.mean < 4


def test_impossible_wishes_end_before_the_model_runs_in_one_line(
    run: Callable[..., tuple[int, str, str]], adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "certificate.json"
    for options, risk, message in [
        ((), 0.02, "--risk: 0.02 with delta 0.1 needs 114 records to test on even if none has a loss"),
        ((), 0.0, "--risk: must be above 0, not 0.0"),
        (("--policy", "gate"), 0.1, "--adapter: has no exit with a gate before the last layer"),
        (("--loss", "quality", "--metric", "bleu"), 0.1, "--metric: must be one of"),
        (("--metric", "f1"), 0.1, "--metric: has an effect with --loss quality only"),
        (("--corpus", tmp_path / "none"), 0.1, "--corpus: no such corpus"),
    ]:
        status, out, errors = run(adapter, output, *options, risk=risk)
        assert status == 2 and not out and errors.count("\n") == 1 and message in errors, errors
    output.write_text("mine")
    status, _, errors = run(adapter, output)
    assert status == 2 and "megatron-ee did not write it" in errors and output.read_text() == "mine"


def test_bad_lines_are_named(model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"id": str(i), "prompt": "x"} for i in range(40)]
    for change, message in [
        ({"colour": "red"}, "sample.jsonl:3: colour: unknown key"),
        ({"id": "1"}, "sample.jsonl:3: id: '1' is that of"),
        ({}, "sample.jsonl:1: references: missing; --loss quality"),
    ]:
        path = tmp_path / "sample.jsonl"
        path.write_text(
            "".join(json.dumps({**each, **(change if i == 2 else {})}) + "\n" for i, each in enumerate(lines))
        )
        fixed: list[object] = ["calibrate", "--model", model, "--adapter", adapter, "--data", path, "--risk", 0.1]
        fixed += ["--delta", 0.1, "--loss", "quality", "--output", tmp_path / "out.json"]
        assert main(list(map(str, fixed))) == 2
        errors = capsys.readouterr().err.splitlines()
        assert message in errors[-1]


def test_a_finished_journal_gives_the_same_result_without_new_answers(
    model: Path, adapter: Path, data: Path, tmp_path: Path
) -> None:
    plan = CalibrationPlan(risk=0.1, delta=0.1, max_tokens=TOKENS)
    released = open_released(model, adapter)
    sample = draw_sample(data, plan, released, corpora=(), allow_overlap=False)
    about = {"made_by": "test", "settings": {}}
    found = []
    for _ in range(2):
        with (
            open_journal(tmp_path / "journal", about, entry_key, resume=True, overwrite=False) as journal,
            open_engine(released, EngineOptions(dtype="float32")) as engine,
        ):
            assert engine is not None
            found.append((calibrate(engine, sample, plan, journal), engine.statistics()["tokens"]))
    (first, tokens), (again, none) = found
    assert tokens and not none
    assert again.scaling == first.scaling and again.loss_interval == first.loss_interval
    assert again.scopes["all"].tests == first.scopes["all"].tests
    assert again.scopes["all"].policy == first.scopes["all"].policy is not None


def test_options_of_certificates_need_one(
    model: Path, adapter: Path, certified: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, message in [
        (("--uncertified",), "--uncertified: has an effect with --calibration only"),
        (("--calibration-group", "a"), "--calibration-group: has an effect with --calibration only"),
        (("--calibration", certified, "--calibration-group", "a"), "--calibration-group: "),
        (("--calibration", certified, "--compare"), "--compare: cannot be used with --calibration"),
        (("--calibration", certified, "--threshold", 0.5), "--policy: "),
        (("--calibration", "none.json"), "--calibration: no such file"),
    ]:
        status, _, errors = generate(model, adapter, capsys, *options)
        assert status == 2 and message in errors.splitlines()[-1]
