"""Independent work through joblib: on processes, threads, or whatever cluster is configured."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError

from .arguments import check_whole, shown
from .errors import WorkerError

__all__ = ["check_jobs", "each_result"]


def check_jobs(n_jobs, name: str = "n_jobs") -> int:
    """How many processes joblib shall use: a whole number, negative ones counted from all.

    Raises:
        ValueError: it is zero or no whole number.
    """
    try:
        number = check_whole(name, n_jobs, -(2**31))
    except ValueError:
        number = 0
    if number == 0:
        raise ValueError(
            f"{name}={shown(n_jobs)} must be a whole number, as joblib takes it: 1, or -1 for all"
        )
    return number


def each_result(
    function: Callable,
    calls: Sequence[tuple],
    n_jobs: int,
    left: Callable[[], str] = lambda: "nothing is kept",
) -> Iterator[tuple[int, object]]:
    """``(i, function(*calls[i]))`` in order, each soon after it is there.

    What worker processes that died were doing is done once more.

    Args:
        function: what is done in a worker.
        calls: its arguments, for each call.
        n_jobs: as joblib takes it.
        left: what an error says about the work so far.

    Raises:
        WorkerError: worker processes died twice.
    """
    done = 0
    for last in (False, True):
        try:
            for result in _in_order(function, calls[done:], n_jobs):
                yield done, result
                done += 1
            return
        except TerminatedWorkerError as error:
            if last:
                raise WorkerError(
                    "worker processes died twice, at first and when their work was repeated, "
                    "perhaps for lack of memory: give fewer n_jobs= or lanes=, or data in a "
                    f"smaller dtype; {left()}"
                ) from error


def _in_order(function: Callable, calls: Sequence[tuple], n_jobs: int) -> Iterator:
    jobs = (joblib.delayed(function)(*call) for call in calls)
    try:
        parallel = joblib.Parallel(n_jobs, return_as="generator")
    except ValueError:  # a backend that gives its results all at once, as multiprocessing and ray
        parallel = joblib.Parallel(n_jobs)
        while some := list(islice(jobs, max(1, joblib.effective_n_jobs(n_jobs)))):
            yield from parallel(some)
    else:
        yield from parallel(jobs)
