"""What ``doctor`` checks. Each check is one function; one that fails is a finding, and the others still run."""

from __future__ import annotations

import errno
import fcntl
import importlib
import os
import platform as python_platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from megatron_ee.tables import counted

PACKAGE = "megatron-ee"
FEW_BYTES, LITTLE_MEMORY = 10e9, 2e9
"""Free disk and memory in bytes below which a warning is due."""
BUSY = 0.75
"""Load per processor above which measured times are not to be trusted."""
Severity = Literal["ok", "off", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: what was checked.
        severity: ``ok``; ``off`` for something optional that is not there; ``warning`` for something that limits what
            works; ``error`` for something that tuning needs.
        found: one line.
        advice: what to do; empty if there is nothing to do.
    """

    name: str
    severity: Severity
    found: str
    advice: str = ""


Check = Callable[[], Iterable[Finding]]


def check_machine(output: Path, *, build: bool = False) -> list[Finding]:
    """Run all checks. ``output``: where runs will write. ``build``: compile what is compiled at its first use."""
    needed: dict[str, Check] = {
        "python": _python,
        "libraries": _libraries,
        "megatron-core": _megatron,
        "process group": _process_group,
        "output": lambda: _output(output),
    }
    others: dict[str, Check] = {
        "GPU": _gpu,
        "network": _network,
        "apex": _apex,
        "DeepSpeed": lambda: _deepspeed(build),
        "compiler": lambda: _compiler(build),
        "processors": _processors,
        "memory": _memory,
        "extras": _extras,
    }
    return [
        finding
        for checks, severity in ((needed, "error"), (others, "warning"))
        for name, check in checks.items()
        for finding in _guarded(name, check, severity)  # type: ignore[arg-type]
    ]


def _guarded(name: str, check: Check, severity: Severity) -> list[Finding]:
    """The findings of a check, and if it fails, one of this severity."""
    found: list[Finding] = []
    try:
        found.extend(check())
    except Exception as error:  # a broken installation raises anything
        found.append(Finding(name, severity, f"the check failed: {_line(error)}"))
    return found


def _python() -> Iterator[Finding]:
    version, wanted = python_platform.python_version(), metadata.metadata(PACKAGE)["Requires-Python"]
    yield _within("python", version, wanted or "", f"{version} on {python_platform.system()}")


def _libraries() -> Iterator[Finding]:
    """Every library that the package requires: installed in a version that the tests have run with, and importable."""
    from packaging.requirements import Requirement

    modules, complete = {"pyyaml": "yaml", "megatron-core": "megatron.core"}, True
    for line in metadata.requires(PACKAGE) or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "error", "not installed", f"pip install '{name}{requirement.specifier}'")
            complete = False
            continue
        if name == "megatron-core":
            continue
        try:
            importlib.import_module(modules.get(name, name.replace("-", "_")))
        except Exception as error:
            yield Finding(name, "error", f"{version} cannot be imported: {_line(error)}", "install it anew")
            complete = False
            continue
        finding = _within(name, version, str(requirement.specifier))
        if finding.severity != "ok" or name in ("torch", "transformers"):
            yield finding
    if complete:
        yield Finding("libraries", "ok", "all required ones can be imported")


def _megatron() -> Iterator[Finding]:
    """megatron-core in the tested range, with the parts that are used."""
    from packaging.requirements import Requirement

    requirements = [Requirement(line) for line in metadata.requires(PACKAGE) or ()]
    (own,) = (
        each
        for each in requirements
        if each.name == "megatron-core" and (each.marker is None or each.marker.evaluate({"extra": ""}))
    )
    importlib.import_module("megatron_ee.parallel.optimizer")
    importlib.import_module("megatron_ee.model.layer")
    yield _within("megatron-core", metadata.version("megatron-core"), str(own.specifier))


def _gpu() -> Iterator[Finding]:
    import torch

    built = torch.version.cuda
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            found = f"{device.name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, CUDA {built}"
            bfloat16 = torch.cuda.get_device_capability(index) >= (8, 0)
            yield Finding(
                f"GPU {index}",
                "ok" if bfloat16 else "warning",
                found,
                "" if bfloat16 else "it has no bfloat16 units: use model.dtype float32",
            )
        nccl = torch.distributed.is_nccl_available()
        found = ".".join(map(str, torch.cuda.nccl.version())) if nccl else "this torch has none"
        yield Finding("NCCL", "ok" if nccl else "error", found, "" if nccl else "install a torch with NCCL")
        return
    there = os.path.exists("/proc/driver/nvidia/version") or os.path.exists("/dev/nvidiactl")
    if built is None and there:
        yield Finding("GPU", "warning", "an NVIDIA driver, but torch is built for CPUs", "install torch's CUDA build")
    elif built is None:
        yield Finding("GPU", "off", "none; torch is built for CPUs")
    elif os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield Finding("GPU", "off", "hidden by CUDA_VISIBLE_DEVICES, which is empty")
    else:
        reason = "its driver does not answer torch" if there else "none"
        advice = f"the driver may be older than CUDA {built} needs" if there else ""
        yield Finding("GPU", "warning" if there else "off", f"{reason}; torch is built for CUDA {built}", advice)


def _process_group() -> Iterator[Finding]:
    """The groups that every command forms, in this process alone, whatever a launcher set in the environment."""
    import torch
    import torch.distributed as dist

    from megatron_ee import platform
    from megatron_ee.parallel.groups import process_groups

    with process_groups(alone=True) as groups:
        total = torch.ones(1, device=platform.device())
        dist.all_reduce(total, group=groups.world)
        total.item()
    yield Finding("process group", "ok", f"{platform.communication_backend()} sums over this process")


def _network() -> Iterator[Finding]:
    """What several processes need: a port, and this machine's name."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        found.listen(1)
        port = found.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            yield Finding("port", "ok", f"127.0.0.1:{port} was free and accepts connections")
    name = socket.gethostname()
    hosts = Path("/etc/hosts")
    known = hosts.is_file() and name in hosts.read_text(encoding="utf-8", errors="replace").split()
    where = "in /etc/hosts" if known else "not in /etc/hosts: several processes need a name server that knows it"
    yield Finding("host name", "ok", f"{name}, {where}")


def _apex() -> Iterator[Finding]:
    from megatron_ee.parallel.adam import find_apex_adam

    found = find_apex_adam()
    if not isinstance(found, str):
        yield Finding("apex", "ok", "its FusedAdam works")
    elif found.endswith("not installed"):
        yield Finding("apex", "off", "not installed; torch's AdamW is used")
    elif "not NVIDIA's" in found:
        yield Finding(
            "apex", "warning", found, "not used; `pip uninstall apex`: the package of that name on PyPI is another"
        )
    else:
        yield Finding("apex", "warning", found, "not used; build it from NVIDIA's source for this torch")


def _deepspeed(build: bool) -> Iterator[Finding]:
    """DeepSpeed's CPU Adam: compiled already, or what it will need."""
    name = "DeepSpeed's CPU Adam"
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        yield Finding(name, "off", "DeepSpeed is not installed", "pip install 'megatron-ee[deepspeed]'")
        return
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    if lock := next(root.glob("**/cpu_adam/lock"), None):
        advice = f"every run waits for it; if no compiler is running, it was killed: delete {lock}"
        yield Finding(name, "warning", f"{version}, being compiled by another process", advice)
        return
    if build:
        from megatron_ee.errors import ConfigError
        from megatron_ee.parallel.host_adam import load_deepspeed

        try:
            load_deepspeed()
        except ConfigError as error:
            yield Finding(name, "warning", f"{version}: {error}")
            return
        yield Finding(name, "ok", f"{version}, compiled")
        return
    if any(root.glob("**/cpu_adam/cpu_adam.so")):
        yield Finding(name, "ok", f"{version}, compiled under {root}")
    elif missing := [tool for tool in ("g++", "ninja") if not _tool(tool)]:
        advice = f"it is compiled at its first use: install {' and '.join(missing)}"
        yield Finding(name, "warning", f"{version}, not compiled; no {' and no '.join(missing)}", advice)
    else:
        yield Finding(name, "ok", f"{version}; it is compiled at its first use, or by doctor --build")


def _compiler(build: bool) -> Iterator[Finding]:
    """What ``generate --compile`` needs."""
    from megatron_ee import platform

    compiler, there = platform.cpp_compiler()
    if not there:
        yield Finding("compiler", "warning", f"no {compiler}", "needed for --compile on a CPU: install g++ or set CXX")
        return
    if not build:
        yield Finding("compiler", "ok", f"{shutil.which(compiler)}")
        return
    import torch

    result = torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=platform.device()))
    works = bool((result == 1).all())
    yield Finding(
        "compiler", "ok" if works else "warning", "torch.compile works" if works else "torch.compile is wrong"
    )


def _processors() -> Iterator[Finding]:
    import torch

    usable, threads, load = len(os.sched_getaffinity(0)), torch.get_num_threads(), os.getloadavg()[0]
    found = f"{counted(usable, 'processor')}, {counted(threads, 'thread')} per process, load {load:.1f}"
    if threads > usable:
        yield Finding("processors", "warning", found, f"set OMP_NUM_THREADS to at most {usable}, over all processes")
    elif load > BUSY * usable:
        yield Finding("processors", "warning", found, "other work is running: measured times will be too long")
    else:
        yield Finding("processors", "ok", found)


def _memory() -> Iterator[Finding]:
    import psutil

    from megatron_ee import platform

    memory, free = psutil.virtual_memory(), platform.free_host_memory()
    found = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    limit = min((limit for limit, _ in platform.control_group_limits()), default=memory.total)
    if limit < memory.total:
        found += (
            f"; its control group lets this process use {limit / 1e9:.1f} GB, of which {free / 1e9:.1f} GB are free"
        )
    little = free < LITTLE_MEMORY
    yield Finding(
        "memory", "warning" if little else "ok", found, "free some before a model is loaded" if little else ""
    )


def _output(output: Path) -> Iterator[Finding]:
    """The file system that runs will write to: room, locks, and renaming of directories."""
    place = output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    few = free < FEW_BYTES
    yield Finding(
        "disk",
        "warning" if few else "ok",
        f"{free / 1e9:.1f} GB free at {place}",
        "checkpoints of a run may not fit; plan says how large they are" if few else "",
    )
    try:
        with tempfile.TemporaryDirectory(prefix=".megatron-ee-doctor-", dir=place) as directory:
            yield _locks(Path(directory))
            (Path(directory) / "a").mkdir()
            os.rename(Path(directory) / "a", Path(directory) / "b")
    except OSError as error:
        advice = "choose another --output" if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM) else ""
        yield Finding("output", "error", f"{place} cannot be written to: {error.strerror}", advice)


def _locks(directory: Path) -> Finding:
    """Whether a second writer is kept out."""
    with open(directory / "lock", "w") as first, open(directory / "lock", "w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            advice = "make sure that only one run writes to an output"
            return Finding("file locks", "warning", f"this file system has none ({error.strerror})", advice)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return Finding("file locks", "ok", "a second writer is kept out")
    return Finding("file locks", "warning", "they have no effect", "make sure that only one run writes to an output")


def _extras() -> Iterator[Finding]:
    """The optional packages, by the name that pip installs them under."""
    from packaging.requirements import Requirement

    for extra in metadata.metadata(PACKAGE).get_all("Provides-Extra") or ():
        if extra in ("test", "docs", "deepspeed"):
            continue
        wanted = [
            requirement
            for requirement in map(Requirement, metadata.requires(PACKAGE) or ())
            if requirement.marker is not None
            and requirement.marker.evaluate({"extra": extra})
            and not requirement.marker.evaluate({"extra": ""})
        ]
        missing = [each.name for each in wanted if not _installed(each.name)]
        if missing:
            advice = f"pip install '{PACKAGE}[{extra}]'"
            yield Finding(f"extra {extra}", "off", f"{', '.join(missing)} not installed", advice)
        else:
            yield Finding(
                f"extra {extra}", "ok", ", ".join(f"{each.name} {metadata.version(each.name)}" for each in wanted)
            )


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _tool(name: str) -> bool:
    """Whether a program is on the path, or beside Python, where ninja is in an environment that is not activated."""
    return any(shutil.which(name, path=path) for path in (None, str(Path(sys.executable).parent)))


def _within(name: str, version: str, wanted: str, found: str = "") -> Finding:
    """``ok`` if a version is in the range that the tests have run with."""
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(wanted).contains(re.sub(r"\+.*", "", version), prereleases=True):
        return Finding(name, "ok", found or version)
    return Finding(name, "warning", f"{found or version} was not tested, only {wanted}", f"install {name} {wanted}")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
