"""The arguments of a run, declared once: `fit`, `run` and `Run` take what is written here."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from purestep.errors import ConfigError, explain, nearest_name
from purestep.loggers import Logger
from purestep.loop import checks
from purestep.loop.cadence import Until
from purestep.loop.events import Callback
from purestep.loop.origin import plain_settings
from purestep.loop.resume import Resume
from purestep.loop.saving import OnSaveError
from purestep.remote import Remote

P = ParamSpec("P")
A = TypeVar("A")
R = TypeVar("R")
StepFn = Callable[[Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run goes. `fit` says what each of them means.

    Raises:
        ConfigError: one of them makes no sense.
    """

    until: Until
    callbacks: Sequence[Callback] = ()
    loggers: Sequence[Logger] | None = None
    run_dir: str | Path | None = None
    resume: Resume = "auto"
    on_save_error: OnSaveError = "continue"
    remote: Remote | str | None = None
    strict: bool = False
    grace_seconds: float | None = None
    donate: bool = False
    settings: Mapping[str, Any] | None = None
    free_settings: Sequence[str] = ()
    device: torch.device | str | int | None = None
    dry_run: int | None = None
    check_evaluation: int | None = None

    def __post_init__(self) -> None:
        checks.check_device(self.device)
        checks.check_counts(1, dry_run=self.dry_run)
        checks.check_counts(0, check_evaluation=self.check_evaluation)
        checks.check_until(self.until)
        checks.check_on_save_error(self.on_save_error)
        checks.check_grace(self.grace_seconds)
        checks.check_run_dir(self.run_dir)
        checks.checked_remote(self.remote, self.run_dir)
        checks.check_flags(strict=self.strict, donate=self.donate)
        checks.check_loggers(self.loggers)
        checks.check_resume(self.resume)
        checks.check_callbacks(self.callbacks)
        # A copy: what the caller changes later is not what the run began with.
        object.__setattr__(self, "settings", plain_settings({} if self.settings is None else self.settings))
        checks.check_free_settings(self.free_settings)


@dataclasses.dataclass(frozen=True)
class RunArguments(RunOptions):
    """What is run, and how."""

    step: StepFn
    state: Any
    train: Any

    def __post_init__(self) -> None:
        checks.check_step(self.step)
        super().__post_init__()


def takes(arguments: Callable[P, A]) -> Callable[[Callable[[A], R]], Callable[P, R]]:
    """Let a function of one dataclass be called with the fields of it; signature and types are those of the dataclass.

    Args:
        arguments: the dataclass.

    Raises:
        ConfigError: when it is called with a name that is none of the fields.

    Examples:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Size:
        ...     width: int
        ...     height: int = 1
        >>> @takes(Size)
        ... def area(size: Size) -> int:
        ...     return size.width * size.height
        >>> area(2, height=3), str(inspect.signature(area))
        (6, '(width: int, height: int = 1) -> int')
        >>> area(2, hight=3)
        Traceback (most recent call last):
        ...
        purestep.errors.ConfigError: area has no argument hight
          where:   hight=3
          why:     it takes width, height
          instead: height=3
    """

    def decorate(function: Callable[[A], R]) -> Callable[P, R]:
        hints = typing.get_type_hints(arguments)
        taken = inspect.signature(arguments).parameters
        result = typing.get_type_hints(function).get("return", inspect.Signature.empty)
        signature = inspect.Signature(
            [parameter.replace(annotation=hints[name]) for name, parameter in taken.items()], return_annotation=result
        )

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name, value in kwargs.items():
                if name not in taken:
                    raise _unknown(function.__name__, name, value, list(taken))
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            return function(arguments(*args, **kwargs))

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__annotations__ = {name: hints[name] for name in taken} | {"return": result}
        return call

    return decorate


def _unknown(function: str, name: str, value: object, taken: Sequence[str]) -> ConfigError:
    near = nearest_name(name, taken)
    shown = repr(value)
    shown = shown if len(shown) <= 100 else shown[:97] + "..."
    return ConfigError(
        explain(
            f"{function} has no argument {name}",
            where=f"{name}={shown}",
            why=f"it takes {', '.join(taken)}",
            instead=f"{near}={shown}" if near else None,
        )
    )
