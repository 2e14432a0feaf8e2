"""The instruments: workloads, checks, timing, receipts."""
