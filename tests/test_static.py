"""Every kernel, at every tile of its table, compiles for its targets without a GPU and spills nowhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("arch", ("sm_80", "sm_90", "sm_100", "gfx942"))
def test_compiles_without_spills(arch):
    # in a process of its own: in this one the kernels are interpreted
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.static", "--target", arch]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "forward_kernel" in done.stdout and "backward_kernel" in done.stdout
