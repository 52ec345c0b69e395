from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spear_lightning.environments.base import Task
from spear_lightning.environments.pool import EnvironmentPool, EnvironmentPoolError
from tests.environments.tiny_environments import Suicidal, Tiny, Unmakeable

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pool() -> Iterator[EnvironmentPool]:
    with EnvironmentPool(Tiny(), workers=2, step_timeout=20.0) as pool:
        yield pool


def tasks(count: int) -> dict[int, Task]:
    return dict(enumerate(Tiny().tasks("train")[:count]))


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until_gone(pid: int, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


def test_64_environments_in_2_workers_play_to_the_end(pool: EnvironmentPool) -> None:
    pids = pool.pids
    observations = pool.reset(tasks(64))
    assert len(pids) == 2
    assert [observations[slot].text.split(":")[0] for slot in range(64)] == [f"train {slot}" for slot in range(64)]
    assert observations[5].task == "count down train 5"
    assert observations[5].admissible == ("down", "up")
    assert observations[5].text.startswith(f"train 5: {observations[5].anchor}")
    need = {slot: int(observation.anchor) for slot, observation in observations.items()}
    assert set(need.values()) == {3, 4, 5}
    steps = dict.fromkeys(need, 0)
    active = set(need)
    while active:
        for slot, observation in pool.step(dict.fromkeys(sorted(active), "down")).items():
            steps[slot] += 1
            assert observation.done == observation.won == (observation.reward == 1.0) == (steps[slot] == need[slot])
            if observation.done:
                active.discard(slot)
    assert pool.pids == pids


def test_the_same_tasks_give_the_same_text_whatever_the_number_of_workers(pool: EnvironmentPool) -> None:
    with EnvironmentPool(Tiny(), workers=1) as single:
        assert single.reset(tasks(6)) == pool.reset(tasks(6))


def test_workers_import_no_torch_and_run_single_threaded(
    pool: EnvironmentPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch  # noqa: F401  (imported here, in the parent; a spawned multiprocessing child would import it too)

    pool.close()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    pool.reset(tasks(2))
    modules = pool.step({0: "echo modules"})[0].text.split()
    assert "spear_lightning.environments.worker" in modules
    assert "torch" not in modules
    answers = pool.step({0: "echo environment", 1: "echo environment"})
    assert [answer.text for answer in answers.values()] == [f"1 {pid}" for pid in pool.pids]


def test_killed_worker_costs_only_its_episodes(pool: EnvironmentPool, caplog: pytest.LogCaptureFixture) -> None:
    pool.reset(tasks(64))
    pids = pool.pids
    os.kill(pids[0], signal.SIGKILL)
    with caplog.at_level(logging.WARNING):
        answers = pool.step(dict.fromkeys(range(64), "down"))
    assert {slot for slot, answer in answers.items() if answer.aborted} == set(range(0, 64, 2))
    assert "died (Killed" in str(answers[0].aborted)
    assert answers[0].done
    assert not answers[0].won
    assert "32 episodes aborted" in caplog.text
    assert pool.pids[1] == pids[1]
    assert pool.pids[0] != pids[0]
    again = pool.reset(tasks(64))
    assert not any(answer.aborted for answer in again.values())
    assert not any(answer.aborted for answer in pool.step(dict.fromkeys(range(64), "down")).values())


def test_idle_worker_that_died_is_replaced_before_new_episodes_begin(pool: EnvironmentPool) -> None:
    pool.reset(tasks(4))
    for pid in pool.pids:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert not any(answer.aborted for answer in pool.reset(tasks(4)).values())


def test_worker_killed_while_it_works(pool: EnvironmentPool) -> None:
    pool.reset(tasks(4))
    pool.send_step({0: "down", 1: "hang", 3: "down"})
    os.kill(pool.pids[1], signal.SIGKILL)
    answers: dict[int, str | None] = {}
    while pool.pending:
        answers |= {slot: answer.aborted for slot, answer in pool.receive().items()}
    assert answers[0] is None
    assert "died" in str(answers[1])
    assert "died" in str(answers[3])
    assert pool.step({2: "down"})[2].aborted is None


def test_a_worker_killed_between_an_answer_and_its_being_taken(pool: EnvironmentPool) -> None:
    """What it had answered is still taken; the episode is over all the same, and said to be at its next step."""
    pool.reset({0: tasks(1)[0]})
    pool.send_reset({2: tasks(3)[2]})
    pool.step({0: "down"})  # of the same worker: its answer comes after that to the reset of slot 2
    os.kill(pool.pids[0], signal.SIGKILL)
    os.waitid(os.P_PID, pool.pids[0], os.WEXITED | os.WNOWAIT)
    assert "died" in str(pool.step({0: "down"})[0].aborted)
    assert pool.gather([2])[2].text.startswith("train 2")
    assert "died" in str(pool.step({2: "down"})[2].aborted)
    assert not any(answer.aborted for answer in pool.reset(tasks(3)).values())


def test_hanging_environment_is_killed_and_the_rest_goes_on() -> None:
    with EnvironmentPool(Tiny(), workers=2, step_timeout=1.0) as pool:
        pool.reset(tasks(6))
        answers = pool.step({0: "down", 1: "hang", 2: "down", 4: "down"})
        assert answers[1].aborted == "environment worker gave no answer for 1 s (step_timeout)"
        assert [answers[slot].aborted for slot in (0, 2, 4)] == [None] * 3
        # Slots 3 and 5 lived in the same worker and were not asked: they learn of it when they are.
        later = pool.step({3: "down", 2: "down"})
        assert later[3].aborted == answers[1].aborted
        assert later[2].aborted is None
        assert pool.reset(tasks(6))[1].aborted is None


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("raise", "environment raised RuntimeError: the engine broke"),
        ("exit", "environment raised SystemExit: 3"),
        ("nan", "environment raised ValueError: the environment gave the reward nan, which is not finite"),
        ("image", "environment raised TypeError: observations must be text (str), the environment gave list"),
    ],
)
def test_environment_that_raises_costs_only_its_episode(
    pool: EnvironmentPool, caplog: pytest.LogCaptureFixture, action: str, reason: str
) -> None:
    pool.reset(tasks(6))
    pids = pool.pids
    answers = pool.step({0: "down", 2: action, 4: "down", 1: "down"})
    assert {slot: answer.aborted for slot, answer in answers.items()} == {0: None, 2: reason, 4: None, 1: None}
    assert reason in caplog.text
    assert pool.pids == pids
    with pytest.raises(ValueError, match="no episode is running in slot 2"):
        pool.step({2: "down"})
    assert pool.reset({2: tasks(3)[2]})[2].aborted is None
    assert pool.step({2: "echo number"})[2].text == "3", "a fresh environment: the state of the old one is unknown"


def test_process_exit_inside_an_environment(pool: EnvironmentPool) -> None:
    pool.reset(tasks(2))
    answers = pool.step({0: "crash", 1: "down"})
    assert answers[0].aborted == "environment worker died (exit code 7)"
    assert answers[1].aborted is None


def test_task_that_cannot_be_reset_is_aborted(pool: EnvironmentPool) -> None:
    answers = pool.reset({0: Task("bad reset"), 2: Task("good")})
    assert answers[0].aborted == "environment raised KeyError: 'no such game'"
    assert answers[2].aborted is None


@pytest.mark.parametrize(
    "action", ["", "\ud800\udfff lone", "x" * 2_000_000, "\x00\x1b[31m", "日本語 ✓", "down\n" * 50]
)
def test_actions_of_any_kind_arrive_unchanged(pool: EnvironmentPool, action: str) -> None:
    pool.reset(tasks(3))
    answers = pool.step({0: action, 1: "down", 2: action})
    assert answers[0].text.partition(" left after ")[2] == action
    assert answers[2].text.partition(" left after ")[2] == action
    assert answers[1].aborted is None


def test_environments_are_reused_after_release() -> None:
    with EnvironmentPool(Tiny(), workers=1) as pool:
        numbers = set()
        for start in range(0, 40, 4):
            slots = range(start, start + 4)
            pool.reset(dict.fromkeys(slots, Task("again")))
            numbers |= {answer.text for answer in pool.step(dict.fromkeys(slots, "echo number")).values()}
            pool.release(slots)
        assert numbers == {"0", "1", "2", "3"}
        with pytest.raises(ValueError, match="slot 0"):
            pool.step({0: "down"})


def test_answers_are_received_as_they_come(pool: EnvironmentPool) -> None:
    pool.send_reset(tasks(4))
    assert pool.pending == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="slots \\[2\\] have an answer outstanding"):
        pool.send_step({2: "down"})
    got: dict[int, str] = {}
    while pool.pending:
        got |= {slot: answer.text for slot, answer in pool.receive().items()}
    assert set(got) == {0, 1, 2, 3}
    assert pool.receive() == {}
    pool.send_step({1: "hang"})
    assert pool.receive(timeout=0.05) == {}
    assert pool.step({0: "down"})[0].text.endswith("after down")


def test_answer_to_a_released_slot_is_dropped(pool: EnvironmentPool) -> None:
    pool.reset(tasks(2))
    pool.send_step({0: "late"})
    pool.release([0])
    assert not pool.pending
    assert "late" not in pool.reset(tasks(1))[0].text
    assert pool.step({0: "down"})[0].text.endswith("after down")


def test_suite_that_cannot_make_environments_gives_the_workers_message() -> None:
    with (
        pytest.raises(EnvironmentPoolError, match=r"cannot start: Unmakeable: .*install spear-lightning\[alfworld\]"),
        EnvironmentPool(Unmakeable(), workers=2),
    ):
        pass


@pytest.mark.slow
def test_workers_that_die_at_every_start_give_one_error() -> None:
    with (
        pytest.raises(
            EnvironmentPoolError, match=r"workers in a row were lost: environment worker died \(exit code 9\)"
        ),
        EnvironmentPool(Suicidal(), workers=1),
    ):
        pass


def test_environments_that_always_fail_do_not_go_on_forever(pool: EnvironmentPool) -> None:
    def fail() -> None:
        for _ in range(30):
            pool.reset(dict.fromkeys(range(8), Task("bad reset")))

    with pytest.raises(EnvironmentPoolError, match=r"100 times in a row.*no such game"):
        fail()


def test_close_ends_the_workers_and_a_reset_starts_them_again(pool: EnvironmentPool) -> None:
    pool.reset(tasks(2))
    pids = pool.pids
    pool.step({0: "down"})
    pool.close()
    assert not any(alive(pid) for pid in pids)
    assert pool.reset(tasks(2))[1].aborted is None


def test_what_an_environment_started_dies_with_a_hanging_worker() -> None:
    with EnvironmentPool(Tiny(), workers=1, step_timeout=1.0) as pool:
        pool.reset(tasks(1))
        child = int(pool.step({0: "child"})[0].text)
        assert alive(child)
        assert pool.step({0: "hang"})[0].aborted
        assert wait_until_gone(child)


@pytest.mark.parametrize("hanging", [False, True])
def test_workers_die_when_the_parent_is_killed(tmp_path: Path, hanging: bool) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\n"
        "from spear_lightning.environments.pool import EnvironmentPool\n"
        "from tests.environments.tiny_environments import Tiny\n"
        "pool = EnvironmentPool(Tiny(), workers=2)\n"
        "pool.reset(dict(enumerate(Tiny().tasks('train')[:4])))\n"
        f"pool.send_step({{0: 'hang'}} if {hanging} else {{}})\n"
        "print(*pool.pids, flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(alive(pid) for pid in pids)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert all(wait_until_gone(pid) for pid in pids)


def test_suites_and_arguments_that_cannot_work_are_refused() -> None:
    class Local(Tiny):
        pass

    with pytest.raises(ValueError, match=r"Local cannot be sent to worker processes"):
        EnvironmentPool(Local())
    with pytest.raises(ValueError, match="workers must be at least 1, not 0"):
        EnvironmentPool(Tiny(), workers=0)
    with pytest.raises(ValueError, match="step_timeout must be above 0"):
        EnvironmentPool(Tiny(), step_timeout=0)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(EnvironmentPool(Tiny()))
