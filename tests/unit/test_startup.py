"""What starting costs: the command line answers at once, and importing Verst loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {"torch", "transformers", "ray", "pydantic", "numpy", "pyarrow", "matplotlib", "sglang", "megatron", "wandb"}


def loaded_by(code: str) -> set[str]:
    script = f"{code}\nimport sys; print(' '.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.splitlines()[-1].split())


def test_import_loads_nothing_heavy():
    assert not loaded_by("import verst") & HEAVY


def test_help_loads_nothing_heavy():
    code = "import verst.cli, contextlib\nwith contextlib.suppress(SystemExit): verst.cli.main(['--help'])"
    assert not loaded_by(code) & HEAVY


def test_configuration_needs_no_torch():
    code = "import verst.config.load, verst.config.plan, verst.config.schema"
    assert not loaded_by(code) & {"torch", "transformers", "ray", "pyarrow"}


def test_the_public_functions_are_not_hidden_by_a_package_of_their_name():
    code = "import verst, verst.runtime.service, verst.training.checkpoints\nassert callable(verst.train) and callable(verst.resume)"
    loaded_by(code)


def test_the_loop_process_needs_no_torch():
    assert not loaded_by("import verst.runtime.service") & {"torch", "transformers"}
