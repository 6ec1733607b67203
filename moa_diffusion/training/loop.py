"""Round after round: a step, its metrics, an evaluation, a checkpoint. Stops and resumes exactly.

What a step is, is the learner's business: ``trainer.py`` draws rollouts and learns from them,
``offline.py`` learns from responses that are already there.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from moa_diffusion.config.schema import CheckpointConfig, TrainerConfig
from moa_diffusion.data.seeds import derive_seed
from moa_diffusion.distributed import ProcessError, agreed, share_telling
from moa_diffusion.monitoring.alarm import Alarm, Watch
from moa_diffusion.monitoring.console import Console, Facts
from moa_diffusion.monitoring.heldout import HeldOut
from moa_diffusion.monitoring.progress import Progress
from moa_diffusion.policies.base import Policy
from moa_diffusion.processes.randomness import seed_globally
from moa_diffusion.processes.stopping import Interrupted
from moa_diffusion.scoring import RewardError
from moa_diffusion.storage import checkpoint, front
from moa_diffusion.storage.log import ALARMS, METRICS, RunLog, read_metrics
from moa_diffusion.storage.saving import Saver
from moa_diffusion.training.stepper import Stepper, TrainingError
from moa_diffusion.types import ConfigError

logger = logging.getLogger(__name__)


class Learner(Protocol):
    """What a run improves a policy with, one round after the other."""

    title: str  # what a round is called, in the plural
    objectives: tuple[str, ...]  # names of the K objectives
    stepper: Stepper
    progress: Progress

    @property
    def policy(self) -> Policy:
        """The policy that is improved."""
        ...

    def prepare(self, heldout: HeldOut | None) -> Mapping[str, Any]:
        """Do once what precedes the first round; what cannot work fails here.

        Args:
            heldout: The evaluation, whose prompts and heads are made ready too; None for none.

        Returns:
            What the scores of each head depend on, as ``Scorer.load`` has it; empty without heads.
        """
        ...

    def step(self, *, kl_scale: float = 1.0) -> dict[str, float]:
        """Learn for one round and return its metrics; ``kl_scale`` is a factor of the KL's weight.

        ``progress.completed`` is the number of rounds before this one.
        """
        ...

    def evaluate(self) -> dict[str, float]:
        """Return what the learner measures of the averaged weights, besides held-out rewards."""
        ...

    def snapshot(self) -> Any:
        """Return what ``undo`` needs to undo the next round."""
        ...

    def undo(self, snapshot: Any) -> bool:
        """Go back to the state before a round that was cut short; return whether that worked."""
        ...

    def headline(self, metrics: Mapping[str, float]) -> str:
        """Return what is to be said of a round beside its gains and weights; perhaps nothing."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return what a resumed run has to share with the one before: JSON values by name."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what rounds change and the next one depends on, equal on every process."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state.

        Raises:
            ConfigError: If it is of another adapter or of other settings.
        """
        ...

    def finish(self) -> None:
        """Report what is to be said at the end of a run, however it ends."""
        ...

    def close(self) -> None:
        """Release worker processes."""
        ...


class Run:
    """Has a learner go round after round; stops and resumes exactly.

    Args:
        learner: Improves the policy. The means of its objectives in evaluations, and those of
            rewards that are not trained on, decide which checkpoints stay.
        length: The rounds, and the minutes, of the whole run; the rest of the section is the
            learner's business.
        checkpoints: When a checkpoint is written, and which ones stay.
        evaluate_every: Rounds between two evaluations; 0 for none.
        heldout: The evaluation; None for none.
        watch: Looks at the evaluations for a reward that is being gamed.
        log: Where metrics and scores go.
        console: What a person sees.
        folder: The run's folder.
        seed: The run's seed.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        length: TrainerConfig,
        checkpoints: CheckpointConfig,
        evaluate_every: int = 0,
        heldout: HeldOut | None,
        watch: Watch,
        log: RunLog,
        console: Console,
        folder: Path,
        seed: int,
    ) -> None:
        self.learner, self.progress = learner, learner.progress
        self.length, self.checkpoints, self.evaluate_every = length, checkpoints, evaluate_every
        self.heldout, self.watch = heldout, watch
        self.log, self.console, self.folder, self.seed = log, console, folder, seed
        self.comm = learner.progress.comm
        self.seconds = 0.0  # that the rounds finished took
        self.torn = False  # a failure has left the state between two rounds
        self._saver = Saver(
            folder, learner.policy, learner.stepper.ema, self.state_dict, self.comm, learner.title
        )
        self._row: dict[str, float] | None = None  # metrics of a round not yet written

    @property
    def completed(self) -> int:
        """The number of rounds finished."""
        return self.progress.completed

    @property
    def policy(self) -> Policy:
        """The policy that is improved."""
        return self.learner.policy

    def step(self) -> dict[str, float]:
        """Learn for one round and return its metrics; nothing is written or evaluated."""
        metrics = self.learner.step(kl_scale=self.watch.kl_scale)
        self.progress.completed += 1
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Measure held-out rewards of the averaged weights, with alarms and a sheet of outputs."""
        metrics = self.learner.evaluate()
        if self.heldout is None:
            return metrics
        with self.progress.timed("evaluate"), self.learner.stepper.ema.applied():
            evaluation = self.heldout(self.completed, before_batch=self.progress.leave_if_stopped)
        if self.console.shown:
            self.console.evaluated(self.completed, self.heldout.standings())
        seconds = self.heldout.scorer.seconds.items()
        self.progress.note_seconds({f"evaluate_{name}": spent for name, spent in seconds})
        alarms = self.watch.look(evaluation)
        with agreed(self.comm, as_one=True):
            for alarm in alarms:
                self.log.write_alarm(alarm.row())
        self._roll_back(next((alarm for alarm in alarms if alarm.to_step is not None), None))
        return {**metrics, **evaluation.metrics, **self.watch.report()}

    def _roll_back(self, alarm: Alarm | None) -> None:
        """Go back to the checkpoint that an alarm names."""
        if alarm is None:
            return
        assert alarm.to_step is not None
        with agreed(self.comm):
            try:
                state = checkpoint.load_state(checkpoint.step_folder(self.folder, alarm.to_step))
            except ConfigError as error:  # somebody deleted or damaged it
                raise TrainingError(f"alarm: cannot go back: {error}") from error
        self.learner.load_state_dict(state)

    # ------------------------------------------------------------------ the run

    def run(self) -> None:
        """Train until ``length.steps`` rounds are done.

        Raises:
            Interrupted: After Ctrl-C or another signal that asks to end, once the state is saved.
            RewardError, TrainingError, ProcessError: On all processes, after the state is saved,
                unless nothing has begun.
            KeyboardInterrupt: On a second Ctrl-C, and the first until something has begun: nothing
                is saved, and what is there stays whole.
            Exception: Any other, perhaps of this process alone, after it has saved the state.
        """
        rounds = self.console.rounds(completed=self.completed, bar=self.progress.bars)
        with self.progress.stop.listening(), rounds:
            self._forget_lost_checkpoints()
            with self.progress.stop.at_once():
                self._prepare()  # if it fails, nothing has happened that would have to be saved
            try:
                self.progress.leave_if_stopped()
                if self._row is not None:
                    self._finish_round()
                elif self.completed == 0 and (metrics := self.evaluate()):
                    with agreed(self.comm, as_one=True):
                        self.log.write(0, metrics | self.progress.take_seconds())
                    if self._may_be_wanted():
                        self.save()
                if self.watch.over and self.completed < self.length.steps:
                    logger.warning(
                        "An alarm ended this run after %d %s. It goes on with another "
                        "alarm.action or a higher alarm.limit.",
                        *(self.completed, self.learner.title),
                    )
                while not self._last():
                    self.progress.leave_if_stopped()
                    self._round()
            except (RewardError, TrainingError, ProcessError, Interrupted) as error:
                share_telling(self.comm, error)
                error.add_note(self._rescue(error, alone=False))
                raise
            except (Exception, SystemExit) as error:  # the other processes may not know of it
                error.add_note(self._rescue(error, alone=True))
                raise
            finally:
                self.learner.finish()
        if self.console.shown:
            self._say_the_end()

    def _say_the_end(self) -> None:
        """Say how the run ended, and where everything is."""
        done = f"{self.completed} of {self.length.steps} {self.learner.title}"
        spent = f"{self.seconds:.0f} s of training"
        said = f"Done: {done}, {spent}."
        if self.completed < self.length.steps:
            reason = "by an alarm" if self.watch.over else "at the limit of trainer.minutes"
            said = f"Ended {reason}: {done}, {spent}."
        alarms = [
            f"{row['kind']} ({row['name']}) after {row['step']} {self.learner.title}"
            + ("" if row["to_step"] is None else f", back to those after {row['to_step']}")
            for row in read_metrics(self.folder / ALARMS)
        ]
        kept = [str(path) for path in checkpoint.list_checkpoints(self.folder)]
        count = f" (the last of {len(kept)})" if kept[1:] else ""
        facts: Facts = [
            ("Alarms", f"{'; '.join(alarms)}, see {self.folder / ALARMS}" if alarms else "none"),
            *([("Checkpoint", f"{kept[-1]}{count}; averaged weights in its ema/")] if kept else []),
            ("Metrics", str(self.folder / METRICS)),
        ]
        if self.heldout:
            shown = f"{self.folder / 'evaluation'}, sheets in {self.folder / 'samples'}"
            facts = [*facts, ("Held out", shown)]
        self.console.end(said, self.heldout.standings() if self.heldout else (), facts)

    def _prepare(self) -> None:
        """Do once what precedes the first round, and write what the scores depend on."""
        heads = self.learner.prepare(self.heldout)
        if heads:
            with agreed(self.comm):
                self.log.write_heads(self.completed, heads)

    def _round(self) -> None:
        """Make one step with what belongs to it: metrics, evaluation, checkpoint."""
        # For heads and libraries that use the global generators; nothing here does.
        seed_globally(derive_seed(self.seed, "global", self.completed) % 2**32)
        start, before = time.perf_counter(), self.learner.snapshot()
        try:
            metrics = self.step()
        except BaseException as error:  # perhaps between two optimizer steps
            traceback.clear_frames(error.__traceback__)  # they hold what memory ran out for
            self.torn = not self.learner.undo(before)  # what is saved is the state before the round
            raise
        seconds = time.perf_counter() - start
        self.seconds += seconds
        self._row = metrics | self.progress.take_seconds() | {"seconds/total": seconds}
        self._finish_round()

    def _finish_round(self) -> None:
        """Evaluate if it is due, write the row, save. Cut short, it is made up after a resume."""
        assert self._row is not None
        words = self.learner.headline(self._row)
        self.console.round(self.completed, self.learner.objectives, self._row, words)
        evaluated = any(name.startswith("eval_") for name in self._row)
        if not evaluated and (self._last() or self._due(self.evaluate_every)):
            start = time.perf_counter()
            self._row |= self.evaluate() | self.progress.take_seconds()
            self._row["seconds/total"] += time.perf_counter() - start
        with agreed(self.comm, as_one=True):
            self.log.write(self.completed, self._row)
        self._row = None
        self.learner.stepper.check_health()
        due = self._due(self.checkpoints.every) or self._may_be_wanted()
        if self._last() or due:
            self.save()

    def _last(self) -> bool:
        """Return whether the run is at its end; the same on every process."""
        over = 0 < 60 * self.length.minutes <= self.seconds
        done = self.completed >= self.length.steps or self.watch.over
        return done or self.comm.any(over)

    def _may_be_wanted(self) -> bool:
        """Return whether a later alarm may go back to the state as it is."""
        return self._rolls_back and self.completed in self.watch.best_steps

    def _due(self, every: int) -> bool:
        return every > 0 and self.completed % every == 0

    def save(self) -> Path:
        """Write a checkpoint of the state after the last completed round.

        Raises:
            ProcessError: On all processes, if it cannot be written.
        """
        folder = checkpoint.step_folder(self.folder, self.completed)
        with agreed(self.comm, as_one=True):
            if self.comm.rank == 0 and self._saver.write(folder):
                self._retain()
        return folder

    def _rescue(self, failure: BaseException, *, alone: bool) -> str:
        """Save what can be saved after a failure; say where it is."""
        if self.torn:
            return f"The state in memory is between two {self.learner.title}: it is not saved."
        return self._saver.rescue(self.completed, failure, alone=alone)

    def _forget_lost_checkpoints(self) -> None:
        """Let alarms go back only to what is there: a run may go on in another folder."""
        here = [
            step
            for step in sorted(self.watch.best_steps if self._rolls_back else ())
            if not (checkpoint.step_folder(self.folder, step) / checkpoint.STATE).is_file()
        ]
        if lost := self.comm.gather_objects([here])[0]:  # what the first process sees counts
            self.watch.forget(lost)
            logger.warning(
                "There are no checkpoints after %s %s to go back to; alarms compare with later "
                "evaluations.",
                ", ".join(map(str, lost)),
                self.learner.title,
            )

    @property
    def _rolls_back(self) -> bool:
        return self.watch.rules.action == "rollback"

    def _retain(self) -> None:
        """Delete the checkpoints that are neither new, nor on the front, nor to go back to."""
        front.retain(
            self.folder,
            (*self.learner.objectives, *self.watch.heldout),
            newest=self.checkpoints.keep,
            front=self.checkpoints.front,
            best=self.watch.best_steps if self._rolls_back else (),
        )

    def close(self) -> None:
        """Release worker processes, trackers and the process group.

        Raises:
            TrackerError: If a tracker does not finish; the rest is released.
        """
        self.learner.close()
        if self.heldout:
            self.heldout.scorer.close()
        try:
            self.log.close()
        finally:
            self.comm.close()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next round depends on, equal on every process."""
        return {
            "step": self.completed,
            "seconds": self.seconds,
            "row": self._row,
            "heldout": self.heldout.state_dict() if self.heldout else {},
            "watch": self.watch.state_dict(),
            "seed": self.seed,
            "objectives": list(self.learner.objectives),
            **self.learner.facts(),
            **self.learner.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a saved state.

        Raises:
            ConfigError: If the run's facts or adapter differ from the checkpoint's.
        """
        shared = {
            "objectives": list(self.learner.objectives),
            "seed": self.seed,
            **self.learner.facts(),
        }
        for key, value in shared.items():
            if state.get(key) != value:
                raise ConfigError(
                    f"resume: the checkpoint has {key} {state.get(key)}. Found {value} in this run."
                )
        self.learner.load_state_dict(state)
        self.progress.completed = state["step"]
        self.seconds, self._row = state["seconds"], state["row"]
        if self.heldout and state["heldout"]:  # empty: the run has not evaluated so far
            if state["heldout"]["identity"] == self.heldout.identity:
                self.heldout.load_state_dict(state["heldout"])
                self.console.resume(self.heldout.standings())
                self.watch.load_state_dict(state["watch"])
            else:
                logger.warning(
                    "Evaluations have other prompts, seeds, rewards or drawing settings than the "
                    "checkpoint's: gains stay empty, and alarms compare with those from here on."
                )
        self.log.rewind(self.completed, pending=self._row is not None)
        if self.comm.rank == 0:
            checkpoint.forget_after(self.folder, self.completed)
            if checkpoint.list_checkpoints(self.folder):
                self._retain()
