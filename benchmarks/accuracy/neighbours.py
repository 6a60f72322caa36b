"""Other published selections of visual tokens, written from their definitions, to compare with; nothing here is in the product.

| method | place | chooses by |
|---|---|---|
| FastV (arXiv 2403.06764) | before layer K | the attention that the prompt's last token pays in layer K-1, averaged over heads |
| DivPrune (arXiv 2503.02175) | before layer 0 | largest smallest cosine distance among the kept image embeddings, greedily |
| CDPruner-style (arXiv 2506.10967) | before layer 0 | a determinantal process over the image embeddings, weighted by relevance |

CDPruner takes the relevance to the question from CLIP's text encoder; the small LLaVA has none, so the mean of the question's token
embeddings stands in for it. FastV and CDPruner depend on the question: their prompts hold one question each.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from calibration.pruned_forward import DensePass, PrunedForward

METHODS = ("fastv", "divprune", "cdpruner")


@torch.no_grad()
def fastv_order(forward: PrunedForward, dense: DensePass, split_layer: int) -> np.ndarray:
    """int64 [N], most attended first; `dense` holds one question. `split_layer` >= 1: the map of layer K-1 is needed."""
    decoder = forward.model.model.language_model
    prompt, layer = dense.prompt, decoder.layers[split_layer - 1]
    last = int(prompt.answer_rows[0])  # its logits predict the answer's first token
    states = layer.input_layernorm(dense.entering[split_layer - 1][None, : last + 1])
    cos, sin = decoder.rotary_emb(states, position_ids=prompt.position_ids[None, : last + 1])
    size = layer.self_attn.head_dim
    query = layer.self_attn.q_proj(states).view(1, last + 1, -1, size).transpose(1, 2)
    key = layer.self_attn.k_proj(states).view(1, last + 1, -1, size).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    key = key.repeat_interleave(forward.heads // forward.kv_heads, 1)
    weights = (query[0, :, -1:] @ key[0].transpose(1, 2) * size**-0.5).softmax(-1).mean(0)[0]
    return _descending(weights[prompt.visual_rows].double().numpy())


def divprune_order(image_embeds: Tensor) -> np.ndarray:
    """int64 [N]: first the token farthest from its nearest neighbour, then always the one farthest from all taken."""
    x = _unit(image_embeds.double().numpy())
    distance = 1.0 - x @ x.T
    taken = [int((distance + np.diag(np.full(len(x), np.inf))).min(1).argmax())]
    nearest = distance[taken[0]].copy()
    while len(taken) < len(x):
        nearest[taken] = -np.inf
        taken.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, distance[taken[-1]])
    return np.array(taken, np.int64)


def cdpruner_order(image_embeds: Tensor, question_embeds: Tensor, count: int) -> np.ndarray:
    """int64 [count]: the greedy maximum of det(diag(r) S diag(r)), S cosine similarity, r relevance scaled to 0..1.

    Args:
        image_embeds: [N, d], as they enter the decoder.
        question_embeds: [T, d], the embeddings of the question's tokens.
    """
    x = _unit(image_embeds.double().numpy())
    relevance = x @ _unit(question_embeds.double().mean(0, keepdim=True).numpy())[0]
    relevance = (relevance - relevance.min()) / max(np.ptp(relevance), 1e-12)
    kernel = relevance[:, None] * (x @ x.T) * relevance[None, :]
    left, factor, taken = np.diag(kernel).copy(), np.zeros((0, len(x))), list[int]()
    for _ in range(count):
        best = int(left.argmax())
        row = (kernel[best] - factor[:, best] @ factor) / np.sqrt(max(left[best], 1e-12))
        factor, left = np.vstack([factor, row]), left - row**2
        taken.append(best)
        left[taken] = -np.inf
    return np.array(taken, np.int64)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _descending(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, kind="stable")
