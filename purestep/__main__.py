"""`python -m purestep`: the command `purestep`."""

from purestep.cli.command import main

if __name__ == "__main__":  # the workers of data import it, too
    raise SystemExit(main())
