#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What `make test-gpu` and `make bench-gpu` run: builds the wheel here, puts it with the tests into build/gpu, and runs both on a GPU:
# here if there is one, else on the machine that GPU_HOST names (ssh; it needs Python >= 3.10 with torch and pytest, but no Go, no C
# compiler, no network). With neither it says how to take build/gpu.tar.gz to one, and fails.
#
#   tools/gpu/make.sh test|bench|pack [arguments for `zipserv bench`]
set -euo pipefail
cd "$(dirname "$0")/../.."
what=${1:-test}
shift || true
case $what in test | bench | pack) ;; *) echo "usage: tools/gpu/make.sh test|bench|pack" >&2; exit 2 ;; esac
python=${PYTHON:-python3}

rm -rf build/gpu
mkdir -p build/gpu/tests
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/gpu .
cp -R tests/gpu build/gpu/tests/
find build/gpu -name __pycache__ -prune -exec rm -rf {} +
cp tools/gpu/run.sh build/gpu/
tar -czf build/gpu.tar.gz -C build gpu
echo "built build/gpu.tar.gz: $(ls build/gpu/*.whl | xargs -n1 basename), run.sh and the tests"
[ "$what" = pack ] && exit 0

if [ -n "${GPU_HOST:-}" ]; then
    remote=$(ssh "$GPU_HOST" 'mktemp -d')
    ssh "$GPU_HOST" "tar -xzf - -C '$remote'" <build/gpu.tar.gz
    status=0
    # shellcheck disable=SC2029 # the arguments are meant to be expanded here
    ssh "$GPU_HOST" "cd '$remote/gpu' && PYTHON='${GPU_PYTHON:-python3}' ./run.sh $what $(printf '%q ' "$@")" || status=$?
    mkdir -p build/bench
    ssh "$GPU_HOST" "cd '$remote/gpu' && if [ -d out ]; then tar -czf - out; fi; rm -rf '$remote'" | tar -xzf - -C build/bench 2>/dev/null || true
    exit $status
fi
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    PYTHON=$python exec build/gpu/run.sh "$what" "$@"
fi
cat >&2 <<'TEXT'
No NVIDIA GPU here. Name a machine that has one by GPU_HOST=user@host (reached by ssh), or take build/gpu.tar.gz there:
    tar -xzf gpu.tar.gz && gpu/run.sh test && gpu/run.sh bench
TEXT
exit 3
