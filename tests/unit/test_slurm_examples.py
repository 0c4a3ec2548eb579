"""The SLURM examples, run with stand-ins for SLURM, torchrun and Python: what they start, forward and put back."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from megatron_ee.commands.tune import parser

EXAMPLES = Path(__file__).resolve().parents[2] / "examples/slurm"
SCRIPTS = ["tune_torchrun.sbatch", "tune_srun.sbatch"]

SCONTROL = """
case "$1" in
    show) printf 'node7\\nnode8\\n' ;;
    requeue) echo "$2" >>"$RECORD/requeued" ;;
esac
"""

# One task where torchrun starts the processes, else as many as SLURM was asked for; signals are passed on.
SRUN = """
printf '%s\\n' "$@" >"$RECORD/srun"
while [[ "$1" == --* ]]; do shift; done
tasks=()
for ((task = 0; task < TASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=$TASKS "$@" &
    tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
status=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task"; result=$?; done
    ((result > status)) && status=$result
done
exit "$status"
"""

# torchrun with its processes, or one process: it ends as OUTCOME says.
PROCESS = """
rank="${RANK:-0}"
printf '%s\\n' "$@" >"$RECORD/arguments-$rank"
env >"$RECORD/environment-$rank"
state() { [ "$rank" != 0 ] || printf "$FORMAT" "$1" >"$OUTPUT/status.json"; }
case "$OUTCOME" in
    finished) state finished ;;
    failed) state failed; exit 3 ;;
    crashed) exit 4 ;;
    killed)
        touch "$RECORD/started-$rank"
        for ((tick = 0; tick < 400; tick++)); do sleep 0.05; done
        exit 5 # no signal came
        ;;
    interrupted)
        trap 'stop=1' USR1
        state running
        touch "$RECORD/started-$rank"
        for ((tick = 0; tick < 400; tick++)); do [ -z "${stop:-}" ] || break; sleep 0.05; done
        [ -n "${stop:-}" ] || exit 5 # no signal came
        sleep 0.3
        state interrupted
        exit "$INTERRUPTED_STATUS"
        ;;
esac
"""


OVERRIDES = ["--data.train", "[corpus/wiki, corpus/code]"]
COMPACT = '{"state":"%s","step":3}'
INDENTED = json.dumps({"state": "%s", "step": 3, "steps": 4}, indent=2)


class Job:
    """A batch script in a job of two machines."""

    def __init__(self, script: str, folder: Path, outcome: str, status_format: str = INDENTED) -> None:
        self.record, self.output, stand_ins = folder / "record", folder / "out put", folder / "bin"
        for directory in (self.record, self.output, stand_ins):
            directory.mkdir()
        for name, body in {"scontrol": SCONTROL, "srun": SRUN, "torchrun": PROCESS, "python": PROCESS}.items():
            (stand_ins / name).write_text(f"#!/usr/bin/env bash\n{body}")
            (stand_ins / name).chmod(0o755)
        by_torchrun = "torchrun" in script
        self.tasks = 1 if by_torchrun else 4
        self.environment = os.environ | {
            "PATH": f"{stand_ins}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "41234",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "4",
            "SLURM_GPUS_ON_NODE": "2",
            "TASKS": str(self.tasks),
            "RECORD": str(self.record),
            "OUTPUT": str(self.output),
            "OUTCOME": outcome,
            "FORMAT": status_format,
            "INTERRUPTED_STATUS": "1" if by_torchrun else "0",
        }
        self.line = ["bash", str(EXAMPLES / script), "my run.yaml", str(self.output), *OVERRIDES]

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.line, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self) -> tuple[int, str]:
        """Exit status and stderr."""
        process = self.start()
        _, errors = process.communicate(timeout=30)
        return process.returncode, errors

    @property
    def requeued(self) -> str:
        path = self.record / "requeued"
        return path.read_text() if path.exists() else ""

    def arguments(self, program: str) -> list[str]:
        return (self.record / program).read_text().splitlines()

    def variables(self, rank: int) -> dict[str, str]:
        lines = (self.record / f"environment-{rank}").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture(params=SCRIPTS)
def script(request: Any) -> str:
    return request.param


def test_syntax(script: str) -> None:
    subprocess.run(["bash", "-n", EXAMPLES / script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", EXAMPLES / script], check=True)


def test_a_finished_run_is_over(script: str, tmp_path: Path) -> None:
    job = Job(script, tmp_path, "finished")
    assert job.run() == (0, "")
    assert job.requeued == ""


@pytest.mark.parametrize("status_format", [COMPACT, INDENTED])
def test_a_run_that_is_signalled_saves_and_is_put_back(script: str, status_format: str, tmp_path: Path) -> None:
    job = Job(script, tmp_path, "interrupted", status_format)
    process = job.start()
    deadline = time.monotonic() + 20
    while len(list(job.record.glob("started-*"))) < job.tasks:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 0
    assert job.requeued == "41234\n"


def test_a_run_that_is_signalled_before_it_has_started_is_put_back(script: str, tmp_path: Path) -> None:
    """The signal ends a Python that has no handlers yet, and no status is written."""
    job = Job(script, tmp_path, "killed")
    process = job.start()
    deadline = time.monotonic() + 20
    while len(list(job.record.glob("started-*"))) < job.tasks:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, job.requeued) == (0, "41234\n"), errors


@pytest.mark.parametrize(
    "outcome, message",
    [
        ("failed", "error: the run ended with status 3, state failed; see above\n"),
        ("crashed", "error: the run ended with status 4, state unknown; see above\n"),
    ],
)
def test_a_run_that_fails_is_not_put_back(script: str, outcome: str, message: str, tmp_path: Path) -> None:
    job = Job(script, tmp_path, outcome)
    # As a requeued job finds it: that state is the last attempt's, and would put the job back for ever.
    (job.output / "status.json").write_text('{"state": "interrupted", "step": 3}')
    status, errors = job.run()
    assert (status, errors) == (int(re.findall(r"\d", message)[0]), message)
    assert job.requeued == ""


def test_arguments_are_asked_for(script: str) -> None:
    done = subprocess.run(["bash", EXAMPLES / script, "run.yaml"], capture_output=True, text=True)
    assert done.returncode != 0
    assert f"which output directory? sbatch {script} CONFIG OUTPUT" in done.stderr


def tune_arguments(arguments: list[str]) -> None:
    found = parser().parse_args(arguments)
    assert (found.config, found.output.name, found.resume) == (Path("my run.yaml"), "out put", True)
    assert found.overrides == OVERRIDES


def test_torchrun_takes_its_arguments(tmp_path: Path) -> None:
    job = Job("tune_torchrun.sbatch", tmp_path, "finished")
    job.run()
    found = get_args_parser().parse_args(job.arguments("arguments-0"))
    assert (found.nnodes, found.nproc_per_node, found.rdzv_backend, found.rdzv_id) == ("2", "gpu", "c10d", "41234")
    host, port = found.rdzv_endpoint.split(":")
    assert host == "node7" and 1024 < int(port) < 32768
    assert "SIGUSR1" in found.signals_to_handle.split(",")
    assert (found.module, found.training_script, found.training_script_args[0]) == (True, "megatron_ee", "tune")
    tune_arguments(found.training_script_args[1:])
    assert "--kill-on-bad-exit=0" in job.arguments("srun")


def test_torchrun_kills_nothing_before_the_job_ends(tmp_path: Path) -> None:
    job = Job("tune_torchrun.sbatch", tmp_path, "finished")
    job.run()
    [ahead] = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", (EXAMPLES / SCRIPTS[0]).read_text(), flags=re.MULTILINE)
    assert 0 < int(ahead) - int(job.variables(0)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) <= 15


def test_srun_gives_each_task_its_rank(tmp_path: Path) -> None:
    job = Job("tune_srun.sbatch", tmp_path, "finished")
    job.run()
    for rank in range(job.tasks):
        found = job.variables(rank)
        assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == (str(rank), "4", str(rank % 2))
        assert found["MASTER_ADDR"] == "node7" and 1024 < int(found["MASTER_PORT"]) < 32768
        arguments = job.arguments(f"arguments-{rank}")
        assert arguments[:3] == ["-m", "megatron_ee", "tune"]
        tune_arguments(arguments[3:])
    assert "--kill-on-bad-exit=1" in job.arguments("srun")


@pytest.mark.parametrize("given", [False, True])
def test_processes_get_threads_and_an_allocator(script: str, given: bool, tmp_path: Path) -> None:
    """Unless the user has set them; the interfaces are the user's alone."""
    job = Job(script, tmp_path, "finished")
    names = ("OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    for name in names:
        job.environment.pop(name, None)
    if given:
        job.environment |= dict.fromkeys(names, "7")
    job.run()
    found = job.variables(0)
    threads = "2" if "torchrun" in script else "4"
    expected = ["7"] * 4 if given else [threads, "expandable_segments:True", None, None]
    assert [found.get(name) for name in names] == expected


def test_slurm_is_told_to_warn_and_to_put_back(script: str) -> None:
    options = re.findall(r"^#SBATCH (\S+)$", (EXAMPLES / script).read_text(), flags=re.MULTILINE)
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append"} <= set(options)
