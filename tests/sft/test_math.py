from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from spear_lightning.agents.tool_calling import ChatToolAgent
from spear_lightning.environments.base import Observation, Task
from spear_lightning.environments.math import GeneratedProblems, MathProblems
from spear_lightning.environments.tools import CODE_INTERPRETER, parse_calls, write_results
from spear_lightning.sft.chat_tokenizer import build_chat_tokenizer
from spear_lightning.sft.dagger import Dagger
from spear_lightning.sft.evaluation import HeldOut
from spear_lightning.sft.math import Solution, WrittenSolutions
from spear_lightning.sft.module import Optimization
from spear_lightning.sft.run import sft

ROOT = Path(__file__).resolve().parents[2]
SANDBOX = "tests.sandbox.sandboxes.MontySandbox"
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "tie_word_embeddings": True,
}


def sums(kind: str = "chain_sum") -> MathProblems:
    train, validation, test = (GeneratedProblems([kind], 60, seed) for seed in (0, 1000, 2000))
    return MathProblems(train, validation, test, instruction="", sandbox=SANDBOX, max_turns=2)


def demonstrate(suite: MathProblems, direct: float, seed: int) -> list[Solution]:
    return WrittenSolutions(ChatToolAgent(), direct).collect(suite, workers=1, seed=seed)


def test_demonstrations_solve_their_problems() -> None:
    suite = sums()
    environment = suite.make()
    demonstrations = demonstrate(suite, direct=0.5, seed=1)
    tasks = suite.tasks("train")
    assert 15 < sum(len(item.replies) == 1 for item in demonstrations) < 45
    for task, item in zip(tasks, demonstrations, strict=True):
        text, _ = environment.reset(options={"task": task.id})
        assert text == item.question
        for number, reply in enumerate(item.replies):
            text, reward, over, _, _ = environment.step(reply)
            assert over == (number + 1 == len(item.replies))
            assert over or text == write_results([("code_interpreter", item.result)])
        assert reward == 1.0
    assert all(len(item.replies) == 2 for item in demonstrate(suite, direct=0.0, seed=1))
    with pytest.raises(ValueError, match=r"must be of the kinds chain_sum and products, .*not simple_equations"):
        demonstrate(MathProblems(GeneratedProblems(["simple_equations"], 3), instruction=""), direct=0.0, seed=1)


def test_demonstrations_are_written_as_the_policy_plays() -> None:
    [item] = demonstrate(MathProblems(GeneratedProblems(["chain_sum"], 1)), direct=0.0, seed=1)
    agent = ChatToolAgent(system="")
    agent.bind(build_chat_tokenizer([item.question, *item.replies], 400))
    (sample,) = WrittenSolutions(agent).encode(item, agent)
    player = agent.start(Task("train-0"), Observation(item.question))
    wrote = agent.encode(item.replies[0] + agent.format.end)
    response = player.respond(wrote)
    assert response.tool_call
    assert len(parse_calls(item.replies[0], [CODE_INTERPRETER])) == 1
    first = player.prompt().ids
    player.observe(Observation(write_results([("code_interpreter", item.result)])))
    prompt = player.prompt().ids
    assert sample.ids[: len(prompt)].tolist() == prompt.tolist()
    assert agent.decode(sample.ids[len(prompt) :]) == item.replies[1] + "<|end|>"
    assert agent.decode(sample.ids[sample.mask]) == "<|end|>".join(item.replies) + "<|end|>"
    assert not sample.mask[: len(first)].any()


def test_tokenizer_spells_any_text_and_keeps_digits_apart() -> None:
    tokenizer = build_chat_tokenizer(["the sum of 12 and 34"] * 3, 300)
    for text in ("", "12 and é 数\n", '<tool_call>{"name"', "<|end|>\x00"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer.encode("1234", add_special_tokens=False)) == 4
    assert len(tokenizer.encode("<tool_call>", add_special_tokens=False)) == 1
    assert len(tokenizer) <= 300
    with pytest.raises(ValueError, match=r"the vocabulary must have at least 265 entries, not 100"):
        build_chat_tokenizer(["x"], 100)


@pytest.mark.slow
def test_writes_a_policy_that_can_be_played_on(tmp_path: Path) -> None:
    agent = ChatToolAgent(system="")
    settings = HeldOut(tasks=4, temperatures=(1.0,), max_turns=2, max_response_tokens=16)
    result = sft(
        *(sums(), str(tmp_path / "policy"), WrittenSolutions(agent), TINY, Optimization(epochs=1)),
        held_out=settings,
        workers=1,
        threads=1,
    )
    assert [score.success.episodes for score in result.scores] == [4]
    assert "60 written solutions" in (tmp_path / "policy" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert model.config.vocab_size == len(agent.tokenizer)
    options = {
        "run.directory": tmp_path / "run",
        "model.policy.model": tmp_path / "policy",
        "data.environment.init_args.sandbox": SANDBOX,
        "data.rollouts": {"tasks": 2, "group_size": 2},
        "data.max_response_tokens": 16,
        "data.minibatches": 1,
        "trainer.max_epochs": 1,
        "trainer.num_sanity_val_steps": 0,
        "trainer.check_val_every_n_epoch": 5,
    }
    command = [sys.executable, "-c", "from spear_lightning.cli.main import main; main()", "fit"]
    command += ["-c", str(ROOT / "configs" / "small" / "math.yaml")]
    command += [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}" for key, value in options.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "finished").read_text() == "1 iterations\n"
    with pytest.raises(ValueError, match=r"WrittenSolutions\.direct must be at least 0 and at most 1"):
        WrittenSolutions(agent, direct=2.0)
    with pytest.raises(ValueError, match=r"dagger\.rounds: only an expert"):
        sft(sums(), str(tmp_path / "other"), WrittenSolutions(agent), TINY, dagger=Dagger(rounds=1))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output: .* is not a folder"):
        sft(sums(), str(tmp_path / "file"), WrittenSolutions(agent), TINY)
