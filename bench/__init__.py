"""What is measured, how, and what was found: `python -m bench`, `python -m bench.static`, `python -m bench.report`."""
