#!/usr/bin/env bash
# Runs every step on a small machine: environment, corpus, base model, then megatron-ee quickstart.
#
#   bash examples/quickstart/run.sh [--out DIR] [--base DIR] [--data FILE]
#
#   --out DIR    output directory: new, or an earlier quickstart's (default: examples/quickstart/out)
#   --base DIR   your own Hugging Face model, in place of a small one that is trained here
#   --data FILE  your own .txt or .jsonl file, in place of the Python standard library's sources
#
# MEGATRON_EE_QUICKSTART_VENV: where the environment is (default: .venv-quickstart). MEGATRON_EE_CACHE: where the
# trained base model is kept for the next run (default: .cache/quickstart). See tools/setup_env.sh for PYTHON and
# MEGATRON_EE_TORCH_INDEX.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
source "$root/tools/setup_env.sh"

usage() { sed -n '4,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
out="$here/out" base="" data=""
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --out | --base | --data)
            [ -n "${2:-}" ] || { say "run.sh: error: $1 needs a value"; exit 2; }
            printf -v "${1#--}" '%s' "$2"
            shift 2
            ;;
        *) say "run.sh: error: unknown argument $1; possible: --out DIR, --base DIR, --data FILE"; exit 2 ;;
    esac
done
[ -z "$base" ] || [ -d "$base" ] || { say "run.sh: error: --base: no such directory: $base"; exit 2; }
[ -z "$data" ] || [ -f "$data" ] || { say "run.sh: error: --data: no such file: $data"; exit 2; }

make_environment "${MEGATRON_EE_QUICKSTART_VENV:-$root/.venv-quickstart}"

started="$(date +%s)"  # the report's seconds do not include the installation
mkdir -p "$out"
corpus="$out/corpus"
"$VENV_PYTHON" "$here/corpus.py" --out "$corpus" ${data:+--data "$data"}
if [ -z "$base" ]; then
    base="$("$VENV_PYTHON" "$here/base_model.py" --corpus "$corpus" --out "${MEGATRON_EE_CACHE:-$root/.cache/quickstart}")"
fi
"$VENV_PYTHON" -m megatron_ee quickstart --base "$base" --data "$corpus/train.jsonl" \
    --held-out "$corpus/held_out.jsonl" --out "$out" --started "$started"
