"""Other programs as clients: lm-eval, and schemathesis with the OpenAPI schema. Slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ee.inference.requests import Completion

pytestmark = pytest.mark.slow
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
{rest}
"""
CHOICES = (
    'doc_to_choice: "{{choices}}"\ndoc_to_target: answer\noutput_type: multiple_choice\nmetric_list: [{metric: acc}]'
)
GENERATES = (
    'doc_to_target: "{{answer}}"\noutput_type: generate_until\n'
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]'
)
QUESTIONS = [
    {"question": f"the quick {word}", "choices": [" fox", " dog", " a wizard"], "answer": number % 3}
    for number, word in enumerate(["brown", "lazy", "seven", "café"])
]


def lm_eval(server: Any, tmp_path: Path, model: str, settings: str, task: str, *more: str) -> Path:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    (tmp_path / "task.yaml").write_text(task.format(name="tiny_task", data=data))
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "OPENAI_API_KEY": "none",
    }
    subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", model, "--model_args", settings, "--tasks", "tiny_task"),
            *("--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples", *more),
        ],
        check=True,
        env=environment,
        timeout=600,
        cwd=tmp_path,
    )
    [samples] = (tmp_path / "out").rglob("samples_*.jsonl")
    return samples


def test_lm_eval_scores_choices(
    server: Any, alone: Callable[..., Completion], chat_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    settings = f"model=tiny,base_url={server.url}/v1/completions,tokenizer={chat_model},num_concurrent=2,max_length=200"
    settings += ",tokenizer_backend=huggingface"
    samples = lm_eval(server, tmp_path, "local-completions", settings, TASK.replace("{rest}", _braces(CHOICES)))
    tokenizer = server.service.tokenizer
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        for texts, [[score, greedy]] in zip(sample["arguments"].values(), sample["resps"], strict=True):
            context, rest = tokenizer.encode(texts["arg_0"]), tokenizer.encode(texts["arg_1"])
            found = alone(
                prompt=tuple(context), forced_ids=tuple(rest), max_tokens=len(rest), logprobs=1, ignore_eos=True
            )
            expected = sum(token.logprobs.forced for token in found.tokens)
            assert float(score) == pytest.approx(expected, abs=1e-3)
            hits = [token.id == forced for token, forced in zip(found.tokens, rest, strict=True)]
            assert str(greedy) == str(all(hits))


def test_lm_eval_generates_in_chats(server: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    settings = f"model=tiny,base_url={server.url}/v1/chat/completions,num_concurrent=1"
    task = TASK.replace("{rest}", _braces(GENERATES))
    samples = lm_eval(server, tmp_path, "local-chat-completions", settings, task, "--apply_chat_template")
    client = server.client()
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        messages = [{"role": "user", "content": sample["doc"]["question"]}]
        found = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=8, temperature=0, stop=["\n"]
        )
        assert sample["resps"][0][0] == found.choices[0].message.content


def test_schemathesis_finds_no_server_error(server: Any, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--checks"),
        "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        *("--max-examples", "30", "--seed", "1", "--no-color", "--request-timeout", "60"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert server.http().get("/health").status_code == 200


def _braces(text: str) -> str:
    """Text in which ``format`` leaves the braces as they are."""
    return text.replace("{", "{{").replace("}", "}}")
