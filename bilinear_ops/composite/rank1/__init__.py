"""Rank-1 subcomponents a block of tokens at a time."""
