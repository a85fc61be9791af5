#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The tests against the real vLLM, in an environment of their own (about 8 GB; kept, and used again while the version is the same).
#
#   tests/vllm/run.sh [pytest arguments]
#   VLLM=0.31.0   the version of vLLM; "newest" takes the newest that installs and only warns when its tests fail
#   VENV=DIR      where the environment is (default .venv-vllm)
set -eu
cd "$(dirname "$0")/../.."

version=${VLLM:-0.31.0}
venv=${VENV:-.venv-vllm}
if [ "$version" = newest ]; then
    want=vllm
    venv=$venv-newest
else
    want="vllm==$version"
fi

if [ ! -e "$venv/done" ] || [ "$(cat "$venv/done")" != "$want" ]; then
    ${PYTHON:-python3} -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check "$want" pytest
    echo "$want" > "$venv/done"
fi
# The package itself as a user gets it, so that vLLM finds the entry point. Its dependencies stay as vLLM pins them.
"$venv/bin/pip" install --quiet --disable-pip-version-check --force-reinstall --no-deps .
"$venv/bin/pip" install --quiet --disable-pip-version-check click rich tqdm safetensors numpy

VLLM_TARGET_DEVICE=cpu; export VLLM_TARGET_DEVICE
code=0
"$venv/bin/python" -m pytest -q -ra tests/vllm "$@" || code=$?
if [ "$code" -ne 0 ] && [ "$version" = newest ]; then
    echo "warning: the tests failed with the newest vLLM ($("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("vllm"))'))" >&2
    code=0
fi
exit "$code"
