"""Answers scored: bundles on question sets."""
