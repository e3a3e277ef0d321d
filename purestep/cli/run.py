"""`purestep run`: an experiment from its file and settings, trained in this process or in several."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from purestep.cli import processes, show
from purestep.cli.flags import Pairs, Settings
from purestep.cli.load import Loaded, load
from purestep.cli.usage import UsageError, of_explained
from purestep.errors import PurestepError
from purestep.record.experiment import Experiment
from purestep.record.kinds import SettingError, kind_of

_OWN = ("device",)  # options that are passed as a setting if the experiment has one of that name


def run(arguments: argparse.Namespace, pairs: Pairs, wants_help: bool) -> int:
    """Train an experiment."""
    if arguments.processes and not (wants_help or arguments.print_config):
        return processes.launch(arguments.processes, arguments.words)
    prepare(arguments)
    loaded = load(arguments.file)
    settings, rest = settings_of(loaded, arguments, pairs)
    if wants_help:
        return help_of("run", loaded, settings)
    if arguments.print_config:
        settings.check()
        print(settings.as_yaml(), end="")
        return 0
    until = until_of(rest)
    settings.check()
    experiment = adapted(loaded.make(settings.plain), arguments, until)
    if arguments.dry_run:
        return _dry_run(experiment, arguments)
    run_dir = Path(arguments.run_dir or default_directory(loaded, settings.plain, arguments))
    resume = int(arguments.resume) if arguments.resume.isdecimal() else arguments.resume
    if resume not in ("auto", "must", "never") and not isinstance(resume, int):
        raise UsageError(f"--resume must be auto, must, never or a position, not {resume!r}")
    return trained(loaded, experiment, run_dir, arguments, resume=resume, remote=arguments.remote)


def prepare(arguments: argparse.Namespace) -> None:
    """Set up the process before any tensor is made: its default device, and bits."""
    if arguments.device is not None:
        from purestep import devices

        os.environ[devices.VARIABLE] = str(_device(arguments.device))
    if arguments.portable:
        from purestep import bits

        bits.portable()


def settings_of(loaded: Loaded, arguments: argparse.Namespace, pairs: Pairs) -> tuple[Settings, dict[str, str | None]]:
    """Return the settings of files and flags, and the flags of the run's end, which are no settings."""
    settings = Settings(loaded.function)
    for name in _OWN:
        value = getattr(arguments, name)
        if value is not None and name in settings:
            pairs = [*pairs, (name, value)]
            setattr(arguments, name, None)
    return settings, read_into(settings, arguments, pairs)


def read_into(settings: Settings, arguments: argparse.Namespace, pairs: Pairs) -> dict[str, str | None]:
    """Read the files and flags of a command into settings; return the flags of the run's end, which are no settings."""
    rest = {name: text for name, text in pairs if name == "until" and name not in settings}
    for path in arguments.config:
        settings.read_config(path)
    settings.read_flags([(name, text) for name, text in pairs if name not in rest])
    return rest


def until_of(rest: Mapping[str, str | None]) -> Any:
    if "until" not in rest:
        return None
    from purestep.loop.until_text import until

    try:
        return until(rest["until"] or "")
    except PurestepError as error:
        problem = f"--until must be the end of a run, such as 5epochs, 1000steps or 2h, not {rest['until']!r}"
        raise UsageError(problem) from error


def adapted(experiment: Experiment, arguments: argparse.Namespace, until: Any = None) -> Experiment:
    """Return an experiment changed by the options of the command."""
    if until is not None:
        experiment = dataclasses.replace(experiment, until=until)
    if experiment.until is None:
        raise UsageError("nothing says when the run ends", "--until 5epochs")
    if arguments.device is not None:
        experiment = dataclasses.replace(experiment, state=_moved(experiment.state, arguments.device))
    return experiment


def _moved(state: Any, device: str) -> Any:
    """Return the state on the device of the flag, which counts more than what the experiment has chosen."""
    from purestep import devices

    target = _device(device)
    try:
        return devices.move(state, target)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {str(error).partition(chr(10))[0]}", "--device cpu") from error


def _device(text: str) -> Any:
    from purestep.devices import default_device

    try:
        return default_device(text)
    except PurestepError as error:
        raise UsageError(f"--device {text}: no device that torch knows", "--device cpu") from error


def loggers_of(arguments: argparse.Namespace) -> list[Any] | None:
    """Return the loggers of `--logger`, each a name or a call; None without any."""
    if arguments.logger is None:
        return None
    from purestep import loggers
    from purestep.record.settings import call_of, decode

    makers = {name: getattr(loggers, name) for name in ("csv", "tensorboard", "wandb", "mlflow")}
    kind = dataclasses.replace(kind_of(object), makers=makers)
    try:
        return [decode(call_of(text, kind, "logger"), kind, "logger") for text in arguments.logger]
    except SettingError as error:
        raise UsageError(f"--{error.path} {error.problem}", f"--{error.nearest}" if error.nearest else "") from error
    except PurestepError as error:
        raise of_explained(error) from error


def default_directory(loaded: Loaded, plain: Mapping[str, Any], arguments: argparse.Namespace) -> str:
    """Return a directory named by the settings, so that the same command continues the run."""
    told = {name: value for name, value in plain.items() if name != "until"}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return f"runs/{loaded.stem}-{digest[:6]}"


def trained(
    loaded: Loaded, experiment: Experiment, run_dir: Path, arguments: argparse.Namespace, **options: Any
) -> int:
    """Train in a run directory, print the result, and return the exit code."""
    show.say(f"{run_dir}: until {experiment.until}")
    result = loaded.fit(experiment, run_dir=run_dir, loggers=loggers_of(arguments), strict=arguments.strict, **options)
    report(result, arguments)
    return int(result.exit_code)


def report(result: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Print how a run ended; in a job of several processes only rank 0 prints."""
    from purestep import tree
    from purestep.distributed.mesh import this_rank

    digest = tree.digest(result.state)  # every process takes part
    told = {
        "reason": result.reason,
        "epochs": result.loop.cursor.epoch,
        "batches": result.loop.cursor.batches,
        "metrics": dict(result.metrics),
        "digest": digest,
        "seconds": result.loop.elapsed,
        "run_dir": None if result.run_dir is None else str(result.run_dir),
    }
    if this_rank() == 0:
        if arguments.json:
            show.as_json(told)
        else:
            again = " (the same command continues it)" if result.interrupted else ""
            show.facts(
                {
                    "why it ended": f"{result.reason}{again}",
                    "epochs, batches": f"{told['epochs']}, {told['batches']}",
                    **dict(result.metrics),
                    "digest": digest,
                    "time in training": f"{result.loop.elapsed:.1f} s",
                    "run directory": told["run_dir"],
                }
            )
    return told


def _dry_run(experiment: Experiment, arguments: argparse.Namespace) -> int:
    result = experiment.fit(dry_run=arguments.dry_run)
    report(result, arguments)
    return int(result.exit_code)


def help_of(command: str, loaded: Loaded, settings: Settings) -> int:
    """Print the arguments of a command, and the settings of an experiment."""
    from purestep.cli.command import parser_of

    print(parser_of(command).format_help())
    print(f"settings of {os.path.relpath(loaded.path)}:{loaded.name}, with their types and values:")
    print(settings.help(f"purestep {command}"), end="")
    return 0
