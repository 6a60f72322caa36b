"""The embeddable API: `load` a bundle, `generate` or `stream` an answer about images.

    from runtime import load
    vlm = load("bundles/tiny-llava-cpu")
    print(vlm.generate("what is at row 2 column 3?", images=["scene.png"]).text)

One loaded model may be used from several threads: calls queue, one runs at a time.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.chain import Conversation, EngineChain
from runtime.detokenize import IncrementalDetokenizer, StopStrings
from runtime.engines.onnxruntime import ThreadPool
from runtime.errors import ContextLengthError, EntropyPruneError
from runtime.generation import Generation, Stopwatch
from runtime.manifest import Manifest, check_files, read_manifest
from runtime.prompt import GENERATION_FILE, ImageSource, Message, Prompt, PromptBuilder
from runtime.sampling import GenerationConfig, Sampler

Images = Sequence[ImageSource]
MAX_RESERVE = 256  # tokens that a cache makes room for at first; it doubles when an answer grows beyond


def load(bundle: str | os.PathLike[str], *, threads: int | None = None, check_hashes: bool = True) -> VisionLanguageModel:
    """Loads a bundle made by `python -m export.build`.

    Args:
        bundle: the bundle's directory.
        threads: engine threads of this process (default: one per available core); the first model loaded decides.
        check_hashes: compare every file with its SHA-256 (about 1 GB/s); False compares sizes only.

    Raises:
        BundleError: it is missing, altered, truncated or too new.
        EngineError: the engine library refuses a graph.
    """
    path = Path(bundle)
    manifest = read_manifest(path)
    check_files(path, manifest, hashes=check_hashes)
    ThreadPool.use(threads)
    return VisionLanguageModel(path, manifest)


class VisionLanguageModel:
    """A loaded bundle. Make one with `load`."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        self.bundle, self.manifest = bundle, manifest
        self.prompts = PromptBuilder(bundle, manifest)
        self.chain = EngineChain(bundle, manifest)
        self.defaults = GenerationConfig.from_json(json.loads((bundle / GENERATION_FILE).read_text(encoding="utf-8")))
        self._lock = threading.Lock()

    def generate(
        self, messages: str | Sequence[Message], images: Images = (), *, keep: int | str | None = None, **options: Any
    ) -> Generation:
        """Answers a prompt.

        Args:
            messages: a question, or a list of messages as Hugging Face's chat templates take them
                (`[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]}]`).
            images: one for each image of the messages, in order: file names, PIL images or uint8 arrays [H, W, 3].
            keep: visual tokens kept after the split, over all images: a budget of the bundle, or "all" (default: its first).
            options: max_new_tokens, do_sample, temperature, top_k, top_p, repetition_penalty, seed, stop_strings, eos_token_ids.

        Raises:
            InputError: a message or image cannot be used, or is too long (ContextLengthError).
            UsageError: an option or budget that does not exist.
        """
        stream = self.stream(messages, images, keep=keep, **options)
        for _ in stream:
            pass
        return stream.result

    def stream(
        self, messages: str | Sequence[Message], images: Images = (), *, keep: int | str | None = None, **options: Any
    ) -> AnswerStream:
        """Like `generate`, piece by piece: iterate over the returned stream, then read its `result`."""
        config = self.defaults.override(**options)
        return AnswerStream(self, messages, images, self.chain.check_keep(keep), config)


class AnswerStream:
    """An answer being generated: iterate for pieces of text; `result` holds the statistics when it has ended.

    Nothing runs before the first piece is asked for. `close` (or leaving a `with` block) cancels it; the model is then free again.
    """

    def __init__(
        self, model: VisionLanguageModel, messages: str | Sequence[Message], images: Images, keep: int | None, config: GenerationConfig
    ) -> None:
        self._result: Generation | None = None
        self._pieces = self._run(model, messages, images, keep, config)

    def __iter__(self) -> Generator[str, None, None]:
        return self._pieces

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels the answer; what was generated so far stays in `result`."""
        self._pieces.close()

    @property
    def result(self) -> Generation:
        """The answer and its statistics, once the stream has ended or was closed after its first piece."""
        if self._result is None:
            raise EntropyPruneError("the stream has no result yet: iterate over it first")
        return self._result

    def _run(
        self, model: VisionLanguageModel, messages: str | Sequence[Message], images: Images, keep: int | None, config: GenerationConfig
    ) -> Generator[str, None, None]:
        watch = Stopwatch()
        with model._lock:
            with watch.stage("preprocess"):
                prompt = model.prompts.build(messages, images)
            allowed = _room(model.manifest, prompt, config)
            conversation, logits = model.chain.prefill(
                prompt.ids.input_ids, prompt.ids.visual_mask, prompt.pixel_values, keep=keep, image_seed=prompt.image_seed,
                reserve=min(allowed, MAX_RESERVE), watch=watch,
            )  # fmt: skip
            answer = _Answer(model, conversation, prompt, config, allowed, watch)
            try:
                yield from answer.pieces(logits)
            finally:
                self._result = answer.generation()


class _Answer:
    """The decode loop of one answer."""

    def __init__(
        self,
        model: VisionLanguageModel,
        conversation: Conversation,
        prompt: Prompt,
        config: GenerationConfig,
        allowed: int,
        watch: Stopwatch,
    ) -> None:
        self._model, self._conversation, self._prompt, self._config = model, conversation, prompt, config
        self._allowed, self._watch = allowed, watch
        self._tokens: list[int] = []
        self._text: list[str] = []
        self._ttft_ms = 0.0
        self._finish_reason = "cancelled"

    def pieces(self, logits: np.ndarray) -> Iterator[str]:
        sampler, detokenizer = Sampler(self._config), IncrementalDetokenizer(self._model.prompts.tokenizer)
        stops = StopStrings(self._config.stop_strings)
        history = self._prompt.ids.input_ids.tolist()
        while True:
            token = sampler.next(logits, history)
            self._ttft_ms = self._ttft_ms or self._watch.elapsed_ms()
            self._tokens.append(token)
            history.append(token)
            if token in self._config.eos_token_ids:
                self._finish_reason = "eos"
                break
            piece, stopped = stops.push(detokenizer.push(token))
            if piece:
                self._text.append(piece)
                yield piece
            if stopped:
                self._finish_reason = "stop"
                return
            if len(self._tokens) >= self._allowed:
                self._finish_reason = "length"
                break
            with self._watch.stage("decode"):
                logits = self._model.chain.decode(self._conversation, token)
        rest, stopped = stops.push(detokenizer.flush())
        if stopped:
            self._finish_reason = "stop"
        rest += stops.flush()
        if rest:
            self._text.append(rest)
            yield rest

    def generation(self) -> Generation:
        selection, stages = self._conversation.selection, self._watch.stages_ms
        entropy = selection.token_entropy
        return Generation(
            text="".join(self._text).strip(),
            token_ids=tuple(self._tokens),
            prompt_tokens=len(self._prompt.ids.input_ids),
            visual_tokens=selection.visual_tokens,
            kept_tokens=len(selection.kept_indices),
            kept_indices=tuple(selection.kept_indices.tolist()),
            token_entropy=entropy,
            ttft_ms=self._ttft_ms,
            tpot_ms=stages.get("decode", 0.0) / max(1, len(self._tokens) - 1),
            stages_ms=stages,
            finish_reason=self._finish_reason,
            unscored_tokens=0 if entropy is None else int((~np.isfinite(entropy)).sum()),
        )


def _room(manifest: Manifest, prompt: Prompt, config: GenerationConfig) -> int:
    """How many tokens may be generated: what is asked for, within the context."""
    room = manifest.max_context - len(prompt.ids.input_ids)
    if room < 1:
        raise ContextLengthError(
            f"the prompt has {len(prompt.ids.input_ids)} tokens, the bundle's context holds {manifest.max_context} with the answer: "
            "shorten it, or export with a larger --max-context"
        )
    return min(room, config.max_new_tokens)
