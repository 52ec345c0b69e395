from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from gymnasium.error import ResetNeeded

from spear_lightning.environments.base import Split
from spear_lightning.environments.expert import DemonstrationNoise
from spear_lightning.environments.pool import EnvironmentPool
from spear_lightning.environments.webshop import WebShop
from spear_lightning.environments.webshop.environment import WebShopEnv
from spear_lightning.environments.webshop.expert import Order, ShoppingExpert
from spear_lightning.environments.webshop.generator import write_official_layout

ROOT = Path(__file__).parents[3]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def play(env: WebShopEnv, task: str, expert: ShoppingExpert) -> list[tuple[str, str, float]]:
    """Observation, action and reward of each step, and the last observation."""
    text, info = env.reset(options={"task": task})
    expert.reset(info["task"], text)
    steps, over = [], False
    while not over:
        action = expert.act(text)
        seen = text
        text, reward, terminated, truncated, _ = env.step(action)
        steps.append((seen, action, reward))
        over = terminated or truncated
    return steps


# -- splits -----------------------------------------------------------------------------------------------------


def test_the_splits_are_the_published_ones_and_disjoint(shop: WebShop) -> None:
    ids = {split: [task.id for task in shop.tasks(split)] for split in SPLITS}
    total = shop.loaded.goals("synthetic")
    assert ids["test"] == [f"synthetic-{number}" for number in range(500)]
    assert ids["validation"] == [f"synthetic-{number}" for number in range(500, 1500)]
    assert ids["train"] == [f"synthetic-{number}" for number in range(1500, total)]
    assert {task.task_type for task in shop.tasks("test")} == {"beauty", "electronics", "fashion", "garden", "grocery"}


def test_splits_can_be_of_other_sizes(shop_cache: Path) -> None:
    suite = WebShop(test=5, validation=7, train=11, cache_dir=str(shop_cache))
    numbers = {split: [int(task.id.removeprefix("human-")) for task in suite.tasks(split)] for split in SPLITS}
    assert numbers == {"test": [*range(5)], "validation": [*range(5, 12)], "train": [*range(12, 23)]}
    tasks = suite.tasks("train")
    assert (len(tasks[2:5]), tasks[2:5][0], tasks[-1].id) == (3, tasks[2], "human-22")
    assert list(tasks)[::2] == list(tasks[::2])
    with pytest.raises(IndexError):
        tasks[11]


@pytest.mark.parametrize(
    ("settings", "split", "message"),
    [
        ({"test": 0}, "test", "no test goals.*3000 human goals, of which 0 are kept for test"),
        ({"test": 3000}, "validation", "no validation goals.*3000 are kept for test and 1000 for validation"),
        ({"validation": 5000}, "train", "no train goals.*change test, validation, products or goals"),
    ],
)
def test_a_split_without_goals_is_an_error(
    shop_cache: Path, settings: dict[str, int], split: Split, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        WebShop(**settings, cache_dir=str(shop_cache)).tasks(split)  # type: ignore[arg-type]


# -- the environment --------------------------------------------------------------------------------------------


def test_the_environment_follows_the_gymnasium_api(shop: WebShop, env: WebShopEnv) -> None:
    task = shop.tasks("train")[0]
    text, info = env.reset(seed=task.seed, options={"task": task.id})
    assert text == f"Instruction: {info['task']}\nWebShop [SEP] Search"
    assert (info["anchor"], info["task_type"], info["won"]) == ("WebShop [SEP] Search", task.task_type, False)
    assert info["admissible_actions"] == ["search[<your query>]"]
    text, reward, terminated, truncated, info = env.step(f"search[{info['task']}]")
    assert (reward, terminated, truncated, info["won"], info["task_score"]) == (0, False, False, False, 0)
    assert info["anchor"] == text
    assert "Instruction" not in text
    env.step(info["admissible_actions"][-1])
    text, reward, terminated, truncated, info = env.step("click[buy now]")
    assert (terminated, truncated, info["won"]) == (True, False, False)
    assert 0 < reward == info["task_score"] < 1
    assert text.endswith(str(reward))
    with pytest.raises(ResetNeeded):
        env.step("search[tea]")
    assert env.reset()[1]["task"] == info["task"]


def test_only_a_full_score_wins(shop: WebShop, env: WebShopEnv) -> None:
    results = []
    for task in shop.tasks("test")[:60]:
        text, info = env.reset(options={"task": task.id})
        expert = ShoppingExpert(1, DemonstrationNoise(detour=0.3))
        expert.reset(info["task"], text)
        over = False
        while not over:
            text, reward, over, truncated, info = env.step(expert.act(text))
            over = over or truncated
            assert info["won"] == (reward == 1)
        results.append(reward)
    assert 0 < min(results) < max(results) == 1  # some in between


def test_the_step_limit_truncates(shop: WebShop, env: WebShopEnv) -> None:
    env.reset(options={"task": shop.tasks("test")[0].id})
    ends = [env.step("nonsense")[2:4] for _ in range(15)]
    assert ends == [(False, False)] * 14 + [(False, True)]
    with pytest.raises(ResetNeeded):
        env.step("search[tea]")


@pytest.mark.parametrize(
    "task", ["", "human", "human-", "human--1", "human-99999999", "robot-1", "human-1 ", "human-٣x"]
)
def test_an_unknown_task_is_named(env: WebShopEnv, task: str) -> None:
    with pytest.raises(ValueError, match="goal" if task else "options="):
        env.reset(options={"task": task})
    with pytest.raises(ResetNeeded):
        env.step("search[tea]")


def test_episodes_in_worker_processes_are_the_same(shop: WebShop, env: WebShopEnv) -> None:
    task = shop.tasks("test")[0]
    expected = play(env, task.id, ShoppingExpert(0))
    with EnvironmentPool(shop, workers=1) as pool:
        observation = pool.reset({0: task})[0]
        assert observation.task in observation.text
        played = []
        for _, action, _ in expected:
            seen = observation.text
            observation = pool.step({0: action})[0]
            played.append((seen, action, observation.reward))
    assert played == expected
    assert observation.won
    assert observation.terminated


def test_a_suite_that_has_played_can_be_sent_to_a_worker(shop: WebShop, env: WebShopEnv) -> None:
    task = shop.tasks("train")[1]
    expected = env.reset(options={"task": task.id})
    sent = pickle.dumps(shop)
    assert len(sent) < 1000
    assert pickle.loads(sent).make().reset(options={"task": task.id}) == expected


def test_two_thousand_steps_take_less_than_a_second(shop: WebShop, env: WebShopEnv) -> None:
    experts = [(task.id, ShoppingExpert(0)) for task in shop.tasks("validation")[:300]]
    actions = [(task, [action for _, action, _ in play(env, task, expert)]) for task, expert in experts]
    started, steps = time.process_time(), 0
    for task, moves in actions:
        env.reset(options={"task": task})
        for move in moves:
            env.step(move)
            steps += 1
    assert steps / (time.process_time() - started) > 2000


# -- the expert -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("goals", ["synthetic", "human"])
def test_the_expert_wins_nearly_all_test_goals(shop_cache: Path, goals: str) -> None:
    suite = WebShop(goals=goals, cache_dir=str(shop_cache))  # type: ignore[arg-type]
    env, expert = suite.make(), ShoppingExpert(0)
    scores = [play(env, task.id, expert)[-1][2] for task in suite.tasks("test")]
    assert len(scores) == 500
    assert sum(score == 1 for score in scores) >= 0.95 * 500


def test_a_straying_expert_strays_and_mostly_comes_back(shop: WebShop, env: WebShopEnv) -> None:
    ways = DemonstrationNoise(detour=0.1, waste=0.1, mistake=0.05, invalid=0.05)
    motives, won = [], 0
    for number, task in enumerate(shop.tasks("train")[:100]):
        expert = ShoppingExpert(number, ways)
        text, info = env.reset(options={"task": task.id})
        expert.reset(info["task"], text)
        over = False
        while not over:
            before, action = info["anchor"], expert.act(text)
            text, _, terminated, truncated, info = env.step(action)
            motives.append(expert.motive)
            if expert.motive == "invalid":
                assert info["anchor"] == before
            over = terminated or truncated
        won += info["won"]
    assert 0.02 < motives.count("invalid") / len(motives) < 0.1
    assert 0.05 < motives.count("stray") / len(motives) < 0.3
    assert won > 60


def test_equal_seeds_make_equal_moves(shop: WebShop, env: WebShopEnv) -> None:
    ways = DemonstrationNoise(detour=0.2, waste=0.2)
    task = shop.tasks("train")[5].id
    first, again, other = (play(env, task, ShoppingExpert(seed, ways)) for seed in (3, 3, 4))
    assert first == again != other


def test_an_order_is_read_off_the_instruction() -> None:
    order = Order.parse(
        "find me tea tree shampoo with scent: rose, and size: pack of 2, and price lower than 30.00 dollars"
    )
    assert (order.cap, order.pairs) == (30, {"scent": "rose", "size": "pack of 2"})
    assert order.words == ("tea", "tree", "shampoo", "rose", "pack", "2")
    said = Order.parse("I need a rug that is soft, the size should be 2 by 3, and i want the red color")
    assert (said.cap, said.pairs) == (float("inf"), {"size": "2 by 3", "color": "red"})
    with pytest.raises(ValueError, match="nothing to buy"):
        Order.parse("i want to buy it")


# -- settings and data ------------------------------------------------------------------------------------------


def test_pages_of_results_can_be_shorter(shop_cache: Path) -> None:
    def hits(per_page: int) -> list[list[str]]:
        """The products on each page of one search."""
        environment = WebShop(per_page=per_page, max_steps=50, cache_dir=str(shop_cache)).make()
        environment.reset(options={"task": "human-0"})
        _, _, _, _, info = environment.step("search[slim fit shirt]")
        pages: list[list[str]] = []
        while True:
            clicks = [action[6:-1] for action in info["admissible_actions"]]
            pages.append([name for name in clicks if name not in ("back to search", "< prev", "next >")])
            if "next >" not in clicks:
                return pages
            opened = environment.step(f"click[{pages[-1][-1]}]")
            assert opened[0].endswith("Buy Now"), "what is shown can be opened"
            environment.step("click[< prev]")
            _, _, _, _, info = environment.step("click[next >]")

    assert [len(page) for page in hits(20)] == [20, 10]
    assert [name for page in hits(20) for name in page] == [name for page in hits(10) for name in page]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"catalogue": "amazon"}, "catalogue must be"),
        ({"goals": "both"}, "goals must be"),
        ({"products": 0}, "products must be at least 1"),
        ({"test": -1}, "test must be at least 0"),
        ({"train": 0}, "train must be at least 1"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"per_page": 0}, "per_page must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_bad_settings_are_named_at_once(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WebShop(**settings)  # type: ignore[arg-type]


def test_official_data_are_played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    write_official_layout(data, 40)
    human = json.loads((data / "items_human_ins.json").read_text())
    human["B0GONE"] = next(iter(human.values()))
    (data / "items_human_ins.json").write_text(json.dumps(human))
    monkeypatch.setenv("WEBSHOP_DATA", str(data))
    for official in (
        WebShop("official", test=20, validation=20, cache_dir=str(tmp_path / "cache")),
        WebShop("official", str(data), test=20, validation=20, cache_dir=str(tmp_path / "cache")),
    ):
        with caplog.at_level(logging.INFO):
            official.prepare()
        assert len(official.tasks("train")) == 80
        won = [play(official.make(), task.id, ShoppingExpert(0))[-1][2] == 1 for task in official.tasks("train")]
        assert sum(won) > 70
    assert "left out: 1 products with instructions that are not in the catalogue" in caplog.text
    assert sorted(path.name for path in data.iterdir()) == [  # never written to: it may be read-only
        "items_human_ins.json",
        "items_ins_v2.json",
        "items_shuffle.json",
        "reviews.json",
    ]


def test_missing_official_data_are_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WEBSHOP_DATA", raising=False)
    with pytest.raises(ValueError, match=r"set data_dir, or \$WEBSHOP_DATA"):
        WebShop("official", cache_dir=str(tmp_path)).prepare()
    with pytest.raises(ValueError, match=r"items_shuffle\.json") as caught:
        WebShop("official", str(tmp_path), cache_dir=str(tmp_path / "cache")).prepare()
    assert str(tmp_path) in str(caught.value)


def test_human_goals_without_their_file_are_one_clear_error(tmp_path: Path) -> None:
    write_official_layout(tmp_path / "data", 40)
    (tmp_path / "data" / "items_human_ins.json").unlink()
    cache = str(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"0 human goals.*items_human_ins\.json"):
        WebShop("official", str(tmp_path / "data"), cache_dir=cache).prepare()
    WebShop("official", str(tmp_path / "data"), goals="synthetic", test=5, validation=5, cache_dir=cache).prepare()


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spear_lightning.environments.base.find_spec", lambda name: None)
    for use in (WebShop().prepare, lambda: WebShop().tasks("train"), WebShop().make):
        with pytest.raises(ValueError, match=r"pip install 'spear-lightning\[webshop\]'"):
            use()


def test_the_cache_follows_the_users_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    WebShop(products=34, test=1, validation=1).prepare()
    assert list((tmp_path / "spear-lightning" / "webshop").glob("*/catalogue.json"))


def test_the_configurations_have_the_published_settings_and_disjoint_goals() -> None:
    def read(name: str) -> Any:
        return yaml.safe_load((ROOT / "configs" / name).read_text(encoding="utf-8"))

    published = read("webshop.yaml")
    data = published["data"]
    assert published["trainer"]["max_epochs"] == 350
    assert (data["rollouts"]["tasks"], data["rollouts"]["group_size"], data["max_turns"]) == (32, 8, 15)
    agent = data["agent"]["init_args"]
    assert (agent["history_length"], agent["max_prompt_tokens"], data["max_response_tokens"]) == (2, 4096, 512)
    assert (data["evaluation"]["temperature"], data["reward"]["success"]) == (0.4, 10)
    WebShop(**data["environment"]["init_args"])
    small, shown = read("small/webshop.yaml"), read("sft/webshop.yaml")
    learned, demonstrated = small["data"]["environment"]["init_args"], shown["environment"]["init_args"]
    for key in ("products", "goals", "catalogue"):
        assert learned[key] == demonstrated[key]
    assert learned["test"] + learned["validation"] + learned["train"] <= demonstrated["test"]
    assert small["model"]["policy"]["model"] == shown["output"]


def test_importing_the_suite_loads_no_engine() -> None:
    code = "import sys, spear_lightning.environments.webshop as w; w.WebShop(); "
    code += "sys.exit(any(name in sys.modules for name in ('rapidfuzz', 'Stemmer')))"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
