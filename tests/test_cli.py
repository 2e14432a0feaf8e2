"""`python -m bilinear_ops`: the report, and the demo from end to end."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bilinear_ops
from bilinear_ops import __main__ as cli
from bilinear_ops import demo, environment

ROOT = Path(bilinear_ops.__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-m", "bilinear_ops", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)


def test_report_as_json(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("BILINEAR_OPS_ANYTHING", "7")
    assert cli.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["versions", "devices", "implementations", "environment", "caches"]
    assert list(found["versions"]) == ["bilinear_ops", "python", "torch", "triton", "numpy"]
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "cpu" in found["devices"]
    for op in ("gated_bilinear", "gated_mlp"):
        assert list(found["implementations"][op]) == list(found["devices"])
        why = "CPU tensors need TRITON_INTERPRET=1" if found["versions"]["triton"] else "triton is not installed"
        assert found["implementations"][op]["cpu"] == {"impl": "torch", "why": why}
    assert found["environment"]["TRITON_INTERPRET"] == "0"
    assert found["environment"]["BILINEAR_OPS_ANYTHING"] == "7"


def test_every_exported_function_is_reported(monkeypatch):
    def kernel_free(x):
        return x

    monkeypatch.setattr(bilinear_ops, "kernel_free", kernel_free, raising=False)
    monkeypatch.setattr(bilinear_ops, "__all__", [*bilinear_ops.__all__, "kernel_free"])
    found = environment.report()["implementations"]
    assert found["kernel_free"]["cpu"] == {"impl": "torch", "why": "the op has no kernel of its own"}
    assert {"gated_bilinear", "gated_mlp"} < set(found)
    assert not {"nn", "reference"} & set(found)


def test_report_says_where_the_kernels_run(monkeypatch):
    monkeypatch.setattr(environment, "devices", lambda: {"cpu": "a CPU", "cuda:0": "a GPU"})
    gpu = ("triton", "the kernels run on this device")
    monkeypatch.setattr(environment, "choice", lambda d: ("torch", "a reason") if d == "cpu" else gpu)
    shown = environment.text(environment.report())
    on_cpu, on_gpu = re.search(r"gated_mlp +torch \[(\d)\] +triton \[(\d)\]\n", shown).groups()
    assert f"[{on_cpu}]  a reason" in shown and f"[{on_gpu}]  the kernels run on this device" in shown


def test_report_for_people():
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^  torch +2\.\d+", done.stdout, re.M)
    assert re.search(r"^  gated_mlp +(torch|triton) \[\d\]", done.stdout, re.M)
    assert re.search(r"^  TRITON_CACHE_DIR ", done.stdout, re.M)


def test_demo_end_to_end():
    pytest.importorskip("sklearn")
    done = run("demo", "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    accuracy = float(re.search(r"^Test accuracy: ([\d.]+)%", done.stdout, re.M).group(1))
    assert accuracy >= 95
    assert done.stdout.count("  epoch ") == 6
    assert done.stdout.count(" ok\n") == 5
    assert re.search(r"the trained layer, 1437 rows: ours [\d.]+ ms  eager [\d.]+ ms", done.stdout)
    assert "What ran where: everything on cpu" in done.stdout
    assert done.stdout.endswith("Everything passed.\n")


def test_training_repeats_itself():
    pytest.importorskip("sklearn")
    data = demo.load_digits()
    first = demo.train(data, epochs=2)
    torch.manual_seed(1)  # whatever the caller drew before
    second = demo.train(data, epochs=2)
    assert torch.equal(first.w, second.w) and torch.equal(first.p, second.p)
    images = torch.cat([data.train_x, data.test_x])
    assert len(images) == 1797 and len(images.unique(dim=0)) == len(images), "no image is on both sides of the split"


def test_demo_fails_on_low_accuracy(monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(demo, "step_times", lambda *_: (1.0, 1.0))
    assert cli.main(["demo", "--epochs", "0"]) == 1
    assert re.search(r"FAILED: accuracy [\d.]+% is below 95%\n$", capsys.readouterr().out)


def test_demo_fails_on_a_wrong_gradient(monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(demo, "step_times", lambda *_: (1.0, 1.0))
    good = demo.gated_mlp

    def wrong(x, w, v, p, **options):
        p.register_hook(lambda g: g * (1 + 1e-5))
        return good(x, w, v, p, **options)

    monkeypatch.setattr(demo, "train", lambda data, epochs: demo.GatedMLP(64, 8, 10))
    monkeypatch.setattr(demo, "ACCURACY", 0.0)
    monkeypatch.setattr(demo, "gated_mlp", wrong)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().out.endswith("FAILED: gradient p differs from the reference\n")


def test_demo_without_sklearn(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().out == 'The demo needs scikit-learn: pip install "bilinear-ops[demo]"\n'
