"""The pages of docs/ keep their word: their examples run as written, each page from top to bottom in one session."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import bilinear_ops

DOCS = Path(bilinear_ops.__file__).parents[1] / "docs"
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
EXAMPLES = {page.name: EXAMPLE.findall(page.read_text(encoding="utf-8")) for page in DOCS.glob("*.md")}
KERNELS = getattr(find_spec("kernels"), "origin", None)  # of the library: our own folder `kernels` has none
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.mark.parametrize("page", sorted(page for page, examples in EXAMPLES.items() if examples))
def test_examples_run(page, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)  # they save models
    names: dict[str, Any] = {}
    for example in EXAMPLES[page]:
        if "from kernels import" not in example or KERNELS:
            exec(example, names)
    assert "left alone" not in capsys.readouterr().out
