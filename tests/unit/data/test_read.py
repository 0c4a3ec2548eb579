"""Which input files hold conversations."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ee.data.read import is_chat


@pytest.mark.parametrize(
    ("name", "content", "chat"),
    [
        ("a.jsonl", b'{"messages": []}', True),
        ("a.ndjson", b'\n \n{"messages": []}\n{"text": ""}', True),
        ("a.json", b'\xef\xbb\xbf{"messages": []}', True),
        ("a.txt", b'{"messages": []}', False),
        ("a.jsonl", b'{"text": "of \\"messages\\""}\n{"messages": []}', False),
        ("a.jsonl", b'["messages"]', False),
        ("a.jsonl", b"\xff{", False),
        ("a.jsonl", b"", False),
    ],
)
def test_the_first_line_tells_conversations(tmp_path: Path, name: str, content: bytes, chat: bool) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert is_chat(path) is chat
