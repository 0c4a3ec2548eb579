# shellcheck shell=bash
# Sourced by tests/run.sh and examples/quickstart/run.sh: makes a virtual environment with this package in it.
#
#   make_environment DIRECTORY [EXTRAS]    sets VENV_PYTHON; EXTRAS such as "[test]"
#
# Which torch goes in:
#   MEGATRON_EE_TORCH_INDEX set     TORCH_PIN from that package index, such as https://download.pytorch.org/whl/cu130
#   CUDA machine, torch there       the torch of the Python that the environment is made from
#   CUDA machine, no such torch     TORCH_PIN from the configured package index (some gigabytes)
#   CPU machine                     TORCH_PIN, never a build with CUDA
# PYTHON names the Python to use, 3.11 or 3.12; without it the first that works of python3.11, python3.12, python3.

TORCH_PIN="torch==2.13.0"
TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"
SETUP_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }

# Whether $1 is a Python 3.11 or 3.12 that can make virtual environments.
python_works() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

# Whether $1 has a torch that this package takes and that reaches the GPU.
python_has_cuda_torch() {
    "$1" - >/dev/null 2>&1 <<'PYTHON'
import re, sys, torch
release = tuple(int(part) for part in re.match(r"(\d+)\.(\d+)", torch.__version__).groups())
early = release == (2, 11) and re.match(r"[\d.]+(a|b|rc|\.dev)", torch.__version__)  # sorts before 2.11
sys.exit(not ((2, 11) <= release < (2, 15) and not early and torch.cuda.is_available()))
PYTHON
}

# Prints the Python to build with: one with a usable CUDA torch if the second argument is "cuda" and there is one.
choose_python() {
    local candidates=(python3.11 python3.12 python3) candidate found=""
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        python_works "$candidate" || continue
        [ -n "$found" ] || found="$candidate"
        if [ "$1" = cuda ] && python_has_cuda_torch "$candidate"; then
            found="$candidate"
            break
        fi
    done
    if [ -z "$found" ]; then
        fail "none of ${candidates[*]} is Python 3.11 or 3.12 with venv and ensurepip; install one (on Debian and" \
            "Ubuntu: python3-venv too) or name it in PYTHON"
    fi
    "$found" -c 'import sys; print(sys.executable)'
}

# Whether pip, as configured here, would give the Python $1 a torch that brings CUDA libraries along. Only torch's own
# metadata is requested: resolving its dependencies may download these libraries.
resolves_to_cuda() {
    local report
    report="$("$1" -m pip install --dry-run --no-deps --ignore-installed --quiet --report - "$TORCH_PIN")" ||
        fail "pip cannot find $TORCH_PIN (see above); MEGATRON_EE_TORCH_INDEX can name a package index that has it"
    "$1" -c '
import json, re, sys
from pip._vendor.packaging.requirements import Requirement
wanted = json.load(sys.stdin)["install"][0]["metadata"].get("requires_dist", [])
names = [r.name for r in map(Requirement, wanted) if r.marker is None or r.marker.evaluate({"extra": ""})]
sys.exit(not any(re.match(r"(nvidia|cuda|triton|pytorch.triton)", name.lower()) for name in names))
' <<<"$report"
}

# Installs torch as $2 says (existing, index, cuda or cpu) with the Python $1.
install_torch() {
    case "$2" in
        existing) say "using the torch with CUDA that is installed" ;;
        index) "$1" -m pip install --quiet --no-compile --index-url "$MEGATRON_EE_TORCH_INDEX" "$TORCH_PIN" ;;
        cuda)
            say "no usable torch with CUDA found: installing $TORCH_PIN with CUDA (some gigabytes)"
            "$1" -m pip install --quiet --no-compile "$TORCH_PIN"
            ;;
        cpu)
            if resolves_to_cuda "$1"; then
                say "the configured package index has torch with CUDA only: taking the CPU build from $TORCH_CPU_INDEX"
                "$1" -m pip install --quiet --no-compile --index-url "$TORCH_CPU_INDEX" "$TORCH_PIN" ||
                    fail "no CPU build of torch; name a package index that has one in MEGATRON_EE_TORCH_INDEX"
            else
                "$1" -m pip install --quiet --no-compile "$TORCH_PIN"
            fi
            ;;
    esac
}

# Makes room for an environment at $1, touching nothing but what make_environment made.
clear_environment() {
    if [ -e "$1/.megatron-ee" ]; then
        rm -rf "$1"
    elif [ -e "$1" ] && { [ ! -d "$1" ] || [ -n "$(ls -A "$1")" ]; }; then
        fail "$1 exists and was not made by these scripts; remove it or choose another place"
    fi
}

make_environment() {
    local directory="$1" extras="${2:-}" machine=cpu torch=cpu python stamp
    local site_packages=()
    case "$directory" in /*) ;; *) directory="$PWD/$directory" ;; esac
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then machine=cuda; fi
    python="$(choose_python "$machine")"
    if [ -n "${MEGATRON_EE_TORCH_INDEX:-}" ]; then
        torch=index
    elif [ "$machine" = cuda ] && python_has_cuda_torch "$python"; then
        torch=existing
        site_packages=(--system-site-packages)
    elif [ "$machine" = cuda ]; then
        torch=cuda
    fi
    # Complete and unchanged: everything that decides what is installed is in the stamp.
    stamp="$("$python" -VV | tr '\n' ' ') $python $SETUP_ROOT $extras $torch ${MEGATRON_EE_TORCH_INDEX:-}"
    stamp+=" $(cat "$SETUP_ROOT/setup.py" "$SETUP_ROOT/tools/setup_env.sh" | cksum)"
    VENV_PYTHON="$directory/bin/python"
    if [ -x "$VENV_PYTHON" ] && [ "$(cat "$directory/.megatron-ee" 2>/dev/null)" = "$stamp" ]; then
        return
    fi
    say "setting up $directory with $("$python" -V) (a few minutes the first time)"
    clear_environment "$directory"
    mkdir -p "$directory"
    echo incomplete >"$directory/.megatron-ee"
    "$python" -m venv ${site_packages[@]+"${site_packages[@]}"} "$directory"
    if [ "$torch" = existing ] && ! python_has_cuda_torch "$VENV_PYTHON"; then
        # $python is of an environment itself, whose packages --system-site-packages does not reach.
        "$python" -c 'import site; print(*site.getsitepackages(), sep="\n")' \
            >"$("$VENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
    fi
    install_torch "$VENV_PYTHON" "$torch"
    # Compiling every module beforehand takes longer than all else; Python compiles those that are used.
    "$VENV_PYTHON" -m pip install --quiet --no-compile --editable "$SETUP_ROOT$extras"
    printf '%s' "$stamp" >"$directory/.megatron-ee"
}
