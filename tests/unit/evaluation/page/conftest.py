"""Small files in the formats of other commands, as one measured model leaves them, and a page made of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_ee.checkpoint.adapter import describe_exits, open_adapter
from megatron_ee.checkpoint.digest import file_sha256
from megatron_ee.commands.main import main
from megatron_ee.config.exits import ExitSpec
from megatron_ee.inference.released import exits_digest

MODEL, TOKENIZER = "a" * 64, "c" * 64
SETTINGS = {"full": 1.0, "speculative": 1.1, "threshold 0.8": 1.4, "calibrated": 1.21}
ANSWERS = {
    "q1": ("What is the capital of Peru?", ["Lima"], "The capital is Lima.", "The capital is Quito, I think."),
    "q2": ("フランスの首都は？", ["パリ"], "首都はパリです。", "首都はパリである。"),
    "q3": ("Two and two?", ["4"], "It is five.", "It is 4."),
    "q4": ("Say yes.", ["yes"], "yes", "yes"),
}


def score(mean: float, difference: float, low: float, high: float) -> dict[str, Any]:
    return {"rows": 4, "mean": mean, "difference": difference, "low": low, "high": high}


def setting_result(name: str, speed: float) -> dict[str, Any]:
    change = 0.0 if name in ("full", "speculative") else -0.05
    equal = 1.0 if change == 0 else 0.25
    scores = {
        "contains": score(0.75 + change, change, 2 * change, -change),
        "f1": score(0.5 + change, change, 2 * change, -change),
        "equal_answers": score(equal, equal - 1, equal - 1.2, equal - 0.9 if change else 0.0),
        "equal_tokens": score(equal, equal - 1, equal - 1.2, equal - 1),
    }
    return {
        "setting": name,
        "rows": 4,
        "scores": scores,
        "mean_departure": None if equal == 1 else 2.5,
        "tokens": 5.5,
        "cut": 0.25,
        "exit_layer": 4.0 if change == 0 else 3.0,
        "layers_per_token": 4.0,
        "speed": {"rows": 4, "tokens_per_second": 20.0 * speed, "speedup": speed},
    }


def figure(mean: float, worse: bool = False) -> dict[str, Any]:
    return {"members": 12, "mean": mean, "rest": 0.0, "low": mean - 0.1, "high": mean + 0.1, "p": 0.01, "worse": worse}


def block(speed: float) -> dict[str, Any]:
    tokens = dict.fromkeys(SETTINGS, 30)
    return {"task": "facts", "rows": 2, "seconds": {**tokens, "calibrated": 30 / speed}, "tokens": tokens}


def comparison() -> dict[str, Any]:
    def group(name: str, loss: float, worse: bool) -> dict[str, Any]:
        measures = {"exit layer": figure(3.0), "agreement": figure(0.9), "quality difference": figure(-0.05)}
        return {
            "name": name,
            "members": 12,
            "too_small": False,
            "largest_loss": 0.4,
            **measures,
            "loss": figure(loss, worse),
        }

    return {
        "by": "group",
        "risk": "loss",
        "overall": {"exit layer": 3.0, "agreement": 0.9, "quality difference": -0.05, "loss": 0.2},
        "certified": {"risk": 0.05, "delta": 0.1},
        "groups": [
            group("(none)", 0.1, False),
            group("south", 0.3, True),
            {"name": "few", "members": 3, "too_small": True, "largest_loss": None},
        ],
        "warning": "more risk than in the other groups by group: south",
    }


def tasks_content(adapter: str) -> dict[str, Any]:
    results = {name: setting_result(name, speed) for name, speed in SETTINGS.items()}
    rows = []
    for id_, (prompt, references, full, early) in ANSWERS.items():
        scores = {"contains": float(references[0] in full), "departure": None, "equal_answers": 1.0}
        other = {"contains": float(references[0] in early), "departure": 3 if early != full else None}
        settings = {name: other if name in ("calibrated", "threshold 0.8") else scores for name in SETTINGS}
        rows.append(
            {
                "id": id_,
                "task": "facts",
                "group": "north",
                "prompt": prompt,
                "references": references,
                "settings": settings,
            }
        )
    return {
        "made_by": "megatron-ee evaluate",
        "model": "/models/tiny",
        "adapter": "/runs/first/adapter-best",
        "model_sha256": MODEL,
        "adapter_sha256": adapter,
        "tokenizer_sha256": TOKENIZER,
        "records_sha256": "d" * 64,
        "settings": [
            {"name": name, "mode": "threshold" if name in ("calibrated", "threshold 0.8") else name, "max_tokens": 24}
            for name in SETTINGS
        ],
        "overall": results,
        "tasks": {"facts": results, "more": results},
        "timing": {"max_num_seqs": 16, "rows": 4, "blocks": [block(1.0), block(1.5)]},
        "groups": {"calibrated": comparison()},
        "rows": rows,
    }


def certificate_content(adapter: str) -> dict[str, Any]:
    tested = [
        {"level": 0.99, "p_value": 0.01, "passed": True, "loss": 0.0, "mean_exit_layer": 3.9},
        {"level": 0.9, "p_value": 0.04, "passed": True, "loss": 0.02, "mean_exit_layer": 3.2},
        {"level": 0.8, "p_value": 0.3, "passed": False, "loss": 0.1, "mean_exit_layer": 2.4},
    ]
    return {
        "made_by": "megatron-ee calibrate",
        "version": 1,
        "task": "facts",
        "loss": "disagreement",
        "risk": 0.05,
        "delta": 0.1,
        "p_value": "betting",
        "n": 80,
        "n_fit": 20,
        "policy": {"name": "threshold", "threshold": 2.0, "thresholds": {"2": 0.9}},
        "tested": {"all": tested},
        "loss_interval": {"mean": 0.02, "low": None, "high": 0.048},
        "mean_exit_layer": {"mean": 3.2, "low": 3.0, "high": 3.4},
        "full_layers": 4,
        "model_sha256": MODEL,
        "adapter_sha256": adapter,
        "tokenizer_sha256": TOKENIZER,
        "data_sha256": "e" * 64,
        "decoding": {
            **{"chat": True, "max_tokens": 24, "sampling": {}, "dtype": "float32", "weights": "packed"},
            "quantise": "none",
        },
        "overlap": "none",
        "seed": 0,
        "date": "2026-03-09T10:00:00+00:00",
    }


def quality_content(agreement: float, loss: float) -> dict[str, Any]:
    exit_ = {"layer": 2, "loss": loss, "accuracy": 0.5, "agreement": agreement, "mean_confidence": 0.6, "ece": 0.1}
    above = {"layer": 2, "share": 0.4, "agreement": 0.95, "accuracy": 0.6}
    point = {"threshold": 0.9, "shares": [0.4, 0.6], "mean_layers": 3.2, "agreement": 0.97, "accuracy": 0.6}
    return {
        "tokens": 900,
        "num_layers": 4,
        "final_loss": 1.5,
        "final_accuracy": 0.7,
        "exits": [{**exit_, "ece_agreement": 0.1, "bins": [], "acceptance": None}],
        "sweep": [{**point, "above": [above]}],
        "free_running": None,
    }


def write_run(path: Path) -> str:
    """A run's directory; returns the digest of its exits."""
    adapter = path / "adapter-best"
    adapter.mkdir(parents=True)
    save_file({"exits.2.norm.weight": torch.ones(8)}, adapter / "exits.safetensors")
    specs = [ExitSpec(layer=2, body="norm", head="shared", init="copy")]
    settings = {"num_layers": 4}
    digest = file_sha256(adapter / "exits.safetensors")
    described = describe_exits(specs, "/models/tiny", MODEL, 20, digest, settings)
    (adapter / "exits.json").write_text(json.dumps(described))
    corpus = path.parent / "train"
    corpus.with_suffix(".json").write_text(json.dumps({"documents": 384, "tokens": 37865, "trained_tokens": 20483}))
    config = {"tuning": {"steps": 20}, "data": {"train": [str(corpus)], "validation": ["held_out"]}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "status.json").write_text(json.dumps({"state": "finished", "step": 20, "steps": 20}))
    lines = [
        {"step": 0, "tokens_seen": 0, "validation": quality_content(0.2, 5.0)},
        {"step": 1, "tokens": 500, "tokens_per_second": 100.0, "exits": [{"layer": 2, "loss": 4.5}]},
        {"step": 20, "tokens_seen": 10000, "validation": quality_content(0.42, 3.0)},
        {"step": 20, "session": {"seconds": 4000.0, "processes": 2, "device": "CPU, 1 threads"}},
    ]
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return exits_digest(open_adapter(adapter))


@dataclass
class Files:
    """The files of a measured model, and a way to make a page of them."""

    root: Path
    adapter: str

    def path(self, name: str) -> Path:
        return self.root / name

    def change(self, name: str, **changes: Any) -> None:
        """Replace keys of a JSON file; None removes one."""
        path = self.path(name)
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    def report(self, *options: object) -> int:
        """Run the command."""
        return main(["report", *map(str, options), "--output", str(self.path("report.html"))])

    def all(self) -> tuple[object, ...]:
        """Options for all files."""
        measured = ("--calibration", self.path("certificate.json"), "--drift", self.path("drift.json"))
        evaluations = ("--evaluation", self.path("eval"), self.path("evaluation.json"))
        return ("--run", self.path("run"), *evaluations, *measured, "--plan", self.path("plan.json"))

    def page(self, *options: object) -> str:
        """The page of these options."""
        assert self.report(*options) == 0
        return self.path("report.html").read_text()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    digest = write_run(tmp_path / "run")
    (tmp_path / "eval").mkdir()
    certificate = tmp_path / "certificate.json"
    certificate.write_text(json.dumps(certificate_content(digest)))
    info = {"settings": {"calibration_sha256": file_sha256(certificate)}}
    (tmp_path / "eval" / "tasks.json").write_text(json.dumps(tasks_content(digest)))
    (tmp_path / "eval" / "answers.jsonl.info.json").write_text(json.dumps(info))
    entries = [
        {"setting": name, "id": id_, "answer": {"text": early if name == "calibrated" else full, "layers": [4, 2, 4]}}
        for id_, (_, _, full, early) in ANSWERS.items()
        for name in SETTINGS
    ]
    block = {"setting": "full", "id": "q1", "block": {"rows": 4}}
    lines = "".join(json.dumps(each) + "\n" for each in [*entries, block])
    (tmp_path / "eval" / "answers.jsonl").write_text(lines + '{"torn')
    mode = {"mode": "threshold", "threshold": 0.9, "tokens_per_second": 21.0, "speedup": 0.9, "agreement": 0.98}
    exits = {"model_sha256": MODEL, "adapter_sha256": digest, "speed": [mode]}
    (tmp_path / "evaluation.json").write_text(json.dumps({**quality_content(0.42, 3.0), **exits}))
    drift = {
        **{
            "risk": 0.05,
            "alarm_level": 0.01,
            "audits": 200,
            "uncounted": 3,
            "mean_loss": 0.12,
            "recent_mean_loss": 0.2,
        },
        "from_start": {"alarm": {"audit": 150, "number": 300, "id": "r"}},
        "restarting": {"alarms": []},
        "certificates": [file_sha256(certificate)],
    }
    (tmp_path / "drift.json").write_text(json.dumps(drift))
    plan = {"gpus": 2, "gpu": "H100", "seconds": 7200.0, "kilowatt_hours": 2.8, "price": 10.0}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    return Files(tmp_path, digest)
