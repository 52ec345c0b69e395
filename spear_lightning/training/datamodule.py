"""The LightningDataModule: plays episodes with the current policy and streams them, mixed with replayed successes.

One pass over the training stream is one SPEAR iteration (algorithm.md §1): collect, score, filter, estimate advantages,
draw from the replay buffer, admit the new successes, deal everything into minibatches. Held-out tasks are played by the
evaluation streams in the same way, without any of the learning.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from spear_lightning.agents.base import Agent
from spear_lightning.algorithm import (
    GRPO,
    AdvantageEstimator,
    QualityFilters,
    ReplayBuffer,
    RewardBaseline,
    RewardComposer,
)
from spear_lightning.checkpoint.manifest import RANKS
from spear_lightning.checkpoint.rank_state import (
    RankFiles,
    load_replay,
    played_from_states,
    played_to_state,
    replay_to_state,
    save_rank_file,
)
from spear_lightning.data.admission import draw_and_admit, fresh_samples, remember
from spear_lightning.data.minibatches import IterationStream, Minibatch, ReplaySteps, StepPlan, build_minibatches
from spear_lightning.data.resampling import play_until_signal
from spear_lightning.data.samples import Sample
from spear_lightning.data.scoring import GroupStatistics, estimate_advantages, score_episode, shares_filtered
from spear_lightning.distributed.collectives import gather, rank, world_size
from spear_lightning.engines.base import RolloutEngine, Sampling
from spear_lightning.environments.base import Split, TaskSuite
from spear_lightning.environments.pool import EnvironmentPool
from spear_lightning.rollout.collector import Collector, Lockstep, RolloutSchedule
from spear_lightning.rollout.episode import Rollout
from spear_lightning.rollout.runner import RolloutRunner
from spear_lightning.rollout.specs import (
    Evaluation,
    TrainingRollouts,
    check_enough_tasks,
    evaluation_specs,
    training_specs,
)
from spear_lightning.training.checks import check_advantage, check_engine, check_replay, check_whole_weights
from spear_lightning.training.hooks import Learner, RankState, rollout_listeners, start_rollout
from spear_lightning.training.watch import Watch
from spear_lightning.utils.ranges import Above0, Positive, in_range

_APART = "in the files of the ranks"
"""In a checkpoint, instead of what the ranks hold: each has a file beside it."""


@in_range
class RolloutDataModule(LightningDataModule, RankState):
    """Streams fresh rollouts mixed with replay.

    Args:
        environment: the tasks and a maker of environments that play them.
        agent: turns observations into prompts and responses into actions.
        engine: generates responses.
        rollouts: how many episodes an iteration plays and how tokens are drawn.
        evaluation: how held-out tasks are played.
        advantage: advantage estimator.
        reward: composes the episode reward.
        filters: quality filters and the share of groups kept.
        replay: buffer of past successes; ``None`` trains on fresh episodes alone.
        baseline: what a past success must exceed to be replayed; ``None`` for ``RewardBaseline()``.
        max_turns: of an episode.
        max_response_tokens: of one turn's response.
        max_episode_tokens: of a whole episode in ``conversation`` context, prompts and observations included; one that
            reaches it is truncated as overlong. ``None`` leaves it to the engine.
        max_active: most episodes that this rank plays at a time; ``None`` plays all of a phase together.
        schedule: when environments are stepped and when responses are generated: ``Lockstep`` (the same batches in
            every run) or ``Asynchronous`` (no episode waits for another one's environment).
        minibatches: optimizer steps per pass over an iteration's samples.
        minibatch_samples: most samples of a step, in place of ``minibatches``: the number of steps then follows from
            the number of samples.
        epochs: passes over an iteration's samples.
        replay_steps: replayed samples are ``mixed`` into the steps of fresh ones, or have steps of their ``own`` after
            them (as published).
        max_tokens: that the model computes for a micro-batch: samples times padded length; with ``policy.layout`` other
            than ``padded``, only the tokens themselves.
        workers: environment worker processes on this rank.
        step_timeout: seconds after which an environment that does not answer is given up.
        seed: of task order, sampling, replay draws and minibatches; ``spear`` sets it from ``seed_everything``.

    Attributes:
        tool_reward_weight: μ(t), set by ``CurriculumSchedule``; 0 without it.
    """

    def __init__(
        self,
        environment: TaskSuite,
        agent: Agent,
        engine: RolloutEngine,
        rollouts: TrainingRollouts = TrainingRollouts(),  # noqa: B008 - frozen
        evaluation: Evaluation = Evaluation(),  # noqa: B008 - frozen
        advantage: AdvantageEstimator = GRPO(normalize_std=False),  # noqa: B008 - frozen
        reward: RewardComposer = RewardComposer(),  # noqa: B008 - frozen
        filters: QualityFilters = QualityFilters(),  # noqa: B008 - frozen
        replay: ReplayBuffer | None = None,
        baseline: RewardBaseline | None = None,
        max_turns: Positive = 50,
        max_response_tokens: Positive = 512,
        max_episode_tokens: Positive | None = None,
        max_active: Positive | None = None,
        schedule: RolloutSchedule = Lockstep(),  # noqa: B008 - frozen
        minibatches: Positive = 1,
        minibatch_samples: Positive | None = None,
        epochs: Positive = 1,
        replay_steps: ReplaySteps = "mixed",
        max_tokens: Positive = 16384,
        workers: Positive = 2,
        step_timeout: Above0 = 60.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.environment, self.agent, self.engine = environment, agent, engine
        self.rollouts, self.evaluation = rollouts, evaluation
        self.advantage, self.reward, self.filters = advantage, reward, filters
        self.replay = replay
        self.baseline = RewardBaseline() if baseline is None else baseline  # an empty one is false
        self.max_turns, self.max_response_tokens = max_turns, max_response_tokens
        self.max_episode_tokens, self.max_active = max_episode_tokens, max_active
        self.schedule = schedule
        self.steps = StepPlan(minibatches, minibatch_samples, epochs, replay_steps)
        self.max_tokens = max_tokens
        self.workers, self.step_timeout, self.seed = workers, step_timeout, seed
        self.tool_reward_weight = 0.0
        self._runner: RolloutRunner | None = None
        self._watch = Watch()
        self._apart = False

    @property
    def max_response_length(self) -> int:
        """Most tokens that one training sample can carry a loss on."""
        if self.agent.context != "conversation":
            return self.max_response_tokens
        longest = self.max_response_tokens * self.max_turns
        return longest if self.max_episode_tokens is None else min(longest, self.max_episode_tokens)

    # --- set-up --------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Make what the environment needs, once per machine."""
        self.environment.prepare()

    def setup(self, stage: str) -> None:
        """Check agent and tasks against policy and settings, and start the environment workers."""
        if self._runner is not None:
            return
        self.agent.bind(self._module.policy.tokenizer)
        if stage == "fit":
            check_engine(self.engine)
            check_enough_tasks(self.environment.tasks("train"), self.rollouts)
            check_advantage(self.advantage, self.reward, self.rollouts, self.agent.context == "stepwise")
            if self.replay is not None:
                check_replay(self.replay, self.filters, self.rollouts, self._samples_per_episode)
            if self.rollouts.max_staleness:
                check_whole_weights(self._trainer.strategy)
        if stage in ("fit", "validate"):
            self.environment.tasks("validation")
        elif stage in ("test", "predict"):
            self.environment.tasks("test")
        self.engine.prepare(self._module.policy, self._trainer.strategy.root_device)
        pool = EnvironmentPool(self.environment, workers=self.workers, step_timeout=self.step_timeout)
        limits = (self.max_active, self.max_episode_tokens)
        collector = Collector(pool, self.agent, self.engine, *limits, self.schedule)
        self._runner = RolloutRunner(
            self._module,
            collector,
            self._sampling,
            seed=self.seed,
            max_turns=self.max_turns,
            on_start=partial(start_rollout, self._trainer),
            iterations=self._trainer.max_epochs,
            ahead=stage == "fit" and self.rollouts.max_staleness > 0,
        )

    def teardown(self, stage: str) -> None:
        """Stop the workers and free the engine."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    # --- training ------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> IterationStream[Minibatch]:
        """The sized stream of minibatches; a pass over it is an iteration."""
        return IterationStream(self._play_iteration, self._length)

    @property
    def _samples_per_episode(self) -> int:
        return self.max_turns if self.agent.context == "stepwise" else 1

    @property
    def _length(self) -> int:
        """Minibatches of an iteration: as many as there can be steps."""
        fresh = self.rollouts.tasks * self.rollouts.group_size * self._samples_per_episode
        return self.steps.most(fresh, 0 if self.replay is None else self.replay.capacity)

    def _play_iteration(self) -> Iterator[Minibatch]:
        yield from self._minibatches_of(self._trainer.current_epoch)

    def _minibatches_of(self, iteration: int) -> list[Minibatch]:
        """Play, score and deal an iteration; nothing but its minibatches outlives this."""
        rollout = self._played(iteration)
        started = time.perf_counter()
        batch = self.rollouts.tasks if self.rollouts.resample else None
        statistics = estimate_advantages(rollout.episodes, self.advantage, self.filters, batch)
        pad_id, temperature = self.agent.pad_id, self.rollouts.temperature
        samples = self._module.correct(fresh_samples(rollout.episodes), pad_id, self.max_tokens, temperature)
        steps = build_minibatches(
            samples,
            self._draw_and_admit(rollout, samples, statistics, iteration),
            plan=self.steps,
            length=self._length,
            max_tokens=self.max_tokens,
            pad_id=pad_id,
            temperature=temperature,
            seed=self.seed,
            iteration=iteration,
            layout=self._module.policy.layout,
        )
        rollout.seconds["other"] += time.perf_counter() - started
        self._end_rollout(rollout)
        return steps

    def _played(self, iteration: int) -> Rollout:
        """The episodes of an iteration, scored. Every rank must call it."""
        deal = partial(training_specs, self.environment.tasks("train"), self.rollouts, seed=self.seed)

        def play(groups: range) -> Rollout:
            specs = partial(deal, groups=groups, rank=rank(), world_size=world_size())
            return self._scored(self._running.play_iteration(iteration, specs))

        rollout, resampling = play_until_signal(play, self.rollouts)
        if self.rollouts.resample:
            self._watch.signal(resampling, self.rollouts)
            self._module.record_counts(resampling.metrics())
        self._watch.filters(shares_filtered(rollout.episodes))
        return rollout

    def _draw_and_admit(
        self, rollout: Rollout, samples: dict[str, Sample], statistics: GroupStatistics, iteration: int
    ) -> dict[str, Sample]:
        """Samples replayed in this iteration; its successes enter the buffer."""
        if self.baseline.current:
            remember(self.baseline, statistics)
        replayed: dict[str, Sample] = {}
        if self.replay is not None:
            replayed, metrics = draw_and_admit(
                self.replay,
                self.baseline,
                rollout.episodes,
                samples,
                iteration,
                seed=self.seed,
                has_tools=self.agent.has_tools,
            )
            self._module.record_counts(metrics)
        if not self.baseline.current:
            remember(self.baseline, statistics)
        return replayed

    # --- evaluation ----------------------------------------------------------------------------------------------

    def val_dataloader(self) -> IterationStream[Rollout]:
        """A sized stream of rollouts on the validation tasks."""
        return self._evaluation_stream("validation")

    def test_dataloader(self) -> IterationStream[Rollout]:
        """A sized stream of rollouts on the test tasks."""
        return self._evaluation_stream("test")

    def predict_dataloader(self) -> IterationStream[Rollout]:
        """The test tasks, for their transcripts."""
        return self._evaluation_stream("test")

    def _evaluation_stream(self, split: Split) -> IterationStream[Rollout]:
        batches = evaluation_specs(self.environment.tasks(split), self.evaluation, rank=rank(), world_size=world_size())

        def play() -> Iterator[Rollout]:
            for specs in batches:
                rollout = self._scored(self._running.play(split, specs, self._trainer.current_epoch))
                self._end_rollout(rollout)
                yield rollout

        return IterationStream(play, len(batches))

    # --- after playing -----------------------------------------------------------------------------------------

    def _end_rollout(self, rollout: Rollout) -> None:
        for listener in rollout_listeners(self._trainer):
            listener.on_rollout_end(self._trainer, self._trainer.lightning_module, rollout)

    def _scored(self, rollout: Rollout) -> Rollout:
        """Score what was played, in place."""
        started = time.perf_counter()
        weight = self.tool_reward_weight if rollout.split == "train" else 0.0
        for episode in rollout.episodes:
            score_episode(episode, self.reward, self.filters, weight)
        rollout.seconds["other"] += time.perf_counter() - started
        return rollout

    def _sampling(self, split: Split) -> Sampling:
        chosen = self.rollouts if split == "train" else self.evaluation
        return Sampling(
            max_new_tokens=self.max_response_tokens,
            temperature=chosen.temperature,
            stop_ids=self.agent.stop_ids,
            top_p=chosen.top_p,
            top_k=chosen.top_k,
        )

    # --- Lightning -----------------------------------------------------------------------------------------------

    def on_exception(self, exception: BaseException) -> None:
        """Stop playing what nobody will learn from."""
        if self._runner is not None:
            self._runner.ahead.cancel()

    def state_dict(self) -> dict[str, Any]:
        """Reward baseline, and what each rank holds. Lightning calls it on every rank."""
        mine = self._rank_state()
        return {"baseline": self.baseline.state_dict()} | {
            name: None if state is None else _APART if self._apart else gather(state) for name, state in mine.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the reward baseline and what this rank held; entries are dealt anew if ranks have changed."""
        self.baseline.load_state_dict(state_dict["baseline"])
        replay, played = (self._saved(state_dict, name) for name in ("replay", "played"))
        if self.replay is not None and replay is not None:
            load_replay(self.replay, replay, rank(), world_size())
        if played is not None and self.rollouts.max_staleness:
            self._running.ahead.keep(played_from_states((played[n] for n in range(len(played))), rank(), world_size()))

    def _saved(self, state_dict: dict[str, Any], name: str) -> Any:
        """What all ranks held, one after the other; ``None`` if nothing."""
        saved = state_dict.get(name)
        return RankFiles(Path(self._trainer.ckpt_path).parent / RANKS, name) if saved == _APART else saved

    def save_rank_state(self, folder: Path) -> None:
        """Write what this rank alone holds; see :class:`~spear_lightning.training.hooks.RankState`."""
        states = {name: state for name, state in self._rank_state().items() if state is not None}
        if states:
            save_rank_file(folder, rank(), states)

    def _rank_state(self) -> dict[str, Any]:
        """Replay buffer and episodes not yet learned from, ``None`` for what there is not."""
        played = None if self._runner is None else self._runner.ahead.wait()
        return {
            "replay": None if self.replay is None else replay_to_state(self.replay),
            "played": None if played is None else played_to_state(played),
        }

    @contextmanager
    def rank_state_apart(self) -> Iterator[None]:
        """What ranks hold has a place of its own; see :class:`~spear_lightning.training.hooks.RankState`."""
        self._apart = True
        try:
            yield
        finally:
            self._apart = False

    @property
    def _running(self) -> RolloutRunner:
        assert self._runner is not None, "setup() has not run"
        return self._runner

    @property
    def _trainer(self) -> Any:
        if self.trainer is None:
            raise RuntimeError("the data module plays episodes with a trainer's policy: use it through a Trainer")
        return self.trainer

    @property
    def _module(self) -> Learner:
        return self._trainer.lightning_module  # type: ignore[no-any-return]
