"""Tasks for lmms-eval that need no download."""
