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
    ((ids, mask),) = ChatRenderer(tokenizer).encode(messages, "chat.jsonl, line 1")
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
    from transformers import AutoTokenizer

    tokenizer, ids, mask = encode(make_hf(templates["marks"]))
    theirs = AutoTokenizer.from_pretrained(tokenizer.path).apply_chat_template(
        CONVERSATION, return_assistant_tokens_mask=True, return_dict=True
    )
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


START = "{{ '<|im_start|>' + m['role'] + '\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
# As Qwen3's: an answer without thinking shows an empty block, but only after the last question.
DROPS_THINKING = (
    "{% set ns = namespace(q=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.q = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}" + START + "{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}{% if loop.index0 > ns.q %}{{ '<think>\\n' + (parts[0].split("
    "'<think>')[-1].strip() if parts | length > 1 else '') + '\\n</think>\\n\\n' }}{% endif %}{{ parts[-1].strip() }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}" + PROMPT
)
# As R1's: the prompt opens a thinking block, of which a finished answer shows nothing.
OPENS_THINKING = (
    "{% for m in messages %}" + START + "{{ m['content'].split('</think>')[-1] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
ASK, ANSWER = {"role": "user", "content": "dog?"}, {"role": "assistant", "content": "the fox"}
THOUGHT = {"role": "assistant", "content": "<think>\na dog\n</think>\n\nquick"}
SHORT = "<|im_start|>user\ndog?<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>\n<|endoftext|>"


def documents_of(directory: Path, messages: Any, template: str | None = None) -> list[tuple[str, str]]:
    """Text and trained text of each document."""
    tokenizer = load_tokenizer(directory)
    documents = ChatRenderer(tokenizer, template).encode(messages, "chat.jsonl, line 1")
    return [(tokenizer.decode(ids), trained(tokenizer, ids, mask)) for ids, mask in documents]


def test_turns_that_look_otherwise_later_are_trained_where_they_are_last(make_hf: Callable[..., Path]) -> None:
    directory = make_hf(DROPS_THINKING)
    block, end = "<think>\n\n</think>\n\n", "<|im_end|><|endoftext|>"
    assert documents_of(directory, [ASK, ANSWER, ASK, THOUGHT]) == [
        (SHORT + block + "the fox" + END, "the fox" + end),  # the empty block is the template's, and not trained
        (
            f"{SHORT}the fox<|im_end|>\n{SHORT}<think>\na dog\n</think>\n\nquick{END}",
            "<think>\na dog\n</think>\n\nquick" + end,
        ),
    ]
    # Answers without a question between them look the same to the end, and stay in one document.
    ((text, answers),) = documents_of(directory, [ASK, THOUGHT, ANSWER])
    assert answers == "<think>\na dog\n</think>\n\nquick<|im_end|>the fox" + end
    assert text.count("<think>") == 2
    # The user has the last word: the whole conversation has nothing to train on.
    assert [text for text, _ in documents_of(directory, [ASK, ANSWER, ASK])] == [SHORT + block + "the fox" + END]


def test_a_prompt_that_opens_a_thinking_block(make_hf: Callable[..., Path]) -> None:
    directory = make_hf(OPENS_THINKING)
    ((text, answers),) = documents_of(directory, [ASK, ANSWER, ASK, THOUGHT])
    assert text == f"{SHORT}the fox<|im_end|>\n{SHORT}\n\nquick{END}"
    assert answers == "the fox<|im_end|>\n\nquick<|im_end|><|endoftext|>"
    # An answer may begin as the opened block does.
    ((_, answers),) = documents_of(directory, [ASK, {"role": "assistant", "content": "<b>fox"}])
    assert answers == "<b>fox<|im_end|><|endoftext|>"
    ((_, answers),) = documents_of(directory, [ASK, {"role": "assistant", "content": "<think>fox"}])
    assert answers == "<think>fox<|im_end|><|endoftext|>"


def test_thinking_in_a_key_of_its_own_is_trained(make_hf: Callable[..., Path]) -> None:
    template = (
        "{% for m in messages %}"
        + START
        + "{% if m['role'] == 'assistant' %}{{ '<think>\\n' + (m['reasoning_content'] "
        "or '') + '\\n</think>\\n\\n' }}{% endif %}{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}" + PROMPT
    )
    ((_, answers),) = documents_of(make_hf(template), [ASK, {**ANSWER, "reasoning_content": "a dog"}, ASK, ANSWER])
    assert answers == "<think>\na dog\n</think>\n\nthe fox<|im_end|>the fox<|im_end|><|endoftext|>"


def test_a_prompt_whose_opened_block_stays(make_hf: Callable[..., Path]) -> None:
    """As QwQ's: what the prompt gives is not trained."""
    template = OPENS_THINKING.replace(".split('</think>')[-1]", "")
    ((_, answers),) = documents_of(make_hf(template), [ASK, THOUGHT])
    assert answers == "a dog\n</think>\n\nquick<|im_end|><|endoftext|>"


def test_the_first_word_of_an_answer_is_trained_with_the_space_before_it(fallback_dir: Path) -> None:
    """Llama 2's template ends the prompt without the space that it writes before the answer."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + 'inst ' + m.content + ' inst' }}{% else %}"
        "{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = load_tokenizer(fallback_dir)
    ((ids, mask),) = ChatRenderer(tokenizer, template).encode([ASK, ANSWER, ASK, ANSWER], "line 1")
    names = [tokenizer.name_of(token) for token, label in zip(ids, mask, strict=True) if label]
    assert names == ["▁the", "▁fox", "▁", "</s>"] * 2


def test_every_turn_is_trained_once_and_as_the_model_would_say_it(make_hf: Callable[..., Path]) -> None:
    """A mark that only the last answer has: each answer is trained with it, in a document of its own."""
    template = (
        "{% for m in messages %}"
        + START
        + "{{ m['content'] }}{% if loop.last and m['role'] == 'assistant' %}{{ ' dog' }}"
        "{% else %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}" + PROMPT
    )
    messages = [ASK, ANSWER, ASK, {"role": "assistant", "content": "jumps"}]
    documents = documents_of(make_hf(template), messages)
    assert [answers for _, answers in documents] == ["the fox dog<|endoftext|>", "jumps dog<|endoftext|>"]


def test_calls_of_tools_are_trained(make_hf: Callable[..., Path]) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "fox"}}]}
    for header in ("", "{% if not m.tool_calls %}{{ raise_exception('a plain answer') }}{% endif %}"):
        template = (
            "{% for m in messages %}" + START + "{% if m.role == 'assistant' %}" + header + "{% endif %}"
            "{{ m.content or '(' + m.tool_calls[0].function.name + ')' }}{{ '<|im_end|>\\n' }}{% endfor %}" + PROMPT
        )
        ((_, answers),) = documents_of(make_hf(template), [ASK, call])
        assert answers == "(fox)<|im_end|><|endoftext|>"


def test_a_template_that_rewrites_the_question_is_refused(make_hf: Callable[..., Path]) -> None:
    template = (
        "{% for m in messages %}{{ m['content'] + ('!' if messages[-1]['role'] == 'user' else '?') }}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"line 1: message 2: .*renders the messages before it differently once it is"):
        documents_of(make_hf(template), [ASK, ANSWER])


def test_the_template_may_be_given(make_hf: Callable[..., Path], sp_model: Path, templates: dict[str, str]) -> None:
    for directory in (make_hf(), make_hf(DROPS_THINKING)):
        ((_, answers),) = documents_of(directory, [ASK, ANSWER], templates["prefixes"])
        assert answers == "the fox<|im_end|><|endoftext|>"
    # A bare SentencePiece model: the template's special tokens are ids, and the same text from a user's keyboard, too.
    template = (
        "{% for m in messages %}{{ bos_token + m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ bos_token + 'assistant:' }}{% endif %}"
    )
    tokenizer = load_tokenizer(sp_model)
    ((ids, mask),) = ChatRenderer(tokenizer, template).encode([ASK, ANSWER], "line 1")
    assert tokenizer.decode(ids) == "<s>user:dog?</s><s>assistant:the fox</s>"
    assert (ids.count(tokenizer.bos_id), ids.count(tokenizer.eos_id)) == (2, 2)
    assert trained(tokenizer, ids, mask) == "the fox</s>"


def test_conversations_with_tools_have_their_own_template(make_hf: Callable[..., Path]) -> None:
    default, tools = ("{% for m in messages %}{{ '" + mark + "' + m.content }}{% endfor %}" for mark in "AB")
    directory = make_hf({"default": default, "tool_use": tools})
    renderer = ChatRenderer(load_tokenizer(directory))
    for value, expected in ((None, "the foxA"), ([{"type": "function"}], "the foxB")):
        ((ids, mask),) = renderer.encode([ANSWER, {**ANSWER, "content": ""}], "line 1", tools=value)
        assert trained(renderer._tokenizer, ids, mask).startswith(expected[:-1])
        assert expected[-1] in renderer._tokenizer.decode(ids)


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
    with pytest.raises(DataError, match=r"line 1: message 1: content: missing"):
        encode(chat, [{"role": "user", "contnet": "x"}])
    strict = make_hf("{{ raise_exception('roles must\nalternate') }}")
    with pytest.raises(DataError, match=r"line 1: the chat template refuses this conversation: roles must alternate"):
        encode(strict)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.text }}{% endfor %}", "message 3: the chat template leaves this answer out"),
        ("", "message 3: the chat template leaves this answer out"),
        ("{% for m in messages %}{% generation %}{% endgeneration %}{% endfor %}", "nothing to train on"),
        ("a\n{% for x in %}", "the chat template cannot be rendered: its line 2: Expected an expression"),
    ],
)
def test_a_template_that_renders_no_answer_is_refused(
    make_hf: Callable[..., Path], template: str, message: str
) -> None:
    renderer = ChatRenderer(load_tokenizer(make_hf("{{ messages[0].content }}")), template)
    with pytest.raises(DataError, match=f"^chat.jsonl, line 1: .*{message}"):
        renderer.encode(CONVERSATION, "chat.jsonl, line 1")


def test_an_empty_answer_is_trained_to_end_at_once(make_hf: Callable[..., Path]) -> None:
    directory = make_hf("{% for m in messages %}{{ m.content }}|{% endfor %}")
    tokenizer, ids, mask = encode(directory, [ASK, {"role": "assistant", "content": ""}])
    assert trained(tokenizer, ids, mask) == "|<|endoftext|>"


GENERATED = {"role": "assistant", "content": "<think>\na dog</think>the  fox"}


def generated(directory: Path, messages: Any, end_token: str | None) -> tuple[str, str]:
    """Text and trained text of a conversation whose last answer the model has generated."""
    tokenizer = load_tokenizer(directory)
    ids, mask = ChatRenderer(tokenizer).encode_generated(messages, end_token, "chat.jsonl, line 1")
    return tokenizer.decode(ids), trained(tokenizer, ids, mask)


@pytest.mark.parametrize("template", [DROPS_THINKING, OPENS_THINKING])
def test_a_generated_answer_stays_as_it_was_generated(make_hf: Callable[..., Path], template: str) -> None:
    """With its thinking and white space, behind the prompt of inference; earlier answers are not trained."""
    directory = make_hf(template)
    opened = "<think>\n" if template == OPENS_THINKING else ""
    text, answers = generated(directory, [ASK, ANSWER, ASK, GENERATED], "<|im_end|>")
    assert answers == f"{GENERATED['content']}<|im_end|>"  # the end-of-text after it is not the model's own
    assert text == f"{SHORT}the fox<|im_end|>\n{SHORT}{opened}{answers}<|endoftext|>"


def test_nothing_is_trained_after_a_generated_answer_that_was_cut(
    make_hf: Callable[..., Path], templates: dict[str, str]
) -> None:
    directory = make_hf(templates["marks"], eos="<|im_end|>")
    for content in ("the fox", "<think>\nthe"):
        cut = [ASK, {"role": "assistant", "content": content}]
        assert generated(directory, cut, None) == (f"{SHORT}{content}<|im_end|>", content)
    assert generated(directory, [ASK, {"role": "assistant", "content": ""}], "<|im_end|>")[1] == "<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "end_token", "message"),
    [
        ([ASK], "<|im_end|>", "the last message must be the assistant's answer"),
        ([ANSWER], "<|im_end|>", "the last message must be the assistant's answer"),
        ([ASK, {"role": "assistant", "tool_calls": [1]}], None, "the last message must be the assistant's answer"),
        ([ASK, ANSWER], "<end>", "end_token '<end>' is no token of "),
        ([ASK, {"role": "assistant", "content": ""}], None, "the answer is empty; nothing to train on"),
        ([ASK, 3], None, "message 2 must be an object with a role"),
    ],
)
def test_a_generated_answer_is_refused(
    messages: Any, end_token: str | None, message: str, make_hf: Callable[..., Path], templates: dict[str, str]
) -> None:
    with pytest.raises(DataError, match=f"^chat.jsonl, line 1: .*{message}"):
        generated(make_hf(templates["prefixes"]), messages, end_token)
