"""The model `entropy_prune` of lmms-eval: registers `benchmarks.accuracy.bundle_model` there and adds nothing of its own.

Importable only where lmms-eval is installed (see docs/benchmarks.md). Its model arguments are the fields of `Settings`:

    LMMS_EVAL_PLUGINS=benchmarks.accuracy.lmms_plugin python -m lmms_eval \
        --model entropy_prune --model_args bundle=DIR,keep=166 --tasks pope
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics

from benchmarks.accuracy.bundle_model import BundleModel, Settings, seconds_and_tokens, statistics
from runtime.errors import UsageError


class EntropyPrune(lmms):
    """A bundle as a model of lmms-eval; `task_dict` (task, split, documents) is set by the harness before it asks."""

    is_simple = True  # tasks give a text and images, as for the harness's own LLaVA-1.5

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.answering = BundleModel(Settings.from_arguments(arguments))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in order. The statistics go into the results' `throughput`, each name with `avg_` before it."""
        begun = len(self.answering.generations)
        answers = self.answering.answer_all([request.args for request in requests], self.task_dict)
        done = self.answering.generations[begun:]
        seconds, tokens = seconds_and_tokens(done)
        log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, statistics(done))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refused: a bundle gives the next token's logits alone.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"task {_task(requests)} compares the likelihood of given answers, a bundle generates its own: "
            "choose the task's variant that generates (seedbench, not seedbench_ppl)"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Refused.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"task {_task(requests)} asks in several rounds, which is not implemented: choose a task of one round")


def _task(requests: Sequence[Any]) -> str:
    return str(requests[0].task_name) if requests else "without questions"
