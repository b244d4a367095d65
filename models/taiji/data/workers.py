"""Runs a pure function over many tasks: in this process, in several, or as Ray tasks.

A task is a small description of work whose result lands in a file of its own, so the outcome does
not depend on who ran it, in which order, or how often it was killed before.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Literal, TypeVar

Engine = Literal["local", "ray"]
Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 2  # tasks a worker that are submitted before their turn; bounds what waits in memory


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    workers: int = 1,
    engine: Engine = "local",
) -> Iterator[Result]:
    """Results of `function` in the order of `tasks`. The function and the tasks must pickle.

    Raises:
        ValueError: fewer than one worker.
        ImportError: engine ray without the package.
    """
    if workers < 1:
        raise ValueError(f"{workers} workers: at least 1 is needed")
    if engine == "ray":
        from taiji.data.ray_engine import run_ray_tasks

        yield from run_ray_tasks(function, tasks, workers=workers)
    elif workers == 1:
        yield from map(function, tasks)
    else:
        # spawn: torch's and pyarrow's threads do not survive a fork
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            submit: Callable[[Task], Any] = lambda task: pool.submit(function, task)  # noqa: E731
            yield from in_order(submit, lambda future: future.result(), tasks, AHEAD * workers)


def in_order(
    submit: Callable[[Task], Any],
    wait: Callable[[Any], Result],
    tasks: Iterable[Task],
    window: int,
) -> Iterator[Result]:
    """Keeps at most `window` tasks submitted and hands out their results first in, first out."""
    waiting: deque[Any] = deque()
    for task in tasks:
        waiting.append(submit(task))
        if len(waiting) >= window:
            yield wait(waiting.popleft())
    while waiting:
        yield wait(waiting.popleft())
