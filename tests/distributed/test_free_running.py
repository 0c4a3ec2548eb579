"""Free-running threshold mode while tuning is what the engine writes afterwards with the same exits, in any layout."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.checkpoint.adapter import open_adapter
from megatron_ee.commands.main import main
from megatron_ee.data.indexed import open_corpus
from megatron_ee.data.loader import validation_windows
from megatron_ee.data.prompts import held_out_prompts
from megatron_ee.inference.loading import open_engine
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.released import open_released
from megatron_ee.inference.requests import Completion, Request
from megatron_ee.testing.project import Project, read_log
from megatron_ee.testing.ranks import Ranks, run_command

THRESHOLD, PROMPTS, TOKENS = 0.025, 5, 16
EXITS = [
    {"layer": 1, "init": "copy"},
    {"layer": 2, "body": "layer", "head": "shared", "init": "copy"},
    {"layer": 3, "body": "norm", "head": "low_rank", "rank": 4},
]


@pytest.fixture(scope="module")
def held_out(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of several documents."""
    root: Path = tmp_path_factory.mktemp("held-out")
    texts = [inspect.getsource(each)[:300] for each in (textwrap.fill, textwrap.dedent, textwrap.indent, json.dumps)]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (*texts, "x = 1; " * 20)))
    paths = ("--input", root / "text.jsonl", "--tokenizer", project.model, "--output", root / "corpus")
    assert main(["prepare-data", *map(str, paths)]) == 0
    return root / "corpus"


def tune(project: Project, held_out: Path, place: Path, world_size: int, **changes: Any) -> list[dict[str, Any]]:
    """Run ``tune`` on so many ranks, and return its log."""
    place.mkdir()
    config = project.config(
        place / "run.yaml",
        **{
            "exits": EXITS,
            "data": {"validation": [str(held_out)]},
            "tuning": {"steps": 4},
            "validation": {
                "interval": 2,
                "sequences": 4,
                "acceptance": {"prompts": PROMPTS, "tokens": TOKENS},
                "free_running_threshold": THRESHOLD,
                **changes.pop("validation", {}),
            },
            **changes,
        },
    )
    command = ["tune", "--config", str(config), "--output", str(place / "run")]
    environment = {"MEGATRON_EE_CACHE": str(project.cache)}
    with Ranks(world_size, run_command, command, environment, str(place / "stderr"), timeout=120) as ranks:
        assert ranks.results() == [0] * world_size
    return read_log(place / "run")


def by_hand(project: Project, held_out: Path, adapter: Path) -> dict[str, Any]:
    """What the engine writes with an adapter, compared with its full mode."""
    windows = validation_windows([open_corpus(held_out)], 32)
    prompts = held_out_prompts(windows.ranges, PROMPTS, 16, 16)
    policy = ThresholdPolicy(threshold=THRESHOLD)
    with open_engine(open_released(project.model, adapter), EngineOptions(dtype="float32")) as engine:
        assert engine is not None
        full, early = (
            [each for (each,) in engine.generate([Request(prompt=p, max_tokens=TOKENS, **mode) for p in prompts])]
            for mode in ({}, {"mode": "threshold", "policy": policy})
        )
    pairs = [
        [mine.id == theirs.id for mine, theirs in zip(ours.tokens, whole.tokens, strict=False)]
        for ours, whole in zip(early, full, strict=True)
    ]
    return {
        "threshold": THRESHOLD,
        "prompts": len(prompts),
        "tokens": sum(len(each.tokens) for each in full),
        "equal": sum(map(sum, pairs)),
        "before": sum(len(list(takewhile(bool, same))) for same in pairs),
        "later": sum(len(each.tokens) - 1 for each in early),
        "layer_runs": round(sum(layers(each) for each in early)),
    }


def layers(completion: Completion) -> float:
    """Decoder layers that ran for the tokens after the first."""
    runs: float = completion.statistics["layers_per_token"] * (len(completion.tokens) - 1)
    return runs


def counts(measured: dict[str, Any]) -> dict[str, Any]:
    derived = {"agreement", "departure", "layers_per_token"}
    return {key: value for key, value in measured.items() if key not in derived}


@pytest.mark.slow
@pytest.mark.parametrize(
    "world_size, parallel",
    [
        (1, {}),
        (2, {"pipeline": 2}),
        (2, {"tensor": 2, "sequence": True}),
        (2, {}),
    ],
    ids=["one", "pipeline", "tensor", "data"],
)
def test_every_validation_is_the_engine_s(
    world_size: int, parallel: dict[str, Any], project: Project, held_out: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    log = tune(project, held_out, run, world_size, parallel=parallel, validation={"free_running": True})
    found = {line["step"]: line["validation"]["free_running"] for line in log if "validation" in line}
    assert sorted(found) == [0, 2, 4] and not [line for line in log if "free_running" in line]
    last = found[4]
    assert counts(last) == by_hand(project, held_out, run / "run" / "adapter")
    assert 0 < last["before"] < last["equal"] < last["tokens"] and last["layers_per_token"] < 4
    assert counts(found[0]) != counts(last)
    assert (run / "run" / "validation" / "free-running.png").exists()


@pytest.mark.parametrize(
    "world_size, parallel", [(1, {}), pytest.param(2, {"pipeline": 2}, marks=pytest.mark.slow)], ids=["one", "pipeline"]
)
def test_by_default_it_is_measured_at_the_end(
    world_size: int, parallel: dict[str, Any], project: Project, held_out: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    log = tune(project, held_out, run, world_size, parallel=parallel)
    assert all(line["validation"]["free_running"] is None for line in log if "validation" in line)
    (line,) = [line for line in log if "free_running" in line]
    best = run / "run" / "adapter-best"
    assert line["adapter"] == "adapter-best" and line["step"] == open_adapter(best).steps
    assert counts(line["free_running"]) == by_hand(project, held_out, best)
    said = (run / "stderr-0").read_text()
    assert "with the exits of adapter-best (step 4), beside the full model on 5 prompts" in " ".join(said.split())
    assert re.search(r"threshold mode: .*\n.* equal ", said)  # the heading of a column breaks between words
