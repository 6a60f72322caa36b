# Each target is one line of Python, so that it can be typed where there is no make: python -m tools.task NAME
PYTHON ?= python3
ARGS ?=

.PHONY: help setup demo calibrate-demo test check format lock-check
help:
	@$(PYTHON) -m tools.task --help
setup demo calibrate-demo test check format lock-check:
	@$(PYTHON) -m tools.task $@ $(ARGS)
