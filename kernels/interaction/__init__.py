"""Kernels of the interaction tensors."""
