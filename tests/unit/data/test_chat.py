from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.data.chat import ChatRenderer
from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.errors import DataError

CONVERSATION = [
    {"role": "system", "content": "be a fox"},
    {"role": "user", "content": "the dog?"},
    {"role": "assistant", "content": "the quick 漢字\nfox"},
    {"role": "user", "content": "over"},
    {"role": "assistant", "content": " jumps 😀"},
]


def encode(directory: Path, messages: Any = CONVERSATION) -> tuple[Any, list[int], list[bool]]:
    tokenizer = load_tokenizer(directory)
    ids, mask = ChatRenderer(tokenizer).encode(messages, "chat.jsonl, line 1")
    assert len(ids) == len(mask)
    return tokenizer, ids, mask


def trained(tokenizer: Any, ids: list[int], mask: list[bool]) -> str:
    return tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])


@pytest.mark.parametrize("kind", ["prefixes", "marks"])
def test_only_the_assistant_is_trained_with_its_end_of_turn(
    make_hf: Callable[..., Path], templates: dict[str, str], kind: str
) -> None:
    tokenizer, ids, mask = encode(make_hf(templates[kind], eos="<|im_end|>"))
    assert trained(tokenizer, ids, mask) == "the quick 漢字\nfox<|im_end|> jumps 😀<|im_end|>"
    # Other turns end with the same id, which is padding too: there it is no label of the assistant's.
    assert ids.count(tokenizer.eos_id) == 5
    assert ids[-1] == tokenizer.eos_id and mask[-1]


def test_marks_and_prefixes_agree(make_hf: Callable[..., Path], templates: dict[str, str]) -> None:
    for eos in ("<|im_end|>", "<|endoftext|>"):
        _, ids, mask = encode(make_hf(templates["prefixes"], eos))
        _, marked_ids, marked_mask = encode(make_hf(templates["marks"], eos))
        assert ids == marked_ids and mask == marked_mask


def test_marks_agree_with_transformers_own_mask(make_hf: Callable[..., Path], templates: dict[str, str]) -> None:
    tokenizer, ids, mask = encode(make_hf(templates["marks"]))
    theirs = tokenizer.hf.apply_chat_template(CONVERSATION, return_assistant_tokens_mask=True, return_dict=True)
    assert ids[:-1] == theirs["input_ids"]  # ours ends with end-of-text
    assert [int(m) for m in mask[:-1]] == theirs["assistant_masks"]


def test_end_of_text_is_appended_once_and_is_a_label_after_the_assistant(
    make_hf: Callable[..., Path], templates: dict[str, str]
) -> None:
    tokenizer, ids, mask = encode(make_hf(templates["prefixes"]))
    assert ids[-1] == tokenizer.eos_id and ids.count(tokenizer.eos_id) == 1 and mask[-1]
    tokenizer, ids, mask = encode(make_hf(templates["prefixes"]), CONVERSATION[:4])  # the user has the last word
    assert ids[-1] == tokenizer.eos_id and not mask[-1]


def test_end_of_text_within_the_assistants_words_is_a_label(
    make_hf: Callable[..., Path], templates: dict[str, str]
) -> None:
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "a<|endoftext|>fox"}]
    tokenizer, ids, mask = encode(make_hf(templates["prefixes"]), messages)
    assert trained(tokenizer, ids, mask) == "a<|endoftext|>fox<|im_end|><|endoftext|>"


def test_tokenisation_that_is_no_prefix(make_hf: Callable[..., Path]) -> None:
    """A tokenizer may join the prompt's last characters with the answer's first; the joint token is not trained."""
    template = (
        "{% for m in messages %}{{ m['content'] if m['role'] == 'assistant' else m['content'] + ' th' }}{% endfor %}"
        "{% if add_generation_prompt %}{% endif %}"
    )
    messages = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "e quick dog"}]
    tokenizer, ids, mask = encode(make_hf(template), messages)
    assert tokenizer.decode(ids) == "fox the quick dog<|endoftext|>"
    assert trained(tokenizer, ids, mask) == " quick dog<|endoftext|>"


def test_a_template_that_rewrites_the_past_is_refused(make_hf: Callable[..., Path]) -> None:
    # As reasoning models' templates do, it drops from earlier answers what it shows in the last.
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' and loop.last %}"
        "{{ 'hm ' }}{% endif %}{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"chat.jsonl, line 1: message 3: .*renders earlier messages differently"):
        encode(make_hf(template))
    # With one answer there is no past to rewrite.
    tokenizer, ids, mask = encode(make_hf(template), CONVERSATION[:3])
    assert trained(tokenizer, ids, mask).startswith("hm the quick")


def test_refused(make_hf: Callable[..., Path], templates: dict[str, str], sp_model: Path) -> None:
    for path in (make_hf(), sp_model):
        with pytest.raises(DataError, match="no chat template"):
            encode(path)
    chat = make_hf(templates["prefixes"])
    with pytest.raises(DataError, match=r"line 1: no token of this conversation is an assistant's"):
        encode(chat, CONVERSATION[:2])
    with pytest.raises(DataError, match=r"line 1: messages must be a list"):
        encode(chat, [])
    with pytest.raises(DataError, match=r"line 1: message 2 must be an object with a role"):
        encode(chat, [CONVERSATION[0], {"content": "x"}])
    with pytest.raises(DataError, match=r"line 1: message 1: content must be text, not int"):
        encode(chat, [{"role": "user", "content": 3}])
    strict = make_hf("{{ raise_exception('roles must\nalternate') }}")
    with pytest.raises(DataError, match=r"line 1: the chat template refuses this conversation: roles must alternate"):
        encode(strict)
