"""The README keeps its word: its example runs, its commands exist, its tables name what the package exports."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import bilinear_ops
from bilinear_ops import environment

ROOT = Path(bilinear_ops.__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def run(example: str) -> dict[str, Any]:
    assert len(example.splitlines()) <= 12
    names: dict[str, Any] = {}
    exec(example, names)
    return names


def test_examples_run():
    _, _, use, read, decompose, _ = blocks("python")  # the last needs two processes: tests/distributed_analyses.py
    use, read, decompose = run(use), run(read), run(decompose)
    assert use["y"].shape == (8, 128, 512)
    assert use["layer"].p.grad.isfinite().all()
    assert read["pairs"].vectors.shape == (10, 4, 64)
    assert read["top"].values.shape == (10, 5)
    assert decompose["y"].shape == (1, 256, 32) and decompose["site"].read.grad.isfinite().all()


def test_what_replaces_the_einsum_finds_the_same():
    before, after, *_ = blocks("python")
    w, v, p = torch.randn(9, 6), torch.randn(9, 6), torch.randn(3, 9)
    names: dict[str, Any] = {"torch": torch, "bo": bilinear_ops, "w": w, "v": v, "p": p}
    exec(before + after, names)
    pairs, values = names["pairs"], names["values"]
    strongest = values.gather(1, values.abs().argsort(1, descending=True)[:, :2])
    torch.testing.assert_close(pairs.values, strongest)
    assert pairs.vectors.shape == (3, 2, 6)


def test_every_analysis_has_its_row():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", README.partition("| `bo.analysis`")[2], re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named >= {name for name in bilinear_ops.analysis.__all__ if name.islower()}


def test_every_op_has_its_row():
    rows = re.findall(r"^\| `(\w+)\(([^)]*)\)`", README, re.M)
    assert {name for name, _ in rows} == set(environment.public_ops())


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    first, by_hand = blocks("sh")
    for verb in re.findall(r"^make (\w+)", first, re.M):
        assert re.search(rf"^{verb}: .venv/installed$", makefile, re.M), verb
    install = re.search(r"^pip (install .*)$", by_hand, re.M).group(1)
    assert install in makefile, "make installs as the README does"
    assert install.replace("install", "install --quiet", 1) in (ROOT / ".ci" / "run").read_text()
    for command in re.findall(r"^python -m (.*)$", by_hand, re.M):
        assert f"/python -m {command}\n" in makefile


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_and_paths_exist(page):
    text = (ROOT / page).read_text()
    paths = re.findall(r"\]\((?!http)([^)#]+)\)", text) + re.findall(
        r"`((?:bilinear_ops|kernels|tests)/[\w/.]*)`", text
    )
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path
