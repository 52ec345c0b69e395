"""What is to be compared, checked before any training time is spent."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_SEED_SUFFIX = re.compile(r"-seed\d+$")


class PlanError(Exception):
    """The comparison as asked for cannot be run; the message names the argument or file and the fix."""


@dataclass(frozen=True)
class Arm:
    """One of the things compared.

    Attributes:
        name: in files, tables and the picture.
        overlays: configuration files laid over the base one, the last one wins.
    """

    name: str
    overlays: tuple[Path, ...]

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Read ``NAME=OVERLAY.yaml[,OVERLAY.yaml…]``.

        Raises:
            PlanError: it does not have this form, or a file is missing.
        """
        name, _, paths = text.partition("=")
        if not _NAME.fullmatch(name) or _SEED_SUFFIX.search(name) or not paths:
            raise PlanError(
                f"--arm {text!r}: give NAME=OVERLAY.yaml[,OVERLAY.yaml...], the name of letters, digits and any of "
                "._+-, and not ending in -seed and a number"
            )
        overlays = tuple(Path(path) for path in paths.split(","))
        for overlay in overlays:
            if not overlay.is_file():
                raise PlanError(f"--arm {name}: there is no file {overlay}")
        return cls(name, overlays)


@dataclass(frozen=True)
class Comparison:
    """A base configuration, arms, seeds, and where the results go.

    Attributes:
        base: configuration that every arm starts from.
        arms: what is compared, names all different.
        seeds: one run of each arm per seed.
        settings: further ``key=value`` pairs that hold for every arm.
        temperatures: that the final policy is tested at, the main one first.
        output: folder of records, summary and picture; runs go to ``runs`` below it.
        command: how ``spear`` is started.
    """

    base: Path
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    settings: tuple[str, ...]
    temperatures: tuple[str, ...]
    output: Path
    command: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.base.is_file():
            raise PlanError(f"--base: there is no file {self.base}")
        names = [arm.name for arm in self.arms]
        for what, values in (("--arm", names), ("--seeds", self.seeds), ("--temperatures", self.temperatures)):
            twice = sorted({str(value) for value in values if list(values).count(value) > 1})
            if twice or not values:
                raise PlanError(f"{what}: {'given twice: ' + ', '.join(twice) if twice else 'give at least one'}")
        for setting in self.settings:
            if not re.fullmatch(r"[A-Za-z_][\w.]*\+?=.*", setting, re.DOTALL):
                raise PlanError(f"--set {setting!r}: give KEY=VALUE, as trainer.max_epochs=40")
            key = setting.split("=", 1)[0]
            if key in ("seed_everything", "run.directory", "ckpt_path", "data.evaluation.temperature"):
                raise PlanError(f"--set {key}: the comparison sets it itself")

    def configuration(self, arm: Arm, seed: int) -> list[str]:
        """Arguments of ``spear`` that configure a run of ``arm``."""
        files = [argument for path in (self.base, *arm.overlays) for argument in ("-c", str(path))]
        return [*files, *(f"--{setting}" for setting in self.settings), f"--seed_everything={seed}"]


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        arm: the arm.
        seed: the seed.
        config: the composed configuration, without the run's directory.
    """

    arm: Arm
    seed: int
    config: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """Names its files."""
        return f"{self.arm.name}-seed{self.seed}"

    @property
    def training_digest(self) -> str:
        """Of what the trained policy depends on: a checkpoint of another digest is of another run."""
        return _digest(self.config)

    def digest(self, temperatures: Sequence[str]) -> str:
        """Of all that the record depends on."""
        return _digest([self.config, list(temperatures)])


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def compose(comparison: Comparison, arm: Arm, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The configuration that ``spear`` makes of an arm's files, without seed and run directory.

    ``start`` in it is the content of the policy that training starts from, where that is a folder: another start
    under the same name is another configuration.

    Args:
        comparison: that the arm belongs to.
        arm: whose configuration.
        environment: variables of the process.

    Raises:
        PlanError: ``spear`` refuses the configuration, or a run of it would leave nothing to compare.
    """
    _refuse_revival(comparison, arm)
    arguments = [*comparison.command, "fit", *comparison.configuration(arm, 0), "--print_config"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=dict(environment))
    if done.returncode:
        raise PlanError(f"arm {arm.name}: the configuration is refused:\n{last_lines(done.stderr or done.stdout, 12)}")
    config: dict[str, Any] = yaml.safe_load(done.stdout)
    config.pop("seed_everything", None)
    config.pop("run", None)
    _require_results(config, arm)
    return config | {"start": _start(config)}


def _refuse_revival(comparison: Comparison, arm: Arm) -> None:
    """A setting below a key that an arm has switched off would switch it on again, unnoticed."""
    for setting in comparison.settings:
        key = setting.split("=", 1)[0]
        parts = key.split(".")
        for prefix in (parts[:length] for length in range(1, len(parts))):
            last = "unset"
            for path in (comparison.base, *arm.overlays):
                last = _lookup(yaml.safe_load(path.read_text(encoding="utf-8")), prefix, last)
            if last is None:
                off = ".".join(prefix)
                raise PlanError(
                    f"--set {key}: arm {arm.name} has {off}: null, and the setting would switch it on; put "
                    "the setting into an overlay of the arms it is for"
                )


def _lookup(values: Any, keys: Sequence[str], missing: Any) -> Any:
    for key in keys:
        if not isinstance(values, Mapping) or key not in values:
            return missing
        values = values[key]
    return values


def _start(config: Mapping[str, Any]) -> str | None:
    policy = (config.get("model") or {}).get("policy") or {}
    name = policy.get("init_args", policy).get("model")
    folder = Path(str(files("spear_lightning") / "policy" / "embedded")) if name == "embedded" else Path(str(name))
    if name is None or not folder.is_dir():
        return None
    content = hashlib.sha256()
    for path in sorted(path for ending in ("safetensors", "json") for path in folder.glob(f"*.{ending}")):
        content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()[:16]


def _require_results(config: Mapping[str, Any], arm: Arm) -> None:
    trainer = config.get("trainer") or {}
    callbacks = [
        (str(entry["class_path"]).rpartition(".")[2], entry.get("init_args") or {})
        for entry in trainer.get("callbacks") or []
    ]
    if "LearningCurve" not in [name for name, _ in callbacks]:
        raise PlanError(f"arm {arm.name}: add LearningCurve to trainer.callbacks, which writes the validation curve")
    checkpoints = [settings for name, settings in callbacks if name == "ModelCheckpoint"]
    if not any(settings.get("save_last") and settings.get("save_top_k") != 0 for settings in checkpoints):
        raise PlanError(
            f"arm {arm.name}: add ModelCheckpoint with save_last: true and save_top_k: 1 to trainer.callbacks; the "
            "last policy is tested, and an interrupted run goes on from it (with save_top_k: 0 Lightning saves nothing "
            "before the end)"
        )
    if trainer.get("logger") not in (None, True):
        raise PlanError(
            f"arm {arm.name}: leave trainer.logger out; curves are read from the default logger's metrics.csv"
        )
    validated, iterations = trainer.get("check_val_every_n_epoch") or 0, trainer.get("max_epochs") or 0
    if not validated or iterations < 1 or iterations % validated:
        raise PlanError(
            f"arm {arm.name}: trainer.max_epochs is {iterations} and trainer.check_val_every_n_epoch {validated}; "
            "make the first a multiple of the second, so that the policy that training ends with is evaluated"
        )


def last_lines(text: str, count: int) -> str:
    """The last lines of a text that say something."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-count:])


def differences(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Settings in which arms differ.

    Args:
        configs: composed configuration by arm.

    Returns:
        By dotted key, the value of each arm (``None`` where it does not have the key).
    """
    flat = {arm: dict(_flatten(config)) for arm, config in configs.items()}
    keys = sorted({key for values in flat.values() for key in values})
    found = {key: {arm: values.get(key) for arm, values in flat.items()} for key in keys}
    return {key: values for key, values in found.items() if len({repr(value) for value in values.values()}) > 1}


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        if "class_path" in value:  # what is configured by class: its name, then its own settings
            name = str(value["class_path"]).rpartition(".")[2]
            return [(prefix, name), *_flatten(value.get("init_args") or {}, prefix)]
        return [
            pair for key, inner in value.items() for pair in _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    if (
        isinstance(value, list)
        and value
        and all(isinstance(entry, Mapping) and "class_path" in entry for entry in value)
    ):
        return [
            pair
            for name, inner in _by_name(value).items()
            for pair in [(f"{prefix}.{name}", True), *_flatten(inner, f"{prefix}.{name}")]
        ]
    return [(prefix, value)] if prefix and value != {} else []


def _by_name(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Settings by the name of their class; of a class that stands there again the name has a number.

    Several ``CurriculumSchedule`` are one curriculum, of which each settles what those after it leave open.
    """
    named: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name, settings = str(entry["class_path"]).rpartition(".")[2], dict(entry.get("init_args") or {})
        if name == "CurriculumSchedule":
            settings = named.get(name, {}) | {key: value for key, value in settings.items() if value is not None}
        elif name in named:
            name = f"{name} {1 + sum(other.partition(' ')[0] == name for other in named)}"
        named[name] = settings
    return named
