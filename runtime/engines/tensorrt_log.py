"""What a builder's log tells and nothing else does: bytes of weights and activations, fused attention, and why a build failed.

Messages are read as they come and dropped: a large model logs hundreds of thousands. Knows nothing about the library that logs.
"""

from __future__ import annotations

import re
from collections import Counter, deque

ERROR, WARNING, VERBOSE = 1, 2, 4  # severities as both libraries number them; 0 is an internal error
KEPT_ERRORS = 20
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
_LAYER = re.compile(r"^ ?Name: (\S+)_myl(\d+)_\d+, LayerType: ", re.MULTILINE)
_ATTENTION = re.compile(r"^_gem[mv]_mha|^_\w*(?:flash|fmha|mha)", re.IGNORECASE)
# Moves tensors, transposed or joined, and computes nothing; a copy that is fused with arithmetic has another name.
_COPY = re.compile(r"^__myl_(?:Tran|Resh|Conc|Slic)*Move(?:Tran|Resh|Conc|Slic|Move)*$")
_PREFIX = re.compile(r"^(?:\w+: )?(?:[\w.]+:\d+: )?")


class BuildLog:
    """Collects the facts of one build. `read` takes one message at a time."""

    def __init__(self) -> None:
        self.weights_bytes: int | None = None
        self.activation_bytes: list[int] = []
        self.listed_layers = 0
        self._attention: Counter[int] = Counter()
        self._copies: Counter[int] = Counter()
        self._subgraphs: set[int] = set()
        self._errors: deque[str] = deque(maxlen=KEPT_ERRORS)

    def read(self, severity: int, message: str) -> None:
        if severity <= ERROR:
            self._errors.append(message)
        if found := _WEIGHTS.search(message):
            self.weights_bytes = int(found[1])
        if found := _ACTIVATIONS.search(message):
            self.activation_bytes.append(int(found[1]))
        for layer in _LAYER.finditer(message):
            self.listed_layers += 1
            subgraph = int(layer[2])
            self._subgraphs.add(subgraph)
            self._attention[subgraph] += bool(_ATTENTION.match(layer[1]))
            self._copies[subgraph] += bool(_COPY.match(layer[1]))

    def forget_errors(self) -> None:
        """Starts `failure` anew."""
        self._errors.clear()

    @property
    def attention_kernels(self) -> tuple[int, ...]:
        """Fused attention kernels of each compiled subgraph, in order; empty where no layers were listed."""
        return tuple(self._attention[subgraph] for subgraph in sorted(self._subgraphs))

    @property
    def copy_layers(self) -> tuple[int, ...]:
        """Layers of each compiled subgraph that only copy a tensor (a cache before it is written to, for one), in order."""
        return tuple(self._copies[subgraph] for subgraph in sorted(self._subgraphs))

    @property
    def failure(self) -> str:
        """The last errors in one line."""
        lines = [_PREFIX.sub("", " ".join(message.split())) for message in self._errors if "node ---" not in message]
        return "; ".join(dict.fromkeys(lines[-3:]))[:600] or "its log gives no reason"
