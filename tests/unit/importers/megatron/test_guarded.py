"""Nothing that a hostile pickle asks for is run, in whatever part of a checkpoint it lies."""

from __future__ import annotations

import argparse
import collections
import contextlib
import copyreg
import io
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from legacy_writer import Exits, Layout, megatron_args, write_legacy
from torch.storage import TypedStorage

from megatron_ee.errors import CheckpointError
from megatron_ee.importers.megatron.guarded import Inert, Mapping, unpickle
from megatron_ee.importers.megatron.legacy import open_legacy
from megatron_ee.importers.megatron.legacy_args import Args, check_agreement, derive_config, early_exits
from megatron_ee.importers.megatron.opening import derived_model
from megatron_ee.importers.megatron.torch_file import TorchFile
from megatron_ee.testing.models import tiny_model


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.reduced


def payloads(mark: Path) -> dict[str, Any]:
    """Objects whose pickles, read by ``pickle``, make the file ``mark``."""
    code = f"open({str(mark)!r}, 'w').close()"
    return {
        "os.system": Calls(os.system, f"touch {mark}"),
        "os.mkdir": Calls(os.mkdir, str(mark)),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "open": Calls(open, str(mark), "w"),
        "subprocess": Calls(subprocess.check_call, ["touch", str(mark)]),
        "torch.save": Calls(torch.save, 1, str(mark)),
        "iterator": Calls(collections.deque, Calls(map, exec, [code])),
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", payloads(Path("mark")))
def test_nothing_is_run(tmp_path: Path, kind: str, protocol: int) -> None:
    mark = tmp_path / "mark"
    data = pickle.dumps({"weights": [payloads(mark)[kind]]}, protocol)
    found = unpickle(data, "file")
    assert isinstance(found["weights"][0], Inert) and not mark.exists()
    with pytest.raises(CheckpointError, match="file: .*is not allowed in such a file.*no code in it was run"):
        unpickle(data, "file", known=("collections", "torch._utils._rebuild_tensor_v2"))
    assert not mark.exists()
    # It would have been, so that this test shows something.
    pickle.loads(data)
    assert mark.exists()


@pytest.mark.parametrize("where", ["args", "argument", "weight", "optimizer", "version", "key", "top"])
def test_nothing_in_a_checkpoint_is_run(saved_model: Any, tmp_path: Path, where: str) -> None:
    directory, model = saved_model("llama2")
    path = write_legacy(tmp_path, model, Layout()) / "mp_rank_00/model_optim_rng.pt"
    content, mark = torch.load(path, weights_only=False), tmp_path / "mark"
    hostile = Calls(os.system, f"touch {mark}")
    if where == "args":
        content["args"] = hostile
    elif where == "argument":
        content["args"].vocab_file = hostile
    elif where == "weight":
        content["model"]["language_model"]["encoder"]["final_norm.weight"] = hostile
    elif where == "optimizer":
        content["optimizer"] = hostile
    elif where == "version":
        content["checkpoint_version"] = hostile
    elif where == "key":
        content["model"]["language_model"] = Calls(dict, [(Calls(os.system, f"touch {mark}"), 1)])
    else:
        content = hostile
    torch.save(content, path)
    assert not mark.exists()
    refused = None
    try:
        open_legacy(tmp_path, trust=True, config=directory)
    except CheckpointError as error:
        refused = str(error)
    assert not mark.exists()
    # What nobody looks at is left where it is.
    assert refused is None if where in ("args", "argument", "optimizer") else refused and str(path) in refused
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_without_trust_not_a_byte_is_read(saved_model: Any, tmp_path: Path) -> None:
    _, model = saved_model("llama2")
    path = write_legacy(tmp_path, model, Layout()) / "mp_rank_00/model_optim_rng.pt"
    path.write_bytes(b"nothing that could be read")
    with pytest.raises(CheckpointError, match="--trust-checkpoint"):
        open_legacy(tmp_path, trust=False)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02c__builtin__\neval\n)R.",  # called without arguments, under its old name
        b"(i__builtin__\neval\n.",
        b"(c__builtin__\neval\nX\x01\x00\x00\x001o.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85\x81.",
        b"cos\nsystem\n(K\x01tR}b.",
    ],
)
def test_every_way_of_making_an_object_makes_an_inert_one(data: bytes) -> None:
    found = unpickle(data, "file")
    assert type(found).__mro__[1] is Inert and found.origin[1] in ("eval", "system")


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(NX\x0c\x00\x00\x00__setstate__NdtB.",
        b"cos\nsystem\n(N}X\x0c\x00\x00\x00__setstate__X\x01\x00\x00\x001stb.",  # set attributes of the class itself
        b"ccollections\nOrderedDict\n(N}X\x05\x00\x00\x00itemsK\x01stb.",
        b"\x82\x01.",  # whatever this process registered for pickles
        b"\x96\x00\x00\x00\x00\x00\x00\x00\x40.",  # an array of 2**62 bytes
        b"X\xff\xff\xff\xff.",
        b"(" * 1000 + b"0.",
        b"h\x05.",
        b"K\x01(K\x02e.",
        b"I" + b"9" * 5000 + b"\n.",
        b"\x80\x02Pdata\n.",
        b"",
        b".",
    ],
)
def test_what_is_no_pickle_of_a_checkpoint_is_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="^file: not a pickle of a checkpoint.*no code in it was run$"):
        unpickle(data, "file")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02}r\x00\x00\x00\x08.",  # a memo of 2**27 entries, for which the unpickler in C takes 2 GB
        b"\x96" + (3 * 2**28).to_bytes(8, "little") + b".",
        b"\x8e" + (3 * 2**28).to_bytes(8, "little") + b".",
    ],
)
def test_what_a_pickle_claims_costs_no_memory(data: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(CheckpointError):
        unpickle(data, "file")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_what_this_process_has_at_hand_for_pickles_is_out_of_reach() -> None:
    copyreg.add_extension("os", "getcwd", 240)
    try:
        assert pickle.loads(b"\x82\xf0)R.") == os.getcwd()
        with pytest.raises(CheckpointError, match="no code in it was run"):
            unpickle(b"\x82\xf0)R.", "file")
    finally:
        copyreg.remove_extension("os", "getcwd", 240)


KIND = b"\x8c\x05torch\x8c\x04Kind\x93"  # the class torch.Kind, as protocol 4 names it
GETATTR = b"\x8c\x08builtins\x8c\x07getattr\x93"


def get(owner: bytes, *names: str) -> bytes:
    """The pickle of ``getattr(owner, *names)``, without its end."""
    words = b"".join(b"X" + len(name).to_bytes(4, "little") + name.encode() for name in names)
    return GETATTR + b"(" + owner + words + b"tR"


def unpickle_kinds(data: bytes) -> Any:
    known = ("torch.Kind", "torch.Size", "torch.sub", "collections")
    return unpickle(b"\x80\x04" + data + b".", "file", known=known, enums={"torch.Kind": ("DENSE",)})


def test_a_member_of_a_known_enum_may_be_pickled_as_its_attribute() -> None:
    """As Python 3.11.0 to 3.11.3 pickle every member of an enum."""
    found = unpickle_kinds(get(KIND, "DENSE"))
    assert found.origin == ("torch", "Kind") and found.args == ("DENSE",) and type(found).__mro__[1] is Inert


@pytest.mark.parametrize(
    "data",
    [
        get(KIND),
        get(KIND, "SPARSE"),
        get(KIND, "DENSE", "DENSE"),  # with a default
        *(get(KIND, name) for name in ("__class__", "__subclasses__", "_member_map_", "mro", "args", "DENSE.name", "")),
        get(b"\x8c\x05torch\x8c\x04Size\x93", "DENSE"),  # not an enum
        get(b"\x8c\x0bcollections\x8c\x0bOrderedDict\x93", "DENSE"),
        get(b"\x8c\x05torch\x8c\x03sub\x93", "Kind.DENSE"),
        get(KIND + b")R", "DENSE"),  # a member
        get(get(KIND, "DENSE"), "DENSE"),
        get(get(KIND, "DENSE"), "__class__"),
        get(get(KIND, "__class__"), "mro"),
        get(GETATTR, "__self__"),
        get(GETATTR, "DENSE"),
        get(b"\x8c\x0atorch.Kind", "DENSE"),  # a string
        GETATTR + b"(" + KIND + b"\x8c\x04trueNtR",
        GETATTR + b"(" + KIND + b"]tR",  # an unhashable name
        GETATTR + b"(" + KIND + b"\x8c\x04evilt\x81",  # by NEWOBJ
        GETATTR + b")R",
        GETATTR + b")\x81",
    ],
)
def test_nothing_else_is_an_attribute(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="^file: .*names builtins.getattr, which is not allowed in such a file"):
        unpickle_kinds(data)


def test_attributes_are_refused_where_no_enum_belongs() -> None:
    with pytest.raises(CheckpointError, match="names builtins.getattr, which is not allowed in such a file"):
        unpickle(b"\x80\x04" + get(KIND, "DENSE") + b".", "file", known=("torch.Kind",))


@pytest.mark.parametrize(
    "first, shape, stride, words",
    [
        (0, (4, 4), (4, 1), r"shape \[4, 4\] of torch.float32 does not fit 48 bytes"),
        (1, (3, 4), (4, 1), "does not fit 48 bytes"),
        (2**60, (1,), (1,), "does not fit 48 bytes"),
        (0, (2**40, 2**40), (2**40, 1), "does not fit 48 bytes"),
        (-1, (3,), (1,), "not a tensor as torch.save writes it"),
        (0, (-3,), (1,), "not a tensor as torch.save writes it"),
        (0, (4, 3), (1, 4), "is not contiguous"),
        (0, (4, 3), (0, 1), "is not contiguous"),
        (0, (3,), (4, 1), "tensor 'x'"),
        (0, 3, 1, "tensor 'x'"),
        (0.0, (3.0,), (True,), "tensor 'x'"),
    ],
)
def test_tensors_that_are_not_inside_their_storage(
    tmp_path: Path, first: Any, shape: Any, stride: Any, words: str
) -> None:
    storage = TypedStorage(wrap_storage=torch.arange(12.0).untyped_storage(), dtype=torch.float32, _internal=True)
    call = Calls(torch._utils._rebuild_tensor_v2, storage, first, shape, stride, False, collections.OrderedDict())
    torch.save({"x": call}, tmp_path / "file.pt")
    file = TorchFile(tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=words) as caught:
        file.tensor(file.content["x"], "x")
    assert str(tmp_path / "file.pt") in str(caught.value)


def test_data_comes_through_as_it_is() -> None:
    state = collections.OrderedDict(a=1, b=[2.5, ("x", b"y", None, True)], c={"d": {3}})
    state._metadata = {"version": 1}  # type: ignore[attr-defined]
    found = unpickle(pickle.dumps({"state": state, "args": argparse.Namespace(layers=2)}, 2), "file")
    assert type(found["state"]) is Mapping and list(found["state"]) == ["a", "b", "c"]
    assert found["state"]["b"][0] == 2.5 and found["state"]["b"][1][2:] == (None, True)
    assert found["args"].origin == ("argparse", "Namespace") and found["args"].state == {"layers": 2}
    assert found["state"]["c"]["d"].origin[1] == "set" and found["state"]["c"]["d"].args == ([3],)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_data_or_refused(data: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        unpickle(data, "file")


JUNK = [
    *(None, True, False, -1, 0, 1, 2**70, -0.5, 1e308, float("inf"), float("nan"), "", "rope", "x" * 300, b"x", {}),
    *([], [1], [[]], (1,), (3, 0), (-1, 0), (2, "a"), {"a": 1}, unpickle(b"cos\nsystem\n)R.", "file")),
]


@pytest.fixture(scope="module")
def arguments() -> list[dict[str, Any]]:
    families = ("llama2", "mistral", "qwen2", "qwen3", "llama3.2-tied")
    others = ("window_attn_skip_freq", "use_rope_scaling", "rope_scaling_factor", "num_experts")
    exits = Exits([2], "norm", True)
    every = [megatron_args(tiny_model(family).config, Layout(), exits) for family in families]
    return [{**dict.fromkeys(others), **each} for each in every]


@settings(max_examples=200, deadline=None)
@given(
    family=st.integers(0, 4),
    changes=st.lists(st.tuples(st.integers(0, 99), st.sampled_from(JUNK)), min_size=1, max_size=3),
)
def test_any_arguments_are_used_or_refused(
    arguments: list[dict[str, Any]], family: int, changes: list[tuple[int, Any]]
) -> None:
    values = dict(arguments[family])
    names = sorted(values)
    args = Args("file", {**values, **{names[number % len(names)]: value for number, value in changes}})
    with contextlib.suppress(CheckpointError):
        model = derived_model(derive_config(args, torch.float16), "file")
        check_agreement(args, model.architecture, "config.json")
        found = early_exits(args, model.architecture)
        assert all(1 <= each.spec.layer <= model.architecture.num_layers for each in found)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_a_mangled_file_is_read_or_refused(tmp_path_factory: Any, flips: list[tuple[float, int]], inside: bool) -> None:
    """Bytes of the whole file, or of its pickle alone, whose checksum is then made anew, so that it is read."""
    saved = io.BytesIO()
    tensor = torch.arange(12.0).view(3, 4)
    torch.save({"args": argparse.Namespace(a=1), "model": {"x": tensor, "y": tensor[1:]}}, saved)
    data = bytearray(saved.getvalue())
    with zipfile.ZipFile(saved) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        description = bytearray(archive.read(name))
        others = {each: archive.read(each) for each in archive.namelist() if each != name}
    for place, value in flips:
        changed = description if inside else data
        changed[min(int(place * len(changed)), len(changed) - 1)] = value
    if inside:
        again = io.BytesIO()
        with zipfile.ZipFile(again, "w") as archive:
            for each, content in {name: bytes(description), **others}.items():
                archive.writestr(each, content)
        data = bytearray(again.getvalue())
    path = tmp_path_factory.mktemp("mangled") / "file.pt"
    path.write_bytes(data)
    try:
        file = TorchFile(path)
        model = file.content["model"] if isinstance(file.content, dict) and "model" in file.content else {}
        for key in ("x", "y"):
            if isinstance(model, dict) and key in model:
                stored = file.tensor(model[key], key)
                assert stored.nbytes <= 48
                stored.read(torch.empty(stored.shape, dtype=stored.dtype), (0,) * len(stored.shape))
    except CheckpointError as error:
        assert str(path) in str(error)


def test_no_module_is_imported(tmp_path: Path) -> None:
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()")
    program = (
        "from megatron_ee.importers.megatron.guarded import unpickle\n"
        "print(unpickle(b'ctrap\\nx\\n)R.', 'file').origin)\n"
        "import trap"
    )
    environment = {**os.environ, "PYTHONPATH": f"{Path.cwd()}:{tmp_path}"}
    before = program.removesuffix("import trap")
    done = subprocess.run([sys.executable, "-c", before], capture_output=True, text=True, env=environment, check=True)
    assert "('trap', 'x')" in done.stdout and not (tmp_path / "mark").exists()
    subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, check=True)
    assert (tmp_path / "mark").exists()
