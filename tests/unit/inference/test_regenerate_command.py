"""``megatron-ee regenerate`` as a user runs it: what it writes, how it continues, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ee.commands import answer_file
from megatron_ee.commands.answer_file import AnswerFile
from megatron_ee.commands.main import main
from megatron_ee.data.indexed import indexed_dataset
from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.testing.command import Command
from megatron_ee.testing.models import save_tiny_model

ROOT = Path(__file__).resolve().parents[3]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [
    {"role": "system", "content": "short"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "and?"},
]


@pytest.fixture(scope="module")
def chat_model(byte_model: Path, tmp_path_factory: pytest.TempPathFactory, save_tokenizer: Callable[..., None]) -> Path:
    path = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(byte_model, path)
    save_tokenizer(path, template=TEMPLATE)
    return path


def write_prompts(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def regenerate(model: Path, prompts: Path, output: Path, *options: object) -> int:
    given = ["--model", model, "--prompts", prompts, "--output", output, "--dtype", "float32", *options]
    return main(["regenerate", *map(str, given)])


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def prepare(model: Path, data: Path, output: Path, *options: str) -> list[tuple[str, str]]:
    """Text and trained text of each document that ``prepare-data`` makes."""
    assert (
        main(["prepare-data", "--input", str(data), "--tokenizer", str(model), "--output", str(output), *options]) == 0
    )
    tokenizer, module = load_tokenizer(model), indexed_dataset()
    documents = [np.array(each) for each in module.IndexedDataset(str(output))]
    masks = [np.ones(len(each), bool) for each in documents]
    if "--chat" in options:
        masks = [np.array(each) > 0 for each in module.IndexedDataset(f"{output}.mask")]
    return [
        (tokenizer.decode(ids.tolist()), tokenizer.decode(ids[mask].tolist()))
        for ids, mask in zip(documents, masks, strict=True)
    ]


@pytest.mark.smoke
def test_answers_are_the_models_and_only_they_are_trained(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", {"prompt": "hi", "id": "a"}, {"messages": TALK})
    output = tmp_path / "new" / "answers.jsonl"
    assert regenerate(chat_model, prompts, output, "--max-tokens", 4) == 0
    assert capsys.readouterr().out == f"{output}: 2 answers to 2 prompts, 2 cut at the length limit\n"
    assert not output.with_name("answers.jsonl.partial").exists()
    generate = ["generate", "--model", chat_model, "--prompts", prompts, "--chat", "--dtype", "float32"]
    assert main([*map(str, generate), "--max-tokens", "4"]) == 0
    texts = [json.loads(line)["text"].rstrip("\ufffd") for line in capsys.readouterr().out.splitlines()]
    user = {"role": "user", "content": "hi"}
    common = {"sample": 0, "finish_reason": "length", "end_token": None}
    assert answers(output) == [
        {"id": "a", "line": 1, "messages": [user, {"role": "assistant", "content": texts[0]}], **common},
        {"line": 2, "messages": [*TALK, {"role": "assistant", "content": texts[1]}], **common},
    ]
    documents = prepare(chat_model, output, tmp_path / "corpus", "--chat")
    assert [trained for _, trained in documents] == texts  # not the earlier answer, and no end of a cut one
    assert documents[1][0] == f"[system]short</s>[user]hi</s>[assistant]ho</s>[user]and?</s>[assistant]{texts[1]}</s>"


def test_an_answer_that_ended_is_trained_with_its_end(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where another token than the tokenizer's end of text ends it. Cut answers can be left out."""
    model = tmp_path / "model"
    shutil.copytree(chat_model, model)
    config = json.loads((model / "generation_config.json").read_text())
    ends = list(range(2, 90))  # many characters, so that a random model ends soon
    (model / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": ends}))
    prompts = write_prompts(tmp_path / "prompts.jsonl", *({"prompt": f"{n}"} for n in range(8)))
    drawn = ("--temperature", 1, "--max-tokens", 3, "--samples", 2)
    kept, every = tmp_path / "kept.jsonl", tmp_path / "every.jsonl"
    assert regenerate(model, prompts, every, *drawn) == 0
    assert regenerate(model, prompts, kept, *drawn, "--drop-cut") == 0
    ended = [each for each in answers(every) if each["finish_reason"] == "eos"]
    assert answers(kept) == ended and 4 < len(ended) < 14
    assert capsys.readouterr().out.endswith(f"{len(ended)} answers to 8 prompts, {16 - len(ended)} left out\n")
    tokenizer = load_tokenizer(model)
    for each, (text, trained) in zip(ended, prepare(model, kept, tmp_path / "corpus", "--chat"), strict=True):
        end = tokenizer.id_of(each["end_token"])
        assert end in {1, *ends}
        assert trained == each["messages"][-1]["content"] + tokenizer.decode([end])
        assert text.endswith(trained if end == 1 else f"{trained}</s>")


def test_without_a_chat_template_texts_are_continued(
    byte_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", {"prompt": "Once upon"}, {"prompt": "two", "max_tokens": 3})
    output = tmp_path / "texts.jsonl"
    assert regenerate(byte_model, prompts, output, "--max-tokens", 6) == 0
    found = answers(output)
    assert [set(each) for each in found] == [{"line", "sample", "text", "finish_reason"}] * 2
    assert found[0]["text"].startswith("Once upon") and len(found[0]["text"]) > len("Once upon")
    documents = prepare(byte_model, output, tmp_path / "corpus")
    assert [text for text, _ in documents] == [each["text"] + "</s>" for each in found]
    write_prompts(prompts, {"messages": TALK})
    assert regenerate(byte_model, prompts, tmp_path / "other.jsonl") == 2
    assert f"{prompts}:1: {byte_model}: the tokenizer has no chat template" in last_line(capsys)


def test_samples_depend_on_seed_place_and_number_alone(chat_model: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", *[{"prompt": "hi"}] * 5, {"prompt": "x", "samples": 1})
    drawn = ("--temperature", 1, "--samples", 3, "--max-tokens", 12)
    for name, options in (("a", ()), ("b", ("--batch-size", 2)), ("c", ("--seed", 1))):
        assert regenerate(chat_model, prompts, tmp_path / name, *drawn, *options) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found = answers(tmp_path / "a")
    assert [(each["line"], each["sample"]) for each in found] == [(n, i) for n in range(1, 6) for i in range(3)] + [
        (6, 0)
    ]
    assert len({each["messages"][-1]["content"] for each in found}) == 16
    others = {each["messages"][-1]["content"] for each in answers(tmp_path / "c")}
    assert not others & {each["messages"][-1]["content"] for each in found}


# -- interruption


@pytest.fixture
def interrupt_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Makes the command receive SIGINT when it has written so many prompts' answers; None: no more."""
    append = AnswerFile.append

    def set_limit(count: int | None) -> None:
        written = 0

        def limited(file: AnswerFile, prompt: int, records: Any) -> None:
            nonlocal written
            append(file, prompt, records)
            written += 1
            if written == count:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)

        monkeypatch.setattr(AnswerFile, "append", limited)

    return set_limit


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("damage", [lambda data: data, lambda data: data + data[:20], lambda data: data[:-9]])
def test_an_interrupted_file_is_continued(
    samples: int,
    damage: Callable[[bytes], bytes],
    chat_model: Path,
    tmp_path: Path,
    interrupt_after: Callable[[int | None], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also one that a kill has torn within a line: the result is that of one run.

    Finished answers are kept although the first prompt still runs.
    """
    lines = [{"prompt": "say 0", "max_tokens": 30}, *({"prompt": f"say {n}"} for n in range(1, 7))]
    prompts = write_prompts(tmp_path / "prompts.jsonl", *lines)
    drawn = ("--temperature", 1, "--samples", samples, "--max-tokens", 8, "--batch-size", 3)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    assert regenerate(chat_model, prompts, whole, *drawn) == 0
    interrupt_after(2)
    assert regenerate(chat_model, prompts, output, *drawn) == 128 + signal.SIGINT
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "megatron-ee regenerate: 2 of 7 prompts are answered; the same command with --resume continues",
        "megatron-ee regenerate: interrupted by SIGINT",
    ]
    unfinished = tmp_path / "answers.jsonl.partial"
    assert not output.exists() and 1 not in [each["line"] for each in answers(unfinished)]
    assert [len(each["answers"]) for each in answers(unfinished)] == [samples] * 2
    unfinished.write_bytes(damage(unfinished.read_bytes()))
    interrupt_after(None)
    assert regenerate(chat_model, prompts, output, *drawn) == 2
    assert f"{unfinished} is unfinished; give --resume to continue it, or --overwrite" in last_line(capsys)
    assert regenerate(chat_model, prompts, output, *drawn, "--resume") == 0
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("answers")) == [
        "answers.jsonl",
        "answers.jsonl.info.json",
    ]


def test_an_interruption_while_the_final_file_is_written(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", {"prompt": "a"}, {"prompt": "b"})
    output, whole = tmp_path / "answers.jsonl", tmp_path / "whole.jsonl"
    assert regenerate(chat_model, prompts, whole, "--max-tokens", 8) == 0
    write_json = answer_file.write_json

    def interrupted(path: Path, data: Any) -> None:
        if path.name == "answers.jsonl.info.json":
            raise KeyboardInterrupt
        write_json(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(answer_file, "write_json", interrupted)
        assert regenerate(chat_model, prompts, output, "--max-tokens", 8) == 130
    assert regenerate(chat_model, prompts, output, "--max-tokens", 8, "--resume") == 0
    assert output.read_bytes() == whole.read_bytes()
    assert regenerate(chat_model, prompts, output, "--max-tokens", 8, "--resume") == 0  # complete
    assert not list(tmp_path.glob("*.partial*"))


def test_only_the_same_work_is_continued(
    chat_model: Path,
    tmp_path: Path,
    interrupt_after: Callable[[int | None], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    output, unfinished = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    interrupt_after(2)
    assert regenerate(chat_model, prompts, output, "--max-tokens", 8) == 130
    before = unfinished.read_bytes()
    interrupt_after(None)
    other = tmp_path / "model"
    save_tiny_model("llama2", other, seed=5, vocab_size=258, max_position_embeddings=64)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(chat_model / name, other)
    changed = write_prompts(tmp_path / "changed.jsonl", {"prompt": "a"}, {"prompt": "b"}, {"prompt": "d"})
    same = ("--max-tokens", 8, "--resume")
    for model, file, options, message in (
        (chat_model, prompts, ("--resume", "--temperature", 1), "temperature 0.0, not 1.0, max_tokens 8, not 512"),
        (chat_model, prompts, (*same, "--drop-cut"), "drop_cut false, not true"),
        (chat_model, changed, same, "other prompts"),
        (other, prompts, same, "another model"),
    ):
        assert regenerate(model, file, output, *options) == 2
        assert f"--resume: {unfinished} was begun with {message}" in last_line(capsys)
    unfinished.write_bytes(b'{"line": 9}\n' + before)
    assert regenerate(chat_model, prompts, output, *same) == 1
    assert f"{unfinished}, line 1: does not answer one of the prompts that are left" in last_line(capsys)
    unfinished.write_bytes(before)
    info = tmp_path / "answers.jsonl.partial.info.json"
    info.rename(tmp_path / "away")
    assert regenerate(chat_model, prompts, output, *same) == 2
    assert f"--resume: {info} is missing or damaged" in last_line(capsys)
    (tmp_path / "away").rename(info)
    with unfinished.open() as held:
        import fcntl

        fcntl.flock(held, fcntl.LOCK_EX)
        assert regenerate(chat_model, prompts, output, *same) == 1
        assert f"{unfinished}: another process is writing it" in last_line(capsys)
    assert unfinished.read_bytes() == before
    assert regenerate(chat_model, prompts, output, *same, "--batch-size", 1) == 0


def test_a_finished_file_is_replaced_only_on_demand(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", {"prompt": "a"})
    output = tmp_path / "answers.jsonl"
    assert regenerate(chat_model, prompts, output, "--max-tokens", 2, "--resume") == 0
    before = output.read_bytes()
    foreign = tmp_path / "thesis.jsonl"
    foreign.write_text("years of work")
    with monkeypatch.context() as patch:
        patch.setattr("megatron_ee.inference.loading.open_engine", lambda *_, **__: pytest.fail("loaded"))
        assert regenerate(chat_model, prompts, output, "--max-tokens", 2, "--resume") == 0
        assert last_line(capsys) == f"megatron-ee regenerate: {output} is complete already"
        for path, options, message in (
            (output, (), f"{output} exists already; choose another name or give --overwrite"),
            (output, ("--resume",), f"{output} exists already; choose another name or give --overwrite"),
            (foreign, ("--overwrite",), f"{foreign}.info.json does not say that megatron-ee regenerate wrote it"),
            (tmp_path, (), f"--output: {tmp_path} is a directory; name a file"),
        ):
            assert regenerate(chat_model, prompts, path, *options) == 2
            assert message in last_line(capsys)
    assert output.read_bytes() == before and foreign.read_text() == "years of work"
    assert not list(tmp_path.glob("*.partial*"))
    assert regenerate(chat_model, prompts, output, "--max-tokens", 5, "--overwrite") == 0
    assert output.read_bytes() != before


@pytest.mark.slow
def test_sigterm_while_it_works(chat_model: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", *({"prompt": f"tell {n}"} for n in range(150)))
    output = tmp_path / "answers.jsonl"
    given = ["--model", chat_model, "--prompts", prompts, "--output", output, "--dtype", "float32", "--max-tokens", 12]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    unfinished = tmp_path / "answers.jsonl.partial"
    with Command(["regenerate", *map(str, given)], environment) as command:
        while not (unfinished.exists() and unfinished.stat().st_size) and command.running:
            time.sleep(0.01)
        command.send(signal.SIGTERM)
        done = command.wait()
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "prompts are answered; the same command with --resume continues" in done.stderr.splitlines()[-2]
    assert done.stderr.endswith("megatron-ee regenerate: interrupted by SIGTERM\n") and "Traceback" not in done.stderr
    count = len(unfinished.read_text().splitlines())
    assert 0 < count < 150
    assert regenerate(chat_model, prompts, output, "--max-tokens", 12, "--resume") == 0
    lines = [each["line"] for each in answers(output)]  # those cut before their first whole character are missing
    assert lines == sorted(set(lines)) and len(lines) > 120


# -- what is refused


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ({"prompt": ""}, (), "prompt: is empty"),
        ({"prompt": " \n"}, (), "the prompt is blank"),
        ({"messages": [{"role": "user", "content": ""}]}, (), "the prompt is blank"),
        ({"messages": TALK[:3]}, (), "messages: end with the assistant's answer; leave it out"),
        ({"prompt": "a" * 99}, (), "prompt: has 117 tokens; the model's 64 positions"),
        ({"prompt": 3}, (), "prompt: must be text, not 3"),
        ({"prompt": "a", "mode": "full"}, (), "'mode': unknown key; possible: id, prompt, messages, temperature, "),
        ({"prompt": "a", "samples": 2}, (), "samples: all 2 would be equal at temperature 0; give a temperature"),
        ({"prompt": "a", "temperature": 0}, ("--samples", 4, "--temperature", 1), "samples: all 4 would be equal"),
    ],
)
def test_a_bad_prompt_is_refused_before_the_model_is_loaded(
    line: object,
    options: tuple[object, ...],
    message: str,
    chat_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("megatron_ee.inference.loading.open_engine", lambda *_, **__: pytest.fail("loaded"))
    prompts = write_prompts(tmp_path / "prompts.jsonl", {"prompt": "good"}, line)
    assert regenerate(chat_model, prompts, tmp_path / "answers.jsonl", *options) == 2
    found = capsys.readouterr().err
    assert found.startswith(f"megatron-ee regenerate: error: {prompts}:2: {message}") and found.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_bad_options_are_refused(chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", {"prompt": "good"})
    for options, message in (
        (("--temperature", -1), "--temperature: must be 0 (greedy) or from"),
        (("--tensor", 2), "tensor x pipeline: 2 x 1 needs 2 processes, but there are 1"),
        (("--resume", "--overwrite"), "argument --overwrite: not allowed with argument --resume"),
    ):
        assert regenerate(chat_model, prompts, tmp_path / "answers.jsonl", *options) == 2
        assert message in last_line(capsys)
