"""Malicious changes of files, by reader, each with a text that the error message must contain.

A case changes one part of a fresh copy of a valid directory (``testing.hostile``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_ee.checkpoint.adapter import DESCRIPTION, WEIGHTS
from megatron_ee.checkpoint.hf_directory import INDEX, SINGLE
from megatron_ee.checkpoint.manifest import MANIFEST
from megatron_ee.checkpoint.safetensors_file import DTYPE_NAMES, MAX_HEADER
from megatron_ee.testing.hostile import (
    CONFIG,
    ESCAPES,
    SHARD,
    SHARDS,
    Spoil,
    add_pieces,
    both,
    edit,
    forge,
    instead,
    link,
    link_out,
    replace,
    single_columns,
    sparse,
    tensor,
    with_header,
    write,
)

Cases = dict[str, tuple[Spoil, str]]

NESTED = json.loads("[" * 300 + "]" * 300)
DEEP = b"[" * 100_000 + b"]" * 100_000


def millions() -> bytes:
    """A JSON list of 15 MB that takes 24 times as much memory when parsed."""
    return b"[" + b"[]," * 5_000_000 + b"[]]"


NOT_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "is not a regular file"),
    "directory": (os.mkdir, "is not a regular file"),
    "link to a device": (link("/dev/zero"), "outside"),
    "link out": (link_out, "outside"),
    "link loop": (lambda path: path.symlink_to(path.name), "is missing"),
    "link to nothing": (link("nothing"), "is missing"),
}
NOT_JSON: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not valid JSON"),
    "not utf-8": (b'{"a": "\xff"}', "not valid JSON"),
    "utf-16": ("{}".encode("utf-16"), "not valid JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", "not valid JSON"),
    "deep": (DEEP, "not valid JSON"),
    "deep in an object": (b'{"a":' * 100_000, "not valid JSON"),
    "nan": (b'{"a": NaN}', "NaN is not JSON"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is not JSON"),
    "float beyond": (b'{"a": 1e999}', "'1e999' is too large"),
    "int beyond": (b'{"a": 1' + b"0" * 5000 + b"}", "not valid JSON"),
    "key twice": (b'{"a": 1, "a": 1}', "key 'a' appears twice"),
    "key twice with an escape": (b'{"a": 1, "\\u0061": 1}', "key 'a' appears twice"),
    "control characters in a key": (b'{"\\u001b[31m": 1, "\\u001b[31m": 1}', "appears twice"),
    "control characters as they are": (b'{"' + ESCAPES.encode() + b'": 1}', "not valid JSON"),
    "a list": (b"[]", "expected"),
    "a number": (b"1", "expected"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
}

# All readers use ``parse_json`` and ``check_confined``. These are tested with all cases, each reader with two.
A_FEW_NOT_JSON = {name: NOT_JSON[name] for name in ("deep", "a list")}
A_FEW_NOT_FILES = {name: NOT_FILES[name] for name in ("pipe", "link out")}

# One safetensors file, for ``read_header``; the path is the file.
HEADERS: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "length of 2**63": (with_header({}, length=2**63), "is too large"),
    "length beyond the file": (with_header({}, length=MAX_HEADER), "truncated"),
    "empty": (b"", "truncated"),
    "pickle": (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "not a safetensors file"),
    "deep in a shape": (with_header(b'{"a":{"dtype":"F32","shape":' + DEEP), "not valid JSON"),
    "nested shape": (with_header({"a": tensor(shape=NESTED)}), "whole numbers"),
    "nested dtype": (with_header({"a": tensor(dtype=NESTED)}), "is not known"),
    "key twice": (with_header(b'{"a":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}}'), "twice"),
    "float": (with_header({"a": tensor(shape=[2.0])}, bytes(8)), "whole numbers"),
    "bool": (with_header({"a": tensor(shape=[True, 2])}, bytes(8)), "whole numbers"),
    "2**63": (with_header({"a": tensor(shape=[2**63])}, bytes(8)), "whole numbers"),
    "product of 2**64": (with_header({"a": tensor("U8", [2**32, 2**32], [0, 0])}), "does not fit the 0 bytes"),
    "no element, yet beyond memory": (with_header({"a": tensor("F32", [0, 2**62], [0, 0])}), "impossibly large sizes"),
    "1000 dimensions": (with_header({"a": tensor("U8", [1] * 1000, [0, 1])}, bytes(1)), "whole numbers"),
    "scalar of 8 bytes": (with_header({"a": tensor("F32", [], [0, 8])}, bytes(8)), "does not fit the 8 bytes"),
    "zero rows with data": (with_header({"a": tensor("F32", [0, 2], [0, 8])}, bytes(8)), "does not fit the 8 bytes"),
    "offsets backwards": (with_header({"a": tensor(offsets=[8, 0])}, bytes(8)), "are not [begin, end]"),
    "offsets beyond": (with_header({"a": tensor(offsets=[2**62, 2**62 + 8])}, bytes(8)), "truncated"),
    "overlap": (with_header({"a": tensor(), "b": tensor(offsets=[4, 12])}, bytes(12)), "overlaps another tensor"),
    "the same bytes twice": (with_header({"a": tensor(), "b": tensor()}, bytes(8)), "overlaps another tensor"),
    "hole": (with_header({"a": tensor(), "b": tensor(offsets=[12, 20])}, bytes(20)), "unused bytes"),
    "something behind": (with_header({"a": tensor()}, bytes(9)), "more than the header describes"),
    "control characters in a name": (with_header({ESCAPES: tensor()}, bytes(8)), "unprintable"),
    "lone surrogate": (with_header(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "unprintable"),
    "name of a million characters": (with_header({"a" * 10**6: tensor("?")}, bytes(8)), "is not known"),
    "metadata of numbers": (with_header({"__metadata__": {"a": 1}}), "must map strings to strings"),
    "values by the million": (lambda: with_header(b'{"__metadata__":' + millions() + b"}"), "values; at most"),
    "index instead": (json.dumps({"weight_map": {"a" * 50: "x"}}).encode(), "not a safetensors file"),
    **{f"not json: {name}": (with_header(text), words) for name, (text, words) in A_FEW_NOT_JSON.items()},
}

# config.json, alone and in a whole model.
CONFIGS: Cases = {
    **{f"not json: {name}": (write("config.json", text), words) for name, (text, words) in A_FEW_NOT_JSON.items()},
    **{name: (instead("config.json", make), words) for name, (make, words) in A_FEW_NOT_FILES.items()},
    "none": (lambda directory: (directory / "config.json").unlink(), "config.json: not found"),
    "enormous": (instead("config.json", sparse(100 * 2**20)), "too many for this file"),
    "code": (edit("config.json", lambda c: c.update(auto_map={"AutoConfig": "evil.Config"})), "auto_map"),
    "code, hidden by a second key": (
        replace("config.json", "{", '{"auto_map": {"a": "b"}, "auto_map": null, '),
        "twice",
    ),
    "a billion layers": (edit("config.json", lambda c: c.update(num_hidden_layers=10**9)), "num_hidden_layers"),
    "more digits than any number": (edit("config.json", lambda c: c.update(vocab_size=10**4000)), "vocab_size"),
    "hidden size below the heads": (edit("config.json", lambda c: c.update(hidden_size=1)), "head_dim"),
    "heads that do not group": (edit("config.json", lambda c: c.update(num_key_value_heads=3)), "num_key_value_heads"),
    "fraction": (edit("config.json", lambda c: c.update(vocab_size=10.0)), "vocab_size"),
    "true layers": (edit("config.json", lambda c: c.update(num_hidden_layers=True)), "num_hidden_layers"),
    "text as a flag": (edit("config.json", lambda c: c.update(tie_word_embeddings="no")), "tie_word_embeddings"),
    "no epsilon": (edit("config.json", lambda c: c.update(rms_norm_eps=0)), "rms_norm_eps"),
    "rope list": (edit("config.json", lambda c: c.update(rope_scaling=[8])), "rope_scaling"),
    "rope before 0": (
        edit("config.json", lambda c: c["rope_scaling"].update(original_max_position_embeddings=0.5)),
        "original_max_position_embeddings",
    ),
    "control characters": (edit("config.json", lambda c: c.update(architectures=[ESCAPES])), "architecture"),
    "long text": (edit("config.json", lambda c: c.update(hidden_act="x" * 10**6)), "hidden_act"),
}

_FIRST = "lm_head.weight"  # the first name in the index, so that a wrong file for it is found first


def _place(name: Any) -> Spoil:
    return edit(INDEX, lambda c: c["weight_map"].update({_FIRST: name}))


# A model directory of two shards and an index.
MODELS: Cases = {
    **{f"index not json: {name}": (write(INDEX, text), words) for name, (text, words) in A_FEW_NOT_JSON.items()},
    **{f"index: {name}": (instead(INDEX, make), words) for name, (make, words) in A_FEW_NOT_FILES.items()},
    **{f"shard: {name}": (instead(SHARDS[1], make), words) for name, (make, words) in A_FEW_NOT_FILES.items()},
    **{f"single: {name}": (instead(SINGLE, make), words) for name, (make, words) in A_FEW_NOT_FILES.items()},
    "parent": (_place("../outside.safetensors"), "leads outside"),
    "absolute": (_place("/etc/passwd.safetensors"), "leads outside"),
    "backslash": (_place("..\\outside.safetensors"), "is not a file name"),
    "link in the way": (
        both(lambda directory: (directory / "sub").symlink_to("/etc"), _place("sub/x.safetensors")),
        "leads outside",
    ),
    "another kind of file": (_place("config.json"), "is not a safetensors file"),
    "name of 10,000 characters": (_place("x" * 10_000 + ".safetensors"), "File name too long"),
    "number as a name": (_place(1), "is not a file name"),
    "control characters": (_place(f"{ESCAPES}.safetensors"), "is not a file name"),
    "lone surrogate": (_place("\ud800.safetensors"), "is not a file name"),
    "the same letter spelt otherwise": (
        both(lambda d: (d / SHARDS[0]).rename(d / "caf\u00e9.safetensors"), _place("cafe\u0301.safetensors")),
        "is missing",
    ),
    "tensor in the other shard": (_place(SHARDS[1]), "is in"),
    "tensor that is nowhere": (
        edit(INDEX, lambda c: c["weight_map"].update(nowhere=SHARDS[0])),
        "'nowhere' is missing",
    ),
    "tensor twice": (replace(INDEX, '"weight_map": {', f'"weight_map": {{"{_FIRST}": "{SHARDS[0]}", '), "twice"),
    "control characters in a tensor's name": (edit(INDEX, lambda c: c["weight_map"].update({ESCAPES: 1})), "file name"),
    "no map": (edit(INDEX, lambda c: c.pop("weight_map")), "weight_map"),
    "map list": (edit(INDEX, lambda c: c.update(weight_map=[["a", "b"]])), "weight_map"),
    "enormous index": (instead(INDEX, sparse(2**40)), "too many for this file"),
    "enormous shard": (instead(SHARDS[0], sparse(2**40)), "not a safetensors file"),
    "empty shard": (write(SHARDS[0], b""), "truncated"),
    "git-lfs pointer": (write(SHARDS[0], b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "pickle by a printing name": (
        both(*(lambda d, name=name: (d / name).unlink() for name in (*SHARDS, INDEX)), write(f"{ESCAPES}.bin", b"")),
        "only as pickle",
    ),
    "unknown tensor": (write(SINGLE, with_header({"evil": tensor()}, bytes(8))), "unknown tensor 'evil'"),
    "integers": (
        write(SINGLE, with_header({_FIRST: tensor("I32", [10, 8], [0, 320])}, bytes(320))),
        "is missing",
    ),
}


def _piece(content: Any) -> Any:
    """The first of several pieces."""
    return content["tensors"]["exits.1.mlp.up_proj.weight"]["pieces"][0]


def _cut_tensor(content: Any) -> Any:
    return content["tensors"]["exits.1.mlp.up_proj.weight"]


def _rename(name: str) -> Spoil:
    return forge(lambda c: c["files"].update({name: c["files"].pop(SHARD)}))


MANIFESTS: Cases = {
    **{f"not json: {name}": (write(MANIFEST, text), words) for name, (text, words) in A_FEW_NOT_JSON.items()},
    "pipe": (instead(MANIFEST, os.mkfifo), "is not a regular file"),
    "directory": (instead(MANIFEST, os.mkdir), "is not a regular file"),
    "link out": (instead(MANIFEST, link_out), "is a link"),
    "link loop": (instead(MANIFEST, lambda path: path.symlink_to(path.name)), "is a link"),
    "shard: pipe": (instead(SHARD, os.mkfifo), "is not a regular file"),
    "shard: link out": (instead(SHARD, link_out), "not a plain safetensors file"),
    "shard: link to a device": (instead(SHARD, link("/dev/zero")), "not a plain safetensors file"),
    "shard: none": (lambda directory: (directory / SHARD).unlink(), "missing"),
    "shard: empty": (write(SHARD, b""), "truncated"),
    "no checksum": (edit(MANIFEST, lambda c: c.pop("sha256")), "SHA-256"),
    "changed": (edit(MANIFEST, lambda c: c["metadata"]["progress"].update(step=4)), "SHA-256"),
    "checksum twice": (replace(MANIFEST, '"sha256"', '"sha256": "", "sha256"'), "twice"),
    "parent": (_rename("../x.safetensors"), "not a plain safetensors file"),
    "another kind of file": (_rename("manifest.json"), "not a plain safetensors file"),
    "control characters in a file's name": (_rename(f"{ESCAPES}.safetensors"), "not a plain safetensors file"),
    "long file name": (_rename("x" * 10_000 + ".safetensors"), "File name too long"),
    "file is a text": (forge(lambda c: c["files"].update({SHARD: "x"})), "expected an object with size, blocks"),
    "size is a text": (forge(lambda c: c["files"][SHARD].update(size="x")), "truncated or changed"),
    "blocks of numbers": (forge(lambda c: c["files"][SHARD].update(blocks=[1])), "one SHA-256"),
    "a block too many": (forge(lambda c: c["files"][SHARD]["blocks"].append("ab" * 32)), "one SHA-256"),
    "tensors null": (forge(lambda c: c.update(tensors=None)), "tensors: expected an object"),
    "control characters in a key": (forge(lambda c: c["tensors"].update({ESCAPES: _cut_tensor(c)})), "its name, dtype"),
    "dtype list": (forge(lambda c: _cut_tensor(c).update(dtype=["F32"])), "its name, dtype or pieces"),
    "pieces are an object": (forge(lambda c: _cut_tensor(c).update(pieces={"a": 1})), "its name, dtype or pieces"),
    "piece is a text": (forge(lambda c: _cut_tensor(c).update(pieces=["a"])), "expected an object with file"),
    "no pieces": (forge(lambda c: _cut_tensor(c).update(pieces=[])), "its pieces hold 0 of"),
    "shape negative": (forge(lambda c: _cut_tensor(c).update(shape=[-12, -8])), "whole numbers"),
    "shape 2**63": (forge(lambda c: _cut_tensor(c).update(shape=[2**63, 8])), "whole numbers"),
    "shape 2**62": (forge(lambda c: _cut_tensor(c).update(shape=[2**62, 2**62])), "its pieces hold"),
    "shape of other dimensions": (forge(lambda c: _cut_tensor(c).update(shape=[96])), "is not inside shape"),
    "offset negative": (forge(lambda c: _piece(c).update(offset=[-1, 0])), "whole numbers"),
    "offset beyond": (forge(lambda c: _piece(c).update(offset=[11, 0])), "is not inside shape"),
    "pieces overlap": (forge(lambda c: _piece(c).update(offset=[1, 0])), "overlap"),
    "pieces leave a hole": (forge(lambda c: _cut_tensor(c).update(shape=[13, 8])), "its pieces hold 96 of 104"),
    "piece beyond the file": (forge(lambda c: _piece(c).update(shape=[6, 8])), "is missing or not as"),
    "piece of another tensor": (forge(lambda c: _piece(c).update(name="exits.1.lm_head.a")), "is missing or not as"),
    "piece in an unknown file": (forge(lambda c: _piece(c).update(file="x.safetensors")), "not one of its files"),
    "piece twice": (forge(lambda c: c["tensors"].update(again=_cut_tensor(c))), "is used twice"),
    "20,000 pieces that overlap": (add_pieces([1, 20_000], [*single_columns(19_999), ([0, 0], [1, 1])]), "overlap"),
    "20,000 pieces and a hole": (add_pieces([1, 20_001], single_columns(20_000)), "hold 20000 of 20001"),
    "pieces cut along 20 dimensions": (add_pieces([2] * 20, [([0] * 20, [1] * 20)]), "split along 20 dimensions"),
    "metadata list": (forge(lambda c: c.update(metadata=[])), "metadata: expected an object"),
    "version text": (forge(lambda c: c.update(version=ESCAPES)), "is not known here"),
    "enormous": (instead(MANIFEST, sparse(2**40)), "too many for this file"),
    "values by the million": (write(MANIFEST, millions), "values; at most"),
}

PARALLELS: Cases = {
    "training checkpoint": (forge(lambda c: c["metadata"].pop("kind")), "training checkpoint"),
    "files list": (forge(lambda c: c["metadata"].update(assets=["config.json"])), "does not list its files"),
    "configuration not listed": (forge(lambda c: c["metadata"].update(assets={})), "does not list its files"),
    "parent": (forge(lambda c: c["metadata"]["assets"].update({"../x": "ab" * 32})), "not a plain file"),
    "the directory": (forge(lambda c: c["metadata"]["assets"].update({"..": "ab" * 32})), "not a plain file"),
    "control characters": (forge(lambda c: c["metadata"]["assets"].update({ESCAPES: "ab" * 32})), "not a plain file"),
    "long name": (forge(lambda c: c["metadata"]["assets"].update({"x" * 10_000: "ab" * 32})), "not a plain file"),
    "digest is a number": (forge(lambda c: c["metadata"]["assets"].update({"config.json": 1})), "damaged"),
    "configuration changed": (write("config.json", json.dumps({**CONFIG, "rms_norm_eps": 2e-5}).encode()), "damaged"),
    "configuration: pipe": (instead("config.json", os.mkfifo), "not a plain file"),
    "configuration: link out": (instead("config.json", link_out), "not a plain file"),
    "unknown tensor": (
        forge(lambda c: c["tensors"].update(evil=c["tensors"].pop("model.norm.weight"))),
        "unknown tensor 'evil'",
    ),
    "missing tensor": (forge(lambda c: c["tensors"].pop("model.norm.weight")), "is missing"),
}


def _describe(change: Callable[[Any], object]) -> Spoil:
    return forge(change, DESCRIPTION)


ADAPTERS: Cases = {
    **{f"not json: {name}": (write(DESCRIPTION, text), words) for name, (text, words) in A_FEW_NOT_JSON.items()},
    **{name: (instead(DESCRIPTION, make), words) for name, (make, words) in A_FEW_NOT_FILES.items()},
    **{f"weights: {name}": (instead(WEIGHTS, make), words) for name, (make, words) in A_FEW_NOT_FILES.items()},
    "no weights": (lambda directory: (directory / WEIGHTS).unlink(), "is missing"),
    "pickle instead": (write(WEIGHTS, b"\x80\x04\x95" + bytes(100)), "truncated"),
    "enormous": (instead(DESCRIPTION, sparse(2**30)), "too many for this file"),
    "changed": (edit(DESCRIPTION, lambda c: c.update(steps=4)), "its SHA-256 is not the one it states"),
    "number as a checksum": (edit(DESCRIPTION, lambda c: c.update(sha256=0)), "its SHA-256 is not the one it states"),
    "checksum twice": (replace(DESCRIPTION, '"sha256"', '"sha256": null, "sha256"'), "appears twice"),
    "version text": (_describe(lambda c: c.update(version="1")), "version '1'"),
    "digest list": (_describe(lambda c: c["files"].update({WEIGHTS: ["ab" * 32]})), "SHA-256"),
    "exits object": (_describe(lambda c: c.update(exits={"1": {}})), "exits: must be a list"),
    "no exits": (_describe(lambda c: c.update(exits=[])), "exits: must be a list of at least 1"),
    "exit list": (_describe(lambda c: c["exits"].append([])), "exits[2]: must be an object"),
    "exit without a layer": (_describe(lambda c: c["exits"][0].pop("layer")), "exits[0].layer: missing"),
    "unknown field": (_describe(lambda c: c["exits"][0].update(__class__="x")), "exits[0].__class__: unknown key"),
    "field of control characters": (_describe(lambda c: c["exits"][0].update({ESCAPES: 1})), "unknown key"),
    "layer true": (_describe(lambda c: c["exits"][0].update(layer=True)), "layer: must be a whole number, not True"),
    "layer fraction": (_describe(lambda c: c["exits"][0].update(layer=1.0)), "layer: must be a whole number, not 1.0"),
    "layer negative": (_describe(lambda c: c["exits"][0].update(layer=-1)), "layer: must be at least 1, not -1"),
    "a billionth layer": (_describe(lambda c: c["exits"][1].update(layer=10**9)), "exits[1].layer: must be at most"),
    "layers twice": (_describe(lambda c: c["exits"][1].update(layer=1)), "once each"),
    "layers backwards": (_describe(lambda c: c["exits"].reverse()), "in the order of their layers"),
    "layer moved": (_describe(lambda c: c["exits"][1].update(layer=3)), "its weights are those of"),
    "rank beyond memory": (_describe(lambda c: c["exits"][0].update(rank=2**40)), "is said to have rank"),
    "weight text": (_describe(lambda c: c["exits"][0].update(weight="1")), "weight: must be a number, not '1'"),
    "weight negative": (_describe(lambda c: c["exits"][0].update(weight=-1)), "weight: must be above 0, not -1"),
    "weight nan": (replace(DESCRIPTION, '"weight": 1.0', '"weight": NaN'), "NaN is not JSON"),
    "body list": (_describe(lambda c: c["exits"][0].update(body=["mlp"])), "body: must be one of"),
    "body of control characters": (_describe(lambda c: c["exits"][0].update(body=ESCAPES)), "body: must be one of"),
    "head null": (_describe(lambda c: c["exits"][0].update(head=None)), "head: must be one of"),
    "another body": (_describe(lambda c: c["exits"][0].update(body="norm")), "its weights are those of mlp"),
    "another head": (_describe(lambda c: c["exits"][0].update(head="shared")), "those of mlp with head low_rank"),
    "an exit left out": (_describe(lambda c: c["exits"].pop()), "does not belong to a described exit"),
    "no steps": (_describe(lambda c: c.pop("steps")), "steps: must be a whole number"),
    "no base model": (_describe(lambda c: c.pop("base_model")), "base_model: missing"),
    "base model list": (_describe(lambda c: c.update(base_model=["x"])), "base_model: must be text"),
    "hash short": (_describe(lambda c: c.update(backbone_sha256="ab")), "backbone_sha256: must be text like ^[0-9a-f]"),
    "hash and a line end": (
        _describe(lambda c: c.update(backbone_sha256="ab" * 32 + "\n")),
        "backbone_sha256: must be",
    ),
    "key twice": (replace(DESCRIPTION, '"steps"', '"steps": 9, "steps"'), "key 'steps' appears twice"),
    "weights of another dtype's name": (
        write(WEIGHTS, with_header({"exits.1.norm.weight": tensor(DTYPE_NAMES[torch.int8], [8], [0, 8])}, bytes(8))),
        "SHA-256",
    ),
}


def _metadata(**changes: Any) -> Spoil:
    return forge(lambda c: c["metadata"].update(changes))


# A training checkpoint, opened for its exits.
DESCRIBED: Cases = {
    "no exits": (_metadata(exits=[]), "holds no exits"),
    "exits null": (_metadata(exits=None), "holds no exits"),
    "exit text": (_metadata(exits=["x"]), "exits[0]: must be an object"),
    "progress text": (_metadata(progress="x"), "steps: must be a whole number"),
    "progress fraction": (_metadata(progress={"step": 1.5}), "steps: must be a whole number"),
    "hash null": (_metadata(backbone_sha256=None), "backbone_sha256: must be text"),
    "an exit left out": (forge(lambda c: c["metadata"]["exits"].pop()), "does not belong to a described exit"),
    "a tensor left out": (forge(lambda c: c["tensors"].pop("exits.1.lm_head.a")), "its weights are those of"),
}
