"""No code from a checkpoint is ever run: what could (pickles, eval, remote code, shells) is not in the package.

An honest author is reminded, and a short way around the rules is noticed too; who hides a call well enough gets past.
"""

from __future__ import annotations

import ast
import builtins
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUARDED = "megatron_ee/importers/megatron/"
"""Reads pickles, asked with ``--trust-checkpoint``; all else is banned there too."""

PICKLES = (
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"),
    *("torch.load", "torch.save", "torch.serialization", "torch.jit.load", "torch.jit.save", "torch.package"),
    *("torch.distributed.checkpoint", "torch.utils.model_zoo", "megatron.core.dist_checkpointing"),
    *("pandas.read_pickle", "pandas.to_pickle", "numpy.core.multiarray", "numpy.lib.format"),
)
CODE = (
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__", "torch.hub"),
    *(
        "runpy",
        "code",
        "codeop",
        "imp",
        "importlib.util.spec_from_file_location",
        "importlib.machinery.SourceFileLoader",
    ),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"),
    *("yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all", "yaml.load_all"),
    *("yaml.UnsafeLoader", "yaml.FullLoader", "yaml.Loader", "yaml.CLoader"),
)
PROCESSES = ("multiprocessing", "torch.multiprocessing", "concurrent.futures.ProcessPoolExecutor")
OBJECTS = (
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
    *("send_object_list", "recv_object_list"),
)
SAFE_LOADERS = ("yaml.SafeLoader", "yaml.CSafeLoader")
OPEN_NAMESPACES = ("builtins", "torch", "os", "importlib", "sys.modules", "numpy")
"""Modules of which nothing may be looked up by a name that is not written out."""

ALLOWED = {
    ("megatron_ee/parallel/groups.py", "all_gather_object"): "between the ranks of one run",
    ("megatron_ee/data/prepare.py", "multiprocessing"): "with the processes it starts",
    ("megatron_ee/data/prepare.py", "concurrent.futures.ProcessPoolExecutor"): "with the processes it starts",
    ("megatron_ee/testing/command.py", "multiprocessing"): "with the process it starts",
    ("megatron_ee/testing/ranks.py", "multiprocessing"): "with the processes it starts",
    ("megatron_ee/testing/gpt.py", "megatron.core.dist_checkpointing"): "on what the test wrote",
    ("megatron_ee/checkpoint/gathering.py", "getattr(torch, ...)"): "a dtype's name, from a rank of the same run",
}


class _Walker(ast.NodeVisitor):
    """Collects ``(line, what)``."""

    def __init__(self, tree: ast.Module) -> None:
        self.found: list[tuple[int, str]] = []
        self._names: dict[str, str] = {}
        self._safe_loaders = set(SAFE_LOADERS)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    whole = alias.asname is not None
                    self._names[alias.asname or alias.name.partition(".")[0]] = (
                        alias.name if whole else alias.name.partition(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    self._names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and any(self._dotted(base) in SAFE_LOADERS for base in node.bases):
                self._safe_loaders.add(f".{node.name}")
        self.visit(tree)

    def _report(self, node: ast.AST, what: str) -> None:
        self.found.append((getattr(node, "lineno", 0), what))

    def _dotted(self, node: ast.AST | None) -> str:
        """``torch.load`` for any expression that is plainly that; what no import explains begins with a dot."""
        if isinstance(node, ast.Name):
            if node.id == "__builtins__":
                return "builtins"
            own = f"builtins.{node.id}" if hasattr(builtins, node.id) else f".{node.id}"
            return self._names.get(node.id, own)
        if isinstance(node, ast.Attribute):
            base = self._dotted(node.value)
            return f"{base}.{node.attr}" if base else ""
        if isinstance(node, ast.Subscript) and _text(node.slice):
            base = self._dotted(node.value)
            if base == "sys.modules":
                return _text(node.slice)
            if base == "builtins" or base.endswith(".__dict__"):
                return f"{base.removesuffix('.__dict__')}.{_text(node.slice)}"
        if isinstance(node, ast.Call):
            name, arguments = self._dotted(node.func), [_text(each) for each in node.args]
            if name in ("importlib.import_module", "builtins.__import__") and arguments and arguments[0]:
                return arguments[0]
            if name == "builtins.getattr" and len(arguments) > 1 and arguments[1]:
                return f"{self._dotted(node.args[0])}.{arguments[1]}"
            if name == "builtins.vars" and node.args:
                return f"{self._dotted(node.args[0])}.__dict__"
        return ""

    def _check_name(self, node: ast.AST, name: str) -> bool:
        for banned in (*PICKLES, *CODE, *PROCESSES):
            if name == banned or name.startswith(f"{banned}."):
                self._report(node, banned)
                return True
        return False

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._check_name(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and not node.level:
            for alias in node.names:
                if alias.name == "*":
                    self._report(node, "import *")
                self._check_name(node, f"{node.module}.{alias.name}")

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self._check_name(node, self._dotted(node))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in OBJECTS:
            self._report(node, node.attr)
        if not self._check_name(node, self._dotted(node)):
            self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if not self._check_name(node, self._dotted(node)):
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Subscript) and _text(target.slice) == "trust_remote_code":
                self._require_false(node, "trust_remote_code", node.value)
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if key is not None and _text(key) == "trust_remote_code":
                self._require_false(node, "trust_remote_code", value)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        keywords = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        for name in ("trust_remote_code", "shell", "allow_pickle"):
            if name in keywords:
                self._require_false(node, name, keywords[name])
        self._check_loading(node, keywords)
        self._check_evasion(node)
        if not self._check_name(node, self._dotted(node)):
            self.generic_visit(node)

    def _require_false(self, node: ast.AST, name: str, value: ast.AST) -> None:
        if not (isinstance(value, ast.Constant) and value.value is False):
            self._report(node, f"{name} that is not False")

    def _check_loading(self, node: ast.Call, keywords: dict[str, ast.expr]) -> None:
        name = self._dotted(node.func)
        if name == "yaml.load":
            loader = self._dotted(keywords.get("Loader", node.args[1] if len(node.args) > 1 else None))
            if loader not in self._safe_loaders:
                self._report(node, "yaml.load without a SafeLoader")
        if name == "numpy.load" and len(node.args) > 2:
            self._require_false(node, "allow_pickle", node.args[2])
        owner, _, method = name.rpartition(".")
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("from_pretrained", "from_config"):
            owner, method = owner.rpartition(".")[2], node.func.attr
        if method in ("from_pretrained", "from_config") or name == "transformers.pipeline":
            local = method == "from_config" or _is_true(keywords.get("local_files_only"))
            if "trust_remote_code" not in keywords and (not local or owner.startswith("Auto") or not owner):
                self._report(node, f"{method or name} without trust_remote_code=False")

    def _check_evasion(self, node: ast.Call) -> None:
        name = self._dotted(node.func)
        if name == "importlib.import_module" and node.args and not _text(node.args[0]) and not _is_ours(node.args[0]):
            self._report(node, "importlib.import_module of a variable")
        if name == "builtins.getattr" and len(node.args) > 1 and not _text(node.args[1]):
            base = self._dotted(node.args[0])
            if base in OPEN_NAMESPACES:
                self._report(node, f"getattr({base}, ...)")


def _text(node: ast.AST) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _is_true(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _is_ours(node: ast.AST) -> bool:
    """An f-string of a module of this package."""
    return isinstance(node, ast.JoinedStr) and bool(node.values) and _text(node.values[0]).startswith("megatron_ee.")


def findings(source: str, file: str = "x.py") -> list[tuple[int, str]]:
    """``(line, what)`` of everything that is banned in a file of this name, allowed exceptions left out."""
    found = _Walker(ast.parse(source)).found
    guarded = file.startswith(GUARDED)
    return [
        (line, what)
        for line, what in sorted(set(found))
        if (file, what) not in ALLOWED and not (guarded and (what in PICKLES or what.startswith("allow_pickle")))
    ]


def sources() -> Iterator[tuple[str, str]]:
    """Name, from the repository's root, and content of every Python file that users run."""
    for path in sorted(
        itertools.chain(*(ROOT.joinpath(top).rglob("*.py") for top in ("megatron_ee", "tools", "examples")))
    ):
        if "out" not in path.relative_to(ROOT).parts:  # what the quickstart makes
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def test_nothing_banned_is_used() -> None:
    found = [f"{file}:{line}: {what}" for file, source in sources() for line, what in findings(source, file)]
    assert not found, "\n".join(found)


def test_all_files_are_looked_at() -> None:
    files = [file for file, _ in sources()]
    assert len(files) > 100 and len(set(files)) == len(files)
    expected = {"setup.py", "tools/tune.py", "megatron_ee/checkpoint/store.py", "examples/quickstart/base_model.py"}
    assert expected - set(files) == {"setup.py"}


def test_every_exception_is_still_needed() -> None:
    used = {(file, what) for file, source in sources() for _, what in _Walker(ast.parse(source)).found}
    assert ALLOWED.keys() <= used


BANNED = {
    "import pickle": "pickle",
    "import os, pickle": "pickle",
    "import pickle as harmless": "pickle",
    "from pickle import loads": "pickle",
    "def f():\n    from cloudpickle import dumps": "cloudpickle",
    "import importlib\nimportlib.import_module('pickle')": "pickle",
    "from importlib import import_module as get\nget('dill').loads(x)": "dill",
    "import importlib\nimportlib.import_module(name)": "importlib.import_module of a variable",
    "import importlib\nimportlib.import_module(f'{name}.x')": "importlib.import_module of a variable",
    "__import__('pickle')": "pickle",
    "__import__(name)": "builtins.__import__",
    "import sys\nsys.modules['pickle'].loads(x)": "pickle",
    "import torch\ntorch.load(path)": "torch.load",
    "import torch as t\nt.load(path, weights_only=True)": "torch.load",
    "from torch import load": "torch.load",
    "from torch import *": "import *",
    "import torch\nread = torch.load": "torch.load",
    "import torch\ngetattr(torch, 'load')(path)": "torch.load",
    "import torch\ngetattr(torch, 'lo' + 'ad')(path)": "getattr(torch, ...)",
    "import torch\nvars(torch)['load'](path)": "torch.load",
    "import torch\ntorch.__dict__['load'](path)": "torch.load",
    "import torch\ntorch.save(x, path)": "torch.save",
    "import torch\ntorch.serialization.add_safe_globals([x])": "torch.serialization",
    "import torch.distributed.checkpoint as dcp": "torch.distributed.checkpoint",
    "import torch.distributed as dist\ndist.checkpoint.load(x)": "torch.distributed.checkpoint",
    "from megatron.core import dist_checkpointing": "megatron.core.dist_checkpointing",
    "import numpy as np\nnp.load(path, allow_pickle=True)": "allow_pickle that is not False",
    "import numpy as np\nnp.load(path, None, True)": "allow_pickle that is not False",
    "import joblib": "joblib",
    "import yaml\nyaml.load(text)": "yaml.load without a SafeLoader",
    "import yaml\nyaml.load(text, Loader=yaml.Loader)": "yaml.Loader",
    "import yaml\nyaml.load(text, Loader)": "yaml.load without a SafeLoader",
    "import yaml\nclass L(yaml.FullLoader): pass\nyaml.load(text, L)": "yaml.FullLoader",
    "import yaml\nyaml.unsafe_load(text)": "yaml.unsafe_load",
    "eval(text)": "builtins.eval",
    "run = exec": "builtins.exec",
    "compile(text, 'x', 'exec')": "builtins.compile",
    "import builtins\nbuiltins.eval(text)": "builtins.eval",
    "import builtins\ngetattr(builtins, name)(text)": "getattr(builtins, ...)",
    "__builtins__.eval(text)": "builtins.eval",
    "__builtins__['eval'](text)": "builtins.eval",
    "import os\nos.system(text)": "os.system",
    "from os import system": "os.system",
    "import subprocess\nsubprocess.run(text, shell=True)": "shell that is not False",
    "import subprocess\nsubprocess.Popen(text, shell=flag)": "shell that is not False",
    "import subprocess\nsubprocess.getoutput(text)": "subprocess.getoutput",
    "f(trust_remote_code=True)": "trust_remote_code that is not False",
    "f(trust_remote_code=flag)": "trust_remote_code that is not False",
    "f(**{'trust_remote_code': True})": "trust_remote_code that is not False",
    "options['trust_remote_code'] = True": "trust_remote_code that is not False",
    "AutoTokenizer.from_pretrained(path)": "from_pretrained without trust_remote_code=False",
    "AutoTokenizer.from_pretrained(path, local_files_only=True)": "from_pretrained without trust_remote_code=False",
    "LlamaTokenizer.from_pretrained(path)": "from_pretrained without trust_remote_code=False",
    "make().from_pretrained(path, local_files_only=True)": "from_pretrained without trust_remote_code=False",
    "AutoModel.from_config(config)": "from_config without trust_remote_code=False",
    "import transformers\ntransformers.pipeline('x')": "pipeline without trust_remote_code=False",
    "import torch.distributed as dist\ndist.all_gather_object(a, b)": "all_gather_object",
    "import multiprocessing": "multiprocessing",
    "from multiprocessing.connection import Connection": "multiprocessing",
}


@pytest.mark.parametrize("source", BANNED)
def test_the_walker_notices(source: str) -> None:
    found = findings(source)
    assert any(what.endswith(BANNED[source]) for _, what in found), found


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile(text)",
        "code, pickle = 1, 2\nprint(code, pickle.load)",
        "model.eval()\nengine.load(path)\nself.save(path)",
        "import numpy as np\nnp.load(path, mmap_mode='r', allow_pickle=False)",
        "import yaml\nyaml.safe_load(text)\nyaml.load(text, Loader=yaml.SafeLoader)",
        "import yaml\nclass L(yaml.SafeLoader): pass\nyaml.load(text, L)",
        "import subprocess\nsubprocess.run([a, b], shell=False)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=False)",
        "LlamaTokenizer.from_pretrained(path, local_files_only=True)",
        "import importlib\nimportlib.import_module(f'megatron_ee.commands.{name}')",
        "import torch\ngetattr(torch, 'float32')\ngetattr(x, name)",
        "import torch\ntorch.compile(model)\ntorch.load_inline",
        "def load(): ...\nload()",
        "text = 'pickle, torch.load and eval(...) are only words'",
    ],
)
def test_the_walker_lets_pass(source: str) -> None:
    assert findings(source) == []


def test_the_guarded_importer_may_read_pickles_and_no_more() -> None:
    source = "import pickle, torch, os\ntorch.load(path)\nf(trust_remote_code=True)\nos.system(x)\neval(x)"
    found = [what for _, what in findings(source, f"{GUARDED}legacy.py")]
    assert found == ["trust_remote_code that is not False", "os.system", "builtins.eval"]
    assert len(findings(source, "megatron_ee/checkpoint/store.py")) == 5


def test_a_finding_names_its_line() -> None:
    assert findings("x = 1\n\nimport pickle\n") == [(3, "pickle")]
