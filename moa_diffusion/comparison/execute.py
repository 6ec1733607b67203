"""A process per run, at most so many at a time, none done twice."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from moa_diffusion import config
from moa_diffusion.comparison.plan import PlannedRun
from moa_diffusion.comparison.read import check_base
from moa_diffusion.processes.stopping import handled
from moa_diffusion.storage import checkpoint
from rewards.progress_bar import progress_bar

POLL = 0.3  # seconds between two looks at the processes


def execute(runs: Sequence[PlannedRun], *, program: Sequence[str], parallel: int) -> dict[str, str]:
    """Run what is not finished, at most ``parallel`` at a time.

    On Ctrl-C, or another signal that asks to end, the processes save their state and end; a second
    Ctrl-C kills them.

    Args:
        runs: All runs of the comparison.
        program: What starts a training: the words before its options.
        parallel: Processes at a time.

    Returns:
        For every run that died, by name, what it said last.

    Raises:
        KeyboardInterrupt: After the processes have ended.
        ValueError: Likewise, if the start's rewards allow no comparison, or if a process of
            an earlier call is still at work on a run.
    """
    waiting = [run for run in runs if not run.finished()]
    active: list[tuple[PlannedRun, subprocess.Popen[bytes]]] = []
    failures: dict[str, str] = {}
    checked = False
    ended = {run.name: run.completed() for run in runs if run not in waiting}
    before = sum(ended.values())
    total = before + sum(run.settings.trainer.steps for run in waiting)
    bar = progress_bar(title="compare", total=total, initial=before, unit="rollout")
    with handled(signal.default_int_handler), bar:
        try:
            while waiting or active:
                while waiting and len(active) < parallel:
                    run = waiting.pop(0)
                    active.append((run, _start(run, program)))
                time.sleep(POLL)
                for run, process in list(active):
                    if process.poll() is None:
                        continue
                    active.remove((run, process))
                    ended[run.name] = run.completed()
                    total -= run.settings.trainer.steps - ended[run.name]
                    bar.total = total
                    if process.returncode or not run.finished():
                        failures[run.name] = cause_of_death(run.log, process.returncode)
                        bar.write(f"{run.name} died: {failures[run.name]} ({run.log})", sys.stderr)
                evaluated = [run for run, _ in active if run.evaluated()]
                if evaluated and not checked:  # all have the same start
                    first = evaluated[0]
                    check_base(first.folder, tuple(first.settings.rewards))
                    checked = True
                done = {run.name: run.completed() for run, _ in active}
                bar.set_postfix_str(", ".join(f"{name} {n}" for name, n in done.items()), False)
                bar.update(sum(ended.values()) + sum(done.values()) - bar.n)
        finally:
            _stop([process for _, process in active])
    return failures


def _start(run: PlannedRun, program: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start or continue one run, out of reach of the terminal's Ctrl-C; its log is beside it.

    The process holds a lock on its log, also when the comparison that started it was killed.
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another process is at work on `{run.folder}`: let it end.") from None
        log.truncate(0)
        saved = checkpoint.list_checkpoints(run.folder)
        if not saved:  # nothing to continue from
            shutil.rmtree(run.folder, ignore_errors=True)
        recipe = run.folder.with_name(f"{run.name}.yaml")
        recipe.write_text(config.to_yaml(run.settings), encoding="utf-8")
        command = [
            *(*program, "--config", str(recipe)),
            *("--objectives.method", run.settings.objectives.method, "--seed", str(run.seed)),
            *("--output_dir", str(run.folder)),
            *(("--resume", "latest") if saved else ()),
        ]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask all to save and end; kill those that have not when asked again."""
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        raise


def cause_of_death(log: Path, status: int) -> str:
    """Return the last line of a log that names an error, else the signal, else the last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    if status < 0 and not errors:
        return f"killed by signal {-status}"
    return (errors or lines or [f"exit {status}"])[-1]
