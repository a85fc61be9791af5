#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs on the GPU machine, beside the wheel and the tests that make.sh packed, or in a checkout with the library built in place.
#
#   run.sh test              correctness on the device, then memcheck and racecheck on small shapes
#   run.sh check             correctness alone
#   run.sh bench [ARGS]      correctness, then `zipserv bench ARGS`; results in out/
#   run.sh models            in a checkout: whole models, loading and offload (tests/python; needs transformers, accelerate, peft)
#   run.sh loop [ARGS]       in a checkout: tools/gpu/decode_loop.py, the vLLM plugin's methods in a decode loop; on all GPUs if there are several
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
what=${1:-test}
shift || true

if ls "$here"/zipserv-*.whl >/dev/null 2>&1; then
    root=$here
    site=$here/site
    rm -rf "$site"
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$site" "$here"/zipserv-*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
else
    root=$(cd "$here/../.." && pwd)
    export PYTHONPATH=$root/python${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 ZIPSERV_REQUIRE_GPU=1
export ZIPSERV_CACHE_DIR=${ZIPSERV_CACHE_DIR:-$root/out/kernels}
mkdir -p "$root/out"

echo "== machine"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
"$python" - <<'PY'
import torch, zipserv, zipserv.cuda
print("python", __import__("platform").python_version(), "torch", torch.__version__, "zipserv", zipserv.__version__)
for key, value in zipserv.cuda.report().items():
    print(f"  {key}: {value}")
PY

correctness() {
    echo "== correctness"
    "$python" -m pytest -q --maxfail=40 -p no:cacheprovider "$root/tests/gpu"
}

models() {
    echo "== models"
    "$python" -m pytest -q --maxfail=40 -p no:cacheprovider -m gpu "$root/tests/python"
}

loop() {
    echo "== decode loop"
    local count
    count=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    if [ "$count" -gt 1 ]; then
        "$python" -m torch.distributed.run --standalone --nproc-per-node "$count" "$root/tools/gpu/decode_loop.py" --out "$root/out/loop.json" "$@"
    else
        "$python" "$root/tools/gpu/decode_loop.py" --out "$root/out/loop.json" "$@"
    fi
}

sanitizer() {
    local tool
    tool=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer 2>/dev/null || true)
    if [ -z "$tool" ]; then
        echo "== compute-sanitizer: not on this machine, so memcheck and racecheck did not run"
        return 1
    fi
    # One allocation a tensor: torch's pools would hide an access beyond one.
    for check in memcheck racecheck; do
        echo "== $check"
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$check" --error-exitcode 99 --print-limit 20 "$python" "$root/tests/gpu/small.py" || return 1
    done
}

bench() {
    echo "== bench"
    if "$python" -c "import click, rich" 2>/dev/null; then
        "$python" -m zipserv bench --out "$root/out" "$@"
    else # the measurements need torch alone; `zipserv bench --read` makes tables and plots of them elsewhere
        "$python" -m zipserv.bench --out "$root/out/bench.json" "$@"
    fi
}

case $what in
check) correctness ;;
test) correctness && sanitizer && echo "== all passed" ;;
bench) correctness && bench "$@" ;;
models) models ;;
loop) loop "$@" ;;
*) echo "usage: run.sh test|check|bench|models|loop" >&2 && exit 2 ;;
esac
