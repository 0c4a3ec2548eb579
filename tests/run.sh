#!/usr/bin/env bash
# Makes an environment of its own, then lints, type-checks and tests. Arguments go to pytest.
# Tests marked slow are left out; "-m slow" runs them alone, "-m smoke" one of each main thing in a minute, "-m ''" all.
#
# MEGATRON_EE_TEST_VENV: where the environment is (default: .venv-test). See tools/setup_env.sh for PYTHON and
# MEGATRON_EE_TORCH_INDEX.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_env.sh

make_environment "${MEGATRON_EE_TEST_VENV:-$PWD/.venv-test}" "[test,deepspeed,wandb]"

# Two test processes with one thread each: more threads per process only fight over two cores. A file's tests run in one
# of them, so that what they share (a run, a model) is made once.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

step() { say "== $*"; }
step ruff check
"$VENV_PYTHON" -m ruff check .
step ruff format
"$VENV_PYTHON" -m ruff format --check .
step mypy
"$VENV_PYTHON" -m mypy
step import-linter
"$VENV_PYTHON" -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'
step pytest
"$VENV_PYTHON" -m pytest -n 2 --dist loadfile -m "not slow" "$@"
