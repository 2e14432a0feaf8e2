"""Runs over many directions: killed and started again, they compute again only the chunk that was cut."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bilinear_ops as bo
from bilinear_ops import analysis

ROOT = Path(__file__).parents[1]


def layer():
    torch.manual_seed(0)
    return torch.randn(9, 6), torch.randn(9, 6), torch.randn(7, 9)


def analyse(folder, killed_at=None):
    """The eigenpairs of two directions at a time; every chunk that begins is written down."""
    w, v, c = layer()

    def eigenpairs(part):
        with open(folder / "log", "a") as f:
            f.write(f"{c[:, 0].tolist().index(part[0, 0].item())} ")
        if killed_at is not None and torch.equal(part[0], c[killed_at]):
            os.kill(os.getpid(), signal.SIGKILL)
        return analysis.interaction_eigh(w, v, part, 3)

    return analysis.run_in_chunks(eigenpairs, c, folder / "run", chunk=2)


def log(folder):
    return list(map(int, (folder / "log").read_text().split()))


def killed(folder, body):
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\nfrom test_analysis_resumable import *\n{body}"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=False)
    assert done.returncode == -signal.SIGKILL


def test_killed_in_a_chunk(tmp_path):
    killed(tmp_path, f"analyse(Path({str(tmp_path)!r}), killed_at=4)")
    assert log(tmp_path) == [0, 2, 4]
    paths = analyse(tmp_path)
    assert log(tmp_path) == [0, 2, 4, 4, 6]
    found = analysis.load_chunks(paths)
    expected = analysis.interaction_eigh(*layer(), 3)
    assert list(found) == list(expected._fields)
    for name, t in expected._asdict().items():
        torch.testing.assert_close(found[name], t)
    before = [path.stat().st_mtime_ns for path in paths]
    assert analyse(tmp_path) == paths and log(tmp_path) == [0, 2, 4, 4, 6]
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_killed_while_a_file_is_written(tmp_path):
    """Half a file is never taken for a whole one."""
    body = f"""
from bilinear_ops.analysis import resumable
def half(result, f):
    if f.name.endswith("000000000002.pt.0"):
        f.write(b"half"), f.flush(), os.kill(os.getpid(), signal.SIGKILL)
    save(result, f)
save, torch.save = torch.save, half
analyse(Path({str(tmp_path)!r}))"""
    killed(tmp_path, body)
    assert log(tmp_path) == [0, 2]
    found = analysis.load_chunks(analyse(tmp_path))
    assert log(tmp_path) == [0, 2, 2, 4, 6]
    torch.testing.assert_close(found["values"], analysis.interaction_eigh(*layer(), 3).values)
    assert not list((tmp_path / "run").glob(".*"))


def test_factors_and_lone_tensors(tmp_path):
    w, v, c = layer()
    u = torch.randn(5, 7)
    paths = analysis.run_in_chunks(
        lambda part: bo.interaction_diagonal(w, v, part), bo.Directions(u, c), tmp_path, chunk=3, description="diagonal"
    )
    assert len(paths) == 2
    torch.testing.assert_close(analysis.load_chunks(paths)["0"], bo.interaction_diagonal(w, v, bo.Directions(u, c)))
    torch.testing.assert_close(
        analysis.load_chunks(paths[1:])["0"], bo.interaction_diagonal(w, v, bo.Directions(u[3:], c))
    )
    assert analysis.load_chunks([]) == {}


def test_refusals(tmp_path):
    w, v, c = layer()
    options = dict(chunk=2, description="first")
    analysis.run_in_chunks(lambda part: part, c, tmp_path, **options)
    assert json.loads((tmp_path / "plan.json").read_text())["directions"] == 7
    for other in (dict(chunk=3), dict(description="second")):
        with pytest.raises(ValueError, match="holds the files of another run"):
            analysis.run_in_chunks(lambda part: part, c, tmp_path, **{**options, **other})
    for others in (c.double(), 2 * c):
        with pytest.raises(ValueError, match="another run"):
            analysis.run_in_chunks(lambda part: part, others, tmp_path, **options)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        analysis.run_in_chunks(lambda part: part, c, tmp_path, chunk=0)
    with pytest.raises(TypeError, match="chunk must be an int"):
        analysis.run_in_chunks(lambda part: part, c, tmp_path, chunk=1.5)
