"""Interaction tensors without forming what need not exist."""
