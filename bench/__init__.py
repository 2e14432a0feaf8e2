"""Measurements: `python -m bench` (speed), `python -m bench.static` (machine code), `python -m bench.report`."""
