"""Stands in for `spear`: reads the same arguments and writes the same files within milliseconds.

Success after i iterations is (50 + i·gain + seed) of 200 games. `fail_once_at: i` and `hang_at: i` in the configuration
stop the first attempt of a run at iteration i; `fail: true` fails every attempt.
"""

import csv
import json
import sys
import time
from pathlib import Path

import yaml

from spear_lightning.utils.atomic import write_atomically


def merge(into: dict, values: dict) -> dict:
    for key, value in values.items():
        into[key] = merge(into.get(key) or {}, value) if isinstance(value, dict) else value
    return into


def parse(arguments: list[str]) -> dict:
    config: dict = {}
    while arguments:
        argument = arguments.pop(0)
        if argument == "-c":
            merge(config, yaml.safe_load(Path(arguments.pop(0)).read_text()))
        elif argument != "--print_config":
            keys, _, value = argument.removeprefix("--").partition("=")
            *outer, last = keys.split(".")
            nested: dict = {last: yaml.safe_load(value)}
            for key in reversed(outer):
                nested = {key: nested}
            merge(config, nested)
    return config


def write(directory: Path, rows: list[dict]) -> None:
    columns = sorted({name for row in rows for name in row} - {"iteration"})
    with (directory / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["iteration", *columns])
        writer.writeheader()
        writer.writerows(rows)


def fit(config: dict, directory: Path) -> None:
    won = lambda done: 50 + config["gain"] * done + config["seed_everything"]  # noqa: E731
    first = 0
    if config.get("ckpt_path"):
        first = int(Path(config["ckpt_path"]).read_text())
    with (directory / "attempts").open("a") as file:
        file.write(f"{first}\n")
    attempts = len((directory / "attempts").read_text().split())
    every = config["trainer"]["check_val_every_n_epoch"]
    for done in range(first, config["trainer"]["max_epochs"] + 1):
        evaluations = [{"iteration": i, "successes": won(i), "episodes": 200} for i in range(0, done + 1, every)]
        write_atomically(directory / "evaluations.json", json.dumps({"evaluations": evaluations}))
        (directory / "last.ckpt").write_text(str(done))
        rows = [
            {
                "iteration": i,
                "rollout/success": 0.5,
                "rollout/entropy": 1 / (i + 1),
                "time/rollout_generation": 1.0,
                "time/rollout_environment": 0.5,
                "time/update": 0.5,
                "replay/used": 4.0 * (i % 2),
            }
            for i in range(done)
        ]
        write(directory, rows)
        if config.get("fail") or (done == config.get("fail_once_at") and attempts == 1):
            sys.exit("the stand-in fails as told")
        if done == config.get("hang_at") and attempts == 1:
            time.sleep(600)


def test(config: dict, directory: Path) -> None:
    done = int(Path(config["ckpt_path"]).read_text())
    success = (50 + config["gain"] * done + config["seed_everything"]) / 200
    success += 0.1 * (config["data"]["evaluation"]["temperature"] < 1)
    write(directory, [{"iteration": done, "test/success": success, "test/episodes": 200, "test/invalid": 0.125}])


def main() -> None:
    subcommand, *arguments = sys.argv[1:]
    config = parse(list(arguments))
    if config.get("refused"):
        print("spear: error: no such key: refused", file=sys.stderr)
        sys.exit(2)
    if "--print_config" in arguments:
        print(yaml.safe_dump(config))
        return
    {"fit": fit, "test": test}[subcommand](config, Path(config["run"]["directory"]))


if __name__ == "__main__":
    main()
