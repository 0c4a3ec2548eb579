"""Build the quickstart's corpus from Python's standard library, or from a user's text file.

``python corpus.py --out DIR`` writes ``DIR/train.jsonl`` and ``DIR/held_out.jsonl``, one document per line: ``{"text":
..., "source": ...}``. Without ``--data`` the documents are the standard library's source files, docstrings included.
Whole files are held out, chosen by a hash of their name, so every run on the same Python gives the same split. Needs
only Python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_ee.checkpoint.ownership import check_output, claim_output

# Left out: tests and bundled tools, which are repetitive; character tables; files that differ by machine.
SKIPPED_DIRECTORIES = {
    "test", "tests", "idle_test", "lib2to3", "encodings", "ensurepip", "site-packages", "dist-packages", "__pycache__"
}  # fmt: skip
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
HELD_OUT_ONE_IN = 20

Document = tuple[str, str]


def standard_library(root: Path) -> Iterator[Document]:
    """(source, text) of each Python file below ``root`` that belongs in the corpus, in the order of their names."""
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(
            name for name in subdirectories if name not in SKIPPED_DIRECTORIES and not name.startswith(SKIPPED_PREFIXES)
        )
        for name in sorted(names):
            if not name.endswith(".py") or name.startswith(SKIPPED_PREFIXES):
                continue
            path = Path(directory) / name
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):  # a few sources have other encodings, or no read permission
                continue
            if text.strip():
                yield path.relative_to(root).as_posix(), text


def is_held_out(source: str) -> bool:
    """Whether the document of this name is held out: about one in ``HELD_OUT_ONE_IN``, the same in every run."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def split_library(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents."""
    train: list[Document] = []
    held_out: list[Document] = []
    for source, text in documents:
        (held_out if is_held_out(source) else train).append((source, text))
    return train, held_out


def split_user_file(path: Path, text_key: str) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents of the user's file: one line in twenty of a ``.jsonl``, else the last tenth.

    Raises:
        ValueError: unreadable, not UTF-8, a bad line (named by its number), or too little text to split.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    if path.suffix == ".jsonl":
        documents = [(f"{path.name}:{number}", text) for number, text in _json_lines(path, content, text_key)]
        held_out = documents[HELD_OUT_ONE_IN - 1 :: HELD_OUT_ONE_IN] or documents[-1:]
        held_out_sources = {source for source, _ in held_out}
        train = [document for document in documents if document[0] not in held_out_sources]
    else:
        cut = content.rfind("\n", 0, len(content) * 9 // 10) + 1
        train = [(f"{path.name}:train", content[:cut])] if content[:cut].strip() else []
        held_out = [(f"{path.name}:held_out", content[cut:])] if content[cut:].strip() else []
    if not train or not held_out:
        raise ValueError(f"{path}: too little text to hold out a part; give more lines or documents")
    return train, held_out


def _json_lines(path: Path, content: str, text_key: str) -> Iterator[tuple[int, str]]:
    # Only "\n" ends a line of JSONL; str.splitlines would also cut at characters that JSON strings may hold.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        text = record.get(text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(f"{path}:{number}: no text under the key {text_key!r}")
        if text.strip():
            yield number, text


def write_documents(path: Path, documents: list[Document]) -> None:
    """Write JSONL to a temporary name beside ``path``, then rename it."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for source, text in documents:
                file.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="new directory for train.jsonl and held_out.jsonl")
    parser.add_argument("--data", type=Path, help="a .txt or .jsonl file to take instead of the standard library")
    parser.add_argument("--text-key", default="text", help="key of the text in a .jsonl file (default: text)")
    arguments = parser.parse_args()
    try:
        check_output(arguments.out, "corpus.py", "--out")
        if arguments.data is not None:
            train, held_out = split_user_file(arguments.data, arguments.text_key)
        else:
            train, held_out = split_library(standard_library(Path(sysconfig.get_paths()["stdlib"])))
            if not train or not held_out:
                raise ValueError("this Python's standard library has no sources; give a text file with --data")
        claim_output(arguments.out, "corpus.py", "--out")
        write_documents(arguments.out / "train.jsonl", train)
        write_documents(arguments.out / "held_out.jsonl", held_out)
    except (ValueError, OSError) as error:
        print(f"corpus.py: {error}", file=sys.stderr)
        return 1
    for name, documents in (("train", train), ("held_out", held_out)):
        megabytes = sum(len(text.encode()) for _, text in documents) / 1e6
        print(f"{name}: {len(documents)} documents, {megabytes:.1f} MB", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
