"""The embeddable API: `load` a bundle, `generate` or `stream` an answer about images.

    from runtime import load
    vlm = load("bundles/tiny-llava-cpu")
    print(vlm.generate("what is at row 2 column 3?", images=["scene.png"]).text)

A state asks several questions about one image without running it again:

    state = vlm.prefill([{"role": "user", "content": [{"type": "image"}]}], images=["scene.png"])
    vlm.generate("read row 2.", state=state)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends import CPU, check_backend, open_backend
from runtime.budgets import Keep, largest_kept
from runtime.chain import EngineChain
from runtime.conversation import Conversation
from runtime.detokenize import IncrementalDetokenizer, StopStrings
from runtime.engines.onnxruntime import ThreadPool
from runtime.errors import ContextLengthError, EntropyPruneError, UsageError, shown
from runtime.executor import Executor
from runtime.generation import Generation, Stopwatch
from runtime.manifest import Manifest, check_files, read_manifest
from runtime.prompt import GENERATION_FILE, ImageSource, Message, Prompt, PromptBuilder, image_list, read_object
from runtime.sampling import GenerationConfig, Sampler
from runtime.state import PrefixCache, PromptState, check_state

Images = Sequence[ImageSource]
MAX_THREADS = 1024
MAX_RESERVE = 256  # tokens that a cache makes room for at first; it doubles when an answer grows beyond


def load(
    bundle: str | os.PathLike[str],
    *,
    threads: int | None = None,
    check_hashes: bool = True,
    cache_bytes: int = 0,
    shared_threads: bool = True,
    backend: str | None = None,
    device_index: int = 0,
) -> VisionLanguageModel:
    """Loads a bundle made by `python -m export.build`.

    Args:
        bundle: the bundle's directory.
        threads: engine threads (default: one per available core). They are shared by the whole process; the first model decides.
        check_hashes: compare every file with its SHA-256 (about 1 GB/s); False compares sizes only.
        cache_bytes: bytes of caches kept for prompts that begin alike (same text and images), least recently used out first.
        shared_threads: False gives every engine threads of its own, for processes with other ONNX Runtime sessions that must have theirs.
        backend: "cpu", "cuda" (ONNX Runtime on a GPU), "tensorrt" or "tensorrt_rtx", which runs or is an error; "auto" (default): what the
            bundle was made for, or the CPU, with a warning, where that cannot run.
        device_index: which GPU.

    Raises:
        BundleError: it is missing, altered, truncated or too new.
        EngineError: the engine library refuses a graph, or the named backend cannot run here.
        UsageError: an option is out of range.
    """
    _check_options(threads, cache_bytes, check_hashes)
    check_backend(backend, device_index)
    path = Path(bundle)
    manifest = read_manifest(path)
    check_files(path, manifest, hashes=check_hashes)
    if shared_threads:
        ThreadPool.use(threads)
    name, executor = open_backend(path, manifest, backend, device_index, threads)
    return VisionLanguageModel(path, executor.manifest, threads, cache_bytes, backend=name, executor=executor)


class VisionLanguageModel:
    """A loaded bundle. Make one with `load`.

    Safe to use from several threads: engines run one call at a time, each answer has caches of its own.

    Attributes:
        backend: what runs: "cpu", "cuda", "tensorrt" or "tensorrt_rtx".
    """

    def __init__(
        self, bundle: Path, manifest: Manifest, threads: int | None = None, cache_bytes: int = 0, *, backend: str = CPU,
        executor: Executor | None = None,
    ) -> None:  # fmt: skip
        self.bundle, self.manifest, self.backend = bundle, manifest, backend
        self.prompts = PromptBuilder(bundle, manifest)
        self.chain = EngineChain(bundle, manifest, threads, executor)
        self.defaults = GenerationConfig.from_json(read_object(bundle / GENERATION_FILE))
        self.cache = PrefixCache(cache_bytes)
        self.lock = threading.Lock()  # guards the cache and who uses which conversation, never held while engines run

    def generate(
        self, messages: str | Sequence[Message], images: Images = (), *, keep: int | str | None = None, state: PromptState | None = None,
        **options: Any,
    ) -> Generation:  # fmt: skip
        """Answers a prompt.

        Args:
            messages: a question, or a list of messages as Hugging Face's chat templates take them
                (`[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]}]`).
            images: one for each image of the messages, in order: file names, PIL images or uint8 arrays [H, W, 3].
            keep: visual tokens kept after the split, over all images of a message: a budget of the bundle, "all", or "auto", which chooses
                the budget for each message by its images' scores (default: the bundle's first, or the state's).
            state: from `prefill`; a question is added to its messages, a list of messages begins with them. Its images are not
                passed again.
            options: max_new_tokens, do_sample, temperature, top_k, top_p, repetition_penalty, seed, stop_strings, eos_token_ids.

        Raises:
            InputError: a message or image cannot be used, or is too long (ContextLengthError).
            UsageError: an option or budget that does not exist, or a state that another answer is using.
        """
        stream = self.stream(messages, images, keep=keep, state=state, **options)
        for _ in stream:
            pass
        return stream.result

    def stream(
        self, messages: str | Sequence[Message], images: Images = (), *, keep: int | str | None = None, state: PromptState | None = None,
        **options: Any,
    ) -> AnswerStream:  # fmt: skip
        """Like `generate`, piece by piece: iterate over the returned stream, then read its `result`."""
        config = self.defaults.override(**options)
        check_state(state, self.manifest)
        if state is not None and keep is not None and self.chain.check_keep(keep) != state.keep:
            raise UsageError(f"the state was made with keep {state.keep or 'all'}, not {keep}: leave keep out, or prefill again")
        return AnswerStream(self, messages, images, state.keep if state else self.chain.check_keep(keep), state, config)

    def prefill(self, messages: str | Sequence[Message], images: Images = (), *, keep: int | str | None = None) -> PromptState:
        """Runs the beginning of a prompt once: `generate("question", state=...)` then asks about it, any number of times.

        What follows an image cannot change its selection (attention is causal), so answers are those of asking afresh.

        Args:
            messages: a list of messages; its last user message may hold images alone. A text is one user message.
            images, keep: as in `generate`.
        """
        budget = self.chain.check_keep(keep)
        prompt = self.prompts.build(messages, images, answer=False)
        _room(self.chain, prompt, 1)
        conversation = self._begin(prompt, budget, MAX_RESERVE)
        self.chain.extend(conversation, prompt.ids.input_ids, prompt.groups, prompt.pixel_values, keep=budget)
        return PromptState(prompt, budget, conversation, self.manifest)

    def close(self) -> None:
        """Gives back the engines, and a device's memory with all conversations in it; the model cannot be used afterwards."""
        with self.lock:
            self.cache.clear()
        self.chain.close()

    # ------------------------------------------------------------ for AnswerStream

    def borrow(self, prompt: Prompt, keep: Keep, state: PromptState | None, reserve: int) -> Conversation:
        """A conversation that holds as much of the prompt as is known, cut down to that, marked as in use."""
        with self.lock:
            conversation = state.conversation if state else self.cache.take(prompt, keep)
            if conversation is not None:
                if conversation.in_use:
                    raise UsageError("the state is being used by another answer: wait for it, close it, or clone() the state")
                conversation.in_use = True
        if conversation is None:
            return self._begin(prompt, keep, reserve)
        conversation.truncate(conversation.shared_with(prompt.ids.input_ids, prompt.groups, keep))
        return conversation

    def give_back(self, conversation: Conversation, state: PromptState | None) -> None:
        """Ends an answer's use of a conversation."""
        with self.lock:
            conversation.in_use = False
            if state is None and self.cache.limit_bytes:
                self.cache.put(conversation)

    def _begin(self, prompt: Prompt, keep: Keep, reserve: int) -> Conversation:
        tokens, most = len(prompt.ids.input_ids), largest_kept(keep, self.manifest.budgets)
        dropped = sum(max(0, len(group.rows) - most) for group in prompt.groups) if most is not None else 0
        return self.chain.new_conversation(tokens + reserve, tokens - dropped + reserve)


class AnswerStream:
    """An answer being generated: iterate for pieces of text; `result` holds the statistics when it has ended.

    Nothing runs before the first piece is asked for. `close` (or leaving a `with` block) cancels it; the model is usable throughout.
    """

    def __init__(
        self, model: VisionLanguageModel, messages: str | Sequence[Message], images: Images, keep: Keep, state: PromptState | None,
        config: GenerationConfig,
    ) -> None:  # fmt: skip
        self._result: Generation | None = None
        self._pieces = self._run(model, messages, images, keep, state, config)

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
        self, model: VisionLanguageModel, messages: str | Sequence[Message], images: Images, keep: Keep, state: PromptState | None,
        config: GenerationConfig,
    ) -> Generator[str, None, None]:  # fmt: skip
        watch = Stopwatch()
        with watch.stage("preprocess"):
            if state is not None:
                messages, images = state.with_question(messages), (*state.images, *image_list(images))
            prompt = model.prompts.build(messages, images)
        allowed = _room(model.chain, prompt, config.max_new_tokens)
        conversation = model.borrow(prompt, keep, state, min(allowed, MAX_RESERVE))
        try:
            groups = [g for g in prompt.groups if g.start >= conversation.next_position]
            reused = conversation.next_position
            pixels = prompt.pixels_of(groups)
            logits = model.chain.extend(conversation, prompt.ids.input_ids, groups, pixels, keep=keep, watch=watch)
            answer = _Answer(model, conversation, prompt, config, allowed, reused, watch)
            try:
                yield from answer.pieces(logits)
            finally:
                self._result = answer.generation()
        finally:
            model.give_back(conversation, state)


class _Answer:
    """The decode loop of one answer."""

    def __init__(
        self,
        model: VisionLanguageModel,
        conversation: Conversation,
        prompt: Prompt,
        config: GenerationConfig,
        allowed: int,
        reused: int,
        watch: Stopwatch,
    ) -> None:
        self._model, self._conversation, self._prompt, self._config = model, conversation, prompt, config
        self._allowed, self._reused, self._watch = allowed, reused, watch
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
        conversation, stages = self._conversation, self._watch.stages_ms
        kept = conversation.kept_indices
        return Generation(
            text="".join(self._text).strip(),
            token_ids=tuple(self._tokens),
            prompt_tokens=len(self._prompt.ids.input_ids),
            reused_tokens=self._reused,
            visual_tokens=conversation.visual_tokens,
            kept_tokens=len(kept),
            kept_indices=tuple(kept.tolist()),
            token_entropy=conversation.token_entropy,
            ttft_ms=self._ttft_ms,
            tpot_ms=stages.get("decode", 0.0) / max(1, len(self._tokens) - 1),
            stages_ms=stages,
            finish_reason=self._finish_reason,
            unscored_tokens=conversation.unscored_tokens,
            auto_budgets=conversation.auto_budgets,
        )


def _check_options(threads: Any, cache_bytes: Any, check_hashes: Any) -> None:
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
        raise UsageError(f"threads is {shown(threads)}; give 1 to {MAX_THREADS}, or leave it out for one per core")
    if type(cache_bytes) is not int or cache_bytes < 0:
        raise UsageError(f"cache_bytes is {shown(cache_bytes)}; give the bytes of caches to keep, 0 for none")
    if type(check_hashes) is not bool:
        raise UsageError(f"check_hashes is {shown(check_hashes)}; give True or False")


def _room(chain: EngineChain, prompt: Prompt, wanted: int) -> int:
    """How many tokens may be generated: what is asked for, within the context."""
    context = chain.max_context
    room = context - len(prompt.ids.input_ids)
    if room < 1:
        longer = "export with a larger --max-context" if context == chain.manifest.max_context else "compile with a larger --capacity"
        raise ContextLengthError(
            f"the prompt has {len(prompt.ids.input_ids)} tokens, the bundle's context holds {context} with the answer: "
            f"shorten it, or {longer}"
        )
    return min(room, wanted)
