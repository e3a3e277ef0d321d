"""Trainings started on clusters by other engines: `ray`."""

from typing import TYPE_CHECKING

from purestep._lazy import attach

if TYPE_CHECKING:
    from purestep.launch.ray_train import ray as ray

__getattr__, __dir__ = attach(__name__)
