"""Gated DeltaNet training under context parallelism. See README.md; the names handed on here are the public ones."""
