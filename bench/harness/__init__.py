"""What measures: workloads, timing, checks, receipts and their report."""
