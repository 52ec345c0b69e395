"""An agent with a tool of its own, the environment that answers the tool, and a small policy to start from."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Sequence
from typing import Any

import gymnasium
import torch
from gymnasium.spaces import Text

from spear_lightning.agents.base import Ids, Response
from spear_lightning.agents.tool_calling import ChatToolAgent
from spear_lightning.data.samples import Sample
from spear_lightning.environments.base import Observation, Split, Task, TaskSuite
from spear_lightning.environments.tools import CALL_TAGS, Tool, parse_calls, write_results
from spear_lightning.policy.loading import fresh_model
from spear_lightning.sft.chat_tokenizer import build_chat_tokenizer
from spear_lightning.sft.module import Optimization, fit_samples, sample_of

THINGS = ("apples", "books", "bowls", "cups", "mugs", "pens", "plates", "watches")
MOST = 9
ANSWER = re.compile(r"answer: (\d+)")
TOOL = Tool(
    name="stock",
    description="How many pieces of a thing the shop has.",
    parameters={"type": "object", "properties": {"thing": {"type": "string"}}, "required": ["thing"]},
)
MODEL = {  # 97 thousand parameters
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
    "max_position_embeddings": 512,
}


class Shop(gymnasium.Env[str, str]):
    """Asks how many pieces of a thing there are, which only the tool knows; the message without a call is graded."""

    def __init__(self) -> None:
        self.observation_space = self.action_space = Text(10_000)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Fill the shop of a task; the seed decides everything."""
        super().reset(seed=seed)
        self.shelf = {thing: int(self.np_random.integers(MOST + 1)) for thing in THINGS}
        self.wanted = THINGS[int(self.np_random.integers(len(THINGS)))]
        return f"how many {self.wanted} are there?", {"won": False}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Answer the calls of a message, or grade it; agent and environment read it with the same function."""
        calls = parse_calls(action, [TOOL])
        if calls:
            results = [(TOOL.name, call.error or self.look(call.arguments["thing"])) for call in calls]
            return write_results(results), 0.0, False, False, {"won": False}
        said = ANSWER.search(action)
        won = said is not None and int(said[1]) == self.shelf[self.wanted]
        return "", float(won), True, False, {"won": won, "answer": said[1] if said else ""}

    def look(self, thing: str) -> str:
        """What the tool says."""
        return str(self.shelf[thing]) if thing in self.shelf else f"there are no {thing[:40]} here"


class ShopSuite(TaskSuite):
    """Shops by number; a suite names the tasks of each split and makes the environments that play them.

    Args:
        train: number of shops to train in.
        held_out: number of shops in validation, and in test.
    """

    def __init__(self, train: int = 1000, held_out: int = 64) -> None:
        self.counts: dict[Split, int] = {"train": train, "validation": held_out, "test": held_out}

    def tasks(self, split: Split) -> Sequence[Task]:
        """The shops of a split; the seeds of the splits are apart."""
        first = 1_000_000 * list(self.counts).index(split)
        return [Task(f"{split}-{number}", seed=first + number) for number in range(self.counts[split])]

    def make(self) -> gymnasium.Env[Any, Any]:
        """A shop that can play any task."""
        return Shop()


class StockAgent(ChatToolAgent):
    """Calls ``stock``, and says ``answer: 7`` in the end; only a message of either form is valid."""

    def __init__(self, max_prompt_tokens: int = 128) -> None:
        super().__init__(tools=[TOOL], system="", answer_mark="answer:", max_prompt_tokens=max_prompt_tokens)

    def understand(self, ids: Ids, observation: Observation) -> Response:
        """As the base class has it, but that a number must follow ``answer:``."""
        response = super().understand(ids, observation)
        if response.tool_call or response.action is None or ANSWER.search(response.action):
            return response
        return Response(response.text, response.action, valid=False, tool_call=False)


def demonstrate(draw: random.Random, direct: float) -> list[str]:
    """A conversation in pieces: a question and a guess; or a question, a call, its result and the answer."""
    thing, count = draw.choice(THINGS), draw.randint(0, MOST)
    question, answer = f"how many {thing} are there?", f"answer: {count}"
    if draw.random() < direct:
        return [question, answer]
    call = json.dumps({"name": TOOL.name, "arguments": {"thing": thing}})
    return [question, f"{CALL_TAGS[0]}{call}{CALL_TAGS[1]}", str(count), answer]


def encode(agent: StockAgent, pieces: Sequence[str]) -> Sample:
    """The tokens of a demonstration as the agent would play it, and which of them the policy has to write."""
    made: list[Ids] = [agent.opening("", pieces[0]).ids]
    for number, text in enumerate(pieces[1:], 1):
        if number % 2:
            made.append(agent.encode(text + agent.format.end))
        else:
            made.append(agent.continuation_ids(made[-1], write_results([(TOOL.name, text)])))
    return sample_of((ids, number % 2 == 1) for number, ids in enumerate(made))


def make_policy(folder: str, demonstrations: int = 3000, direct: float = 0.6, seed: int = 1) -> None:
    """Clone demonstrations into a fresh small model and write a Hugging Face folder.

    Args:
        folder: to write.
        demonstrations: number of conversations.
        direct: share of them that guess without looking.
        seed: of everything random.
    """
    torch.set_num_threads(1)
    agent, draw = StockAgent(), random.Random(seed)
    shown = [demonstrate(draw, direct) for _ in range(demonstrations)]
    tokenizer = build_chat_tokenizer([text for pieces in shown for text in pieces], 384)
    agent.bind(tokenizer)
    network = fresh_model(MODEL, tokenizer, "MODEL", dtype=torch.float32, attention="sdpa", seed=seed)
    samples = [encode(agent, pieces) for pieces in shown]
    fit_samples(network, samples[32:], samples[:32], Optimization(learning_rate=3e-3, batch_size=8, epochs=3), seed)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    make_policy(sys.argv[1] if len(sys.argv) > 1 else "runs/own-tool-agent-start")
