"""Tables and dicts of quality per exit."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ee.checkpoint.atomic import write_json
from megatron_ee.config.exits import ExitSpec
from megatron_ee.evaluation.acceptance import with_acceptance
from megatron_ee.evaluation.history import Validation
from megatron_ee.evaluation.report import (
    HISTORY_ROWS,
    comparison_dict,
    print_comparison,
    print_history,
    print_quality,
    report_dict,
    write_quality,
)
from megatron_ee.model.metrics import FinalStats, QualityAccumulator, TokenStats
from megatron_ee.model.quality import DraftAcceptance, FreeRunning, Quality
from megatron_ee.tables import make_console

EXITS = (ExitSpec(2), ExitSpec(4, body="layer", head="low_rank"))


def quality(first_loss: float = 3.0, thresholds: tuple[float, ...] = (0.75, 0.99)) -> Quality:
    """Four tokens: exit 2 agrees on half of them, exit 4 on all; the final exit is right on three."""
    labels = torch.tensor([1, 2, 3, 4])
    final = FinalStats(torch.full((4,), 2.0), torch.tensor([1, 2, 3, 9]))
    first = TokenStats(torch.full((4,), first_loss), torch.tensor([0.9, 0.3, 0.8, 0.6]), torch.tensor([1, 7, 8, 9]))
    second = TokenStats(torch.full((4,), 2.5), torch.tensor([0.9, 0.7, 0.7, 0.7]), torch.tensor([1, 2, 3, 9]))
    accumulator = QualityAccumulator((2, 4), 8, thresholds, body_layers=[0, 1])
    accumulator.update([first, second], final, labels, torch.ones(4, dtype=torch.bool))
    return accumulator.result()


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def plain(*arguments: object) -> list[list[str]]:
    file = io.StringIO()
    print_quality(*arguments, console=make_console(file))  # type: ignore[arg-type]
    return rows(file.getvalue())


def test_dict_has_the_fixed_keys_and_reads_back() -> None:
    data = json.loads(json.dumps(report_dict(quality(), EXITS), allow_nan=False))
    assert data["final_loss"] == 2.0
    assert data["tokens"] == 4
    assert [(e["layer"], e["body"], e["head"]) for e in data["exits"]] == [(2, "mlp", "own"), (4, "layer", "low_rank")]
    assert {"loss", "perplexity", "agreement", "accuracy", "mean_confidence", "ece", "ece_agreement"} <= {
        *data["exits"][0]
    }
    assert [point["threshold"] for point in data["sweep"]] == [0.75, 0.99]
    assert data["sweep"][1]["shares"] == [0.0, 0.0, 1.0]
    assert report_dict(Quality.from_dict(data), EXITS) == data


def test_free_running_threshold_mode_is_shown_and_reads_back() -> None:
    found = FreeRunning(0.8, prompts=4, tokens=40, equal=30, before=25, later=36, layer_runs=288)
    measured = replace(quality(), free_running=found)
    data = json.loads(json.dumps(report_dict(measured, EXITS), allow_nan=False))
    assert {"agreement": 0.75, "departure": 6.25, "layers_per_token": 8.0}.items() <= data["free_running"].items()
    assert Quality.from_dict(data) == measured and report_dict(quality(), EXITS)["free_running"] is None
    shown = plain(measured, EXITS)
    start = next(n for n, row in enumerate(shown) if row[:1] == ["Free-running"])
    assert ["0.8", "8.00", "75.0%", "6.2", "of", "10.0"] in shown[start : start + 4]
    alone = FreeRunning(0.8, prompts=1, tokens=1, equal=1, before=1, later=0, layer_runs=0)
    assert alone.to_dict()["layers_per_token"] is None


def test_acceptance_is_shown_and_reads_back() -> None:
    """Not for an exit that cannot draft; files of older releases have none."""
    measured = with_acceptance(quality(), {2: DraftAcceptance(4, 8, 20, 15, 12)})
    data = json.loads(json.dumps(report_dict(measured, EXITS), allow_nan=False))
    first, second = (exit_["acceptance"] for exit_ in data["exits"])
    assert (
        first
        == {
            "draft_length": 4,
            "rounds": 8,
            "tokens": 20,
            "proposed": 15,
            "accepted": 12,
            "length": 2.5,
            "rate": 0.8,
        }
        and second is None
    )
    assert report_dict(Quality.from_dict(data), EXITS) == data
    table = plain(measured, EXITS)
    assert ["2", "mlp", "2.50", "80.0%"] in table and ["4", "layer,", "low_rank", "2.50", "80.0%"] not in table
    for exit_ in data["exits"]:
        del exit_["acceptance"]
    assert Quality.from_dict(data) == quality()
    empty = with_acceptance(quality(), {2: DraftAcceptance(4, 0, 0, 0, 0)})
    assert ["2", "mlp", "-", "-"] in plain(empty, EXITS)
    assert report_dict(empty, EXITS)["exits"][0]["acceptance"]["length"] is None


def test_comparison_dict() -> None:
    data = comparison_dict(quality(3.5), quality(3.0), EXITS)
    assert data["final_loss"] == 2.0
    first = data["exits"][0]
    assert (first["layer"], first["body"], first["loss_initial"], first["loss_tuned"]) == (2, "mlp", 3.5, 3.0)
    assert (first["agreement_initial"], first["agreement_tuned"]) == (0.5, 0.5) and "loss_copied" not in first
    with_copies = comparison_dict(quality(3.5), quality(3.0), EXITS, quality(9.0))["exits"][0]
    assert [with_copies[f"loss_{name}"] for name in ("copied", "initial", "tuned")] == [9.0, 3.5, 3.0]


def test_plain_tables_are_words_and_numbers_only() -> None:
    table = plain(quality(), EXITS, "Title")
    assert table[0] == ["Title", "(4", "tokens)"]
    assert ["2", "mlp", "3.000", "20.1", "25.0%", "50.0%", "65.0%", "45.0%"] in table
    assert ["8", "final", "2.000", "7.4", "75.0%", "100.0%"] in table
    # At 0.75 two tokens leave at exit 2, the others at the end, having run the other exit's layer too.
    assert ["0.75", "5.50", "75.0%", "50.0%", "50.0%", "0.0%", "50.0%"] in table
    assert ["0.75", "50.0%", "50.0%", "25.0%", "100.0%"] in table
    assert ["0.99", "0.0%", "-", "0.0%", "-"] in table
    text = " ".join(word for row in table for word in row)
    assert text.isascii() and "\x1b" not in text


def test_to_stdout_or_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    print_quality(quality(), EXITS)
    print_quality(quality(), EXITS, "Validation", to_stderr=True)
    captured = capsys.readouterr()
    assert captured.out.startswith("Quality per exit")
    assert captured.err.startswith("Validation")


def test_on_a_terminal_of_80_columns_nothing_is_cut() -> None:
    from rich.console import Console

    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, color_system=None)
    print_quality(with_acceptance(quality(), {2: DraftAcceptance(4, 8, 20, 15, 12)}), EXITS, console=console)
    print_comparison(quality(3.5), quality(), EXITS, console=console)
    print_comparison(quality(3.5), quality(), EXITS, quality(19.5), console=console)
    text = file.getvalue()
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_comparison_table() -> None:
    file = io.StringIO()
    print_comparison(quality(3.5), quality(3.0), EXITS, console=make_console(file))
    table = rows(file.getvalue())
    assert ["2", "mlp", "3.500", "->", "3.000", "50.0%", "->", "50.0%", "25.0%", "->", "25.0%"] in table
    assert ["8", "final", "2.000", "100.0%", "75.0%"] in table
    print_comparison(quality(3.5), quality(3.0), EXITS, quality(9.0), console=make_console(file))
    words = ["9.000", "->", "3.500", "->", "3.000", "50.0%", "->", "50.0%", "->", "50.0%"]
    assert ["2", "mlp", *words] in rows(file.getvalue())


def test_without_exits_only_the_final_one_is_shown() -> None:
    accumulator = QualityAccumulator((), 8, (0.5,))
    labels = torch.tensor([1, 2])
    accumulator.update([], FinalStats(torch.ones(2), labels), labels, torch.ones(2, dtype=torch.bool))
    result = accumulator.result()
    assert report_dict(result, ())["exits"] == []
    assert plain(result, ())[2:] == [["8", "final", "1.000", "2.7", "100.0%", "100.0%"]]


def test_a_diverged_exit_is_shown_and_written(tmp_path: Path) -> None:
    data = report_dict(quality(math.nan), EXITS)
    assert data["exits"][0]["loss"] is None
    assert ["2", "mlp", "-", "-", "25.0%", "50.0%", "65.0%", "45.0%"] in plain(quality(math.nan), EXITS)
    write_json(tmp_path / "quality.json", data)
    assert json.loads((tmp_path / "quality.json").read_text()) == data


def test_write_json_leaves_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    write_json(path, {"good": 1})
    with pytest.raises(ValueError):
        write_json(path, {"bad": math.nan})
    assert json.loads(path.read_text()) == {"good": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["quality.json"]


def test_other_exits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers \[2, 4\], not \[2\]"):
        report_dict(quality(), EXITS[:1])
    with pytest.raises(ValueError, match="not"):
        print_quality(quality(), (ExitSpec(2), ExitSpec(5)))


def test_without_thresholds_there_is_no_sweep(tmp_path: Path) -> None:
    unswept = quality(thresholds=())
    write_quality(unswept, EXITS, tmp_path / "step-0")
    assert [path.name for path in tmp_path.iterdir()] == ["step-0.json"]
    assert json.loads((tmp_path / "step-0.json").read_text())["sweep"] == []
    assert len(plain(unswept, EXITS)) < len(plain(quality(), EXITS)) - 4
    write_quality(quality(), EXITS, tmp_path / "step-1")
    assert (tmp_path / "step-1.png").is_file()


def history(count: int, best: int | None) -> list[list[str]]:
    validations = [
        Validation(10 * place, 4_000 * place, 2.0, {2: 4.0 - place, 4: math.nan}, {2: 0.5, 4: 0.75}, {})
        for place in range(count)
    ]
    file = io.StringIO()
    print_history(validations, best, make_console(file))
    return rows(file.getvalue())


def test_history_of_two_validations() -> None:
    title, heading, *lines = history(2, 10)
    assert " ".join(title) == "Exits while tuning, on validation data (final exit: loss 2.000)"
    assert (
        " ".join(heading)
        == "after step tokens seen exit 2: loss exit 2: agreement exit 4: loss exit 4: agreement kept as"
    )
    assert lines == [
        ["0", "0", "4.000", "50.0%", "-", "75.0%"],
        ["10", "4,000", "3.000", "50.0%", "-", "75.0%", "adapter-best"],
    ]


def test_history_with_free_running_threshold_mode() -> None:
    measured = [None, (0.5, 7.25)]
    validations = [Validation(n, n, 2.0, {2: 4.0}, {2: 0.5}, {}, found) for n, found in enumerate(measured)]
    file = io.StringIO()
    print_history(validations, None, make_console(file))
    _, heading, *lines = rows(file.getvalue())
    assert " ".join(heading).endswith("agreement threshold mode: equal layers per token kept as")
    assert [line[-2:] for line in lines] == [["-", "-"], ["50.0%", "7.25"]]


def test_of_many_validations_some_are_shown_with_the_best() -> None:
    _, _, *lines = history(100, 70)
    steps = [int(line[0]) for line in lines]
    assert steps[0] == 0 and steps[-1] == 990 and len(steps) == HISTORY_ROWS + 1
    assert steps == sorted(steps) and [line[0] for line in lines if line[-1] == "adapter-best"] == ["70"]
    assert len(history(HISTORY_ROWS, None)) == 2 + HISTORY_ROWS
