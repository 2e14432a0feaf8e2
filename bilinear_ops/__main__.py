"""`python -m bilinear_ops`: the environment report. `python -m bilinear_ops demo`: the package at work on real data."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from bilinear_ops import demo, environment


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bilinear_ops",
        description="Report versions, devices, and what each op will run on them.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    commands = parser.add_subparsers(dest="command", metavar="demo")
    run = commands.add_parser(
        "demo",
        help="train, check and time a bilinear classifier on handwritten digits",
        description="Train a bilinear classifier on handwritten digits, check it against the reference and time it.",
    )
    run.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    run.add_argument("--epochs", type=int, default=demo.EPOCHS, help="passes over the data (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.command == "demo":
        return demo.run(arguments.device, arguments.epochs)
    found = environment.report()
    print(json.dumps(found, indent=2) if arguments.json else environment.text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
