"""Kernels of the rank-1 subcomponents."""
