"""Export: from a Hugging Face checkpoint to a bundle of engine graphs."""

TOOL_VERSION = "0.1.0"
