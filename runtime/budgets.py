"""Budgets of a bundle: which may be asked for, and how "auto" chooses among them for one image group.

The scores' mass says how much of what the score saw a kept set still holds. With s the scores of a group's N visual tokens, a set of the R
largest holds

    mass(R) = sum over the R largest of (s - min s) / sum over all of (s - min s)

where scores that are not finite count as nothing, and a group of equal scores has mass 1 at any R. "auto" takes the smallest budget whose
mass reaches the bundle's threshold (`Manifest.auto_keep`), and the largest budget where none does. Knows nothing about engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

import numpy as np

from runtime.errors import UsageError, shown
from runtime.manifest import Manifest

AUTO: Final = "auto"
Keep: TypeAlias = int | Literal["auto"] | None  # a keep count, a choice for each image group, or all


def check_keep(manifest: Manifest, keep: int | str | None) -> Keep:
    """What a user's `keep` means for a bundle: None is its default budget, "all" no pruning (returned as None), "auto" stays.

    Raises:
        UsageError: the bundle has no such budget, or none for each image.
    """
    if keep is None:
        return manifest.budgets[0]
    if isinstance(keep, str):
        if keep == "all":
            return None
        if keep == AUTO:
            check_held(manifest, AUTO)
            return AUTO
    n = manifest.geometry.visual_tokens  # prunes nothing of one image
    if not isinstance(keep, (int, np.integer)) or isinstance(keep, bool) or keep not in (*manifest.budgets, n):
        raise _no_such_budget(manifest, keep)
    return int(keep)


def check_held(manifest: Manifest, keep: Keep) -> None:
    """Raises UsageError where the bundle has no score graph for a keep count, or no threshold for "auto"."""
    if keep == AUTO and manifest.auto_keep is None:
        raise UsageError(
            f"this bundle has no threshold for keep auto: export it with several budgets and --auto-keep T, or keep {_held(manifest)}"
        )
    if keep is not None and keep != AUTO and keep not in manifest.budgets:
        raise _no_such_budget(manifest, keep)


def smallest_kept(keep: Keep, budgets: Sequence[int]) -> int | None:
    """The smallest keep count that may come out of `keep`: a group of no more tokens keeps all, unscored. None keeps all."""
    return min(budgets) if keep == AUTO else keep


def largest_kept(keep: Keep, budgets: Sequence[int]) -> int | None:
    """The largest keep count that may come out of `keep`, which is what caches make room for; None keeps all."""
    return max(budgets) if keep == AUTO else keep


def kept_mass(scores: np.ndarray) -> np.ndarray:
    """The mass that the 1, 2, ... N largest of N scores hold.

    Args:
        scores: [N], N >= 1, any float dtype; summed in float64.

    Returns:
        float64 [N], ascending; the last is 1.
    """
    finite = np.isfinite(scores)
    above = np.zeros(len(scores))
    if finite.any():
        values = scores[finite].astype(np.float64)
        above[finite] = values - values.min()
    sums = np.cumsum(np.sort(above)[::-1])
    return np.asarray(sums / sums[-1]) if sums[-1] > 0 else np.ones(len(scores))


def choose_budget(scores: np.ndarray, budgets: Sequence[int], threshold: float) -> int:
    """The smallest budget whose mass reaches a threshold, the largest where none does; one of N or more holds all of it.

    Args:
        scores: [N] of one image group, as the score graph gives them.
        threshold: above 0, up to 1.
    """
    mass = kept_mass(scores)
    reached = [budget for budget in budgets if budget >= len(mass) or mass[budget - 1] >= threshold]
    return min(reached, default=max(budgets))


def _held(manifest: Manifest) -> str:
    auto = "" if manifest.auto_keep is None else f", {AUTO}"
    return f"{', '.join(map(str, manifest.budgets))}{auto} and all"


def _no_such_budget(manifest: Manifest, keep: object) -> UsageError:
    wanted = keep if isinstance(keep, str) and len(keep) < 20 else shown(keep)
    return UsageError(f"this bundle holds the budgets {_held(manifest)}, not {wanted}: export it with --keep {wanted}")
