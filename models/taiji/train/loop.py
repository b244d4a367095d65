"""One training loop for every phase: accelerate underneath, EMA, bf16 where asked, exact resume.

A step's batch is `micro_batches` pieces, each drawn from generators of (seed, step, piece): which
process takes a piece, and what came before, change nothing. A step whose loss or gradient is not
finite is skipped; a row of them takes the run back to its last checkpoint, with other randomness.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from taiji.train.parallel import gather_into, mean_over_processes, slowest
from taiji.train.precision import has_bf16
from taiji.train.resume import LOG_FILE, resume, roll_back, save
from taiji.train.session import Batch as Batch
from taiji.train.session import Draw, Session, open_session
from taiji.train.session import Log as Log
from taiji.train.settings import LoopConfig as LoopConfig
from taiji.train.settings import learning_rate_scale as learning_rate_scale
from taiji.train.settings import step_generators as step_generators
from taiji.train.step import take_step
from taiji.train.throughput import describe_speed, peak_flops

EMULATED = (
    "this device has no bf16 arithmetic: a step can take many times as long as with precision "
    "fp32, which is what precision auto is here"
)
STRAGGLING = 0.1  # share of the time that one process waits for data, from which it is named


@dataclass(frozen=True)
class Probe:
    """A look at the averaged weights every `every` steps; `look(step)` returns True to end the run
    there. Every process looks, and all must see the same."""

    every: int
    look: Callable[[int], bool]


def run(
    objective: nn.Module,
    draw: Draw,
    config: LoopConfig,
    folder: Path,
    log: Log = print,
    data: dict[str, str] | None = None,
    *,
    probe: Probe | None = None,
) -> dict[str, float]:
    """Minimises `objective(**batch, generator=g) -> (loss, parts)`; leaves EMA weights in it.

    `draw(rng, size)` gives one piece of a batch. State goes to `folder`/checkpoints and metrics to
    `folder`/log.jsonl; a run that finds a checkpoint there goes on from it. Returns the last
    averaged metrics. What changes while training must be a parameter or a persistent buffer.
    Checkpoints name `data`, hashes of what is drawn from.

    An objective with `turns` is called once a turn, with `turn=name, step=i`; `parameters_of(turn)`
    says what that turn's optimiser updates, `lr_scales[turn]` its factor on the learning rate,
    `turn_periods[turn]` in which steps it is taken (every n-th). The average is over the first
    turn's parameters. One with `parameter_groups()` has its own factor `lr_scale` on the learning
    rate of each group.

    Raises FloatingPointError when steps stay non-finite, naming the last good checkpoint, and
    ValueError when the checkpoint in `folder` is of another recipe, model or data.
    """
    session = open_session(objective, draw, config, folder, log, data)
    device = session.accelerator.device.type
    if config.precision == "bf16" and device in ("cpu", "cuda") and not has_bf16(device):
        session.log(EMULATED)
    resume(session)
    session.begun = time.monotonic()
    _track(session)
    progress, streak = session.progress, 0
    while progress.step < config.steps:
        good = take_step(session)
        streak = 0 if good else streak + 1
        progress.step += 1
        progress.skipped += not good
        if streak >= session.most_skips:
            roll_back(session, streak)
            progress, streak = session.progress, 0
            continue
        if progress.step % config.log_every == 0 or progress.step == config.steps:
            _report(session)
        due = progress.step % config.checkpoint_every == 0 and streak == 0
        if due or progress.step == config.steps:
            save(session)
        if probe and progress.step % probe.every == 0 and _look(session, probe):
            log(f"ended at step {progress.step} of {config.steps}")
            break
    return _close(session, objective)


def _look(session: Session, probe: Probe) -> bool:
    """The probe's word on the averaged weights, which are in the model meanwhile."""
    session.ema.store(session.averaged)
    session.ema.copy_to(session.averaged)
    try:
        return probe.look(session.progress.step)
    finally:
        session.ema.restore(session.averaged)


def _report(session: Session) -> None:
    """One line of the log: means since the last one, and how fast it went."""
    progress, accelerator = session.progress, session.accelerator
    if not progress.pending:
        if progress.step == session.config.steps and not progress.metrics:
            raise FloatingPointError("no step had a finite loss; lower learning_rate")
        return
    names = list(progress.pending)
    means = [float(np.mean(progress.pending[name])) for name in names]
    values = dict(zip(names, mean_over_processes(means, accelerator), strict=True))
    peak, _ = peak_flops(accelerator.device, session.config.precision)
    speed = session.meter.read(peak * accelerator.num_processes)
    if speed:
        speed["data_wait"], straggler = slowest(speed["data_wait"], accelerator)
        if accelerator.num_processes > 1 and speed["data_wait"] > STRAGGLING:
            session.log(f"process {straggler} waits longest for data, and the others for it")
    counts = {n: getattr(progress, n) for n in ("skipped", "rollbacks", "spikes")}
    progress.metrics = {**values, **speed, **{n: float(c) for n, c in counts.items() if c}}
    progress.pending = {}
    seconds = session.seconds()
    shown = " ".join(f"{k} {v:.4f}" for k, v in values.items()) + describe_speed(speed)
    session.log(f"step {progress.step}/{session.config.steps} {seconds:.0f} s {shown}")
    accelerator.log(progress.metrics, step=progress.step)
    if accelerator.is_main_process:
        row = {"step": progress.step, "seconds": seconds, **progress.metrics}
        with (session.folder / LOG_FILE).open("a") as file:
            file.write(json.dumps(row) + "\n")


def _track(session: Session) -> None:
    if session.accelerator.log_with:
        session.accelerator.init_trackers(
            "tensorboard",
            init_kwargs={"tensorboard": {"purge_step": session.progress.step + 1}},
        )


def _close(session: Session, objective: nn.Module) -> dict[str, float]:
    """EMA weights into the objective; the last metrics."""
    session.ema.copy_to(session.averaged)
    if session.module is not objective:
        gather_into(objective, session.module)
    for tracker in session.accelerator.trackers:
        tracker.finish()
    return {**session.progress.metrics, "seconds": session.seconds()}
