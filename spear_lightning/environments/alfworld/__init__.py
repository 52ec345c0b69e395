"""ALFWorld: household tasks in text, on the real engine, with generated or official games."""

from spear_lightning.environments.alfworld.generator import SceneSize
from spear_lightning.environments.alfworld.suite import ALFWorld

__all__ = ["ALFWorld", "SceneSize"]
