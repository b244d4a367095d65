"""The engine of `taiji.data.workers` on Ray: the same functions as Ray tasks.

A running cluster is used where RAY_ADDRESS names one; its machines must see the data folder under
the same path. Without one, Ray starts on this machine and ends with the run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from taiji.data.workers import AHEAD, in_order

# before ray is imported: it reads them then
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

try:
    import ray
except ImportError as error:
    raise ImportError(
        f"engine ray needs the package ({error}): pip install 'hcf-toolkit[ray]'"
    ) from error

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_ray_tasks(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, workers: int
) -> Iterator[Result]:
    """Results in the order of `tasks`. A failed worker process is tried again by Ray, an error of
    the function is raised here as itself."""
    started = not ray.is_initialized()
    if started:
        _start(workers)
    try:
        remote = ray.remote(num_cpus=1, max_retries=2)(function)
        yield from in_order(remote.remote, _get, tasks, AHEAD * workers)
    finally:
        if started:
            ray.shutdown()


def _start(workers: int) -> None:
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.ERROR)
        return
    ray.init(
        num_cpus=workers,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=256 * 2**20,  # tasks are descriptions and results a few numbers
    )


def _get(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
