"""English text that ships with Python, as words: topics of the language reference and docstrings."""

from __future__ import annotations

import ast
import itertools
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

WORD = re.compile(r"[a-z]+|\d|[^a-z\d\s]")
END, RARE = "<end>", "<rare>"  # end of a document; a word outside the vocabulary
HELD_OUT = 10  # one document in ten
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3"}


class Corpus(NamedTuple):
    """Concatenated documents as indices of words `[N]`, int64, and the words."""

    train: Tensor
    test: Tensor
    words: list[str]


def load(vocabulary: int, documents: int | None = None) -> Corpus:
    """Load all documents or the first `documents`, without duplicates. Deterministic for a version of Python."""
    texts = dict.fromkeys(itertools.islice(_texts(), documents))
    split = [[END, *WORD.findall(text.lower())] for text in texts]
    counts = Counter(itertools.chain.from_iterable(split))
    words = [RARE, *(word for word, _ in counts.most_common(vocabulary - 1))]
    number = {word: n for n, word in enumerate(words)}
    train, test = [], []
    for n, document in enumerate(split):
        (train if n % HELD_OUT else test).extend(number.get(word, 0) for word in document)
    return Corpus(torch.tensor(train), torch.tensor(test), words)


def _texts() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if SKIPPED.isdisjoint(path.relative_to(library).parts):
            yield from _docstrings(path)


def _docstrings(path: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield text


class KneserNey:
    """The interpolated Kneser-Ney bigram model of words `[N]` (Chen and Goodman 1999), a baseline from counts alone."""

    def __init__(self, words: Tensor, vocabulary: int):
        counts = torch.zeros(vocabulary, vocabulary)
        counts.index_put_((words[:-1], words[1:]), torch.ones(len(words) - 1), accumulate=True)
        contexts = (counts > 0).sum(0).float()  # number of contexts of each word
        uniform = torch.full_like(contexts, 1 / vocabulary)
        self.log_p = _discounted(counts, backoff=_discounted(contexts, backoff=uniform)).log()  # [V, V]

    def loss(self, words: Tensor) -> float:
        """Mean negative log likelihood of words `[N]` after the first, in nats."""
        return -self.log_p[words[:-1], words[1:]].mean().item()


def _discounted(counts: Tensor, backoff: Tensor) -> Tensor:
    """Probabilities from discounted counts `[..., V]`; the freed mass is distributed as `backoff` `[V]`."""
    once, twice = (counts == 1).sum(), (counts == 2).sum()
    discount = once / (once + 2 * twice)
    total = counts.sum(-1, keepdim=True)
    freed = discount * (counts > 0).sum(-1, keepdim=True)
    return torch.where(total > 0, ((counts - discount).clamp(min=0) + freed * backoff) / total, backoff)
