"""The wish to stop: SIGTERM, as schedulers send it before they take a machine away."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils


class Preemption:
    """A context in which SIGTERM is remembered, to be acted on between two steps.

    JAX's own handler, which comes with several processes, agrees with the others on the step.
    """

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def asked(self, step: int) -> bool:
        """Whether to save and stop now; the same answer in every process."""
        if jax.process_count() == 1:
            return self._asked
        return bool(multihost_utils.reached_preemption_sync_point(step))
