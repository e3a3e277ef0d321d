"""The command `purestep`: what the rest of the package does, from a terminal.

`command.main` reads the command line and calls one file for each group of commands; each of them is imported when it is
asked for, so that help, completion and tables of runs need no torch.
"""
