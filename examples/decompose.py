"""Decompose layers: do planted components come back, and which way to decompose a trained SwiGLU layer is best?

    python examples/decompose.py [--quick]    # writes figures/decompose.json and figures/decompose.png
    python examples/decompose.py --check      # is docs/findings.md what its receipt says?

`decompose_known.py` has the targets of known structure, `decompose_layer.py` the comparison. Nothing is downloaded; a
CPU is enough. The text model and its activations are trained once and kept in --out. With --only the other parts of the
receipt in --out stay as they are.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import decompose_findings as findings
import decompose_layer as layer
import torch
from decompose_known import STUDIES
from findings_page import written

import bilinear_ops as bo

SEEDS = (1, 2, 3, 4, 5)  # settings were chosen on others
QUICK = layer.Study(
    vocabulary=256, documents=40, d=16, h=32, model_steps=60, words=2048, kept=6, steps=20, every=10, batch=64,
    rates=(3e-3,), tuning=(100,), seeds=(1,),
)  # fmt: skip


def known(names: list[str], seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """What came back of planted components, for each target and seed."""
    found = []
    print(f"{'target':<16}{'seed':>6}{'cosine':>10}{'active':>10}{'planted':>10}{'error':>10}")
    for name in names:
        decompose, setting = STUDIES[name]
        for seed in seeds:
            recovery = decompose(name, setting, seed)
            found.append({"target": name, "seed": seed, **recovery._asdict()})
            print(f"\r{name:<16}{seed:>6}" + "".join(f"{value:>10.3f}" for value in recovery), flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Decompositions of layers, known and trained.")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, planted terms, a tiny text model: to see it run"
    )
    parser.add_argument("--only", default="", help='parts whose name contains this; the layer is "layer"')
    parser.add_argument("--out", type=Path, default=Path("figures"), help="for receipt, plot and cache")
    parser.add_argument("--check", action="store_true", help="train nothing; compare docs/findings.md with its receipt")
    options = parser.parse_args(arguments)
    if options.check:
        return findings.check()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "decompose.json"
    receipt: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if options.only and path.exists() else {}
    receipt["versions"] = {
        "bilinear_ops": bo.__version__, "torch": torch.__version__, "python": platform.python_version()
    }  # fmt: skip
    names = [n for n in (["planted terms"] if options.quick else STUDIES) if options.only in n]
    others = [r for r in receipt.get("known", []) if r["target"] not in names]
    receipt["known"] = others + (known(names, SEEDS[:1] if options.quick else SEEDS) if names else [])
    if options.only in "layer":
        receipt |= layer.compare(QUICK if options.quick else layer.Study(), options.out)
    path.write_text(written(receipt), encoding="utf-8")
    if "runs" not in receipt:
        return 0
    print(findings.text(receipt))
    try:
        findings.plot(receipt).savefig(options.out / "decompose.png", dpi=120)
    except ModuleNotFoundError as error:
        print(f"No plot: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
