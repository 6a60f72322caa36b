"""Pieces `transformers-BACKEND`: transformers (sdpa) as it is and under torch.compile, against a bundle on the same device, in turn.

The same shape with random weights of its own (times do not depend on them), the same precision, prompts and images. Timed from pixels on
the host to the first token, and per further token, greedily; preprocessing is left out on both sides. Eager grows its cache, as
transformers does by default; compiled, it has a static one, which it needs to keep its shapes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.gpu.settings import Settings
from runtime.profile_statistics import Distribution, paired_ratio

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration

    from benchmarks.gpu.latency import Subject
    from export.spec import ModelSpec

EAGER, COMPILED = "transformers, sdpa", "transformers, torch.compile"
ROUND_TO: Final = 64  # of the static cache's length


@dataclass(frozen=True, slots=True)
class Times:
    """One answer in milliseconds: pixels to first token, and a further token on average; `tokens` of transformers' answers."""

    prefill_ms: float
    per_token_ms: float
    tokens: tuple[int, ...] = ()


def piece(backend: str) -> Callable[[Settings], dict[str, Any]]:
    """The piece that compares with one backend."""

    def run(settings: Settings) -> dict[str, Any]:
        from benchmarks.gpu.pieces import runnable

        reason = runnable(settings, backend)
        if reason is not None:
            return {"skipped": reason, "said": f"left out: {reason}"}
        return measure(settings, backend)

    return run


def measure(settings: Settings, backend: str) -> dict[str, Any]:
    """Runs everything in turn; a compiler that fails is recorded with its reason, and the rest is measured without it."""
    import torch
    import transformers

    from benchmarks.gpu.device import open_model
    from benchmarks.gpu.latency import Subject, in_turn, name_of

    subject = Subject.of(open_model(settings.bundle, backend, settings.device_index), settings.new_tokens)
    baseline = Baseline.make(settings, subject)
    contenders: dict[str, Callable[[int], Times]] = {
        f"{backend}, keep {name_of(keep)}": _ours(subject, keep) for keep in (None, *settings.budgets)
    }
    contenders[EAGER] = baseline.eager
    refused = _attempt(baseline)
    if refused is None:
        contenders[COMPILED] = baseline.compiled
    rounds = in_turn(list(contenders.values()), settings)
    columns = dict(zip(contenders, zip(*rounds, strict=True), strict=True))
    ratios = {f"{other} / {name}": _ratios(columns[other], columns[name]) for other in (EAGER, COMPILED) if other in columns
              for name in columns if name not in (EAGER, COMPILED)}  # fmt: skip
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "compiler": baseline.compiler}
    return {
        "backend": backend, "rounds": len(rounds), "versions": versions, "dtype": str(baseline.dtype), "compile_refused": refused,
        "times_ms": {name: _distributions(answers) for name, answers in columns.items()}, "ratios": ratios,
        "torch_peak_bytes": baseline.peak_bytes(),
        "said": "; ".join(f"{n}: prefill {r['prefill']['median']:.2f}x, token {r['per_token']['median']:.2f}x" for n, r in ratios.items()),
    }  # fmt: skip


def _ours(subject: Subject, keep: int | None) -> Callable[[int], Times]:
    def ask(number: int) -> Times:
        answer = subject.ask(number, keep)
        return Times(answer.prefill_ms, answer.per_token_ms)

    return ask


def _attempt(baseline: Baseline) -> str | None:
    """Compiles by running once; the reason where that fails."""
    try:
        baseline.compiled(0)
    except (RuntimeError, ImportError, OSError, NotImplementedError) as error:  # the compiler's errors are RuntimeErrors
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return None


def _distributions(answers: Sequence[Times]) -> dict[str, Any]:
    return {name: dataclasses.asdict(Distribution.of([getattr(a, f"{name}_ms") for a in answers])) for name in ("prefill", "per_token")}


def _ratios(theirs: Sequence[Times], ours: Sequence[Times]) -> dict[str, Any]:
    return {
        name: dataclasses.asdict(paired_ratio([getattr(a, f"{name}_ms") for a in theirs], [getattr(a, f"{name}_ms") for a in ours]))
        for name in ("prefill", "per_token")
    }


# ---------------------------------------------------------------- transformers


@dataclass(frozen=True, slots=True)
class Baseline:
    """A transformers model with random weights, and the prompts that the bundle gets.

    `static` is the compiled model's cache: one for all answers, since a new one would be compiled for (or recorded) anew.
    """

    model: LlavaForConditionalGeneration
    subject: Subject
    dtype: torch.dtype
    compiler: str
    static: Any
    prefill: Callable[..., Any]
    step: Callable[..., Any]

    @classmethod
    def make(cls, settings: Settings, subject: Subject) -> Baseline:
        import torch
        from transformers import StaticCache

        device = torch.device("cpu") if settings.rehearse else torch.device("cuda", settings.device_index)
        dtype = torch.float32 if settings.rehearse else torch.float16
        model = random_llava(settings, device, dtype)
        tokens = subject.model.manifest.geometry.visual_tokens + subject.text_tokens + subject.new_tokens
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=-(-tokens // ROUND_TO) * ROUND_TO)
        if settings.rehearse:  # the same calls without a compiler's minutes
            passes = [torch.compile(model.forward, backend="eager", dynamic=False) for _ in range(2)]
            return cls(model, subject, dtype, "backend eager", cache, *passes)
        prefill, step = torch.compile(model.forward, dynamic=False), torch.compile(model.forward, dynamic=False, mode="reduce-overhead")
        return cls(model, subject, dtype, "inductor: prefill default, decode reduce-overhead", cache, prefill, step)

    def eager(self, number: int) -> Times:
        """An answer with transformers as it is."""
        from transformers import DynamicCache

        return self._answer(number, DynamicCache(config=self.model.config.get_text_config()), self.model.forward, self.model.forward)

    def compiled(self, number: int) -> Times:
        """An answer with compiled forward passes."""
        self.static.reset()
        return self._answer(number, self.static, self.prefill, self.step)

    def _prompt(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [S] int64 and pixels [1, 3, side, side] float32, as the bundle gets them."""
        from runtime.profile_runs import messages, synthetic_image

        prompt = self.subject.model.prompts.build(messages(self.subject.question), [synthetic_image(number)])
        assert prompt.pixel_values is not None, "there is an image"
        return prompt.ids.input_ids, prompt.pixel_values

    def _answer(self, number: int, cache: Any, prefill: Callable[..., Any], step: Callable[..., Any]) -> Times:
        import torch

        ids, pixels = self._prompt(number)
        device, rows, steps = self.model.device, len(ids), self.subject.new_tokens - 1
        self._wait()
        with torch.no_grad():
            began = time.perf_counter()
            positions = torch.arange(rows, device=device)[None]
            out = prefill(
                input_ids=torch.from_numpy(ids)[None].to(device), pixel_values=torch.from_numpy(pixels).to(device, self.dtype),
                position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            token = out.logits[:, -1:].argmax(-1)
            tokens = [int(token)]  # what a user sees: the token on the host
            middle = time.perf_counter()
            for i in range(steps):
                if device.type == "cuda" and step is self.step:  # a recorded graph's outputs are overwritten by its next run
                    torch.compiler.cudagraph_mark_step_begin()
                position = torch.full((1, 1), rows + i, device=device)
                out = step(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1)
                token = out.logits[:, -1:].argmax(-1)
                tokens.append(int(token))
        return Times((middle - began) * 1e3, (time.perf_counter() - middle) * 1e3 / steps, tuple(tokens))

    def _wait(self) -> None:
        import torch

        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def peak_bytes(self) -> int | None:
        """Most of the device's memory that torch has held; None on a CPU."""
        import torch

        return torch.cuda.max_memory_reserved(self.model.device) if self.model.device.type == "cuda" else None


def random_llava(settings: Settings, device: torch.device, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """A LLaVA of the measured bundle's shape, weights drawn by transformers' own initialisation, made on the device."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from export.configs import load_model_config
    from runtime.errors import UsageError

    if settings.rehearse:
        config = LlavaConfig.from_pretrained(settings.work / "checkpoint")
    else:
        spec = load_model_config("llava15").spec
        if spec is None:
            raise UsageError("configs/models/llava15.toml has no geometry: give it one")
        config = llava_config(spec)
    torch.manual_seed(settings.seed)
    with torch.device(device):
        model: LlavaForConditionalGeneration = LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def llava_config(spec: ModelSpec) -> Any:
    """transformers' configuration of a geometry of `configs/models`; the tower has one layer more, whose output nobody reads."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    d, v = spec.decoder, spec.vision
    text = LlamaConfig(
        vocab_size=d.vocab_size, hidden_size=d.hidden_size, intermediate_size=d.intermediate_size, num_hidden_layers=d.layers,
        num_attention_heads=d.query_heads, num_key_value_heads=d.kv_heads, head_dim=d.head_size, rms_norm_eps=d.rms_norm_eps,
        max_position_embeddings=d.max_positions, rope_parameters={"rope_type": "default", "rope_theta": d.rope_theta},
    )  # fmt: skip
    vision = CLIPVisionConfig(
        image_size=v.image_size, patch_size=v.patch_size, hidden_size=v.hidden_size, intermediate_size=v.intermediate_size,
        num_hidden_layers=v.layers + 1, num_attention_heads=v.heads, layer_norm_eps=v.layer_norm_eps, hidden_act=v.activation,
        projection_dim=v.hidden_size,
    )  # fmt: skip
    return LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=spec.image_token_id, projector_hidden_act=v.projector_activation,
        multimodal_projector_bias=v.projector_bias, vision_feature_layer=-2, vision_feature_select_strategy="default",
        image_seq_length=v.visual_tokens,
    )  # fmt: skip
