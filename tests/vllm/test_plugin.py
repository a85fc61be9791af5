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


def test_vllm_loads_it() -> None:
    code = """
from vllm.plugins import load_general_plugins
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
before = "zipserv" in QUANTIZATION_METHODS
load_general_plugins()
import json
print(json.dumps([before, "zipserv" in QUANTIZATION_METHODS, get_quantization_config("zipserv").__module__]))
"""
    assert json.loads(python(code)) == [False, True, "zipserv.integrations.vllm.config"]


def test_a_compressed_folder_needs_no_flag(folders) -> None:
    """From the command line's arguments to the configuration, in a process that only vLLM sets up."""
    code = f"""
from vllm.engine.arg_utils import EngineArgs
config = EngineArgs(model={str(folders.compressed("llama"))!r}, dtype="bfloat16", skip_tokenizer_init=True, enforce_eager=True).create_engine_config()
print(config.model_config.quantization, type(config.quant_config).__name__)
"""
    assert python(code) == "zipserv ZipServConfig"


def test_the_flag_is_accepted(folders) -> None:
    code = f"""
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
args = parser.parse_args(["--model", {str(folders.plain("llama"))!r}, "--quantization", "zipserv", "--skip-tokenizer-init", "--enforce-eager"])
config = EngineArgs.from_cli_args(args).create_engine_config()
print(config.model_config.quantization, type(config.quant_config).__name__)
"""
    assert python(code) == "zipserv ZipServConfig"


def test_importing_the_plugin_needs_no_vllm() -> None:
    code = "import sys, zipserv.integrations.vllm; print('vllm' in sys.modules)"
    assert python(code) == "False"


def test_register_twice() -> None:
    register()
    register()
