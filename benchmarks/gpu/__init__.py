"""Checks and measures on a machine with an NVIDIA GPU, in pieces of under ten minutes: `python -m benchmarks.gpu`; see README.md here."""
