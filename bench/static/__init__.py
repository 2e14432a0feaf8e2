"""Checks of the kernels' machine code without a GPU, and the smallest case of each kernel."""
