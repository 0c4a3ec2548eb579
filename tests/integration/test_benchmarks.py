"""Each benchmark on a tiny model: it runs, and its JSON holds finite figures. Nothing is asserted of times."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import calibration, convert, decode, exits, models, pipeline, plan, quantised, serve, streamed, tune
from benchmarks.models import exit_layers, save_model
from megatron_ee.checkpoint.saved_model import open_model
from megatron_ee.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmarks") / "model"
    save_model(path, "tiny", "float32")
    return path


@pytest.fixture
def run(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Runs a benchmark once, with one thread, and gives its rows by what they are called."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which a benchmark sets
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MEGATRON_EE_CACHE", str(tmp_path))

    def run(benchmark: Any, *arguments: str) -> dict[str, Any]:
        given = ["--model", str(model), "--repeats", "1", "--threads", "1", "--json", *arguments]
        assert benchmark.main(given) == 0
        result = json.loads(capsys.readouterr().out)
        assert result.keys() == {"benchmark", "machine", "settings", "limits", "rows"}
        assert result["machine"]["threads"] == 1
        assert result["machine"]["load_before"] >= 0
        assert all(finite(value) for value in result["limits"].values())
        keys = [key for key, _, form in benchmark.COLUMNS if form]
        figures = [row[key] for row in result["rows"] for key in keys if row.get(key) is not None]
        assert figures and all(math.isfinite(figure) and figure >= 0 for figure in figures)
        name = next(key for key, _, form in benchmark.COLUMNS if not form)
        return {row[name]: row for row in result["rows"]}

    return run


def finite(value: float) -> bool:
    return math.isfinite(value) and value > 0


@pytest.mark.slow
def test_tune(run: Any) -> None:
    rows = run(tune, "--tokens", "16", "--exits", "2")
    assert rows.keys() == {"ours", "plain PyTorch"}
    assert rows["plain PyTorch"]["speed"] == rows["plain PyTorch"]["memory"] == 1
    assert len(rows["ours"]["losses"]) == 2
    assert rows["ours"]["peak_mb"] > 50  # torch itself is larger


def test_different_work_is_noticed() -> None:
    step = {"losses": [1.0, 2.0], "grad_norm": 3.0}
    tune.check_same("float32", step, step)
    for other in ({"losses": [1.0, 2.001]}, {"grad_norm": 3.01}):
        with pytest.raises(RuntimeError, match="do not compute the same"):
            tune.check_same("float32", step, step | other)


@pytest.mark.slow
def test_decode(run: Any) -> None:
    arguments = ["--tokens", "4", "--prompt-tokens", "4", "--prompts", "1", "--rows", "1", "--dtype", "float32"]
    rows = run(decode, *arguments, "--exits", "1", "--busy", "1")
    assert rows.keys() == {"transformers", "full", "threshold", "speculative", "transformers, assistant_early_exit=3"}
    assert rows["full"]["layers_per_token"] == 4
    assert rows["full"]["bandwidth_share"] > 0
    assert rows["transformers"]["same_outputs"] == rows["speculative"]["same_outputs"] == 1


@pytest.mark.slow
def test_streamed(run: Any, tmp_path: Path) -> None:
    plot = ("--plot", str(tmp_path / "step.png"))
    rows = run(streamed, "--residency", "device", "disk", "--tokens", "16", "--microbatches", "2", "--cold", *plot)
    assert rows["device"]["reading"] == rows["device"]["not_hidden"] == 0
    assert rows["disk"]["reading"] > 0 and rows["disk"]["planned_mb"] < rows["device"]["planned_mb"]
    assert (tmp_path / "step.png").is_file()


def test_a_model_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "SHARD", 100_000)
    save_model(tmp_path / "model", "tiny", "bfloat16")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    assert open_model(tmp_path / "model").architecture.num_layers == 4
    monkeypatch.setattr(models.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="0.0 GB are free; set TMPDIR"):
        save_model(tmp_path / "other", "tiny", "bfloat16")


@pytest.mark.slow
def test_convert(run: Any) -> None:
    rows = run(convert)
    assert list(rows) == ["start", "cp and fsync", "SHA-256", "HF to parallel", "parallel to HF"]
    for name in ("HF to parallel", "parallel to HF"):
        assert finite(rows[name]["against_copy"])
        assert finite(rows[name]["against_copy_and_hash"])
        assert rows[name]["peak_mb"] > 50


@pytest.mark.slow
def test_pipeline(run: Any) -> None:
    rows = run(pipeline, "--tokens", "16", "--exits", "2", "--microbatches", "2", "--steps", "1")
    assert list(rows) == ["one process", "2 stages, balanced", "2 stages, even"]
    assert rows["one process"]["speedup"] == rows["one process"]["expected"] == rows["one process"]["limit"] == 1
    assert 1 < rows["2 stages, balanced"]["expected"] <= 2
    assert rows["2 stages, even"]["stages"] == "1-1 (no exit); 2-3 (2, 3)"


@pytest.mark.slow
def test_plan(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # A case takes 20 seconds: two on one process and one on two show what all eight do.
    for cases, name in ((plan.KINDS, "layer exits, own heads"), (plan.SIZES, "tensor 2, sequence")):
        for other in cases.keys() - {name, "mlp exits, own heads"}:
            monkeypatch.delitem(cases, other)
    rows = run(plan, "--tokens", "16", "--exits", "2", "--microbatches", "2", "--steps", "1")
    assert list(rows) == ["mlp exits, own heads", "layer exits, own heads", "tensor 2, sequence"]
    for row in rows.values():
        assert row["ratio"] == row["planned"] / row["measured"] > 0


@pytest.mark.slow
def test_serve(run: Any) -> None:
    load = ("--clients", "2", "--requests", "1", "--tokens", "4", "--prompt-characters", "8", "--exits", "1")
    rows = run(serve, *load, "--dtype", "float32", "--minutes", "0.1")
    assert rows.keys() == {serve.PEER, serve.ENGINE, serve.OURS, serve.EARLY}
    assert rows[serve.PEER]["against_transformers"] == rows[serve.ENGINE]["against_engine"] == 1
    assert rows[serve.OURS]["memory"] > 50 and rows[serve.ENGINE]["memory"] is None


def test_layers_of_exits() -> None:
    assert exit_layers(4, 12) == [2, 4, 7, 9]
    assert exit_layers(8, 4) == [1, 2, 3]


def test_prompts_lie_apart() -> None:
    groups = decode.prompt_groups(range(100), rows=2, least=3, length=10)
    assert [[prompt[0] for prompt in group] for group in groups] == [[0, 22], [44, 66]]
    assert all(len(prompt) == 10 for group in groups for prompt in group)


@pytest.mark.slow
def test_exits(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copies and fits, with gates; the second time nothing is tuned again."""
    for name, value in project.environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "def main():"}\n{"prompt": "import "}\n')
    files = ("--model", project.model, "--train", project.train, "--validation", project.held_out)
    files += ("--output", tmp_path / "runs", "--json", tmp_path / "found.json")
    settings = ("--layers", 1, 3, "--steps", 2, "--interval", 1, "--sequence-length", 32, "--validation-sequences", 4)
    gates = ("--gate-prompts", tmp_path / "prompts.jsonl", "--gate-tokens", 4)
    arguments = [str(each) for each in (*files, *settings, *gates, "--fit.tokens", 512)]
    assert exits.main(arguments) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    keys = ("init", "layer", "tokens_seen")
    assert {tuple(row[key] for key in keys) for row in found["rows"]} == {
        (init, layer, seen) for init in ("copy", "fit") for layer in (1, 3) for seen in (0, 128, 256)
    }
    assert all(0 <= row["agreement"] <= 1 and math.isfinite(row["loss"]) for row in found["rows"])
    fitted = {(row["init"], row["layer"]): row["loss"] for row in found["rows"] if row["tokens_seen"] == 0}
    assert fitted["fit", 1] < fitted["copy", 1]
    assert {row["policy"] for row in found["gates"]} == set(exits.POLICIES)
    assert all(row["agreement"] == 1 for row in found["gates"] if row["early"] == 0)
    capsys.readouterr()
    tuned = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/adapter/exits.json")}
    assert len(tuned) == 2 and exits.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in tuned} == tuned
    printed = capsys.readouterr()
    assert "Agreement with the final exit, and loss" in printed.out and "tuning" not in printed.err


@pytest.mark.slow
def test_quantised(run: Any) -> None:
    rows = run(quantised, "--tokens", "16", "--microbatches", "2", "--dtype", "float32")
    assert rows.keys() == {"none", "int8", "int4"}
    assert rows["none"]["memory"] == 1 > rows["int8"]["memory"] > rows["int4"]["memory"]
    assert rows["none"]["agreement"] == rows["none"]["on_plain"] == rows["none"]["of_plain"]


def test_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    """It counts how often a promise fails, and fails itself if that is too often."""
    assert calibration.main(["--trials", "20", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["losses"], row["n"], row["p_value"]) for row in rows} == {
        (losses, n, name)
        for losses in calibration.LOSSES
        for n in (50, 200, 1000)
        for name in ("betting", "hoeffding-bentkus")
    }
    assert all(row["speed"] >= 1 and row["violations"] <= row["allowed"] for row in rows)
