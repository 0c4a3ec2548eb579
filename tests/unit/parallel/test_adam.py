"""The choice of Adam, and that each computes, keeps and restores what torch's does.

DeepSpeed's tests run twice: with DeepSpeed, where it is installed, and everywhere with a stand-in written in torch, so
that this package's half of the work is always tested. apex needs a GPU; here there are stand-ins for what may be found
under its name.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatron_ee import platform
from megatron_ee.config.exits import ExitSpec
from megatron_ee.config.schema import OptimizerConfig, ScheduleConfig
from megatron_ee.errors import ConfigError
from megatron_ee.parallel import host_adam
from megatron_ee.parallel.adam import adam_class
from megatron_ee.parallel.host_adam import HostAdam
from megatron_ee.parallel.optimizer import ExitOptimizer, ParameterState
from megatron_ee.parallel.split_adam import join, remainder_of
from megatron_ee.testing.deepspeed import stand_in_deepspeed
from megatron_ee.testing.project import saved_tensors
from megatron_ee.testing.ranks import run_ranks
from megatron_ee.testing.tuning import STEPS, Case, Outcome, tune_cases

Make = Callable[..., tuple[nn.Module, ExitOptimizer]]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["stand-in", pytest.param("installed", marks=pytest.mark.slow)])
def deepspeed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "stand-in":
        for name, module in stand_in_deepspeed().items():
            monkeypatch.setitem(sys.modules, name, module)
    elif importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None:
        pytest.skip("needs g++ and DeepSpeed; pip install 'megatron-ee[deepspeed]'")
    return str(request.param)


class Small(nn.Module):
    """Weights that decay, weights that do not, sizes that fill no vector register, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.matrix = nn.Parameter(torch.randn(37, 29, generator=generator))
        self.bias = nn.Parameter(torch.randn(37, generator=generator))
        self.frozen = nn.Parameter(torch.randn(5, generator=generator), requires_grad=False)
        self.scalar = nn.Parameter(torch.randn(1, generator=generator))


@pytest.fixture
def make(groups: Any) -> Make:
    def make(
        implementation: str, dtype: torch.dtype = torch.float32, decay_towards: str = "zero", weight_decay: float = 0.1
    ) -> tuple[nn.Module, ExitOptimizer]:
        from megatron.core.transformer import TransformerConfig

        config = TransformerConfig(
            num_layers=1, hidden_size=8, num_attention_heads=1, bf16=dtype == torch.bfloat16, params_dtype=dtype
        )
        module = Small().to(platform.device(), dtype)
        settings = OptimizerConfig(
            lr=1e-2, min_lr=1e-3, weight_decay=weight_decay, clip_grad=5.0,
            implementation=implementation, decay_towards=decay_towards,  # type: ignore[arg-type]
        )  # fmt: skip
        return module, ExitOptimizer([module], config, groups, settings, ScheduleConfig("linear", 0.2), 8)

    return make


def step(module: nn.Module, optimizer: ExitOptimizer, steps: range) -> None:
    """Steps with gradients that depend on the step alone, so that roundings do not feed on themselves."""
    for number in steps:
        optimizer.zero_gradients()
        optimizer.begin(module)
        generator = torch.Generator().manual_seed(number)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))  # type: ignore[attr-defined]
        optimizer.reduce_gradients()
        optimizer.step(math.sqrt(float(optimizer.squared_norm(module))))


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> bool:
    difference = (ours.detach().float() - theirs.detach().float()).abs().max()
    return float(difference) <= tolerance * float(theirs.detach().abs().max())


def exact_state(state: ParameterState) -> dict[str, torch.Tensor]:
    """All float32, whichever form the main weights have."""
    tensors = dict(state.tensors)
    if "remainder" in tensors:
        weight = state.parameter.detach().view(-1)[state.start : state.stop]
        tensors["main"] = join(weight, tensors.pop("remainder"))
    return tensors


def compare_states(ours: ExitOptimizer, theirs: ExitOptimizer) -> None:
    for mine, other in zip(ours.parameter_states(), theirs.parameter_states(), strict=True):
        assert (mine.start, mine.stop) == (other.start, other.stop)
        one, two = exact_state(mine), exact_state(other)
        assert one.keys() == two.keys() and ("main" in one) == (mine.parameter.dtype == torch.bfloat16)
        for name, tensor in one.items():
            assert tensor.dtype == torch.float32 and tensor.shape == (mine.stop - mine.start,)
            assert close(tensor.cpu(), two[name].cpu()), name
    assert ours.counters() == theirs.counters()


def carry_over(old: ExitOptimizer, new: ExitOptimizer, weights: nn.Module, into: nn.Module) -> None:
    """Restore, in the order that a training checkpoint does: state, weights, counters."""
    for to, of in zip(list(new.parameter_states()), list(old.parameter_states()), strict=True):
        tensors = exact_state(of)
        if "remainder" in to.tensors:
            weight = of.parameter.detach().view(-1)[of.start : of.stop]
            tensors["remainder"] = remainder_of(tensors["main"].to(weight.device), weight)
        for name, tensor in to.tensors.items():
            tensor.copy_(tensors[name])
    with torch.no_grad():
        for parameter, saved in zip(into.parameters(), weights.parameters(), strict=True):
            parameter.copy_(saved)
    new.restore_counters(old.counters())


@pytest.mark.parametrize("dtype", DTYPES)
def test_deepspeed_equals_torch(dtype: torch.dtype, deepspeed: str, make: Make) -> None:
    ours, optimizer = make("deepspeed_cpu", dtype)
    theirs, native = make("torch", dtype)
    start = [parameter.detach().clone() for parameter in ours.parameters()]
    inner = next(optimizer._adams())
    assert isinstance(inner, HostAdam)
    used = {"installed": "DeepSpeedCPUAdam", "stand-in": "StandInCPUAdam"}
    assert type(inner._inner).__name__ == used[deepspeed]
    step(ours, optimizer, range(6))
    step(theirs, native, range(6))
    compare_states(optimizer, native)
    assert optimizer.counters()["adam_step"] == 6
    for mine, other, before in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        assert mine.dtype == dtype
        assert close(mine, other, 1e-5 if dtype == torch.float32 else 2**-8)  # of bfloat16 one may round otherwise
        assert torch.equal(mine, before) != mine.requires_grad


def plain_weights(module: nn.Module, steps: int) -> dict[str, torch.Tensor]:
    """Main weights after ``steps`` of torch's AdamW, and decay of 20 towards what ``module`` holds, matrices only."""
    start = {name: p.detach().float().clone() for name, p in module.named_parameters() if p.requires_grad}
    mains = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    plain = torch.optim.AdamW(mains.values(), lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    rates = [5e-3, 1e-2, *(1e-2 - 9e-3 * number / 6 for number in range(1, 7))]  # as ``make``: two steps of warm-up
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        for main in mains.values():
            main.grad = torch.randn(main.shape, generator=generator).to(main.device)
        nn.utils.clip_grad_norm_(mains.values(), 5.0)
        plain.param_groups[0]["lr"] = rates[number]
        with torch.no_grad():
            mains["matrix"].lerp_(start["matrix"], rates[number] * 20.0)
        plain.step()
    return {name: main.detach() for name, main in mains.items()}


def check_decay_towards_initial(make: Make, implementation: str, dtype: torch.dtype) -> None:
    """Equal to the same in plain torch; and resumed, equal to uninterrupted, bit for bit."""
    module, optimizer = make(implementation, dtype, "initial", 20.0)
    expected = plain_weights(module, 6)
    step(module, optimizer, range(6))
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for state in optimizer.parameter_states():
        name, tensors = names[id(state.parameter)], exact_state(state)
        assert ("initial" in tensors) == (name == "matrix")
        assert close(tensors.get("main", state.parameter.detach().view(-1)).cpu(), expected[name].view(-1).cpu()), name
    first, old = make(implementation, dtype, "initial", 20.0)
    step(first, old, range(3))
    second, new = make(implementation, dtype, "initial", 20.0)
    for state in new.parameter_states():  # as after another initialisation
        if "initial" in state.tensors:
            state.tensors["initial"].zero_()
    carry_over(old, new, first, second)
    step(second, new, range(3, 6))
    assert all(map(torch.equal, second.parameters(), module.parameters()))
    for mine, other in zip(new.parameter_states(), optimizer.parameter_states(), strict=True):
        assert all(torch.equal(mine.tensors[name], tensor) for name, tensor in other.tensors.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_decays_towards_initial_values(dtype: torch.dtype, make: Make) -> None:
    check_decay_towards_initial(make, "torch", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_deepspeed_decays_towards_initial_values(dtype: torch.dtype, deepspeed: str, make: Make) -> None:
    check_decay_towards_initial(make, "deepspeed_cpu", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "before, after", [("deepspeed_cpu",) * 2, ("torch", "deepspeed_cpu"), ("deepspeed_cpu", "torch")]
)
def test_deepspeed_resumes(before: str, after: str, dtype: torch.dtype, deepspeed: str, make: Make) -> None:
    straight, uninterrupted = make(after, dtype)
    step(straight, uninterrupted, range(8))
    first, old = make(before, dtype)
    step(first, old, range(5))
    second, new = make(after, dtype)
    carry_over(old, new, first, second)
    assert new.counters() == old.counters() and new.counters()["adam_step"] == 5
    step(second, new, range(5, 8))
    compare_states(new, uninterrupted)
    if before == after:
        for mine, other in zip(second.parameters(), straight.parameters(), strict=True):
            assert torch.equal(mine, other)
        for one, two in zip(new.parameter_states(), uninterrupted.parameter_states(), strict=True):
            for name, tensor in one.tensors.items():
                assert torch.equal(tensor, two.tensors[name]), name


def test_deepspeed_goes_on_from_float32_weights_that_others_wrote(deepspeed: str, make: Make) -> None:
    (ours, optimizer), (theirs, native) = make("deepspeed_cpu"), make("torch")
    for module, each in ((ours, optimizer), (theirs, native)):
        step(module, each, range(1))
        with torch.no_grad():
            module.matrix.mul_(3.0)  # type: ignore[operator]
        step(module, each, range(1, 2))
    assert close(ours.matrix, theirs.matrix)  # type: ignore[arg-type]


def test_deepspeed_keeps_its_state_in_host_memory(deepspeed: str, make: Make) -> None:
    module, optimizer = make("deepspeed_cpu", torch.bfloat16)
    step(module, optimizer, range(2))
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    count = 0
    for state in optimizer.parameter_states():
        assert state.parameter.main_param is None  # type: ignore[attr-defined]  # megatron-core's own copy
        for tensor in state.tensors.values():
            assert tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() not in weights
            count += tensor.numel()
    assert count == 3 * (37 * 29 + 37 + 1)


def test_deepspeeds_page_locked_memory_is_one_buffer_of_the_size_that_is_needed(
    deepspeed: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers, real = [], platform.host_buffer

    def host_buffer(nbytes: int, *instead: str) -> torch.Tensor:
        buffers.append((nbytes, *instead))
        return real(nbytes, *instead)

    monkeypatch.setattr(platform, "host_buffer", host_buffer)
    make("deepspeed_cpu")
    weights = 37 * 29 + 37 + 1
    assert buffers == [(0,), (2 * 4 * weights, "optimizer.implementation to auto")]  # main weights and gradients


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_makes_no_tensor_from_a_number_of_the_host(
    dtype: torch.dtype, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each would be a copy that the host waits for."""
    module, optimizer = make("torch", dtype)
    step(module, optimizer, range(1))
    optimizer.zero_gradients()
    monkeypatch.setattr(torch, "tensor", None)
    optimizer.step(1.0)


def test_stage_that_trains_nothing(deepspeed: str, groups: Any) -> None:
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    settings = OptimizerConfig(implementation="deepspeed_cpu")
    optimizer = ExitOptimizer([], config, groups, settings, ScheduleConfig(), 2)
    optimizer.zero_gradients()
    optimizer.reduce_gradients()
    optimizer.step(0.0)
    assert list(optimizer.parameter_states()) == [] and optimizer.counters()["adam_step"] == 0


def tune(models: Any, cases: list[Case], output: Path, start: Path | None, which: str) -> list[Outcome]:
    if which == "stand-in":
        sys.modules.update(stand_in_deepspeed())
    return tune_cases(models, cases, output, start)


@pytest.fixture(scope="module")
def llama2(saved_model: Any) -> Path:
    """A tiny model, saved before there is a stand-in: saving it imports a DeepSpeed that is installed."""
    return saved_model("llama2")[0]


@pytest.mark.parametrize("deepspeed", ["stand-in", pytest.param("installed", marks=pytest.mark.slow)], indirect=True)
def test_deepspeed_across_data_parallel_ranks(llama2: Path, deepspeed: str, tmp_path: Path) -> None:
    models = {"llama2": llama2}
    specs = (ExitSpec(1, "embedding", "own"), ExitSpec(3, "norm", "low_rank", rank=4))
    whole = (((1, 4), (1, 3)),)

    def case(implementation: str, dtype: str) -> Case:
        return Case(f"{implementation}-{dtype}", "llama2", specs, whole, implementation=implementation, dtype=dtype)

    single, half = case("deepspeed_cpu", "float32"), case("deepspeed_cpu", "bfloat16")
    streamed = dataclasses.replace(half, name="streamed", residency="disk")
    native = case("torch", "float32")
    two, again, one = tmp_path / "two", tmp_path / "again", tmp_path / "one"
    run_ranks(2, tune, models, [single, half, streamed], two, None, deepspeed)
    run_ranks(2, tune, models, [single, half], again, two, deepspeed)
    run_ranks(1, tune, models, [native], one, None, deepspeed)
    run_ranks(1, tune, models, [single], one, two, deepspeed)  # resharded

    wanted, found = (saved_tensors(two / each.name / f"step-{STEPS}") for each in (half, streamed))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in wanted.items())
    for each in (single, half):
        wanted, resumed = (saved_tensors(path / each.name / f"step-{STEPS}") for path in (two, again))
        assert wanted.keys() == resumed.keys()
        assert any(key.startswith("optimizer.main.") for key in wanted) == (each is half)
        for key, tensor in wanted.items():
            assert torch.equal(tensor, resumed[key]), key
    wanted = saved_tensors(one / native.name / f"step-{STEPS}")
    for path in (two / single.name, one / single.name):
        for key, tensor in saved_tensors(path / f"step-{STEPS}").items():
            assert close(tensor, wanted[key], 1e-5), f"{path}: {key}"


def test_deepspeed_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nowhere:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "deepspeed":
                raise ModuleNotFoundError("No module named 'deepspeed'", name=name)

    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Nowhere(), *sys.meta_path])
    with pytest.raises(ConfigError, match=r"^optimizer.implementation: .* not installed; pip install 'megatron-ee\["):
        adam_class("deepspeed_cpu", torch.float32)


BUILD_ERROR = """Error building extension 'cpu_adam': [1/3] g++ -MMD -MF cpu_adam.o.d -c cpu_adam.cpp -o cpu_adam.o
FAILED: [code=127] cpu_adam.o
/bin/sh: 1: g++: not found
ninja: build stopped: subcommand failed.
"""


def test_deepspeed_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise RuntimeError(BUILD_ERROR)

    for name, module in stand_in_deepspeed(load).items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ConfigError) as error:
        adam_class("deepspeed_cpu", torch.float32)
    assert str(error.value) == (
        "optimizer.implementation: DeepSpeed's CPU Adam cannot be compiled or loaded here "
        "(RuntimeError: /bin/sh: 1: g++: not found); it needs g++ with OpenMP and ninja"
    )


@pytest.mark.parametrize("seconds, said", [(0.0, False), (0.5, True)])
def test_compiling_is_announced(
    seconds: float, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host_adam, "PATIENCE_SECONDS", 0.2)
    for name, module in stand_in_deepspeed(lambda: time.sleep(seconds)).items():
        monkeypatch.setitem(sys.modules, name, module)
    assert adam_class("deepspeed_cpu", torch.float32) is HostAdam
    captured = capsys.readouterr()
    assert captured.out == "" and ("is being compiled" in captured.err) == said


# What may be found under the name of apex. NVIDIA's FusedAdam counts its steps in the parameter group.
APEX_ADAM = """
import torch
class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, capturable=False):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        assert adam_w_mode and not capturable
        {construct}
    @torch.no_grad()
    def step(self, closure=None):
        {step}
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                root = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
                p.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1 ** group["step"]))
class FusedSGD:
    pass
"""
NO_CUDA = "raise RuntimeError('apex.optimizers.FusedAdam requires cuda extensions')"
WRONG_CUDA = "raise RuntimeError('CUDA error: no kernel image is available for execution on the device')"
APEXES = {
    "missing": (None, "apex is not installed"),
    "of-python-2": ({"__init__": "print 'flash'"}, "is not NVIDIA's package"),
    "unrelated": (
        {"__init__": "from pyramid_mailer.interfaces import IMailer", "models": ""},
        "is not NVIDIA's package",
    ),
    "without-kernels": (
        {"__init__": "", "optimizers": APEX_ADAM.format(construct=NO_CUDA, step="")},
        "(RuntimeError: apex.optimizers.FusedAdam requires cuda extensions)",
    ),
    "kernels-for-another-gpu": (
        {"__init__": "", "optimizers": APEX_ADAM.format(construct="", step=WRONG_CUDA)},
        "(RuntimeError: CUDA error: no kernel image is available for execution on the device)",
    ),
}
TWO_STEPS = """
import torch
from megatron_ee.config.schema import OptimizerConfig, ScheduleConfig
from megatron_ee.errors import ConfigError
from megatron_ee.parallel.groups import process_groups
from megatron_ee.parallel.optimizer import ExitOptimizer, ParameterState
from megatron_ee.parallel.split_adam import join, remainder_of
from megatron.core.transformer import TransformerConfig

config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
with process_groups() as groups:
    for implementation in ("apex", "auto"):
        module = torch.nn.Linear(4, 4)
        settings = OptimizerConfig(implementation=implementation, min_lr=0.0, clip_grad=0.1)
        try:
            optimizer = ExitOptimizer([module], config, groups, settings, ScheduleConfig(), 2)
        except ConfigError as error:
            print(error)
            continue
        before = module.weight.detach().clone()
        for _ in range(2):
            optimizer.zero_gradients()
            module.weight.main_grad.fill_(1.0)
            optimizer.step(float(optimizer.squared_norm(module)) ** 0.5)
        assert not torch.equal(before, module.weight)
        print([(type(each).__module__, type(each).__name__) for each in optimizer._adams()])
"""


def write_apex(directory: Path, files: dict[str, str] | None) -> Path:
    if files is not None:
        (directory / "apex").mkdir(parents=True)
        for name, text in files.items():
            (directory / "apex" / f"{name}.py").write_text(text)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("which", APEXES)
def test_apex_that_does_not_work(which: str, tmp_path: Path) -> None:
    files, reason = APEXES[which]
    if files is None and importlib.util.find_spec("apex") is not None:
        pytest.skip("an apex is installed")
    paths = [str(write_apex(tmp_path, files)), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TWO_STEPS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    refused, chosen = done.stdout.splitlines()
    assert refused.startswith("optimizer.implementation: ") and reason in refused
    assert refused.endswith("; install NVIDIA apex from its source with CUDA kernels, or use auto")
    assert chosen == "[('torch.optim.adamw', 'AdamW')]"


@pytest.fixture
def apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for an apex that works, in torch."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    write_apex(tmp_path, {"__init__": "", "optimizers": APEX_ADAM.format(construct="", step="")})
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", ["auto", "apex"])
def test_apex_that_works_is_taken(implementation: str, dtype: torch.dtype, apex: None, make: Make) -> None:
    ours, optimizer = make(implementation, dtype)
    theirs, native = make("torch", dtype)
    assert [type(each).__name__ for each in optimizer._adams()] == ["FusedAdam"]
    assert [type(each).__name__ for each in native._adams()] == ["AdamW" if dtype == torch.float32 else "SplitAdam"]
    step(ours, optimizer, range(3))
    step(theirs, native, range(3))
    compare_states(optimizer, native)
    resumed_weights, resumed = make(implementation, dtype)
    carry_over(optimizer, resumed, ours, resumed_weights)
    step(resumed_weights, resumed, range(3, 6))
    step(theirs, native, range(3, 6))
    compare_states(resumed, native)
    for mine, other in zip(resumed_weights.parameters(), theirs.parameters(), strict=True):
        assert close(mine, other, 1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_apex_decays_towards_initial_values(dtype: torch.dtype, apex: None, make: Make) -> None:
    check_decay_towards_initial(make, "apex", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_apex_on_a_gpu(dtype: torch.dtype, make: Make) -> None:
    try:
        fused = adam_class("apex", dtype)
    except ConfigError as error:
        pytest.skip(str(error))
    assert fused.__module__.startswith("apex.")
    ours, optimizer = make("auto", dtype)
    theirs, native = make("torch", dtype)
    assert [type(each) for each in optimizer._adams()] == [fused]
    step(ours, optimizer, range(5))
    step(theirs, native, range(5))
    compare_states(optimizer, native)


@pytest.mark.gpu
def test_deepspeed_takes_little_device_memory(deepspeed: str, groups: Any) -> None:
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, bf16=True, params_dtype=torch.bfloat16
    )
    held = {}
    for implementation in ("torch", "deepspeed_cpu"):
        before = torch.cuda.memory_allocated()
        module = nn.Linear(4096, 4096, bias=False, device=platform.device(), dtype=torch.bfloat16)
        settings = OptimizerConfig(implementation=implementation)  # type: ignore[arg-type]
        optimizer = ExitOptimizer([module], config, groups, settings, ScheduleConfig(), 2)
        step(module, optimizer, range(2))
        optimizer.zero_gradients()
        held[implementation] = torch.cuda.memory_allocated() - before
        del module, optimizer
        gc.collect()
    assert held["torch"] - held["deepspeed_cpu"] >= 0.9 * 12 * 4096 * 4096
