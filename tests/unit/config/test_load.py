"""Configuration files and overrides: what is read, and the one line that each mistake gets."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ee.config import schema
from megatron_ee.config.load import config_from_dict, config_help, config_to_dict, load_config, parse_exits
from megatron_ee.config.schema import CorpusConfig, ExitConfig, RunConfig, StageConfig
from megatron_ee.errors import ConfigError

MINIMAL = """
model: {path: models/tiny}
exits:
  - {layer: 2}
  - {layer: 0.5, body: norm, head: shared}
data: {train: [corpus/a, {path: corpus/b, weight: 2}]}
"""
TOP = "model, exits, data, parallel, optimizer, schedule, loss, tuning, fit, validation, checkpoint, logging"


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, list(overrides))


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_status == 2
    return message.replace(str(tmp_path / "run.yaml"), "FILE")


@pytest.mark.smoke
def test_values_and_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    assert config.exits == [ExitConfig(2), ExitConfig(0.5, "norm", "shared")]
    assert config.data.train == ["corpus/a", CorpusConfig("corpus/b", 2.0)]
    assert isinstance(config.exits[0].layer, int)
    assert config == RunConfig(
        model=schema.ModelConfig("models/tiny"),
        exits=config.exits,
        data=schema.DataConfig(train=config.data.train),
    )


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", ".1e-3", "0.0001", "1e-04"])
def test_numbers_with_exponents_are_numbers(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"{MINIMAL}optimizer: {{lr: {text}}}").optimizer.lr == 1e-4
    assert load(tmp_path, MINIMAL, "--optimizer.lr", text).optimizer.lr == 1e-4


def test_a_whole_number_is_a_float_where_one_is_wanted(tmp_path: Path) -> None:
    lr = load(tmp_path, MINIMAL, "--optimizer.lr", "1").optimizer.lr
    assert lr == 1.0
    assert isinstance(lr, float)


def test_overrides_apply_in_order_after_the_file(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        f"{MINIMAL}tuning: {{steps: 5, seed: 1}}",
        *("--tuning.steps", "7", "--tuning.steps=9", "--optimizer.lr", "3e-4"),
        *("--exits.0.layer", "3", "--exits[1].body", "mlp", "--data.train.1.weight", "0.5"),
        *("--optimizer", "{min_lr: 1e-6}", "--logging.tensorboard", "false"),
    )
    assert (config.tuning.steps, config.tuning.seed) == (9, 1)
    assert (config.optimizer.lr, config.optimizer.min_lr) == (3e-4, 1e-6)
    assert config.exits == [ExitConfig(3), ExitConfig(0.5, "mlp", "shared")]
    assert config.data.train[1] == CorpusConfig("corpus/b", 0.5)
    assert config.logging.tensorboard is False


def test_lists_and_paths_as_overrides(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL, "--exits", "[{layer: 4}]", "--model.path", "007", "--data.train.0", "{path: x}")
    assert config.exits == [ExitConfig(4)]
    assert config.model.path == "007"
    assert config.data.train[0] == CorpusConfig("x")


def test_overrides_can_give_what_the_file_lacks(tmp_path: Path) -> None:
    config = load(tmp_path, "exits: [{layer: 1}]", "--model.path", "m", "--data.train", "[c]", "--data.seed", "3")
    assert (config.model.path, config.data.train, config.data.seed) == ("m", ["c"], 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimiser: {lr: 1}", "optimiser: unknown key; did you mean 'optimizer'?"),
        ("wandb: {}", f"wandb: unknown key; possible: {TOP}"),
        ("optimizer: {minlr: 1}", "optimizer.minlr: unknown key; did you mean 'min_lr'?"),
        ("tuning: {steps: true}", "tuning.steps: must be a whole number, not true"),
        ("tuning: {steps: '10'}", "tuning.steps: must be a whole number, not '10'"),
        ("tuning: {steps: 1e3}", "tuning.steps: must be a whole number, not 1000.0"),
        ("tuning: {steps: }", "tuning.steps: must be a whole number, not nothing"),
        ("optimizer: {lr: fast}", "optimizer.lr: must be a number, not 'fast'"),
        ("optimizer: {lr: .nan}", "optimizer.lr: must be a number, not nan"),
        ("optimizer: {lr: true}", "optimizer.lr: must be a number, not true"),
        ("optimizer: 3", "optimizer: expected keys such as lr, min_lr, beta1, not 3"),
        ("logging: {tensorboard: 1}", "logging.tensorboard: must be true or false, not 1"),
        ("schedule: {decay: cosin}", "schedule.decay: must be one of linear, cosine, constant, not 'cosin'; did you"),
        ("validation: {thresholds: 0.5}", "validation.thresholds: expected a list, such as [a, b], not 0.5"),
        ("validation: {thresholds: [0.5, x]}", "validation.thresholds[1]: must be a number, not 'x'"),
    ],
)
def test_mistakes_in_a_block(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, MINIMAL + text).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exits: [{layer: 2}, {layer: 3, bodi: mlp}]", "exits[1].bodi: unknown key; did you mean 'body'?"),
        ("exits: [{body: mlp}]", "exits[0].layer: missing; it has no default (a number)"),
        ("exits: [{layer: true}]", "exits[0].layer: must be a number, not true"),
        ("exits: [3]", "exits[0]: expected keys such as layer, body, head, not 3"),
        ("exits: {layer: 3}", "exits: expected a list, such as [a, b], not {'layer': 3}"),
        ("exits: [{layer: 1, class_path: os.system}]", "exits[0].class_path: unknown key; possible: layer, body, head"),
    ],
)
def test_mistakes_in_a_list(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, "model: {path: m}\ndata: {train: [a]}\n" + text).startswith(message)


def test_mistakes_in_a_corpus(tmp_path: Path) -> None:
    head = "model: {path: m}\nexits: [{layer: 1}]\n"
    assert refusal(tmp_path, head + "data: {train: [{path: a, wieght: 1}]}") == (
        "data.train[0].wieght: unknown key; did you mean 'weight'?"
    )
    assert refusal(tmp_path, head + "data: {train: [3]}") == (
        "data.train[0]: must be text or keys such as path, weight, not 3"
    )
    assert (
        refusal(tmp_path, head)
        == "data: missing; it has no default (keys such as train, validation, validation_fraction)"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {path: x\nexits: 3", "FILE:2: not valid YAML: "),
        ("a: 1\n\tb: 2", "FILE:2: not valid YAML: found character '\\t' that cannot start any token"),
        ("model: {path: a}\nmodel: {path: b}", "FILE:2: not valid YAML: key 'model' twice"),
        ("x: !!python/object/apply:os.system [ls]", "FILE:1: not valid YAML: could not determine a constructor"),
        ("", "FILE: expected keys such as model, exits, data, found nothing"),
        ("- 1", "FILE: expected keys such as model, exits, data, found [1]"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text).startswith(message)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such configuration file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="not readable as text"):
        load_config(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not readable as text"):
        load_config(tmp_path / "binary")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--optimizer.lrr", "3"], "optimizer.lrr: unknown key; did you mean 'lr'?"),
        (["--optimizer.lrr"], "optimizer.lrr: unknown key; did you mean 'lr'?"),
        (["--optimizer.lr"], "optimizer.lr: --optimizer.lr needs a value"),
        (["--optimizer.lr", "--tuning.steps", "3"], "optimizer.lr: --optimizer.lr needs a value"),
        (["--optimizer.lr", "x"], "optimizer.lr: must be a number, not 'x'"),
        (["--optimizer.lr.x", "3"], "optimizer.lr.x: unknown key; optimizer.lr is a number and has no keys"),
        (["--exits.2.layer", "3"], "exits[2]: the configuration has 2 items here, counted from 0"),
        (["--exits.last.layer", "3"], "exits.last: exits is a list; name an item by its number, such as --exits.0"),
        (["--exits.0.boddy", "mlp"], "exits[0].boddy: unknown key; did you mean 'body'?"),
        (["--data.train.0.weight", "3"], "data.train[0]: the file has 'corpus/a' here, which has no keys to set"),
        (["--parallel.layout.0.layer", "[1, 2]"], "parallel.layout[0].layer: unknown key; did you mean 'layers'?"),
        (["--data.train", "[a"], "data.train: '[a' is not valid YAML: "),
        (["steps", "3"], "'steps': expected an override such as --optimizer.lr 3e-4"),
        (["--model.dtype", "float61"], "model.dtype: must be one of auto, float32, bfloat16, not 'float61'; did you"),
    ],
)
@pytest.mark.smoke
def test_mistakes_in_overrides(tmp_path: Path, overrides: list[str], message: str) -> None:
    assert refusal(tmp_path, MINIMAL, *overrides).startswith(message)


LAYOUT = "parallel: {pipeline: 2, layout: [{layers: [1, 2]}, {exits: [2, 0.5]}]}"


def test_layouts(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL).parallel.layout == "auto"
    config = load(tmp_path, MINIMAL + LAYOUT)
    assert config.parallel.layout == [StageConfig([1, 2]), StageConfig(exits=[2, 0.5])]
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    changed = load(
        tmp_path, MINIMAL + LAYOUT, "--parallel.layout.0.layers", "[1, 3]", "--parallel.layout.1.exits.0", "1"
    )
    assert changed.parallel.layout == [StageConfig([1, 3]), StageConfig(exits=[1, 0.5])]
    assert load(tmp_path, MINIMAL + LAYOUT, "--parallel.layout", "auto").parallel.layout == "auto"
    assert refusal(tmp_path, MINIMAL + LAYOUT, "--parallel.layout.a.layers", "3") == (
        "parallel.layout.a: parallel.layout is a list; name an item by its number, such as --parallel.layout.0"
    )
    given = load(tmp_path, MINIMAL, "--parallel.layout", "[{layers: [1, 2], exits: [1]}]")
    assert given.parallel.layout == [StageConfig([1, 2], [1])]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("atuo", "parallel.layout: must be auto or a list, not 'atuo'; did you mean 'auto'?"),
        ("3", "parallel.layout: must be auto or a list, not 3"),
        ("{layers: [1, 2]}", "parallel.layout: must be auto or a list, not {'layers': [1, 2]}"),
        ("[3]", "parallel.layout[0]: expected keys such as layers, exits, not 3"),
        ("[{}]", "parallel.layout[0]: is empty; give keys such as layers, exits"),
        ("[[1, 4]]", "parallel.layout[0]: expected keys such as layers, exits, not [1, 4]"),
        ("[{layers: [1, 2]}, {layer: [3, 4]}]", "parallel.layout[1].layer: unknown key; did you mean 'layers'?"),
        ("[{layers: 4}]", "parallel.layout[0].layers: expected a list, such as [a, b], not 4"),
        ("[{layers: [1, 2.5]}]", "parallel.layout[0].layers[1]: must be a whole number, not 2.5"),
        ("[{exits: [two]}]", "parallel.layout[0].exits[0]: must be a number, not 'two'"),
    ],
)
def test_mistakes_in_a_layout(tmp_path: Path, layout: str, message: str) -> None:
    assert refusal(tmp_path, f"{MINIMAL}parallel: {{layout: {layout}}}") == message


def test_reading_a_configuration_does_not_change_the_values() -> None:
    values = yaml.safe_load(MINIMAL + LAYOUT)
    before = json.dumps(values)
    config_from_dict(values)
    assert json.dumps(values) == before


def test_saved_and_reloaded(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL, "--optimizer.lr", "3e-4", "--exits.0.init", "random")
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    assert load(tmp_path, yaml.safe_dump(config_to_dict(config))) == config


@settings(deadline=None, max_examples=30)  # a busy machine is not a wrong answer
@given(
    st.builds(
        ExitConfig,
        layer=st.integers() | st.floats(allow_nan=False, allow_infinity=False),
        body=st.sampled_from(["embedding", "norm", "mlp", "layer"]),
        head=st.sampled_from(["own", "shared", "low_rank"]),
        weight=st.floats(allow_nan=False, allow_infinity=False),
        rank=st.integers(),
        init=st.sampled_from(["copy", "random"]),
    )
)
def test_any_exit_survives_json(exit_: ExitConfig) -> None:
    config = RunConfig(schema.ModelConfig("m"), [exit_], schema.DataConfig(["c"]))
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_a_list_of_exits_is_not_empty() -> None:
    assert parse_exits("[{layer: 2, body: norm}]", "--exits") == [ExitConfig(2, "norm")]
    for text, word in (("[]", "at least one exit"), ("", "expected a list"), ("[{}]", "exits[0].layer: missing")):
        with pytest.raises(ConfigError, match=re.escape(word)):
            parse_exits(text, "--exits")


def _keys(kind: Any, prefix: str = "") -> list[str]:
    found = []
    for field in dataclasses.fields(kind):
        block = getattr(schema, str(field.type), None)
        is_block = dataclasses.is_dataclass(block)
        found += _keys(block, f"{prefix}{field.name}.") if is_block else [prefix + field.name]
    return found


def test_help_documents_every_key() -> None:
    text = config_help()
    keys = _keys(RunConfig) + _keys(ExitConfig, "exits.N.") + _keys(CorpusConfig, "data.train.N.")
    keys += _keys(StageConfig, "parallel.layout.N.")
    assert len(keys) > 35
    for key in keys:
        start = text.find(f"--{key} ")
        assert start >= 0, key
        entry = text[start : text.find("\n  --", start)].split(maxsplit=2)
        assert len(entry) == 3, key
        assert not entry[2].startswith("("), f"{key} has no docstring"
    assert "configuration file" not in text
    assert "show this help" not in text.lower()
