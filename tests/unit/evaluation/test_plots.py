"""Pictures: that they are drawn, of what, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from megatron_ee.checkpoint.ownership import check_file
from megatron_ee.errors import DataError, UserError
from megatron_ee.evaluation.figure import FORMATS, saved_figure
from megatron_ee.evaluation.history import Validation, read_log, read_validations
from megatron_ee.evaluation.plots import (
    plot_acceptance,
    plot_agreement,
    plot_free_running,
    plot_reliability,
    plot_sweep,
    plot_training,
)
from megatron_ee.model.metrics import FinalStats, QualityAccumulator, TokenStats
from megatron_ee.model.quality import Quality
from megatron_ee.tuning.log import free_running_steps

SVG = "{http://www.w3.org/2000/svg}"
PNG = b"\x89PNG\r\n\x1a\n"


def quality(layers: tuple[int, ...] = (2, 4), thresholds: tuple[float, ...] = (0.5, 0.8, 0.81, 1.5)) -> Quality:
    generator = torch.Generator().manual_seed(0)
    count = 300
    accumulator = QualityAccumulator(layers, 12, thresholds)
    labels = torch.randint(5, (count,), generator=generator)
    exits = [
        TokenStats(
            torch.rand(count, generator=generator) * 4,
            torch.rand(count, generator=generator),
            torch.randint(5, (count,), generator=generator),
        )
        for _ in layers
    ]
    final = FinalStats(torch.rand(count, generator=generator), labels)
    accumulator.update(exits, final, labels, torch.ones(count, dtype=torch.bool))
    return accumulator.result()


def drawn_text(path: Path) -> str:
    """The texts of an SVG; matplotlib draws letters as shapes and keeps each text as a comment beside them."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.parse(path, parser).getroot()
    return "\n".join(str(element.text).strip() for element in root.iter(ElementTree.Comment))


def write_log(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def step_line(step: int, loss: float = 3.0) -> dict:
    exits = [{"layer": layer, "loss": loss - layer / 10, "weight": 1.0, "grad_norm": 0.5} for layer in (2, 4)]
    return {"step": step, "tokens": 100 * step, "lr": 1e-4, "exits": exits}


def test_sweep_names_axes_units_and_thresholds(tmp_path: Path) -> None:
    plot_sweep(quality(), tmp_path / "deep" / "sweep.svg")
    texts = drawn_text(tmp_path / "deep" / "sweep.svg").splitlines()
    assert "layers run per token (mean; the model has 12)" in texts
    assert "tokens (%)" in texts
    assert "agreement with the final exit" in texts
    assert "1.5" in texts
    assert "threshold 0.5" in texts
    # 0.8 and 0.81 lie on top of each other: one of them is left out rather than written over the other.
    assert len({"0.8", "0.81"} & set(texts)) == 1
    # The legend shows both of the hollow markers.
    legend = ElementTree.parse(tmp_path / "deep" / "sweep.svg").find(".//*[@id='legend_1']")
    assert legend is not None
    styles = [(each.get("style"), each.get("{http://www.w3.org/1999/xlink}href")) for each in legend.iter(f"{SVG}use")]
    assert len({marker for style, marker in styles if "fill: #ffffff" in str(style)}) == 2


@pytest.mark.parametrize("exits", [1, 5])
def test_reliability_has_one_diagram_per_exit(tmp_path: Path, exits: int) -> None:
    result = quality(tuple(range(1, exits + 1)))
    plot_reliability(result, tmp_path / "reliability.svg")
    text = drawn_text(tmp_path / "reliability.svg")
    for exit_ in result.exits:
        assert f"after layer {exit_.layer}: ECE {exit_.ece:.1%}" in text
    assert "confidence (%)" in text


def test_training_has_one_curve_per_exit(tmp_path: Path) -> None:
    lines = [{"step": 0, "validation": quality().to_dict()}, *(step_line(step) for step in range(1, 101))]
    log = write_log(tmp_path / "log.jsonl", [*lines, {"step": 100, "validation": quality().to_dict()}])
    plot_training(log, tmp_path / "training.svg")
    text = drawn_text(tmp_path / "training.svg")
    for expected in ("exit after layer 2", "exit after layer 4", "optimizer step", "loss (nats per token)"):
        assert expected in text
    assert "final exit, on validation data" in text


def validation_line(step: int, tokens: int, agreement: float | None) -> dict:
    exits = [{"layer": layer, "loss": 3.0 - layer / 10, "agreement": agreement} for layer in (2, 4)]
    return {"step": step, "tokens_seen": tokens, "validation": {"final_loss": 2.0, "exits": exits}}


def test_agreement_has_one_line_per_exit_against_tokens_seen(tmp_path: Path) -> None:
    lines = [
        validation_line(0, 0, 0.5),
        step_line(10),
        validation_line(10, 4_000, 0.6),
        validation_line(20, 8_000, 0.7),
    ]
    validations = read_validations(write_log(tmp_path / "log.jsonl", lines))
    plot_agreement(validations, 10, tmp_path / "agreement.svg")
    text = drawn_text(tmp_path / "agreement.svg").splitlines()
    for expected in ("exit after layer 2", "exit after layer 4", "lowest validation loss (step 10)", "8k"):
        assert expected in text
    assert "agreement with the final exit (% of tokens)" in text
    plot_agreement(validations[:2], None, tmp_path / "two.png")
    assert (tmp_path / "two.png").read_bytes().startswith(PNG)
    with pytest.raises(ValueError, match="no validation"):
        plot_agreement([], None, tmp_path / "none.png")


def test_acceptance_has_one_line_per_exit_that_drafts(tmp_path: Path) -> None:
    lines = [validation_line(step, 400 * step, 0.5) for step in (0, 10)]
    lines[0]["validation"]["exits"][0]["acceptance"] = {"length": 1.5}
    lines[1]["validation"]["exits"][0]["acceptance"] = {"length": None}  # no rounds
    first, second = read_validations(write_log(tmp_path / "log.jsonl", lines))
    assert first.acceptance == {2: 1.5} and math.isnan(second.acceptance[2]) and list(second.acceptance) == [2]
    plot_acceptance([first, second], None, tmp_path / "acceptance.svg")
    text = drawn_text(tmp_path / "acceptance.svg").splitlines()
    assert "exit after layer 2" in text and "exit after layer 4" not in text
    assert "acceptance length (tokens per round)" in text


def test_free_running_threshold_mode_of_validations_and_of_the_end(tmp_path: Path) -> None:
    measured = {"agreement": 0.5, "layers_per_token": 7.25}
    lines = [validation_line(step, 400 * step, 0.5) for step in (0, 10, 20)]
    lines[0]["validation"]["free_running"] = measured
    lines[1]["validation"]["free_running"] = None
    at_end = {"step": 20, "adapter": "adapter", "free_running": {"agreement": 0.75, "layers_per_token": None}}
    first, second, last = read_validations(write_log(tmp_path / "log.jsonl", [*lines, at_end]))
    assert first.free_running == (0.5, 7.25) and second.free_running is None
    assert last.free_running is not None and last.free_running[0] == 0.75 and math.isnan(last.free_running[1])
    assert free_running_steps(tmp_path) == {0, 20}
    plot_free_running([first, second, last], 20, tmp_path / "plot.svg")
    text = drawn_text(tmp_path / "plot.svg").splitlines()
    assert "7.2" in text and "tokens equal to the full model's (%)" in text


def test_validations_of_a_log(tmp_path: Path) -> None:
    """A repeated step counts once, a figure that was not finite is nan, and older releases counted no tokens."""
    older = {key: value for key, value in validation_line(5, 0, 0.1).items() if key != "tokens_seen"}
    lines = [
        validation_line(0, 0, 0.5),
        older,
        validation_line(10, 9, 0.6),
        validation_line(10, 9, None),
        step_line(11),
    ]
    first, second = read_validations(write_log(tmp_path / "log.jsonl", lines))
    assert first == Validation(0, 0, 2.0, {2: 2.8, 4: 2.6}, {2: 0.5, 4: 0.5}, {})
    assert (second.step, second.tokens_seen) == (10, 9) and all(map(math.isnan, second.agreements.values()))
    log = write_log(
        tmp_path / "bad.jsonl", [{"step": 1, "tokens_seen": 1, "validation": {"exits": [{}]}}, step_line(2)]
    )
    with pytest.raises(
        DataError, match=r"bad.jsonl:1: not a line of a tuning log: validation.exits\[0\].layer: missing"
    ):
        read_validations(log)


def test_names_may_hold_any_letters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dollar signs are no formulas, and letters that the font lacks are told once, with other warnings as they are."""
    plot = tmp_path / "plot.svg"
    with pytest.warns(UserWarning, match="another") as warned, saved_figure(plot, (3, 3)) as figure:
        axes = figure.subplots()
        axes.set_title("$\\frac{1}$ costs $5")
        axes.set_xlabel("\u65e5\u672c\u8a9e")
        warnings.warn("another", stacklevel=1)
    assert len(warned) == 1
    assert capsys.readouterr().err == f"{plot}: the plot's font lacks some letters, which it shows as boxes\n"
    assert "$\\frac{1}$ costs $5" in drawn_text(plot)


def test_png_and_pdf(tmp_path: Path) -> None:
    plot_sweep(quality(), tmp_path / "sweep.PNG")
    assert (tmp_path / "sweep.PNG").read_bytes().startswith(PNG)
    plot_training(write_log(tmp_path / "log.jsonl", [step_line(1)]), tmp_path / "training.pdf")
    assert (tmp_path / "training.pdf").read_bytes().startswith(b"%PDF")
    assert {entry.name for entry in tmp_path.iterdir()} == {"sweep.PNG", "log.jsonl", "training.pdf"}


def test_log_of_a_resumed_or_killed_run(tmp_path: Path) -> None:
    diverged = step_line(3)
    diverged["exits"][0]["loss"] = None
    log = write_log(tmp_path / "log.jsonl", [step_line(1), step_line(2, 9.0), step_line(2, 5.0), diverged])
    with log.open("a") as file:
        file.write('{"step": 4, "exi')
    steps, validations = read_log(log)
    assert sorted(steps) == [1, 2, 3] and not validations
    assert steps[2][2] == pytest.approx(4.8)
    assert math.isnan(steps[3][2])
    plot_training(log, tmp_path / "training.png")


def test_log_with_a_step_and_its_validation_on_one_line(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", [step_line(7) | {"validation": quality().to_dict()}])
    steps, validations = read_log(log)
    assert set(steps[7]) == {2, 4}
    assert set(validations[7]) == {0, 2, 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no step and no validation"),
        ("\n", "no step and no validation"),
        ('{"step": 1}\n', "no step and no validation"),
        ('nonsense\n{"step": 1}\n', "log.jsonl:1: not valid JSON"),
        (
            '{"exits": [{"layer": 1, "loss": 2}]}\n{"step": 1}\n',
            "log.jsonl:1: not a line of a tuning log: step: missing",
        ),
        ("[]\n{}\n", "log.jsonl:1"),
    ],
)
def test_other_logs_are_refused(tmp_path: Path, text: str, message: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(text)
    with pytest.raises(DataError, match=message):
        plot_training(log, tmp_path / "training.png")
    assert not (tmp_path / "training.png").exists()


def test_a_line_without_end_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ee.config.untrusted.MAX_FILE", 100)
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n' + " " * 150)
    with pytest.raises(DataError, match="log.jsonl:2: a line of more than 100 bytes"):
        read_log(log)


def test_missing_log(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        plot_training(tmp_path / "none.jsonl", tmp_path / "training.png")


def test_other_formats_and_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must be one of \.png, \.pdf, \.svg"):
        plot_sweep(quality(), tmp_path / "sweep.docx")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        plot_sweep(quality(), tmp_path / "file" / "sweep.png")
    with pytest.raises(ValueError, match="no sweep"):
        plot_sweep(quality(thresholds=()), tmp_path / "sweep.png")
    with pytest.raises(ValueError, match="no sweep"):
        plot_sweep(quality(layers=()), tmp_path / "sweep.png")


def test_importing_does_not_import_matplotlib() -> None:
    code = "import sys, megatron_ee.evaluation.plots; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_plot_may_be_written_again(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"sweep{suffix}"
    plot_sweep(quality(), path)
    check_file(path, "--plot")
