"""Work in a separate thread, on a copy of the pipeline, that can be stopped within a step."""

import copy
import threading
import time
from collections.abc import Callable

from ..objective.exclusive import MODULES
from ..objective.wrapping import plain_module
from ..pipeline.pipeline import Pipeline

__all__ = ["Job", "Stopped", "stoppable_copy"]


class Stopped(Exception):
    """The reader pressed stop."""


def stoppable_copy(pipeline: Pipeline, stop: threading.Event) -> Pipeline:
    """A copy of the pipeline whose every forward pass raises `Stopped` once ``stop`` is set.

    The data are only read, and are shared. A recipe calls the model at least once per step, so a
    stop takes effect within a step, whatever the recipe, and leaves only this copy behind.
    """

    def check_stop(*_):
        if stop.is_set():
            raise Stopped

    shared = {id(stage.data): stage.data for stage in pipeline.stages}
    with MODULES:  # another thread's calls exchange their tensors
        mine = copy.deepcopy(pipeline, shared)
    for stage in mine.stages:
        plain_module(stage.model).register_forward_pre_hook(check_stop)
    return mine


class Job:
    """One run of ``work(pipeline)`` in a separate thread.

    Args:
        pipeline: copied first; ``work`` gets the copy.
        work: what to do; its result goes to ``done``.
        done, stopped, failed: what to call at the end, in that thread: ``done(result, seconds)``,
            ``stopped()``, ``failed(exception)``.
        tick: called with the seconds so far, about twice a second until the end or a stop, to show
            that work goes on.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        work: Callable,
        *,
        done: Callable,
        stopped: Callable,
        failed: Callable,
        tick: Callable[[float], None],
    ):
        self._stop = threading.Event()
        self._over = threading.Event()
        mine = stoppable_copy(pipeline, self._stop)
        start = time.perf_counter()

        def run():
            try:
                result = work(mine)
                ending = (done, result, time.perf_counter() - start)
            except Stopped:
                ending = (stopped,)
            except Exception as error:
                ending = (failed, error)
            self._over.set()
            watch.join()
            ending[0](*ending[1:])

        def report_time():
            while not self._over.wait(0.5):
                if not self._stop.is_set():
                    tick(time.perf_counter() - start)

        # Daemons, so that a kernel that shuts down does not wait for them.
        watch = threading.Thread(target=report_time, name="msif-watch", daemon=True)
        self.thread = threading.Thread(target=run, name="msif-retraining", daemon=True)
        watch.start()
        self.thread.start()

    @property
    def running(self) -> bool:
        """Whether the work is still going on."""
        return not self._over.is_set()

    def stop(self) -> None:
        """Ask it to stop at its next forward pass."""
        self._stop.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait at most so many seconds; returns whether it, and its last callback, have ended."""
        self.thread.join(seconds)
        return not self.thread.is_alive()
