#!/usr/bin/env bash
# Checks everything that needs a GPU, on one GPU, in at most ten minutes after installation. It ends with a table of the
# findings. Status 0: all checks passed; 1: a check failed; 2: there is no CUDA device, or a wrong argument.
#
#   bash tools/gpu_check.sh [--skip NAME ...] [--out DIR]
#
# MEGATRON_EE_GPU_PYTHON: a Python with this package's dependencies and pytest. Without it an environment is created as for
# the tests: see tests/run.sh.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/tools/setup_env.sh"

if [[ " $* " != *" --device cpu "* ]] && ! nvidia-smi -L >/dev/null 2>&1; then
    say "gpu_check: there is no CUDA device here (nvidia-smi finds none); no check was run"
    exit 2
fi
VENV_PYTHON="${MEGATRON_EE_GPU_PYTHON:-}"
[ -n "$VENV_PYTHON" ] || make_environment "${MEGATRON_EE_TEST_VENV:-$root/.venv-test}" "[test]"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
exec "$VENV_PYTHON" "$root/tools/gpu_check.py" "$@"
