"""One step of training: its pieces drawn, every turn's gradient and update, nothing moved by a turn
that is not finite."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from taiji.train.attention import short_attention
from taiji.train.parallel import mean_over_processes, whole
from taiji.train.session import Batch, Session, trained_by
from taiji.train.settings import learning_rate_scale, step_generators
from taiji.train.throughput import FlopCounter


def take_step(session: Session) -> bool:
    """One step, every turn of it; False, and nothing moved by the turn, when it was not finite."""
    config, step = session.config, session.progress.step
    pieces = _draw_pieces(session, step)
    session.counter = FlopCounter() if session.meter.flops_per_sample is None else None
    values: dict[str, list[float]] = {}
    periods: dict[str, int] = getattr(session.module, "turn_periods", {})
    for turn, optimizer in zip(session.turns, session.optimizers, strict=True):
        if step % periods.get(turn, 1):
            continue
        for group in optimizer.param_groups:
            scale = learning_rate_scale(step, config) * group["lr_scale"]
            group["lr"] = config.learning_rate * scale
        found = _backward(session, pieces, turn, step)
        moved = trained_by(session.module, turn)
        norm = session.accelerator.clip_grad_norm_(moved, config.max_grad_norm)
        name = "loss" if turn == session.turns[0] else f"loss_{turn}"
        loss = found.pop("loss")
        finite = np.isfinite(loss) and (norm is None or np.isfinite(float(whole(norm))))
        if finite and not session.has_engine:
            optimizer.step()
        session.module.zero_grad()
        if not finite:
            what = "gradient" if np.isfinite(loss) else name
            session.log(f"step {step}: {what} is not finite; skipped")
            return False
        if turn == session.turns[0]:
            session.ema.step(session.averaged)
            _watch(session, loss)
        for key, value in {name: loss, **found}.items():
            values.setdefault(key, []).append(value)
    for key, row in values.items():
        session.progress.pending.setdefault(key, []).extend(row)
    if session.counter is not None:
        done = len(pieces) * config.batch_size // config.micro_batches
        session.meter.flops_per_sample = session.counter.flops / done
    session.meter.step_done()
    return True


def _draw_pieces(session: Session, step: int) -> list[tuple[Batch, torch.Generator]]:
    """This process's pieces of the step's batch, each with the randomness of its own."""
    config, accelerator = session.config, session.accelerator
    size, rollbacks = config.batch_size // config.micro_batches, session.progress.rollbacks
    pieces = []
    with session.meter.waiting():
        for i in range(accelerator.process_index, config.micro_batches, accelerator.num_processes):
            rng, generator = step_generators(config.seed, step, i, rollbacks)
            batch = {k: v.to(accelerator.device) for k, v in session.draw(rng, size).items()}
            pieces.append((batch, generator))
    return pieces


def _backward(
    session: Session, pieces: Sequence[tuple[Batch, torch.Generator]], turn: str, step: int
) -> dict[str, float]:
    """Gradients of a turn over this process's pieces; returns the loss, a mean over all processes,
    and the objective's parts, means over this process's pieces."""
    told = {"turn": turn, "step": step} if turn else {}
    rows: dict[str, list[float]] = {"loss": []}
    for i, (batch, generator) in enumerate(pieces):
        with _piece(session, last=i + 1 == len(pieces)):
            with session.accelerator.autocast():
                loss, parts = session.model(**batch, generator=generator, **told)
            if session.has_engine and not np.isfinite(_mean(session, [loss.item()])):
                return {"loss": float("nan")}  # its backward pass would move the weights
            session.accelerator.backward(loss)
        for key, value in {"loss": loss.item(), **parts}.items():
            rows.setdefault(key, []).append(value)
    found = {key: float(np.mean(row)) for key, row in rows.items()}
    return {**found, "loss": _mean(session, [found["loss"]])}


def _mean(session: Session, values: list[float]) -> float:
    return mean_over_processes(values, session.accelerator)[0]


@contextmanager
def _piece(session: Session, last: bool) -> Iterator[None]:
    """Gradients meet those of other processes at the last piece only."""
    with session.counter or nullcontext(), short_attention(session.module):
        if isinstance(session.model, FSDPModule):
            session.model.set_requires_gradient_sync(last)
            yield
        else:
            with session.accelerator.accumulate(session.model):
                yield


def _watch(session: Session, loss: float) -> None:
    progress = session.progress
    if progress.detector.is_spike(loss, session.config.spike_sigma):
        progress.spikes += 1
        mean = progress.detector.mean
        session.log(f"step {progress.step}: loss spike, {loss:.4g} against a mean of {mean:.4g}")
