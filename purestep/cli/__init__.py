"""The command `purestep`: runs, records and exports from a terminal.

`command.main` parses the command line and imports only the file of the given command, so that help, completion and
tables of runs need no torch.
"""
