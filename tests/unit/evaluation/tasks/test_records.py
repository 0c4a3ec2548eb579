"""Records of tasks: what a line may hold, how it is tokenized, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ee.errors import ConfigError
from megatron_ee.evaluation.tasks.records import read_records, records_digest
from megatron_ee.inference.released import Released, open_released

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
GOOD = {"prompt": "a", "references": ["b"]}


def test_a_line_has_defaults_and_its_prompt_as_tokens(read: Callable, released: Released) -> None:
    records = read("\ufeff", {"prompt": "Once", "id": "x", "task": "t", "group": "g"}, "\n", {"prompt": "two"})
    assert [(each.id, each.task, each.group) for each in records] == [("x", "t", "g"), ("task.jsonl:3", "task", None)]
    assert records[0].prompt_ids == tuple(released.tokenizer.encode_prompt("Once"))
    assert records[0].where.endswith("task.jsonl:1") and not records[0].scored


def test_a_prompt_is_a_users_message_where_there_is_a_template(
    byte_model: Path, save_tokenizer: Callable[..., None], tmp_path: Path
) -> None:
    model, path = tmp_path / "model", tmp_path / "chat.jsonl"
    shutil.copytree(byte_model, model)
    save_tokenizer(model, template=TEMPLATE)
    released = open_released(model)
    choices = {"choices": ["no", "yes"], "answer": 1}
    lines = [{"prompt": "ho?", **choices}, {"messages": [{"role": "system", "content": "be"}], **choices}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompt, messages = read_records([path], released)
    decode = released.tokenizer.decode
    assert decode(prompt.prompt_ids) == "[user]ho?</s>[assistant]"
    assert decode(messages.prompt_ids) == "[system]be</s>[assistant]"
    assert [tuple(map(decode, each)) for each in prompt.choice_ids] == [
        ("[user]ho?</s>[assistant]", "no"),
        ("[user]ho?</s>[assistant]", "yes"),
    ]


@pytest.mark.parametrize(
    ("prompt", "choices", "spelt"),
    [("is it", ["no", " yes"], [" no", " yes"]), ("is it ", ["no", "yes"], ["no", "yes"]), ("首都は", ["東"], ["東"])],
)
def test_a_choice_continues_a_text_after_a_space(
    prompt: str, choices: list[str], spelt: list[str], read: Callable, released: Released
) -> None:
    [record] = read({"prompt": prompt, "choices": [*choices, "other"], "answer": 0})
    found = [released.tokenizer.decode(own) for _, own in record.choice_ids]
    assert found[: len(spelt)] == spelt
    assert all(before == record.prompt_ids for before, _ in record.choice_ids)


def test_a_token_that_the_prompt_shares_with_a_choice_is_the_choices(
    hf_dir: Path, saved_model: Callable, tmp_path: Path
) -> None:
    """A space at the end of the prompt is one token with the word after it."""
    model, path = tmp_path / "model", tmp_path / "task.jsonl"
    shutil.copytree(saved_model("llama2", vocab_size=400)[0], model)
    for file in hf_dir.iterdir():
        shutil.copy(file, model)
    released = open_released(model)
    path.write_text(json.dumps({"prompt": "the quick ", "choices": ["brown fox", "lazy"], "answer": 0}))
    [record] = read_records([path], released)
    spelt = [tuple(map(released.tokenizer.decode, each)) for each in record.choice_ids]
    assert spelt == [("the quick", " brown fox"), ("the quick", " lazy")]
    assert released.tokenizer.decode(record.prompt_ids) == "the quick "


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**GOOD, "reference": "c"}, "reference: unknown key; did you mean 'references'?"),
        ({**GOOD, "references": "b"}, "references: must be a list, not 'b'"),
        ({**GOOD, "references": [3]}, "references[0]: must be text, not 3"),
        ({**GOOD, "references": ["b", "!"]}, "references: '!' has no letter or digit that could be compared"),
        ({**GOOD, "messages": []}, "give either a prompt or messages"),
        ({"references": ["b"]}, "give either a prompt or messages"),
        ({"prompt": " ", "references": ["b"]}, "prompt: is blank"),
        ({"messages": [], "references": ["b"]}, "messages: messages must be a list of at least one"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages: end with the assistant's answer"),
        ({**GOOD, "choices": ["x", "y"]}, "give choices together with answer"),
        ({**GOOD, "answer": 0}, "give choices together with answer"),
        ({**GOOD, "choices": ["x"], "answer": 0}, "choices: give two or more texts"),
        ({**GOOD, "choices": ["x", ""], "answer": 0}, "choices: give two or more texts"),
        ({**GOOD, "choices": ["x", "y"], "answer": 2}, "answer: must be the index of a choice, 0 to 1, not 2"),
        ({**GOOD, "choices": ["x", "y"], "answer": True}, "answer: must be a whole number"),
        ({**GOOD, "choices": ["x", "y" * 99], "answer": 0}, "choices: 'yyy"),
        ({**GOOD, "id": 3}, "id: must be text, not 3"),
        ({**GOOD, "group": ""}, "group: must be text of 1 or more characters"),
        ({**GOOD, "group": "b\0"}, "group: holds the control character U+0000; remove it"),
        ({**GOOD, "group": "b\u202e"}, "group: holds the control character U+202E; remove it"),
        ({**GOOD, "task": "b\x1b[31m"}, "task: holds the control character U+001B; remove it"),
        ({**GOOD, "references": ["b", "❤️"]}, "references: '❤️' has no letter or digit"),
        ({**GOOD, "id": "first"}, "id: 'first' is that of "),
        ({"prompt": "a" * 99, "references": ["b"]}, "prompt: has 100 tokens; the model's 64 positions"),
        ({"prompt": "\ud800", "references": ["b"]}, "prompt: is not valid Unicode: it holds half"),
        ({"prompt": "a", "references": ["b", "c\udc00"]}, "references: is not valid Unicode: it holds half"),
        ('{"prompt": "a"\n', "line: not valid JSON: "),
        ("[1]\n", "must be a JSON object, not [1]"),
        ({"prompt": "a"}, "references: missing, but "),
    ],
)
def test_a_bad_line_is_refused_by_file_and_line(line: object, message: str, read: Callable, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read({**GOOD, "id": "first"}, line)
    error = str(caught.value)
    assert error.startswith(f"{tmp_path / 'task.jsonl'}:2: {message}") and "\n" not in error and caught.value.common


def test_names_that_look_alike_are_one(read: Callable) -> None:
    records = read(*({**GOOD, "group": name, "task": name} for name in ("é", "e\u0301")))
    assert {(each.group, each.task) for each in records} == {("é", "é")}


def test_quality_needs_references_or_choices(read: Callable) -> None:
    assert read({"prompt": "a"})
    assert read({"prompt": "a", "choices": ["x", "y"], "answer": 0}, quality=True)
    with pytest.raises(ConfigError, match=r":1: give references, or choices with answer"):
        read({"prompt": "a"}, quality=True)


def test_a_file_without_records_is_refused(read: Callable, released: Released, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no record"):
        read("\n", " \n")
    with pytest.raises(ConfigError, match=f"^{tmp_path}: cannot be read: Is a directory"):
        read_records([tmp_path], released)


def test_the_records_of_a_task_stand_side_by_side(read: Callable) -> None:
    lines = [{"prompt": "a", "task": task, "id": f"{n}"} for n, task in enumerate("xyx")]
    assert [record.id for record in read(*lines)] == ["0", "2", "1"]


def test_the_digest_is_of_all_that_records_hold(read: Callable) -> None:
    digests = {
        records_digest(read({**GOOD, **changes}))
        for changes in ({}, {"prompt": "c"}, {"references": ["c"]}, {"group": "c"}, {"id": "c"}, {"task": "c"})
    }
    assert len(digests) == 6
    assert records_digest(read(GOOD)) == records_digest(read(GOOD))
