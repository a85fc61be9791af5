# SPDX-License-Identifier: Apache-2.0
"""vLLM finds the plugin by itself. The package must be installed for that, not only on the path."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points

from zipserv.integrations.vllm import register


def python(code: str) -> str:
    """In a process of its own, where nothing is registered yet."""
    environment = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "ERROR", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_entry_point() -> None:
    (found,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "zipserv"]
    assert found.load() is register


def test_vllm_finds_it(folders) -> None:
    """From the arguments of a command line to the configuration, in a process that only vLLM sets up: a compressed folder needs no flag, a
    plain one takes it, and before vLLM has loaded its plugins there is no such method."""
    code = f"""
import json
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
found = ["zipserv" in QUANTIZATION_METHODS]
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
plain, compressed = {str(folders.plain("llama"))!r}, {str(folders.compressed("llama"))!r}
def note(config):
    found.append([config.model_config.quantization, type(config.quant_config).__name__])
note(EngineArgs(model=compressed, dtype="bfloat16", skip_tokenizer_init=True, enforce_eager=True).create_engine_config())
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
args = parser.parse_args(["--model", plain, "--quantization", "zipserv", "--skip-tokenizer-init", "--enforce-eager"])
note(EngineArgs.from_cli_args(args).create_engine_config())
found += ["zipserv" in QUANTIZATION_METHODS, get_quantization_config("zipserv").__module__]
print(json.dumps(found))
"""
    expected = ["zipserv", "ZipServConfig"]
    assert json.loads(python(code)) == [False, expected, expected, True, "zipserv.integrations.vllm.config"]


def test_importing_the_plugin_needs_no_vllm() -> None:
    code = "import sys, zipserv.integrations.vllm; print('vllm' in sys.modules)"
    assert python(code) == "False"


def test_register_twice() -> None:
    register()
    register()
