"""`purestep completion`: a script for a shell to complete commands and options."""

from __future__ import annotations

import argparse

from purestep.errors import import_extra


def completion(arguments: argparse.Namespace) -> int:
    """Print the completion script of a shell."""
    shtab = import_extra("shtab", extra="completion", needed_by="purestep completion")
    from purestep.cli.command import parser

    print(shtab.complete(parser(), shell=arguments.shell))
    return 0
