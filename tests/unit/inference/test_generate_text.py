"""From a prompt to text: special tokens, where it ends, statistics, refusals; and the command as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ee.checkpoint.adapter import save_adapter
from megatron_ee.checkpoint.loading import open_model
from megatron_ee.config.exits import ExitSpec
from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.errors import CheckpointError, ConfigError, DataError
from megatron_ee.inference.generate import continue_prompt, encode_prompt, end_of_text, generate
from megatron_ee.inference.policy import ExitPolicy
from megatron_ee.model.stage import Stage
from megatron_ee.testing.models import SHAPE, save_tiny_model

PROMPT = "Once upon a time"
EXITS = [ExitSpec(1), ExitSpec(2, "layer")]
ROOT = Path(__file__).resolve().parents[3]


def save_tokenizer(directory: Path, *, bos: bool, extra: int = 0) -> None:
    """Every byte a token; with ``bos``, texts begin with ``<s>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"<extra{i}>" for i in range(extra))]
    core = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(directory)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 64 positions with a tokenizer that fits it."""
    path = tmp_path_factory.mktemp("model")
    save_tiny_model("llama2", path, vocab_size=258, max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
    save_tokenizer(path, bos=True)
    return path


@pytest.fixture(scope="module")
def stage(directory: Path, load_stage: Callable[..., Stage]) -> Stage:
    return load_stage(directory, EXITS)


@pytest.fixture(scope="module")
def adapter(directory: Path, stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "adapter"
    digest = open_model(directory).digest()
    about = {"base_model": str(directory), "backbone_sha256": digest, "steps": 0, "extra": {}}
    save_adapter(path, stage.exits, [exit_.spec for exit_ in stage.exits], stage.setup.groups, **about)
    return path


def edit(directory: Path, name: str, **changes: Any) -> None:
    path = directory / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({key: value for key, value in {**content, **changes}.items() if value is not None}))


def test_the_prompt_is_encoded_as_transformers_does(directory: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(directory)(PROMPT)["input_ids"]
    assert encode_prompt(load_tokenizer(directory), PROMPT) == expected
    assert expected[0] == 0 and len(expected) == len(PROMPT) + 1
    save_tokenizer(tmp_path, bos=False)
    assert encode_prompt(load_tokenizer(tmp_path), PROMPT) == expected[1:]


def test_a_bare_sentencepiece_model_begins_with_its_first_token(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PROMPT, "a man of time", "one upon two"]),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=40,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path)
    assert encode_prompt(tokenizer, PROMPT) == [tokenizer.bos_id, *tokenizer.encode(PROMPT)]


def test_the_configuration_says_what_ends_the_text(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(directory, path)
    tokenizer = load_tokenizer(path)
    edit(path, "generation_config.json", eos_token_id=[7, 9])
    assert end_of_text(path, tokenizer) == {7, 9}
    edit(path, "generation_config.json", eos_token_id=7)
    assert end_of_text(path, tokenizer) == {7}
    (path / "generation_config.json").unlink()
    edit(path, "config.json", eos_token_id=[5])
    assert end_of_text(path, tokenizer) == {5}
    edit(path, "config.json", eos_token_id=None)
    assert end_of_text(path, tokenizer) == {1}  # the tokenizer's
    edit(path, "generation_config.json", eos_token_id=["</s>"])
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id must be .*'</s>'"):
        end_of_text(path, tokenizer)


def test_text_layers_and_statistics(directory: Path, stage: Stage) -> None:
    tokenizer = load_tokenizer(directory)
    ids = encode_prompt(tokenizer, PROMPT)
    result = continue_prompt(stage, tokenizer, ids, ExitPolicy(1e-9, max_deferred=2), (), 9)
    assert result.layers == [4, 1, 1, 4, 1, 1, 4, 1, 1]
    assert len(result.token_ids) == len(result.pieces) == 9
    assert tokenizer.decode(ids) + result.text == tokenizer.decode([*ids, *result.token_ids])
    figures = result.statistics
    assert figures["finish_reason"] == "length"
    assert (figures["prompt_tokens"], figures["tokens"]) == (len(ids), 9)
    assert figures["tokens_by_layer"] == {"1": 6, "4": 3}
    assert figures["mean_exit_layer"] == pytest.approx((3 * 4 + 6 * 1) / 9)
    # 8 passes; 6 of their tokens have run all 4 layers and the exit's own after layer 2, the last 2 one layer so far.
    assert figures["deferred_tokens"] == 2
    assert figures["layers_per_token"] == pytest.approx((6 * 5 + 2 * 1) / 8)
    assert figures["tokens_per_second"] > 0 and figures["time_to_first_token"] > 0
    assert len(figures["confidences"]) == 9 and all(0 < c <= 1 for c in figures["confidences"])
    json.dumps(figures, allow_nan=False)


def test_one_token_is_too_few_for_rates(directory: Path, stage: Stage) -> None:
    figures = continue_prompt(stage, load_tokenizer(directory), [3, 4], None, (), 1).statistics
    assert figures["tokens"] == 1
    assert figures["tokens_per_second"] is None and figures["layers_per_token"] is None


def test_end_of_text_is_a_token_but_no_text(directory: Path, stage: Stage) -> None:
    tokenizer = load_tokenizer(directory)
    ids = encode_prompt(tokenizer, PROMPT)
    free = continue_prompt(stage, tokenizer, ids, None, (), 20)
    stop = next(i for i in range(2, 20) if free.token_ids[i] not in free.token_ids[:i])
    result = continue_prompt(stage, tokenizer, ids, None, {free.token_ids[stop]}, 20)
    assert result.token_ids == free.token_ids[: stop + 1]
    assert len(result.pieces) == stop + 1 and result.text == "".join(result.pieces[:-1])
    assert result.statistics["finish_reason"] == "eos"


def test_stops_at_the_end_of_the_context(directory: Path, stage: Stage) -> None:
    tokenizer = load_tokenizer(directory)
    for length, room in ((60, 4), (63, 1)):
        result = continue_prompt(stage, tokenizer, [5] * length, ExitPolicy(0.01), (), 50)
        assert len(result.token_ids) == room and result.statistics["finish_reason"] == "context"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt": ""}, "--prompt: is empty; give text to continue"),
        ({"prompt": "x" * 63}, "--prompt: has 64 tokens, but the model has 64 positions; shorten it"),
        ({"mode": "threshold"}, "--mode: threshold needs exits; give their adapter with --adapter DIR"),
        ({"mode": "speculative"}, "--mode: 'speculative' is not available; choose full or threshold"),
        ({"threshold": 0.0}, "--threshold: must be above 0"),
        ({"threshold": float("nan")}, "--threshold: must be above 0"),
        ({"max_tokens": 0}, "--max-tokens: must be at least 1, not 0"),
        ({"dtype": "float16"}, "--dtype: 'float16' is unknown; possible: float32, bfloat16"),
    ],
)
def test_refuses(directory: Path, changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": directory, "adapter": None, "prompt": PROMPT, "mode": "full"}
    with pytest.raises(ConfigError) as caught:
        generate(**{**arguments, **changes})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_refuses_several_processes(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="generate runs on one process, not 2"):
        generate(model=directory, adapter=None, prompt=PROMPT, mode="full")


def test_refuses_a_tokenizer_that_does_not_fit(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(directory, path)
    save_tokenizer(path, bos=True, extra=3)
    with pytest.raises(DataError, match="the tokenizer has 261 tokens, but the model's vocabulary has only 258"):
        generate(model=path, adapter=None, prompt=PROMPT, mode="full")


@pytest.mark.parametrize("mode", ["full", "threshold"])
def test_refuses_exits_of_another_backbone(mode: str, adapter: Path, tmp_path: Path) -> None:
    assert SHAPE["num_hidden_layers"] == 4
    save_tiny_model("llama2", tmp_path, seed=5, vocab_size=258, max_position_embeddings=64)
    save_tokenizer(tmp_path, bos=True)
    with pytest.raises(CheckpointError, match="exits fit only the weights they were tuned on"):
        generate(model=tmp_path, adapter=adapter, prompt=PROMPT, mode=mode)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-m", "megatron_ee", "generate", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command_full_mode_equals_transformers(directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = command("--model", directory, "--prompt", PROMPT, "--max-tokens", 20, "--dtype", "float32", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    inputs = AutoTokenizer.from_pretrained(directory)(PROMPT, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=1)
    assert result["token_ids"] == theirs[0, inputs["input_ids"].shape[1] :].tolist()
    assert set(result["layers"]) == {4} and len(result["layers"]) == len(result["token_ids"])


def test_command_shows_where_tokens_left(directory: Path, adapter: Path, stage: Stage) -> None:
    arguments = ("--model", directory, "--adapter", adapter, "--prompt", PROMPT, "--dtype", "float32")
    done = command(*arguments, "--threshold", 0.01, "--max-tokens", 100, "--json")
    assert done.returncode == 0, done.stderr
    assert "stopped at the end of the model's context" in done.stderr
    result = json.loads(done.stdout)
    assert set(result["layers"]) >= {1, 4}
    assert result["statistics"]["finish_reason"] == "context"
    tokenizer = load_tokenizer(directory)
    here = continue_prompt(stage, tokenizer, encode_prompt(tokenizer, PROMPT), ExitPolicy(0.01), {1}, 100)
    assert (result["text"], result["token_ids"], result["layers"]) == (here.text, here.token_ids, here.layers)
