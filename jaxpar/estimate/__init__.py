"""Arithmetic: what a run holds, sends and takes. Never imports jax."""
