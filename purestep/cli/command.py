"""`main`: the command line, read with argparse; each command is a function of another file of this room."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from purestep.cli.usage import Parser, UsageError, version
from purestep.errors import nearest_name

_DESCRIPTION = """\
Train, inspect runs, and execute them again to verify them. An experiment is a function from typed settings to a
ps.Experiment, in a Python file: FILE is that file, or FILE:NAME for one of several functions in it."""

_EPILOG = """\
  purestep run examples/digits.py --lr 1e-3 --until 5epochs
  purestep run FILE --help             the settings of an experiment
  purestep COMMAND --help              the arguments of a command

Exit codes: 0 done; 1 an error, or a difference that a command found; 2 a wrong command line; 130 and 143 for SIGINT and
SIGTERM: the run is saved, and the same command continues it."""

# Name: description, and the function `purestep.cli.<file>:<function>`.
COMMANDS = {
    "run": ("train an experiment; the same command again continues it", "run:run"),
    "sweep": ("train an experiment under every combination of settings, resumably", "sweep:sweep"),
    "runs": ("list the runs under a directory", "tables:runs"),
    "show": ("print the settings, the program and the results of a run", "tables:show_run"),
    "plot": ("draw the learning curves of a run", "tables:plot"),
    "snapshots": ("list the snapshots of a run", "tables:snapshots"),
    "compare": ("print the differences between the records of two runs", "records:compare"),
    "diff": ("compare the states of two runs bit by bit", "records:diff"),
    "bisect": ("find the first batch in which two runs differ, by executing them again", "records:bisect"),
    "replay": ("execute steps of a run again, with the same bits", "records:replay"),
    "fork": ("continue a run from one of its positions under other settings", "records:fork"),
    "verify": ("execute a run again and compare it with its snapshots", "records:verify"),
    "export": ("write a snapshot as one file for other programs", "tables:export"),
    "doctor": ("check this machine and its installation", "doctor:doctor"),
    "completion": ("print the completion script of a shell", "completion:completion"),
}
# Commands that also take settings of an experiment.
WITH_SETTINGS = ("run", "sweep", "fork")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code.

    Args:
        argv: arguments without the name of the program; by default those of this process.

    Examples:
        >>> main(["--version"])
        purestep 0.1.0
        0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in words if not word.startswith("-")), "")
    try:
        return _main(words, command)
    except UsageError as error:
        print(f"purestep{f' {command}' if command in COMMANDS else ''}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `purestep runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _main(words: list[str], command: str) -> int:
    if "--version" in words[:1]:
        print(f"purestep {version()}")
        return 0
    if words and words[0].startswith("-") and words[0] not in ("-h", "--help"):
        raise UsageError(f"there is no option {words[0]} before a command", "purestep COMMAND " + words[0])
    if command and command not in COMMANDS:
        near = nearest_name(command, COMMANDS)
        raise UsageError(f"there is no command {command!r}", f"purestep {near}" if near else "purestep --help")
    if not command or words[0] != command:
        parser().print_help()
        return 0
    file, function = COMMANDS[command][1].split(":")
    own = parser_of(command)
    pairs: list[tuple[str, str | None]] = []
    rest = words[1:]
    if command in WITH_SETTINGS:
        rest, pairs, wants_help = split(rest, own)
        if wants_help and not any(not word.startswith("-") for word in rest):
            own.print_help()
            return 0
    arguments = _parsed(own, rest)
    if arguments is None:
        return 0
    arguments.words = words
    called = getattr(importlib.import_module(f"purestep.cli.{file}"), function)
    if command in WITH_SETTINGS:
        return int(_reported(called, arguments, pairs, wants_help))
    return int(_reported(called, arguments))


def _parsed(own: Parser, words: list[str]) -> argparse.Namespace | None:
    """Return the parsed arguments; None if help was printed."""
    try:
        return own.parse_args(words)
    except SystemExit:  # argparse exits after help
        return None


def _reported(function: Any, *arguments: Any) -> int:
    """Call a command; print errors of purestep without a traceback."""
    from purestep.errors import PurestepError

    try:
        return int(function(*arguments))
    except PurestepError as error:
        print(f"purestep: {error}", file=sys.stderr)
        return 1
    except (UsageError, BrokenPipeError):
        raise
    except Exception as error:
        _print_from(str(getattr(arguments[0], "file", "")).partition(".py")[0] + ".py", error)
        return 1


def _print_from(file: str, error: Exception) -> None:
    """Print an error with its traceback, from the file of the experiment on where it is of that file."""
    path, frames = os.path.abspath(file), error.__traceback__
    while frames is not None and os.path.abspath(frames.tb_frame.f_code.co_filename) != path:
        frames = frames.tb_next
    if frames is not None or (isinstance(error, SyntaxError) and os.path.abspath(error.filename or "") == path):
        error = error.with_traceback(frames)
    traceback.print_exception(error)


def split(words: Sequence[str], own: Parser) -> tuple[list[str], list[tuple[str, str | None]], bool]:
    """Separate the arguments of a command from the settings of an experiment.

    Returns:
        The arguments of the command; (name, text) of each setting in order, with None for a flag without text; and
        whether help is requested.

    Examples:
        >>> split(["a.py", "--lr", "1e-3", "--json", "--jit"], parser_of("run"))
        (['a.py', '--json'], [('lr', '1e-3'), ('jit', None)], False)
    """
    options, mine, pairs = own.options(), [], []
    queue = list(words)
    wants_help = False
    while queue:
        word = queue.pop(0)
        name, equals, text = word.partition("=")
        value = text if equals else None
        if name in ("-h", "--help"):
            wants_help = True
        elif name in options or not word.startswith("--"):
            mine.append(word)
            if not equals and options.get(name) and queue and not queue[0].startswith("--"):
                mine.append(queue.pop(0))
        else:
            if not equals and queue and not queue[0].startswith("--"):
                value = queue.pop(0)
            pairs.append((name[2:].replace("-", "_"), value))
    return mine, pairs, wants_help


# --- arguments of each command ----------------------------------------------------------------------------------------


def parser() -> Parser:
    """Return the parser of the whole command: for help and for completion."""
    whole = Parser("purestep", description=_DESCRIPTION, epilog=_EPILOG)
    whole.add_argument("--version", action="store_true", help="print the version")
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    for name in COMMANDS:
        parser_of(name, commands.add_parser(name, help=COMMANDS[name][0]))
    return whole


def parser_of(command: str, own: Parser | None = None) -> Parser:
    """Return the parser of one command, or add its arguments to one."""
    own = own or Parser(f"purestep {command}", description=COMMANDS[command][0][0].upper() + COMMANDS[command][0][1:])
    _ARGUMENTS[command](own)
    return own


def _json(own: Parser) -> None:
    own.add_argument("--json", action="store_true", help="print JSON for a script")


def _file(own: Parser) -> None:
    own.add_argument("file", metavar="FILE", help="of the experiment: FILE.py, or FILE.py:NAME")


def _run(own: Parser, *names: str) -> None:
    for name in names or ("run",):
        own.add_argument(name, metavar=name.upper(), help="run directory")


def _of_run(own: Parser) -> None:
    own.add_argument(
        "--experiment", metavar="FILE", help="of the experiment, FILE.py or FILE.py:NAME; by default the recorded one"
    )


def _training(own: Parser) -> None:
    own.add_argument("--config", metavar="YAML", action="append", default=[], help="settings from a file, before flags")
    own.add_argument("--device", metavar="DEVICE", help="where to train: cpu, cuda, cuda:1, or auto, the default")
    own.add_argument("--portable", action="store_true", help="same bits on every x86-64 processor (docs/bits.md)")
    own.add_argument("--logger", metavar="NAME", action="append", help="csv, tensorboard, wandb(project='p'), ...")
    own.add_argument("--strict", action="store_true", help="refuse to resume under other settings instead of warning")
    _json(own)


def _arguments_of_run(own: Parser) -> None:
    _file(own)
    _training(own)
    own.add_argument("--run-dir", metavar="DIR", help="by default runs/FILE-HASH, a hash of the settings")
    own.add_argument("--remote", metavar="URL", help="copy the run directory there and begin by it: s3://..., ...")
    own.add_argument("--print-config", action="store_true", help="print the settings as YAML, and run nothing")
    own.add_argument("--dry-run", metavar="N", type=_count, help="train N batches, and write nothing")
    own.add_argument("--processes", metavar="N", type=_count, help="start N processes with torchrun")
    own.add_argument("--resume", metavar="HOW", default="auto", help="auto, must, never, or the number of a snapshot")
    own.epilog = "--until END ends the run elsewhere: 5epochs, 1000steps, 2h.\nIts settings: purestep run FILE --help"


def _arguments_of_sweep(own: Parser) -> None:
    _file(own)
    _training(own)
    own.add_argument("--run-dir", metavar="DIR", help="directory of the runs; by default runs/FILE-sweep")
    own.add_argument("--jobs", metavar="N", type=_count, default=1, help="runs at the same time")
    own.add_argument("--vmap", action="store_true", help="train runs that differ in tensors only in one step")
    own.add_argument("--metric", metavar="NAME", help="by which runs are compared, such as val/loss")
    own.add_argument("--mode", choices=("min", "max"), default="min", help="whether less or more of it is better")
    own.add_argument(
        "--halving", metavar="N", type=_count, help="go on with the best one in N after a part of the length"
    )
    own.epilog = "Settings take several values: --lr 1e-4,1e-3 --seed 0..7. The same command continues the sweep."


def _arguments_of_runs(own: Parser) -> None:
    own.add_argument("root", metavar="DIR", nargs="?", default="runs", help="by default runs")
    own.add_argument("--sort", metavar="COLUMN", help="when, updates, a metric or a setting")
    own.add_argument("--reverse", action="store_true", help="largest first")
    own.add_argument("--filter", metavar="NAME=VALUE", action="append", default=[], help="only runs with this value")
    _json(own)


def _arguments_of_plot(own: Parser) -> None:
    own.add_argument("run", metavar="RUN", help="run directory")
    own.add_argument("out", metavar="PNG", nargs="?", help="by default learning_curves.png in the run directory")
    own.add_argument("--metric", metavar="NAME", action="append", help="by default all")


def _arguments_of_export(own: Parser) -> None:
    own.add_argument("run", metavar="RUN", help="run directory")
    own.add_argument("out", metavar="OUT", help="a path that ends with .safetensors, .pt or .pth")
    own.add_argument("--best", metavar="METRIC", help="the snapshot with the best value of this metric")
    own.add_argument("--mode", choices=("min", "max"), default="min", help="whether lower or higher values are best")
    own.add_argument("--at", metavar="N", type=_whole, help="the snapshot at a position; by default the newest")
    own.add_argument("--only", choices=("params", "model", "all"), default="params", help="by default params")


def _arguments_of_compare(own: Parser) -> None:
    _run(own, "a", "b")
    _json(own)


def _arguments_of_diff(own: Parser) -> None:
    _run(own, "a", "b")
    _of_run(own)
    own.add_argument("--at", metavar="N", type=_whole, help="position of both; by default the newest of each")
    _json(own)


def _arguments_of_bisect(own: Parser) -> None:
    _run(own, "a", "b")
    _of_run(own)
    own.add_argument("--operation", action="store_true", help="name the first operation of torch that differs, too")


def _arguments_of_replay(own: Parser) -> None:
    _run(own)
    _of_run(own)
    own.add_argument("--at", metavar="N", type=_count, required=True, help="the position after the step")
    own.add_argument("--from", metavar="N", type=_whole, dest="first", help="show every step from there on")
    _json(own)


def _arguments_of_fork(own: Parser) -> None:
    _run(own)
    _of_run(own)
    own.add_argument("--at", metavar="N", type=_count, required=True, help="the position to go on from")
    own.add_argument("--run-dir", metavar="DIR", help="of the new run; by default RUN-at-N-HASH")
    own.add_argument("--prepare", action="store_true", help="make the directory, and train nothing")
    _training(own)


def _arguments_of_verify(own: Parser) -> None:
    _run(own)
    _of_run(own)
    own.add_argument("--every", metavar="N", type=_count, default=1, help="only every N-th span between snapshots")
    _json(own)


def _arguments_of_completion(own: Parser) -> None:
    own.add_argument("shell", metavar="SHELL", choices=("bash", "zsh", "tcsh"), help="bash, zsh or tcsh")


def _one_run(own: Parser) -> None:
    _run(own)
    _json(own)


_ARGUMENTS = {
    "run": _arguments_of_run,
    "sweep": _arguments_of_sweep,
    "runs": _arguments_of_runs,
    "show": _one_run,
    "plot": _arguments_of_plot,
    "snapshots": _one_run,
    "compare": _arguments_of_compare,
    "diff": _arguments_of_diff,
    "bisect": _arguments_of_bisect,
    "replay": _arguments_of_replay,
    "fork": _arguments_of_fork,
    "verify": _arguments_of_verify,
    "export": _arguments_of_export,
    "doctor": _json,
    "completion": _arguments_of_completion,
}


def _count(text: str) -> int:
    return _at_least(text, 1)


def _whole(text: str) -> int:
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, not {text!r}")
    return int(text)
