"""Times engines from outside while a profile runs: the engines themselves carry no clocks.

Two figures of each call: the call as the chain sees it, and within it the time inside the engine library. Their difference is what
handing over tensors costs (binding).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime import names
from runtime.chain import EngineChain
from runtime.device.executor import DeviceExecutor
from runtime.engines.base import Engine
from runtime.host_executor import HostExecutor
from runtime.kv_cache import KVGroup

_SESSION, _RUN = "_session", "run_with_iobinding"


@dataclass(frozen=True, slots=True)
class EngineCall:
    """One run of one engine, in milliseconds; `library_ms` is None where the engine does not show its library's session."""

    name: str
    run_ms: float
    library_ms: float | None


@dataclass(frozen=True, slots=True)
class EngineTotals:
    """Sums over some calls, in milliseconds."""

    run_ms: float
    library_ms: float | None

    @classmethod
    def of(cls, calls: Sequence[EngineCall]) -> EngineTotals:
        inside = [c.library_ms for c in calls if c.library_ms is not None]
        return cls(sum(c.run_ms for c in calls), sum(inside) if len(inside) == len(calls) else None)


class EngineClock:
    """The calls since the last `restart`. Belongs to one thread."""

    def __init__(self) -> None:
        self._calls: list[EngineCall] = []

    def restart(self) -> None:
        self._calls = []

    def add(self, call: EngineCall) -> None:
        self._calls.append(call)

    def split(self) -> tuple[EngineTotals, EngineTotals]:
        """Prefill and decode: the first run of `post_ecl` ends the prefill of one image group."""
        ends = next((i + 1 for i, call in enumerate(self._calls) if call.name == names.POST_ECL), len(self._calls))
        return EngineTotals.of(self._calls[:ends]), EngineTotals.of(self._calls[ends:])


class _TimedSession:
    """A library's session whose runs are timed; everything else is its own."""

    def __init__(self, session: Any) -> None:
        self.session, self.ms = session, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run_with_iobinding(self, *arguments: Any) -> None:
        began = time.perf_counter()
        self.session.run_with_iobinding(*arguments)
        self.ms += (time.perf_counter() - began) * 1e3


class _TimedEngine:
    """An engine whose runs are told to a clock."""

    def __init__(self, name: str, engine: Engine, session: _TimedSession | None, clock: EngineClock) -> None:
        self._name, self._engine, self._inside, self._clock = name, engine, session, clock

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str], cache: KVGroup | None = None) -> list[np.ndarray]:
        if self._inside is not None:
            self._inside.ms = 0.0
        began = time.perf_counter()
        results = self._engine.run(feeds, outputs, cache)
        run_ms = (time.perf_counter() - began) * 1e3
        self._clock.add(EngineCall(self._name, run_ms, None if self._inside is None else self._inside.ms))
        return results


@contextmanager
def timed_engines(chain: EngineChain) -> Iterator[EngineClock]:
    """Times a chain's engines within the block; afterwards the chain is as it was.

    On a device a stage is one call: from its first enqueueing until its results are there. A decode step counts as one call, of `post_ecl`.
    """
    clock, executor = EngineClock(), chain.executor
    if isinstance(executor, HostExecutor):
        with _timed_on_the_host(executor.engines, clock):
            yield clock
    elif isinstance(executor, DeviceExecutor):
        before, executor.on_run = executor.on_run, lambda graph, ms: clock.add(EngineCall(graph, ms, None))
        try:
            yield clock
        finally:
            executor.on_run = before
    else:
        raise TypeError(f"no clock for a {type(executor).__name__}")


@contextmanager
def _timed_on_the_host(engines: dict[str, Engine], clock: EngineClock) -> Iterator[None]:
    plain = dict(engines)
    sessions: dict[str, _TimedSession] = {}
    for name, engine in plain.items():
        attributes = vars(engine) if hasattr(engine, "__dict__") else {}
        if hasattr(attributes.get(_SESSION), _RUN):
            sessions[name] = attributes[_SESSION] = _TimedSession(attributes[_SESSION])
        engines[name] = _TimedEngine(name, engine, sessions.get(name), clock)
    try:
        yield
    finally:
        for name, timed in sessions.items():
            vars(plain[name])[_SESSION] = timed.session
        engines.update(plain)
