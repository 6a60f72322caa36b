"""The names of graphs and tensors, in one place: the exporter writes them, the runtime binds them.

Tensor names follow Hugging Face and ONNX Runtime GenAI. A layer index is always the global one, in both halves.
"""

from __future__ import annotations

VISION = "vision"
PRE_ECL = "pre_ecl"
SCORE = "score"
POST_ECL = "post_ecl"

PIXEL_VALUES = "pixel_values"
IMAGE_EMBEDS = "image_embeds"
INPUTS_EMBEDS = "inputs_embeds"
POSITION_IDS = "position_ids"
PAST_LENGTH = "past_length"
LAST_INDEX = "last_index"
HIDDEN_STATES = "hidden_states"
SCORE_STATES = "score_states"
KEPT_HIDDEN_STATES = "kept_hidden_states"
KEPT_POSITION_IDS = "kept_position_ids"
KEPT_INDICES = "kept_indices"
TOKEN_ENTROPY = "token_entropy"
IMAGE_SEED = "image_seed"
LOGITS = "logits"
PAST = "past_key_values."
PRESENT = "present."

MANIFEST_FILE = "bundle.json"
REPORT_FILE = "report.json"
VERIFY_FILE = "verify.json"

SCORE_MODES = ("trace", "row", "raw", "dpp", "random", "energy-high", "energy-low", "uniform")
SCORELESS_MODES = ("random", "uniform")  # their scores look at no activation

# How a decoder half's graph writes its cache: `export.graphs.kv_write` has the forms.
ROUND_TO = 64  # capacities are multiples of this: attention on a CPU costs by capacity, not by length
IN_PLACE, TENSOR_SCATTER, APPEND = "in_place", "tensor_scatter", "append"
KV_WRITES = (IN_PLACE, TENSOR_SCATTER, APPEND)


def past_key(layer: int) -> str:
    """Input: the key cache of a layer."""
    return f"{PAST}{layer}.key"


def past_value(layer: int) -> str:
    """Input: the value cache of a layer."""
    return f"{PAST}{layer}.value"


def present_key(layer: int) -> str:
    """Output: the key cache of a layer with the new rows written."""
    return f"{PRESENT}{layer}.key"


def present_value(layer: int) -> str:
    """Output: the value cache of a layer with the new rows written."""
    return f"{PRESENT}{layer}.value"


def tap(layer: int) -> str:
    """Debug output: the hidden states that leave a layer (only in graphs built with debug outputs)."""
    return f"hidden_states.{layer}"


ALL_LOGITS = "all_logits"


def score_graph(keep: int) -> str:
    """The manifest's name of the score graph of one budget."""
    return f"{SCORE}.{keep}"
