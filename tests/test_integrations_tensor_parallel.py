"""A model that the transformers library shards over two processes is left alone, and the report says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers_models import build

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.ci
def test_a_sharded_model_is_left_alone(tmp_path):
    pytest.importorskip("transformers", minversion="5")
    build("llama", num_key_value_heads=2).save_pretrained(tmp_path)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    command += [str(ROOT / "tests" / "transformers_tensor_parallel.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left alone: model.layers.") == 2
