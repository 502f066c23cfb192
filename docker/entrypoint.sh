#!/usr/bin/env bash
# Entry point of the images; runs wherever `vllm` and hashevict_vllm are in PATH.
set -euo pipefail

usage() {
    cat <<'END'
Usage: entrypoint.sh [MODEL] [VLLM-SERVE-OPTION...]

Runs `vllm serve MODEL --kv-policy hashevict --kv-budget 1024` with the options given,
which win over what the environment says. Without a model it fetches and converts
SmolLM2-135M-Instruct once. A --config file replaces the policy's defaults,
and its model the default one.

Environment:
  HASHEVICT_MODEL   name on the hub or path (default: SmolLM2-135M-Instruct)
  HASHEVICT_POLICY  --kv-policy (default: hashevict; full is stock vLLM)
  HASHEVICT_BUDGET  --kv-budget (default: 1024)
  HASHEVICT_PORT    port of the server, also for the health check (default: 8000)
  HASHEVICT_CACHE   where the default model and compiled kernels are kept
  VLLM_CPU_KVCACHE_SPACE  KV-cache pool on a CPU in GiB (default here: 2)
and every variable of vLLM and of the hub: VLLM_API_KEY, HF_TOKEN, HF_HUB_OFFLINE, …
END
}

die() {
    echo "hashevict-vllm: $*" >&2
    exit 2
}

given() { # NAME ARGUMENT...: whether an option is among the arguments
    local name=$1 argument
    shift
    for argument; do
        [[ $argument == "$name" || $argument == "$name="* ]] && return 0
    done
    return 1
}

value_of() { # NAME ARGUMENT...: prints the last value that an option is given
    local name=$1 value=
    shift
    while [[ $# -gt 0 ]]; do
        case $1 in
        "$name") value=${2:-} ;;
        "$name="*) value=${1#*=} ;;
        esac
        shift
    done
    echo "$value"
}

# Whether a YAML file of options holds a key; vLLM itself says what is wrong with a file.
in_file() { # FILE KEY
    [[ -f $1 ]] && python3 - "$@" 2>/dev/null <<'END'
import sys, yaml
with open(sys.argv[1]) as file:
    options = yaml.safe_load(file)
sys.exit(not (isinstance(options, dict) and sys.argv[2] in options))
END
}

check_port() {
    [[ $1 =~ ^[1-9][0-9]{0,4}$ && $1 -le 65535 ]] ||
        die "HASHEVICT_PORT: $1 is not a port; give a number from 1 to 65535."
}

# Kernels are compiled into it at start, and the default model is written there.
check_cache() {
    local cache
    cache=$(python3 -c \
        'from hashevict_vllm.downloads import cache_dir; print(cache_dir())' \
        2>/dev/null) || {
        python3 -c 'import hashevict_vllm' 2>/dev/null ||
            die "python3: hashevict_vllm is not installed for the one in PATH."
        die "HASHEVICT_CACHE: user $(id -u) has no home directory; name a directory to keep files in."
    }
    mkdir -p "$cache" 2>/dev/null && [ -w "$cache" ] ||
        die "HASHEVICT_CACHE: user $(id -u) cannot write to $cache;" \
            "mount a volume of that user's, or name another directory."
}

check_model() {
    [[ $1 != [./]* || -e $1 ]] ||
        die "$1: no such model; mount it into the container, or name one of the hub."
}

case ${1:-} in
-h | --help)
    usage
    exit
    ;;
esac

# vLLM ignores the form with "=": no option of the file would count.
arguments=()
for argument; do
    if [[ $argument == --config=* ]]; then
        echo "hashevict-vllm: --config: vLLM reads it as two words; made two of them." >&2
        arguments+=(--config "${argument#--config=}")
    else
        arguments+=("$argument")
    fi
done
set -- "${arguments[@]+"${arguments[@]}"}"
config=$(value_of --config "$@")

command -v vllm >/dev/null ||
    die "vllm: not in PATH; install hashevict-vllm[cpu] or hashevict-vllm[cuda]."
given --port "$@" &&
    die "--port: set HASHEVICT_PORT instead, which the health check reads too."
[[ -z ${HASHEVICT_PORT:-} ]] && in_file "$config" port &&
    die "$config: port: set HASHEVICT_PORT instead, which the health check reads too."
port=${HASHEVICT_PORT:-8000}
check_port "$port"
check_cache

policy=$(value_of --kv-policy "$@")
policy=${policy:-${HASHEVICT_POLICY:-}}
budget=${HASHEVICT_BUDGET:-}
# On the command line the defaults would beat the values of a --config file.
if ! given --config "$@"; then
    policy=${policy:-hashevict}
    # A budget is refused where nothing is bounded.
    [[ $policy == full ]] || budget=${budget:-1024}
fi
options=(--port "$port" ${policy:+--kv-policy "$policy"} ${budget:+--kv-budget "$budget"})

# The command line wins over the file, so a default must not stand there.
model_in_file=
if in_file "$config" model; then model_in_file=yes; fi
if [[ $# -gt 0 && $1 != -* ]]; then
    model=$1
    shift
else
    model=${HASHEVICT_MODEL:-}
fi
if [[ -z $model && -z $model_in_file ]]; then
    model=$(python3 -m hashevict_vllm.models)
    options+=(--served-model-name SmolLM2-135M-Instruct)
fi
[[ -z $model ]] || check_model "$model"
# Without it vLLM takes nearly all memory of a CPU's machine; GPUs do not read it.
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-2}
exec vllm serve ${model:+"$model"} "${options[@]}" "$@"
