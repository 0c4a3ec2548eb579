"""The help desk of ``docs/serving.md``, as its page says: calibrate, keys, rules, serve, ask."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from megatron_ee.serving.exit_log import read_logs
from megatron_ee.testing.project import Project
from megatron_ee.testing.ranks import free_port

SECONDS = 60.0
PAGE = Path(__file__).resolve().parents[2] / "docs/serving.md"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def steps() -> list[str]:
    """The blocks of code of the page's section, in their order."""
    section = PAGE.read_text(encoding="utf-8").partition("## Two tiers")[2].partition("\n## ")[0]
    return re.findall(r"^```\w*\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


def chat_model(project: Project, folder: Path) -> tuple[Path, Path]:
    """A model with a chat template, and an exit that is always right: the layers after it change nothing."""
    model, adapter = folder / "model", folder / "adapter"
    shutil.copytree(project.model, model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    weights = load_file(model / "model.safetensors")
    for layer, name in itertools.product((2, 3), ("self_attn.o_proj", "mlp.down_proj")):
        weights[f"model.layers.{layer}.{name}.weight"].zero_()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    exits = '[{"layer": 2, "body": "norm", "init": "copy"}]'
    project.run("convert", "--input", model, "--to", "adapter", "--exits", exits, "--output", adapter)
    return model, adapter


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_help_desk(project: Project, tmp_path: Path) -> None:
    calibrate, keys, rules, serve, ask = steps()
    model, adapter = chat_model(project, tmp_path)
    questions = [f"When is room {number} open?" for number in range(60)]
    (tmp_path / "inquiries.jsonl").write_text("".join(json.dumps({"prompt": each}) + "\n" for each in questions))
    # All inquiries are audited, not two of a hundred: then chance does not decide what the log holds.
    names = {"MODEL": model, "runs/first/adapter-best": adapter, "0.0.0.0": "127.0.0.1", "0.02": 1}
    files = ("inquiries.jsonl", "inquiries.json", "rules.yaml", "keys.yaml", "logs/exits.jsonl")
    names |= {name: tmp_path / name for name in files}

    def words(block: str) -> list[object]:
        program, *rest = shlex.split(block.replace("\\\n", " "))
        assert program == "megatron-ee"
        return [names.get(word, word) for word in rest]

    certificate = project.run(*words(calibrate), "--json").stdout
    assert json.loads(certificate)["policy"] is not None, "the exit is always right, so something faster is safe"

    secrets = {"website": "5c1f" * 8, "back-office": "77b0" * 8}
    given = iter(secrets.values())
    script = re.sub(r'"\$\(openssl rand -hex 32\)"', lambda _: next(given), keys)
    subprocess.run(["bash", "-euc", script], cwd=tmp_path, check=True)
    (tmp_path / "rules.yaml").write_text(rules)

    url = f"http://127.0.0.1:{(port := free_port())}"
    with project.start(*words(serve), "--port", port) as server:
        until = time.monotonic() + SECONDS
        while not answers(url):
            assert server.running and time.monotonic() < until, server.wait().stderr

        def asked(key: str) -> list[dict[str, Any]]:
            script = ask.replace("http://help-desk:8000", url).replace("curl ", "curl -sS ").replace("website", key)
            done = subprocess.run(["bash", "-euc", script], cwd=tmp_path, env={}, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            decoder, found, text = json.JSONDecoder(), [], done.stdout
            while text:
                answer, end = decoder.raw_decode(text)
                found.append(answer)
                text = text[end:].lstrip()
            return found

        inquiry, important = asked("website")
        assert inquiry["early_exit"]["mode"] == "threshold" and inquiry["early_exit"]["tier"] == "default"
        assert inquiry["early_exit"]["calibration"]["status"] == "certified"
        assert inquiry["early_exit"]["tokens_by_layer"]["2"] > 10 and inquiry["early_exit"]["layers_per_token"] < 4
        assert important["early_exit"]["mode"] == "full" and important["early_exit"]["tier"] == "important"
        assert important["early_exit"]["calibration"]["status"] == "full"
        assert important["early_exit"]["calibration"]["reason"] == "priority: important"
        assert set(important["early_exit"]["tokens_by_layer"]) == {"4"}
        for answer in asked("back-office"):
            assert answer["early_exit"]["tier"] == "important" and set(answer["early_exit"]["tokens_by_layer"]) == {"4"}

        def post(**fields: Any) -> httpx.Response:
            body = {"messages": [{"role": "user", "content": questions[0]}], **fields}
            headers = {"Authorization": f"Bearer {secrets['website']}"}
            return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=SECONDS)

        warm = post(temperature=1.0).json()["early_exit"]
        assert warm["mode"] == "full" and warm["calibration"]["reason"].startswith("temperature: 1.0")
        assert post(early_exit={"threshold": 0.1, "uncertified": True}).status_code == 400
        server.send(signal.SIGTERM)
        assert server.wait(SECONDS).returncode == 0
    # By admission: the record of an audited request is written after its audit.
    records = sorted(read_logs([tmp_path / "logs/exits.jsonl"]), key=lambda record: record.number)
    statuses = [record.calibration and record.calibration.status for record in records]
    assert statuses == ["certified", "full", "full", "full", "full"]
    losses = [record.audit and record.audit.loss for record in records]
    assert losses == [0.0, None, None, None, None], "the exit is always right"


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=SECONDS).status_code == 200
    except httpx.TransportError:
        return False
