"""Where a run saves itself, finds itself again, and goes back to after a row of bad steps."""

import time
from pathlib import Path

from taiji.train.checkpoint import (
    changes,
    checkpoints,
    kept_lines,
    load_checkpoint,
    other_recipe,
    read_state,
    save_checkpoint,
    write_text,
)
from taiji.train.parallel import refresh_masters
from taiji.train.session import Progress, Session

LOG_FILE = "log.jsonl"


def save(session: Session) -> None:
    update = {"seconds": session.seconds(), "ema_step": session.ema.optimization_step}
    state = session.progress.model_copy(update=update).model_dump(exclude={"step"})
    save_checkpoint(
        session.folder / "checkpoints",
        model=session.module,
        shadow=session.ema.shadow_params,
        optimizers=session.optimizers,
        step=session.progress.step,
        state=state,
        keep=session.config.keep_checkpoints,
        own_moments=session.has_engine,
    )
    session.accelerator.wait_for_everyone()


def resume(session: Session) -> None:
    found = checkpoints(session.folder / "checkpoints")
    if found:
        _restore(session, found[-1])
        session.log(f"resumed at step {session.progress.step}")


def _restore(session: Session, path: Path) -> None:
    """Everything as it was in the checkpoint `path`; later lines of the log are dropped."""
    saved = Progress(**read_state(path))
    now = {"loop": session.config.relevant(), "data": session.data}
    was = {"loop": saved.loop, "data": saved.data}
    differing = changes(was, now, session.config.accept_changes)
    if differing:
        raise ValueError(other_recipe(path, differing))
    if saved.step > session.config.steps:
        raise ValueError(
            f"{path} is of step {saved.step}, past loop.steps {session.config.steps}; ask for more "
            "steps, or start in an empty work folder"
        )
    load_checkpoint(
        path,
        model=session.module,
        shadow=session.ema.shadow_params,
        optimizers=session.optimizers,
        own_moments=session.has_engine,
    )
    if session.has_engine:
        refresh_masters(session.module)
    saved.loop, saved.data = now["loop"], now["data"]
    session.progress, session.begun = saved, time.monotonic()
    session.ema.optimization_step = saved.ema_step
    log_file = session.folder / LOG_FILE
    if session.accelerator.is_main_process and log_file.exists():
        write_text(log_file, kept_lines(log_file.read_text(), saved.step))
    session.accelerator.wait_for_everyone()


def roll_back(session: Session, streak: int) -> None:
    """To the last checkpoint, with other randomness from there."""
    progress, found = session.progress, checkpoints(session.folder / "checkpoints")
    said = f"{streak} steps in a row from step {progress.step - streak} were not finite"
    if not found:
        raise FloatingPointError(f"{said}, before the first checkpoint; lower learning_rate")
    if progress.rollbacks >= session.config.max_rollbacks:
        raise FloatingPointError(
            f"{said}, after {progress.rollbacks} roll-backs; the last good checkpoint is "
            f"{found[-1]}: go on from it with a lower learning_rate, named in loop.accept_changes"
        )
    spent = session.seconds()
    _restore(session, found[-1])
    session.progress.seconds = spent
    session.progress.rollbacks = progress.rollbacks + 1
    session.progress.skipped = progress.skipped
    session.log(f"{said}: back to step {session.progress.step}")
