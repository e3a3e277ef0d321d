"""`Experiment`: what `fit` is called with, as one value, so that a run can be executed again; `experiment` makes it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ParamSpec

from purestep import trainer
from purestep.arguments import Judge, checked
from purestep.callbacks import log
from purestep.errors import ConfigError, explain
from purestep.loop import checks
from purestep.loop.cadence import Until
from purestep.loop.events import Callback
from purestep.loop.options import RunArguments
from purestep.loop.origin import plain_settings
from purestep.loop.result import Result
from purestep.loop.run import Run
from purestep.record.kinds import settings_of
from purestep.record.settings import arguments_of, free_names, plain_of
from purestep.step_protocol import StepFn
from purestep.views import Block, Printed, Table, shortened, written

P = ParamSpec("P")


@checked(ConfigError)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Experiment(Printed):
    """A training: what it computes with, without where and for how long it runs.

    Args:
        step: pure function `(state, batch) -> (state, metrics)`.
        state: the first state.
        data: what `fit` takes as `train`.
        until: where a run of it ends; `fit` may say otherwise.
        callbacks: features of the run.
        settings: hyperparameters, JSON by name; `ps.experiment` fills them in.
        free_settings: names of those that a resume may change without a word; `ps.experiment` adds where a run ends and
            the plan it runs under.

    Raises:
        ConfigError: one of them is not what it is called.

    Examples:
        >>> import torch
        >>> import purestep as ps
        >>> tx = ps.optim.sgd(0.1)
        >>> step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
        >>> data = ps.data.batches({"x": torch.ones(8, 2)}, 4)
        >>> Experiment(step, ps.init(lambda: torch.nn.Linear(2, 1), tx), data, until=ps.steps(3)).fit().reason
        'reached 3 steps'
    """

    step: StepFn
    state: Any
    data: Any
    _: dataclasses.KW_ONLY
    until: Until | None = None
    callbacks: Sequence[Callback] = ()
    settings: Mapping[str, Any] | None = None
    free_settings: Sequence[str] = ()

    def __post_init__(self) -> None:
        checks.check_step(self.step)
        checks.check_callbacks(self.callbacks)
        if self.until is not None:
            checks.check_until(self.until)
        # A copy: what the caller changes later is not what it was made with.
        object.__setattr__(self, "settings", plain_settings({} if self.settings is None else self.settings))
        checks.check_free_settings(self.free_settings)

    @classmethod
    def of(cls, makes: Callable[..., Experiment], settings: Mapping[str, Any]) -> Experiment:
        """Make the experiment of settings that are given by name: a YAML file's, an OmegaConf, a sweep's.

        Args:
            makes: function that makes an experiment; its arguments are the settings.
            settings: as a run records them, see `ps.experiment`; mappings and sequences of any kind, nested.

        Raises:
            ConfigError: they are not the arguments of the function.

        Examples:
            >>> import torch
            >>> import purestep as ps
            >>> def linear(tx: ps.optim.GradientTransformation, until: ps.Until = ps.steps(9)) -> ps.Experiment:
            ...     step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
            ...     state = ps.init(lambda: torch.nn.Linear(2, 1), tx)
            ...     return ps.Experiment(step, state, ps.data.batches({"x": torch.ones(8, 2)}, 4), until=until)
            >>> ps.Experiment.of(linear, {"tx": {"name": "sgd", "learning_rate": 0.1}, "until": "3 steps"}).fit().reason
            'reached 3 steps'
        """
        plain = {str(name): _json(value) for name, value in settings.items()}
        made_ = experiment(makes)(**arguments_of(makes, plain))
        # The call that was asked for: what it made may print as what it consists of.
        named = {setting.name for setting in settings_of(makes) if setting.kind.makers}
        asked = {name: value for name, value in plain.items() if name in named and isinstance(value, dict)}
        return dataclasses.replace(made_, settings={**(made_.settings or {}), **asked})

    def fit(self, **options: Any) -> Result:
        """Run it: `ps.fit` with these arguments; `options` are others of `fit`, such as `run_dir` and `until`.

        Raises:
            ConfigError: nothing says when it ends.
        """
        return trainer.fit(self.step, self.state, self.data, **self._options(options))

    def run(self, **options: Any) -> Run:
        """Start it and return it as an iterator of events: `ps.run` with these arguments and `options`.

        Raises:
            ConfigError: nothing says when it ends.
        """
        return trainer.run(self.step, self.state, self.data, **self._options(options))

    def _options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"until": self.until, "callbacks": self.callbacks, **self._told, **options}

    def view(self) -> list[Block]:
        callbacks = ", ".join(callback.name for callback in self.callbacks) or "none"
        named = {f"setting {name}": written(value) for name, value in (self.settings or {}).items()}
        rows: list[list[object]] = [[name, value] for name, value in named.items()]
        rows += [
            ["step", shortened(repr(self.step), 100)],
            ["data", shortened(repr(self.data), 100)],
            ["until", "said by fit" if self.until is None else str(self.until)],
            ["callbacks", callbacks],
        ]
        return [Table(["experiment", ""], rows)]

    @property
    def _told(self) -> dict[str, Any]:
        return {"settings": self.settings, "free_settings": self.free_settings}

    def arguments(self, until: Until, *, strict: bool = False) -> RunArguments:
        """Return what a run of it takes that is executed again, in memory."""
        callbacks = tuple(self.callbacks)
        if "log" not in {callback.name for callback in callbacks}:
            callbacks = (*callbacks, log())  # `fit` adds it, and others may watch its rows
        options: dict[str, Any] = {"until": until, "callbacks": callbacks, **self._told, "strict": strict}
        return RunArguments(self.step, self.state, self.data, **options)


Makes = Annotated[
    Experiment | Callable[..., Experiment],
    Judge(
        "an experiment, or a function that makes one", lambda value: isinstance(value, Experiment) or callable(value)
    ),
]


@checked(ConfigError)
def experiment(function: Callable[P, Experiment]) -> Callable[P, Experiment]:
    """Let the arguments of a function that makes an `Experiment` be the settings of it.

    So a run knows with which arguments it was made, and `replay`, `fork`, `verify` and `bisect` make the experiment of
    a run again: they call the function with the settings of the run.

    Args:
        function: its arguments are JSON (numbers, strings, lists), or what their annotations say that text stands for:
            an `Until`, a policy, an optimizer, a schedule or a plan of ps, a dtype, a path, an enum, a dataclass of
            these. The fields of one dataclass that is the only argument are the settings.

    Raises:
        ConfigError: an argument is something else; when the function is called.

    Examples:
        >>> import torch
        >>> import purestep as ps
        >>> @ps.experiment
        ... def linear(lr=0.1, *, batch_size=4):
        ...     tx = ps.optim.sgd(lr)
        ...     step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
        ...     state = ps.init(lambda: torch.nn.Linear(2, 1), tx)
        ...     return ps.Experiment(step, state, ps.data.batches({"x": torch.ones(8, 2)}, batch_size))
        >>> linear(0.2).settings
        {'lr': 0.2, 'batch_size': 4}
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        what = "experiment: function must be a function with arguments that it names"
        raise ConfigError(explain(what, where=f"function={function!r}", why=str(error))) from error

    @functools.wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> Experiment:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        settings = plain_settings(plain_of(function, bound.arguments))
        made_ = _checked_experiment(function(*args, **kwargs), function)
        free = (*made_.free_settings, *free_names(function))
        return dataclasses.replace(made_, settings={**settings, **(made_.settings or {})}, free_settings=free)

    return make


def made(makes: object, settings: Mapping[str, Any]) -> Experiment:
    """Return an experiment; a function is called with the settings of the run that it made.

    Raises:
        ConfigError: it is neither, or the settings are not its arguments.
    """
    if isinstance(makes, Experiment):
        return makes
    if not callable(makes):
        what = "an experiment is a ps.Experiment, or a function that makes one from the settings of the run"
        raise ConfigError(explain(what, where=f"experiment={makes!r}", instead="ps.Experiment(step, state, data)"))
    try:
        arguments = arguments_of(makes, _taken(makes, settings))
        inspect.signature(makes).bind(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            explain(
                "the settings of the run are not the arguments of the function that is to make its experiment",
                where=f"settings: {dict(settings)}",
                why=str(error),
                instead="@ps.experiment before the function, whose arguments are the settings then;\n"
                "or pass what it returns: experiment=make(lr=0.1)",
            )
        ) from error
    return _checked_experiment(makes(**arguments), makes)


def _taken(makes: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the settings of a run that the function takes; an experiment may have added others."""
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(makes).parameters.values()):
        return dict(settings)
    names = {setting.name for setting in settings_of(makes)}
    return {name: value for name, value in settings.items() if name in names}


def _json(value: Any) -> Any:
    """Return mappings and sequences of other libraries as dicts and lists."""
    if isinstance(value, Mapping):
        return {str(name): _json(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_json(item) for item in value]
    return value


def _checked_experiment(found: object, function: object) -> Experiment:
    if isinstance(found, Experiment):
        return found
    name = getattr(function, "__name__", repr(function))
    raise ConfigError(
        explain(
            f"{name} makes no experiment",
            where=f"it returned a {type(found).__name__}",
            instead="return ps.Experiment(step, state, data)",
        )
    )
