"""Our normalizers and weightings inside TRL's ``GRPOTrainer``: one reward function made of K.

TRL has no hook for an aggregation: ``multi_objective_aggregation`` is one of two names. But it
calls a reward function once per generation, on every process, with that process's completions in
the order of their groups. So a reward function can be the aggregation: it gathers K rewards,
normalises and weighs them, and hands back one advantage per completion as its reward. With
``scale_rewards="none"`` all that TRL still does is to take the group's mean off::

    A_i = a_i - mean_g a = a_i    where the advantages a of every group have mean 0

So methods whose advantages have another mean are refused (``aggregation.py``): Noon keeps no
negative advantage, and TRL would make some negative again.

Deviations from our own trainer: advantages are not clipped, and evaluations are only measured.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from math import nan
from typing import Any, TypeAlias

import torch
from torch import nn

from moa_diffusion.integrations.aggregation import Aggregation
from moa_diffusion.objectives.base import Normalizer, Weighting

# As TRL calls it: `prompts`, `completions`, columns of the data set and more, all by keyword.
RewardFunction: TypeAlias = Callable[..., Sequence[float | None]]
REWARD_MEAN = re.compile(r"rewards/.*/mean")  # TRL logs one per reward function


class MultiObjective:
    """The one reward function of a ``GRPOTrainer``, together with its callback.

    ::

        names = ["brevity", "rhyme"]
        reward = MultiObjective(
            {"brevity": brevity, "rhyme": rhyme},
            normalizer=DualStage(names),
            weighting=Apex(names),
        )
        GRPOTrainer(
            model,
            reward_funcs=reward,
            callbacks=[reward.callback()],
            args=GRPOConfig(scale_rewards="none"),
            train_dataset=prompts,
        )

    Metrics go to TRL's log under the names that our trainer gives them, raw rewards to its table
    of completions. One rollout of ours is one generation batch of TRL's.

    Args:
        rewards: K functions by name, as TRL calls them. ``None`` or NaN: does not apply.
        normalizer: The normalizer of these objectives, in this order.
        weighting: A weighting, given in the same way.

    Raises:
        ValueError: If the three do not fit together, or TRL cannot carry them.
    """

    def __init__(
        self,
        rewards: Mapping[str, RewardFunction],
        *,
        normalizer: Normalizer,
        weighting: Weighting,
    ) -> None:
        self.rewards = dict(rewards)
        self.aggregation = Aggregation(normalizer, weighting)
        if normalizer.objectives != tuple(self.rewards):
            raise ValueError(
                f"Parameter `normalizer` should have the objectives {tuple(self.rewards)}. "
                f"Found {normalizer.objectives}."
            )
        for name, function in self.rewards.items():
            if not _is_plain(function):
                raise ValueError(
                    "Parameter `rewards` should hold plain functions, in which models and "
                    f"coroutines can be wrapped. Found {type(function).__name__} for {name!r}."
                )
        self.__name__ = "advantage"  # what TRL calls this reward in its log and its tables
        self._group_size: int | None = None  # not told yet
        self._training = False  # whether a training step is on; else it is an evaluation

    @property
    def metrics(self) -> Mapping[str, float]:
        """What the last rollout says about each objective, and the weighting's own numbers.

        Names are those of docs/metrics.md, such as ``weight/<objective>`` and
        ``reward_mean/<objective>``; empty before the first rollout.
        """
        return self.aggregation.metrics

    def __call__(
        self,
        *,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_metric: Callable[[str, float], None],
        log_extra: Callable[[str, list[float]], None],
        **columns: Any,
    ) -> list[float]:
        """Return one advantage for each of this process's n completions, as TRL calls it.

        An evaluation trains nothing: means are logged, 0 is returned and nothing is remembered.

        Raises:
            ValueError: If rewards are not one per completion, or groups are not whole.
        """
        from accelerate import PartialState
        from accelerate.utils import gather_object

        if self._group_size is None:
            raise RuntimeError(
                "The trainer should have the callback of its reward function: "
                "GRPOTrainer(..., reward_funcs=reward, callbacks=[reward.callback()])."
            )
        rows = []  # [K][n]
        for name, function in self.rewards.items():
            given = function(
                prompts=prompts,
                completions=completions,
                log_metric=log_metric,
                log_extra=log_extra,
                **columns,
            )
            if len(given) != len(completions):
                raise ValueError(
                    f"The reward function {name!r} should return one number for each of the "
                    f"{len(completions)} completions. Found {len(given)}."
                )
            rows.append([nan if value is None else float(value) for value in given])
            log_extra(f"reward/{name}", rows[-1])
        mine = list(zip(map(_as_text, prompts), *rows, strict=True))
        everyone = gather_object(mine)  # N, in rank order: that of TRL's groups
        asked = [sample[0] for sample in everyone]
        values = torch.tensor([sample[1:] for sample in everyone], dtype=torch.float64).T  # [K, N]
        if self._training:
            advantages = self.aggregation(asked, values, self._group_size)  # [N]
            metrics = self.metrics
        else:
            advantages = values.new_zeros(len(everyone))
            means = zip(self.rewards, values.nanmean(1).tolist(), strict=True)
            metrics = {f"reward_mean/{name}": mean for name, mean in means}
        for name, value in metrics.items():
            log_metric(name, value)
        start = PartialState().process_index * len(mine)
        own: list[float] = advantages[start : start + len(mine)].tolist()
        return own

    def callback(self) -> Any:
        """Return the ``TrainerCallback`` through which this object learns about the trainer.

        It also saves what normalizer and weighting remember, in the ``trainer_state.json`` of each
        checkpoint; ``train(resume_from_checkpoint=...)`` brings it back.

        Raises:
            ImportError: If TRL is not installed.
        """
        from transformers import TrainerCallback
        from transformers.trainer_callback import ExportableState

        try:
            from trl import GRPOConfig
        except ImportError as error:
            raise ImportError(
                'The callback of TRL\'s trainer needs trl: pip install "moa-diffusion[trl]"'
            ) from error
        reward = self

        # Made without arguments: so does transformers where it restores callbacks by itself.
        class MultiObjectiveCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
            def on_init_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                if not isinstance(args, GRPOConfig):
                    raise TypeError(
                        "This callback should be given to TRL's GRPOTrainer. "
                        f"Found a trainer whose settings are {type(args).__name__}."
                    )
                _check_settings(args)
                reward._group_size = args.num_generations

            def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                self.on_init_end(args, state, control)  # not called for a callback added later
                name = type(self).__name__
                if name not in state.stateful_callbacks:
                    raise ValueError(
                        "Parameter `resume_from_checkpoint` should be of a run with the callback "
                        f"of MultiObjective. Found {list(state.stateful_callbacks)}."
                    )
                reward.aggregation.restore(state.stateful_callbacks[name]["attributes"]["saved"])

            def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                reward._training = True

            def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
                reward._training = False

            def on_log(
                self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **others: Any
            ) -> None:
                means = [key for key in logs if REWARD_MEAN.fullmatch(key)]
                if len(means) > 1:
                    raise ValueError(
                        "Parameter `reward_funcs` should be the MultiObjective alone: TRL adds "
                        f"rewards of others to its advantages. Found {', '.join(means)}."
                    )

            def state(self) -> dict[str, Any]:
                return {"args": {}, "attributes": {"saved": reward.aggregation.state()}}

        return MultiObjectiveCallback()


def _check_settings(args: Any) -> None:
    """Check that TRL leaves advantages as they are, but for the group's mean."""
    for name, value, wanted in (
        ("scale_rewards", args.scale_rewards, ("none",)),
        (
            "multi_objective_aggregation",
            args.multi_objective_aggregation,
            ("sum_then_normalize",),
        ),
        ("reward_weights", args.reward_weights, (None, [1.0])),
    ):
        if value not in wanted:
            raise ValueError(
                f"Parameter `{name}` of GRPOConfig should be {wanted[0]!r}: MultiObjective has "
                f"normalised and weighed by itself. Found {value!r}."
            )


def _is_plain(function: Any) -> bool:
    """Return whether it is what TRL calls at once and for numbers: no path, model or coroutine."""
    if not callable(function) or isinstance(function, nn.Module):
        return False
    return not any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))


def _as_text(prompt: Any) -> str:
    """Return the text by which siblings are known and a weighting remembers.

    Messages become JSON.
    """
    if isinstance(prompt, str):
        return prompt
    try:
        return json.dumps(prompt, sort_keys=True, ensure_ascii=False)
    except TypeError as error:
        raise ValueError(f"Prompts should hold text alone: {error}.") from error
