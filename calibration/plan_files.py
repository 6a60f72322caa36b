"""The files that calibrations write: the plan, a picture and the measurements beside it; one run at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from export.calibration_plan import CalibrationPlan
from runtime.errors import StorageError, UsageError
from runtime.files import check_writable

__all__ = ["BudgetFiles", "PlanFiles"]


@dataclass(frozen=True, slots=True)
class PlanFiles:
    """The plan's file and the two beside it."""

    plan: Path

    @property
    def picture(self) -> Path:
        return self.plan.with_suffix(".png")

    @property
    def journal(self) -> Path:
        return self.plan.with_suffix(".images.jsonl")

    def check(self) -> None:
        """Refuses early what cannot be written, and to replace what is not a plan, or holds more than this command finds.

        Raises:
            UsageError: another file, or a plan with budgets, is there.
            StorageError: it cannot be written.
        """
        old = self._existing()
        if old is not None and (old.budgets is not None or old.auto_keep is not None):
            raise UsageError(
                f"{self.plan} holds calibrated budgets, which a new split layer would make void; it is left alone: "
                "move it away, or choose another --output"
            )

    def _existing(self) -> CalibrationPlan | None:
        """The plan that would be replaced, if there is one; all files are checked to be writable."""
        if self.plan.suffix != ".json":
            raise UsageError(f"--output {self.plan} does not end in .json: the picture and the measurements are named after it")
        for path in (self.plan, self.picture, self.journal):
            check_writable(path)
        if not self.plan.exists():
            return None
        try:
            return CalibrationPlan.read(self.plan)
        except UsageError as error:
            raise UsageError(f"{self.plan} exists and is not a plan ({error}); it is left alone: choose another --output") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One run at a time; an operating-system lock, released when the process dies."""
        file = self.plan.absolute().with_name(f".{self.plan.name}.lock")
        lock = FileLock(file, is_singleton=False)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise StorageError(f"another run is writing {self.plan}: wait for it, or choose another --output") from error
        except OSError as error:
            raise StorageError(f"cannot write {self.plan}: {error.strerror}; choose another --output") from error
        try:
            yield
        finally:
            with suppress(OSError):  # while it is locked: later it could be the next run's
                file.unlink()
            lock.release()


@dataclass(frozen=True, slots=True)
class BudgetFiles(PlanFiles):
    """Those of `calibration.budget`, beside those of `calibration.ecl`. `carried_on` is the plan that is read first, if any."""

    carried_on: Path | None = None

    @property
    def picture(self) -> Path:
        return self.plan.with_suffix(".budget.png")

    @property
    def journal(self) -> Path:
        return self.plan.with_suffix(".budget.jsonl")

    def check(self) -> None:
        """Refuses early what cannot be written, and to replace what is not a plan, or a plan that holds another calibration's evidence.

        Raises:
            UsageError: such a file is there.
            StorageError: it cannot be written.
        """
        old = self._existing()
        if old is None or (self.carried_on is not None and self.carried_on.exists() and self.plan.samefile(self.carried_on)):
            return
        if set(old.evidence) - {"budget"}:
            raise UsageError(
                f"{self.plan} holds another calibration's evidence, which would be lost; it is left alone: carry it on with "
                f"--plan {self.plan}, or choose another --output"
            )
