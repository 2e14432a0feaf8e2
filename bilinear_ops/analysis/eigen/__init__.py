"""Eigenpairs of interaction matrices: solvers, their operators and their gradient."""
