"""The measurements of text.py as text: claims with their verdicts, expectations, both curves, and some features.

The page docs/findings.md holds this text between two marks; `check` compares it with its receipt.
"""

from __future__ import annotations

import findings_page
from findings_page import Receipt, spread, table
from text_claims import FEATURES, MATRICES, RANDOM, at_rank, claims, expectations, values

RECEIPT = findings_page.DOCS / "receipts" / "text.json"
SHOWN = (1, 2, 4, 8)  # numbers of eigenvectors


def text(receipt: Receipt) -> str:
    """Tables of all measurements and findings, as Markdown; figures are means over seeds with their range."""
    scale, corpus = receipt["scale"], receipt["text"]
    versions = ", ".join(f"{name} {version}" for name, version in receipt["versions"].items())
    read, written = (spread([found[side] for found in values(receipt, "unexplained")], ".1%") for side in (0, 1))
    parts = [
        f"{corpus['train']} words to train and {corpus['test']} in held-out documents, {scale['vocabulary']} different "
        f"ones; d {scale['d']}, {scale['h']} hidden units, {scale['steps']} steps of {scale['batch']} x "
        f"{scale['context']} words; autoencoders of {scale['features']} features, {scale['active'][0]} active at the "
        f"input and {scale['active'][1]} at the output, which leave {read} and {written} of the variance; seeds "
        f"{', '.join(map(str, scale['seeds']))}. {versions}.",
        f"Held-out loss {spread(values(receipt, 'loss'))} nats a word, a Kneser-Ney bigram model's "
        f"{corpus['bigram_loss']:.2f}. Features count that are active at 30 held-out words or more: "
        f"{spread(values(receipt, 'counted'), '.0f')} of them.",
        "### Claims about language",
        table(("claim", "in [P]", "here", "verdict"), claims(receipt)),
        "### Expectations of language set before the runs",
        table(("expected", "found", "met"), expectations(receipt)),
        "### Correlation of activations with their first eigenvectors",
        table(("of", "inputs", *(f"first {n}" for n in SHOWN)), curves(receipt)),
        "### Output features that their interactions explain best",
        f"Of seed {scale['seeds'][0]}. The last word of a context, in brackets, is where the feature is most active; "
        "it promotes words that follow. An input feature is named by the words at which it is strongest; two features "
        "may have one name. Pairs are the strongest when weighted by co-activation, in that order; the number is the "
        "strength alone.",
        table(("feature", "promotes", "contexts", "pairs of input features"), stories(receipt)),
    ]
    return "\n\n".join(parts) + "\n"


def curves(receipt: Receipt) -> list[list[str]]:
    """One row a kind of form and of inputs."""
    return [
        [forms, said, *(spread(at_rank(receipt, forms, inputs, rank)) for rank in SHOWN)]
        for inputs, said in (("active", "active"), ("everywhere", "all"))
        for forms in (FEATURES, RANDOM, MATRICES)
    ]


def stories(receipt: Receipt) -> list[list[str]]:
    """One row a feature of the first seed."""
    return [
        [
            str(story["feature"]),
            code(story["promotes"]),
            "<br>".join(code([context]) for context in story["contexts"]),
            "<br>".join(f"{value:+.3f} {code([first])} x {code([second])}" for value, first, second in story["pairs"]),
        ]
        for story in receipt["runs"][0]["stories"]
    ]


def code(words: list[str]) -> str:
    """Words as Markdown code, which no character ends."""
    return " ".join(f"`` {word} ``" for word in words)


def check() -> int:
    """Whether the page holds the text of its receipt; returns the exit status."""
    return findings_page.check("text", RECEIPT, text)
