"""From what a user writes to token ids: special tokens, chat templates that are not trusted, and what ends a text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.data.tokenizer import load_tokenizer
from megatron_ee.errors import DataError
from megatron_ee.inference.released import end_of_text
from megatron_ee.inference.requests import encode_chat

PROMPT = "Once upon a time"
SaveTokenizer = Callable[..., None]


def edit(directory: Path, name: str, **changes: Any) -> None:
    path = directory / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({key: value for key, value in {**content, **changes}.items() if value is not None}))


def test_the_prompt_is_encoded_as_transformers_does(
    byte_model: Path, tmp_path: Path, save_tokenizer: SaveTokenizer
) -> None:
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(byte_model)(PROMPT)["input_ids"]
    assert load_tokenizer(byte_model).encode_prompt(PROMPT) == expected
    assert expected[0] == 0 and len(expected) == len(PROMPT) + 1
    save_tokenizer(tmp_path, bos=False)
    assert load_tokenizer(tmp_path).encode_prompt(PROMPT) == expected[1:]


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
    assert tokenizer.encode_prompt(PROMPT) == [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    with pytest.raises(DataError, match="the tokenizer has no chat template; give the prompt as text"):
        encode_chat(tokenizer, [{"role": "user", "content": PROMPT}])


def test_any_of_the_files_may_name_what_ends_the_text(byte_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(byte_model, path)
    edit(path, "generation_config.json", eos_token_id=[7, 9])
    edit(path, "config.json", eos_token_id=5)
    tokenizer = load_tokenizer(path)
    assert tokenizer.eos_id == 1
    assert end_of_text(path, tokenizer) == {1, 5, 7, 9}
    edit(path, "config.json", eos_token_id=[5, 6])
    edit(path, "generation_config.json", eos_token_id=7)
    assert end_of_text(path, tokenizer) == {1, 5, 6, 7}
    (path / "generation_config.json").unlink()
    edit(path, "config.json", eos_token_id=None)
    assert end_of_text(path, tokenizer) == {1}
    edit(path, "generation_config.json", eos_token_id=["</s>"])
    with pytest.raises(DataError, match=r"generation_config.json: eos_token_id must be .*'</s>'"):
        end_of_text(path, tokenizer)


# -- chats

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "o"},
]


def chat_with(template: str | None, directory: Path, save: SaveTokenizer, chat: Any = CHAT) -> list[int]:
    save(directory, template=template)
    return encode_chat(load_tokenizer(directory), chat)


def test_a_chat_is_put_into_the_models_template(tmp_path: Path, save_tokenizer: SaveTokenizer) -> None:
    from transformers import AutoTokenizer

    ids = chat_with(TEMPLATE, tmp_path, save_tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    rendered = theirs.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert rendered == "<s>[user] Hello\n[assistant] Yes?\n[user] o\n[assistant]"
    assert ids == theirs(rendered, add_special_tokens=False)["input_ids"] and ids[0] == 0
    assert ids.count(0) == 1  # the template's own; none is added


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "the tokenizer has no chat template; give the prompt as text"),
        ("{% for m in messages %}", "the chat template fails on these messages: "),
        ("{{ raise_exception('roles\nmust alternate') }}", "fails on these messages: roles must alternate"),
        ("{{ messages[0].content + 5 }}", "the chat template fails on these messages: "),
        ("{{ messages[99].content }}", "the chat template fails on these messages: "),
        ("{{ 1 / 0 }}", "the chat template fails on these messages: "),
        ("{{ messages[0]['content']['x']['y'] }}", "the chat template fails on these messages: "),
        ("{% include '/etc/passwd' %}", "the chat template fails on these messages: "),
        ("{{ 'x' * 10**15 }}", "the chat template fails on these messages: "),
        ("{{ range(10**9) | list }}", "the chat template fails on these messages: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the chat template fails on these messages: "),
    ],
)
def test_a_template_that_fails_is_one_line(
    template: str | None, message: str, tmp_path: Path, save_tokenizer: SaveTokenizer
) -> None:
    with pytest.raises(DataError) as caught:
        chat_with(template, tmp_path, save_tokenizer)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "messages.__class__.__base__.__subclasses__()",
        "cycler.__init__.__globals__.os.system('touch OWNED')",
        "lipsum.__globals__['os'].system('touch OWNED')",
        "namespace.__init__.__globals__['os'].popen('touch OWNED').read()",
        "joiner.__init__.__builtins__.open('OWNED', 'w')",
        "raise_exception.__globals__['os'].system('touch OWNED')",
        "(messages | attr('__class__')).__mro__",
        "'{0.__class__.__mro__}'.format(messages)",
        "'%s' | format(messages.append(1))",
    ],
)
def test_a_hostile_template_gets_nowhere(
    expression: str, tmp_path: Path, save_tokenizer: SaveTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes with a downloaded model: no attribute with an underscore, nothing outside, no change of what it got."""
    monkeypatch.chdir(tmp_path)
    chat = [dict(message) for message in CHAT]
    try:
        ids = chat_with("{{ " + expression + " }}", tmp_path, save_tokenizer, chat)
        text = load_tokenizer(tmp_path).decode(ids)
    except DataError as error:
        text = ""
        assert "the chat template fails on these messages: " in str(error) and "\n" not in str(error)
    assert "class" not in text and "object" not in text and "function" not in text
    assert not (tmp_path / "OWNED").exists() and chat == CHAT
