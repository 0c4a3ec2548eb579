"""The official client of OpenAI's API against a server of a tiny model, and the answers against the engine alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

from megatron_ee.data.tokenizer import Tokenizer
from megatron_ee.inference.options import EngineOptions
from megatron_ee.inference.policy import ThresholdPolicy
from megatron_ee.inference.requests import Completion
from megatron_ee.inference.sampling import Sampling

Alone = Callable[..., Completion]
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}
QUESTION = [{"role": "user", "content": "hello"}]
RENDERED = "user: hello\nassistant: "


def chat_ids(tokenizer: Tokenizer, text: str = RENDERED) -> tuple[int, ...]:
    return tuple(tokenizer.encode_spans(text)[0])


def test_models_are_listed(server: Any) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_completion_is_the_engines(server: Any, alone: Alone) -> None:
    found = server.client().completions.create(prompt="abc", max_tokens=12, **GREEDY)
    expected = alone(prompt="abc", max_tokens=12)
    assert found.choices[0].text == expected.text
    assert found.choices[0].finish_reason == "length"
    assert found.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 4,  # with <s>
        "completion_tokens": 12,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert found.choices[0].logprobs is None


def test_a_chat_is_the_engines(server: Any, alone: Alone, tokenizer: Tokenizer) -> None:
    found = server.client().chat.completions.create(messages=QUESTION, max_completion_tokens=12, **GREEDY)
    expected = alone(prompt=chat_ids(tokenizer), max_tokens=12)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].message.role == "assistant"
    assert found.usage.prompt_tokens == len(RENDERED)
    assert found.object == "chat.completion"


def test_parts_of_a_message_and_newer_roles(server: Any, alone: Alone, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    messages = [{"role": "developer", "content": "be short"}, {"role": "user", "content": parts}]
    found = server.client().chat.completions.create(messages=messages, max_tokens=4, **GREEDY)
    expected = alone(prompt=chat_ids(tokenizer, "system: be short\n" + RENDERED), max_tokens=4)
    assert found.choices[0].message.content == expected.text


def test_an_answer_can_be_sent_back(server: Any) -> None:
    client = server.client()
    first = client.chat.completions.create(messages=QUESTION, max_tokens=4, **GREEDY)
    history = [*QUESTION, first.choices[0].message.model_dump(), {"role": "user", "content": "and?"}]
    assert client.chat.completions.create(messages=history, max_tokens=4, **GREEDY).usage.completion_tokens == 4


def test_a_streamed_chat_equals_the_whole_one(server: Any) -> None:
    client = server.client()
    whole = client.chat.completions.create(messages=QUESTION, max_tokens=20, **GREEDY)
    stream = client.chat.completions.create(
        messages=QUESTION, max_tokens=20, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(each.choices[0].delta.content or "" for each in chunks[:-1]) == whole.choices[0].message.content
    assert [each.choices[0].finish_reason for each in chunks[-3:-1]] == [None, "length"]
    assert len({each.id for each in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(each.usage is None for each in chunks[:-1])


def test_a_streamed_completion_equals_the_whole_one(server: Any) -> None:
    client = server.client()
    settings = {"prompt": ["abc", "wizards"], "max_tokens": 9, "n": 2, "seed": 5, "model": "tiny", "logprobs": 2}
    whole = client.completions.create(**settings)
    texts, tokens, reasons = [""] * 4, [[] for _ in range(4)], [None] * 4
    for chunk in client.completions.create(stream=True, **settings):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert whole.usage.prompt_tokens == 4 + 8 and whole.usage.completion_tokens == 36


@pytest.mark.parametrize("samples", [1, 2])
def test_cached_tokens_are_those_of_each_prompt(serve: Callable[..., Any], samples: int) -> None:
    prompts = [[*range(10, 26), each, each] for each in (40, 50)]
    with serve(engine=EngineOptions(prefix_cache_seqs=4)) as server:
        client = server.client()
        for prompt in prompts:
            client.completions.create(prompt=prompt, max_tokens=2, **GREEDY)
        usage = client.completions.create(prompt=prompts, max_tokens=2, n=samples, **GREEDY).usage
    assert usage.prompt_tokens == 2 * 18 and usage.prompt_tokens_details.cached_tokens == 2 * 17


def test_seeds(server: Any, alone: Alone) -> None:
    client = server.client()
    settings = {"model": "tiny", "prompt": "abc", "max_tokens": 10}
    found = client.completions.create(seed=7, n=2, temperature=1.0, **settings)
    for sample, choice in enumerate(found.choices):
        expected = alone(prompt="abc", max_tokens=10, sampling=Sampling(temperature=1.0, seed=7 + sample))
        assert choice.text == expected.text
    assert found.choices[0].text != found.choices[1].text
    unseeded = {client.completions.create(**settings).choices[0].text for _ in range(4)}
    assert len(unseeded) > 1  # temperature 1 and a new seed each, as OpenAI's
    client.completions.create(seed=-1, **settings)
    client.completions.create(seed=2**63 - 1, n=2, **settings)


def test_stop_strings(server: Any, alone: Alone) -> None:
    text = alone(prompt="abc", max_tokens=30).text
    stop = text[5:8]
    client = server.client()
    found = client.completions.create(prompt="abc", max_tokens=30, stop=stop, **GREEDY)
    assert found.choices[0].text == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    chunks = client.completions.create(prompt="abc", max_tokens=30, stop=[stop, ""], stream=True, **GREEDY)
    assert "".join(each.choices[0].text for each in chunks) == found.choices[0].text


def test_token_ids_and_lists_of_prompts(server: Any, alone: Alone) -> None:
    client = server.client()
    one, two = [0, 70, 71, 72], [0, 80, 81]
    texts = [alone(prompt=tuple(ids), max_tokens=6).text for ids in (one, two)]
    assert client.completions.create(prompt=one, max_tokens=6, **GREEDY).choices[0].text == texts[0]
    both = client.completions.create(prompt=[one, two], max_tokens=6, **GREEDY)
    assert [choice.text for choice in both.choices] == texts
    assert [choice.index for choice in both.choices] == [0, 1]


def test_logprobs_of_a_chat(server: Any, alone: Alone, tokenizer: Tokenizer) -> None:
    client = server.client()
    found = client.chat.completions.create(messages=QUESTION, max_tokens=8, logprobs=True, top_logprobs=3, **GREEDY)
    expected = alone(prompt=chat_ids(tokenizer), max_tokens=8, logprobs=3)
    entries = found.choices[0].logprobs.content
    assert [each.logprob for each in entries] == [token.logprobs.emitted for token in expected.tokens]
    assert all(len(each.top_logprobs) == 3 for each in entries)
    assert all(each.top_logprobs[0].logprob == each.logprob for each in entries)  # greedy
    written = b"".join(bytes(each.bytes) for each in entries)
    assert written.decode(errors="replace") == found.choices[0].message.content
    plain = client.chat.completions.create(messages=QUESTION, max_tokens=8, logprobs=True, **GREEDY)
    assert [each.logprob for each in plain.choices[0].logprobs.content] == [each.logprob for each in entries]
    assert all(each.top_logprobs == [] for each in plain.choices[0].logprobs.content)
    streamed: list[Any] = []
    for chunk in client.chat.completions.create(
        messages=QUESTION, max_tokens=8, logprobs=True, top_logprobs=3, stream=True, **GREEDY
    ):
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert streamed == entries


def test_echo_with_logprobs_scores_the_prompt(server: Any, alone: Alone) -> None:
    prompt = "the fox"
    found = server.client().completions.create(prompt=prompt, max_tokens=0, echo=True, logprobs=2, **GREEDY)
    choice = found.choices[0]
    assert choice.text == prompt and choice.finish_reason == "length"
    assert choice.logprobs.tokens == ["<s>", *prompt]
    assert choice.logprobs.text_offset == [0, *range(len(prompt))]
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    ids = [0, *server.service.tokenizer.encode(prompt)]
    for position in range(1, len(ids)):  # each from a prefill of its own
        token = alone(prompt=tuple(ids[:position]), max_tokens=1, logprobs=100).tokens[0]
        top = token.logprobs.top
        best = max(choice.logprobs.top_logprobs[position].values())
        assert best == pytest.approx(token.logprobs.emitted, abs=1e-4)
        if ids[position] in top:
            assert choice.logprobs.token_logprobs[position] == pytest.approx(top[ids[position]], abs=1e-4)
    assert found.usage.completion_tokens == 0


def test_echo_goes_on_with_the_answer(server: Any, alone: Alone) -> None:
    client = server.client()
    expected = alone(prompt="abc", max_tokens=5)
    settings = {"prompt": "abc", "max_tokens": 5, "echo": True, **GREEDY}
    assert client.completions.create(**settings).choices[0].text == "abc" + expected.text
    found = client.completions.create(logprobs=1, **settings).choices[0]
    assert found.text == "abc" + expected.text
    assert len(found.logprobs.tokens) == len(found.logprobs.text_offset) == 4 + 5
    chunks = list(client.completions.create(logprobs=1, stream=True, **settings))
    assert "".join(each.choices[0].text for each in chunks) == found.text
    tokens = [token for each in chunks for token in each.choices[0].logprobs.tokens]
    offsets = [offset for each in chunks for offset in each.choices[0].logprobs.text_offset]
    assert tokens == found.logprobs.tokens and offsets == found.logprobs.text_offset
    drafted = {"early_exit": {"mode": "speculative", "draft": {"exit": 2}}}  # the prompt is scored in full mode
    same = client.completions.create(logprobs=1, extra_body=drafted, **settings).choices[0].logprobs
    assert same.token_logprobs[1:] == pytest.approx(found.logprobs.token_logprobs[1:], abs=1e-4)


def test_penalties_keep_tokens_from_coming_again(server: Any, alone: Alone) -> None:
    client = server.client()
    sampling = Sampling(frequency_penalty=2.0, presence_penalty=2.0)
    found = client.completions.create(prompt="abc", max_tokens=20, frequency_penalty=2, presence_penalty=2, **GREEDY)
    assert found.choices[0].text == alone(prompt="abc", max_tokens=20, sampling=sampling).text


def test_early_exit_of_one_request(server: Any, alone: Alone) -> None:
    client = server.client()
    settings = {"prompt": "abc", "max_tokens": 20, **GREEDY}
    policy = ThresholdPolicy(threshold=0.3)
    expected = alone(prompt="abc", max_tokens=20, mode="threshold", policy=policy)
    for body in (
        {"early_exit": {"mode": "threshold", "threshold": 0.3}},
        {"early_exit": {"policy": {"name": "threshold", "threshold": 0.3}}},
        {"vllm_xargs": {"threshold": "0.3"}},
        {"early_exit": {"mode": "threshold"}, "vllm_xargs": {"threshold": 0.3, "exits": "1,2"}},
    ):
        found = client.completions.create(extra_body=body, **settings)
        assert found.choices[0].text == expected.text, body
        assert found.choices[0].early_exit["layers"] == [token.layer for token in expected.tokens]
        summary = found.early_exit
        assert summary["mode"] == "threshold" and summary["tier"] == "default"
        assert summary["tokens_by_layer"] == expected.statistics["tokens_by_layer"]
        assert summary["layers_per_token"] == pytest.approx(expected.statistics["layers_per_token"])
    assert len(expected.statistics["tokens_by_layer"]) > 1
    chunks = list(client.completions.create(extra_body={"early_exit": {"threshold": 0.3}}, stream=True, **settings))
    layers = [layer for each in chunks for layer in each.choices[0].early_exit["layers"]]
    assert layers == [token.layer for token in expected.tokens]
    pieces = [piece for each in chunks for piece in each.choices[0].early_exit["pieces"]]
    assert "".join(pieces) == expected.text
    assert chunks[-1].early_exit == summary


def test_speculative_mode_tells_of_its_drafts(server: Any, alone: Alone) -> None:
    body = {"early_exit": {"mode": "speculative", "draft": {"exit": 2, "length": 3}}}
    found = server.client().completions.create(prompt="abc", max_tokens=20, extra_body=body, **GREEDY)
    assert found.choices[0].text == alone(prompt="abc", max_tokens=20).text
    assert found.early_exit["proposed"] > 0


def test_important_requests_run_in_full_mode(server: Any, alone: Alone) -> None:
    client = server.client()
    settings = {"prompt": "abc", "max_tokens": 8, **GREEDY}
    expected = alone(prompt="abc", max_tokens=8)
    for found in (
        client.completions.create(extra_body={"priority": "important"}, **settings),
        client.completions.create(extra_headers={"X-Priority": "important"}, **settings),
    ):
        assert found.choices[0].text == expected.text
        assert found.early_exit["mode"] == "full" and found.early_exit["tier"] == "important"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 0}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 300}, "stop"),
        ({"n": 129}, "n"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [999]}, "prompt"),
        ({"prompt": "x" * 300}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"unknown": 1}, "unknown"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"early_exit": {"mode": "fast"}}, "early_exit.mode"),
        ({"early_exit": {"threshold": 0}}, "early_exit.threshold"),
        ({"early_exit": {"mode": "threshold", "exits": [3]}}, "early_exit.exits"),
        ({"early_exit": {"mode": "threshold", "draft": {"exit": 2}}}, "early_exit.draft"),
        ({"vllm_xargs": {"draft_length": 3}, "priority": "important"}, "early_exit.draft"),
        ({"early_exit": {"policy": "fast"}}, "early_exit.policy.name"),
        ({"early_exit": {"policy": "gate"}}, "early_exit.policy"),
        ({"early_exit": {"task": "other task"}}, "early_exit.task"),
        ({"early_exit": {"unknown": 1}}, "early_exit.unknown"),
        ({"early_exit": {"threshold": 0.5, "policy": {"threshold": 0.4}}}, "early_exit.threshold"),
        ({"vllm_xargs": {"mode": "fast"}}, "vllm_xargs.mode"),
        ({"vllm_xargs": {"threshold": "much"}}, "vllm_xargs.threshold"),
        ({"vllm_xargs": {"exits": "1,x"}}, "vllm_xargs.exits[1]"),
        ({"vllm_xargs": {"draft": "8", "draft_exit": 8}}, "vllm_xargs.draft"),
        ({"vllm_xargs": {"mode": "full"}, "early_exit": {"mode": "threshold"}}, "vllm_xargs.mode"),
        ({"priority": "urgent"}, "priority"),
    ],
)
def test_a_wrong_field_is_named(server: Any, body: dict[str, Any], param: str) -> None:
    response = server.post("/v1/completions", {"model": "tiny", "prompt": "abc", **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "refuse"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
        ({"chat_template": "x"}, "chat_template"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(server: Any, body: dict[str, Any], param: str) -> None:
    response = server.post("/v1/chat/completions", {"model": "tiny", "messages": QUESTION, **body})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_errors_are_the_clients_exceptions(server: Any) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(prompt="x" * 300, model="tiny")
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(prompt="x", model="gpt-4")
    assert missing.value.code == "model_not_found"


def test_what_asks_for_nothing_is_accepted(server: Any) -> None:
    body = {
        "model": "tiny",
        "messages": QUESTION,
        "max_tokens": 2,
        **{"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True},
        **{"tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}, "seed": None},
    }
    assert server.post("/v1/chat/completions", body).status_code == 200
