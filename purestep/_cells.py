"""The notebook around this process: whether there is one, its cells and its folder; and where purestep was called from.

This module uses IPython only if it is loaded already, so outside of a notebook it costs a look into `sys.modules`.
Nothing here changes IPython or its kernel.
"""

from __future__ import annotations

import dataclasses
import linecache
import os
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any


def folder_of(file: str) -> str:
    """Return the folder of a file with a separator behind it: paths in `torchvision` do not begin with that of torch.

    Examples:
        >>> "/lib/torchvision/ops.py".startswith(folder_of("/lib/torch/__init__.py"))
        False
    """
    return os.path.join(os.path.dirname(os.path.abspath(file)), "")


PACKAGE = folder_of(__file__)
_LONGEST = 1 << 20  # most characters of a session's source, the last ones
_ENTRIES = ("fit",)  # public functions that errors name instead of the step that they call


# --- the shell --------------------------------------------------------------------------------------------------------


def shell() -> Any:
    """Return the IPython shell of this process, in a terminal or in a kernel; None where there is none."""
    ipython = sys.modules.get("IPython")
    # While IPython itself is imported, the module has no `get_ipython` yet.
    return None if ipython is None or not hasattr(ipython, "get_ipython") else ipython.get_ipython()


def in_kernel() -> bool:
    """Tell whether this process is a Jupyter kernel: its cells can show HTML, and replace their output.

    Examples:
        >>> in_kernel()
        False
    """
    zmq = sys.modules.get("ipykernel.zmqshell")
    return zmq is not None and isinstance(shell(), zmq.ZMQInteractiveShell)


# --- where purestep was called from -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
    """The line that called purestep. Every donation makes one, so names are looked up later, by `str`.

    Attributes:
        code: the code object of the calling function, or of the top level of a file or cell.
        line: line number in the file or cell.
        entry: "fit" if the caller called `fit`; else "".
        cell: the running cell, such as "In[7]"; "" outside of cells.
    """

    code: CodeType
    line: int
    entry: str = ""
    cell: str = ""

    def told(self) -> str:
        """Return the place as the end of a sentence: "by fit in train.py:12"."""
        return f"{f'by {self.entry} ' if self.entry else ''}in {self}"

    def __str__(self) -> str:
        """Name the cell and the line, or the file and the line."""
        if not self.cell:
            return f"{self.code.co_filename}:{self.line}"
        if cell_name(self.code.co_filename) == self.cell:
            return f"cell {self.cell}, line {self.line}"
        home = cell_name(self.code.co_filename)
        inner = f"line {self.line} of {home}" if home else f"{self.code.co_filename}:{self.line}"
        return f"cell {self.cell} ({inner})"


def caller() -> FrameType | None:
    """Return the nearest frame outside of this package; None in a thread that purestep started.

    Code compiled by a cell magic (`%%time`) has no source file, so the frame of the cell is returned.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is not None and shell() is not None and not source(frame):
        return _running(frame) or frame
    return frame


def place() -> Place | None:
    """Return the line that called purestep; None in a thread that purestep started."""
    frame: FrameType | None = sys._getframe(1)
    entry = ""
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        if frame.f_code.co_name in _ENTRIES:
            entry = frame.f_code.co_name
        frame = frame.f_back
    if frame is None:
        return None
    running = _running(frame)
    return Place(frame.f_code, frame.f_lineno, entry, "" if running is None else cell_name(running.f_code.co_filename))


def _running(frame: FrameType | None) -> FrameType | None:
    """Return the frame of the running cell: this frame or one of its callers; None outside of cells."""
    if shell() is None:
        return None
    while frame is not None and not (frame.f_code.co_name == "<module>" and cell_name(frame.f_code.co_filename)):
        frame = frame.f_back
    return frame


def cell_name(file: str) -> str:
    """Return the name of the cell that was compiled under a file name; "" if no cell was."""
    found = shell()
    named = None if found is None else found.compile.format_code_name(file)
    return named[1] if named else ""


def source(frame: FrameType) -> str:
    """Return the text of the file or cell that a frame runs; "" if unknown."""
    return "".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals))


def session() -> str:
    """Return the text of all cells that ran in this session so far; "" outside of IPython.

    Earlier cells are included because they define the functions that a cell calls. A very long session is cut to its
    end.
    """
    found = shell()
    if found is None or found.history_manager is None:
        return ""
    cells = found.history_manager.input_hist_raw  # the text as it was typed; number 0 is empty
    text = "\n".join(f"# In[{number}]\n{cell}\n" for number, cell in enumerate(cells) if number and cell.strip())
    return text[-_LONGEST:]


# --- the folder -------------------------------------------------------------------------------------------------------


def notebook() -> Path | None:
    """Return the file of the notebook if its front end names it; None outside of a notebook.

    VS Code puts the name into a variable of the notebook, Jupyter's server into the environment of the kernel. A kernel
    started by another kernel (by nbclient in a cell, say) inherits that environment. The name counts only if the kernel
    was started in the folder of the notebook, as the server does.
    """
    if not in_kernel():
        return None
    found = shell()
    named = found.user_ns.get("__vsc_ipynb_file__")
    if isinstance(named, str) and os.path.isfile(named):
        return Path(named).absolute()
    named = os.environ.get("JPY_SESSION_NAME", "")
    if named and os.path.isfile(named) and os.path.samefile(os.path.dirname(named) or ".", found.starting_dir):
        return Path(named).absolute()
    return None


def located(path: str | Path) -> Path:
    """Return an absolute path. A relative path is relative to the folder of the notebook, if that is known.

    So a run keeps its folder when a cell changes the working directory, and the next session finds it. In a script, and
    where the front end does not name the notebook, the path is relative to the working directory.

    Examples:
        >>> located("runs/digits") == Path.cwd() / "runs" / "digits"
        True
    """
    path = Path(path)
    if not path.is_absolute() and (file := notebook()) is not None:
        return file.parent / path
    return path.absolute()


def shown(path: Path) -> str:
    """Return a path for the stored output of a notebook: relative to the notebook's folder if it lies inside."""
    home = notebook()
    folder = Path.cwd() if home is None else home.parent
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
