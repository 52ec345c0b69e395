"""What ``benchmarks/rollouts.py`` plays with: models, the stock way to generate, environments and who plays them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from spear_lightning.agents.base import Ids, Response
from spear_lightning.agents.stepwise import StepwiseAgent
from spear_lightning.engines.base import Completion, Request, RolloutEngine, Sampling
from spear_lightning.engines.huggingface.forward import generation_mode
from spear_lightning.environments.alfworld.suite import ALFWorld
from spear_lightning.environments.base import Split, Task, TaskSuite
from spear_lightning.environments.pool import EnvironmentPool
from spear_lightning.policy.policy import Policy
from spear_lightning.rollout.collector import Collector, Lockstep, RolloutSchedule
from spear_lightning.rollout.episode import Rollout
from spear_lightning.rollout.specs import EpisodeSpec
from spear_lightning.utils.randomness import stream_seed, uniforms

TOKENIZER = str(Path(__file__).resolve().parents[2] / "spear_lightning/policy/embedded")

MODELS: dict[str, dict[str, Any]] = {
    "1 M": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    "28 M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
}
_COMMON = {
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
VOCABULARIES = {"1 M": 2048, "28 M": 10240}


def make_policy(model: str, vocabulary: int | None = None) -> Policy:
    """A fresh model with the package's tokenizer.

    Args:
        model: one of :data:`MODELS`.
        vocabulary: entries; ``None`` takes as many as the model's name needs.
    """
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary or VOCABULARIES[model]}
    return Policy(config={**_COMMON, **MODELS[model], **sizes}, tokenizer=TOKENIZER)


class GenerateEngine(RolloutEngine):
    """``transformers``' own ``generate`` on the whole prompts of a call, padded on the left, as trainers do it.

    It computes no log-probabilities at all, which favours it.
    """

    def sync(self, policy: Policy, version: int) -> None:
        """Take over the policy."""
        self._policy, self._version = policy, version

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request."""
        sampling = requests[0].sampling
        longest = max(len(request.prompt_ids) for request in requests)
        ids = torch.zeros(len(requests), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, longest - len(request.prompt_ids) :] = torch.from_numpy(request.prompt_ids.astype(np.int64))
            mask[row, longest - len(request.prompt_ids) :] = 1
        with generation_mode(self._policy):
            given = self._policy.causal_lm.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=sampling.max_new_tokens,
                do_sample=True,
                top_k=0,
                eos_token_id=list(sampling.stop_ids) or None,
                pad_token_id=0,
            )[:, longest:].numpy()
        return [self._completion(row, sampling) for row in given]

    def end(self, session: str) -> None:
        """Nothing is kept."""

    def _completion(self, row: Any, sampling: Sampling) -> Completion:
        ends = np.flatnonzero(np.isin(row, sampling.stop_ids))
        ids = row[: ends[0] + 1] if len(ends) else row
        unknown = np.full(len(ids), np.nan, np.float32)
        return Completion(ids.astype(np.int32), unknown, unknown, "stop" if len(ends) else "length", self._version)


def converse(engine: RolloutEngine, *, episodes: int, turns: int, prompt: int, new: int, seen: int, top: int) -> int:
    """Conversations in which every turn appends a response and what was seen; the number of tokens generated.

    Args:
        engine: that generates; nothing stops a response before its limit.
        episodes: at a time, each with a prompt of its own.
        turns: of each.
        prompt: tokens of the opening prompt.
        new: tokens of a response.
        seen: tokens of an observation.
        top: ids are drawn below it.
    """
    rng = np.random.default_rng(0)
    contexts = [rng.integers(5, top, prompt, dtype=np.int32) for _ in range(episodes)]
    sampling = Sampling(new)
    generated = 0
    for turn in range(turns):
        requests = [
            Request(str(number), context, sampling, stream_seed(number, turn))
            for number, context in enumerate(contexts)
        ]
        completions = engine.generate(requests)
        generated += sum(len(completion.ids) for completion in completions)
        contexts = [
            np.concatenate([context, completion.ids, rng.integers(5, top, seen, dtype=np.int32)])
            for context, completion in zip(contexts, completions, strict=True)
        ]
    for number in range(episodes):
        engine.end(str(number))
    return generated


class AnyResponseAgent(StepwiseAgent):
    """Takes any response for one of the admissible actions, so that a fresh model wanders through real games."""

    def interpret(self, ids: Ids, admissible: tuple[str, ...], think: bool = False) -> Response:
        """The action that the ids stand for."""
        response = super().interpret(ids, admissible, think)
        number = float(uniforms(stream_seed("action", *ids.tolist()), 1)[0])
        action = admissible[int(number * len(admissible))] if admissible else "look"
        return replace(response, action=action, valid=True, tool_call=True)


class SlowSteps(gymnasium.Wrapper[str, str, str, str]):
    """Waits before each step, as for a sandbox or a server: mostly a little, now and then long."""

    def __init__(self, environment: gymnasium.Env[str, str], seconds: float, rare: float) -> None:
        super().__init__(environment)
        self._seconds, self._rare = seconds, rare

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin an episode."""
        self._name, self._steps = (options or {}).get("task", ""), 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: str) -> Any:
        """Step after a while."""
        self._steps += 1
        number = float(uniforms(stream_seed("wait", self._name, self._steps, action), 1)[0])
        time.sleep(self._rare if number < 1 / 32 else 2 * number * self._seconds)
        return self.env.step(action)


class SlowSuite(TaskSuite):
    """The tasks of another suite, whose environments take their time.

    Args:
        suite: whose tasks are played.
        seconds: that a step waits on average.
        rare: seconds that one step in 32 waits.
    """

    def __init__(self, suite: TaskSuite, seconds: float, rare: float) -> None:
        self.suite, self.seconds, self.rare = suite, seconds, rare

    def prepare(self) -> None:
        """Make the games."""
        self.suite.prepare()

    def tasks(self, split: Split) -> Sequence[Task]:
        """The tasks of the other suite."""
        return self.suite.tasks(split)

    def make(self) -> gymnasium.Env[Any, Any]:
        """A slow environment."""
        return SlowSteps(self.suite.make(), self.seconds, self.rare)


def games(count: int) -> ALFWorld:
    """Generated ALFWorld games of the quickstart's size, made if they are not there."""
    suite = ALFWorld(task_types=["pick_and_place_simple"], train=count, validation=1, test=1, max_steps=100)
    suite.prepare()
    return suite


class Player:
    """Episodes of one suite with one engine, over and over.

    Args:
        suite: whose training tasks are played.
        engine: synchronised with a policy.
        policy: whose tokenizer writes the prompts.
        groups: tasks that are played.
        size: episodes of each.
        turns: of each episode.
        new: tokens of a response at most.
        workers: environment processes.
        schedule: of the rollout.
    """

    def __init__(
        self,
        suite: TaskSuite,
        engine: RolloutEngine,
        policy: Policy,
        *,
        groups: Sequence[int],
        size: int,
        turns: int,
        new: int,
        workers: int = 2,
        schedule: RolloutSchedule = Lockstep(),  # noqa: B008 - frozen
    ) -> None:
        agent = AnyResponseAgent(think=False)
        agent.bind(policy.tokenizer)
        self.engine, self.policy, self.turns, self.new = engine, policy, turns, new
        tasks = suite.tasks("train")
        self.specs = [EpisodeSpec(tasks[group], group, index) for group in groups for index in range(size)]
        self.collector = Collector(EnvironmentPool(suite, workers=workers), agent, engine, schedule=schedule)
        self.played: Rollout | None = None

    def play(self) -> None:
        """Play all episodes once; always the same ones."""
        self.engine.sync(self.policy, 0)
        self.played = self.collector.play(self.specs, Sampling(self.new), iteration=0, seed=1, max_turns=self.turns)

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the last phase's time."""
        assert self.played is not None
        total = sum(self.played.seconds.values())
        return {name: round(seconds / total, 3) for name, seconds in self.played.seconds.items()}

    def close(self) -> None:
        """End the environments."""
        self.collector.close()
