"""Images, histograms and texts as files of a run directory: `media/<name>/<step>.png`, `.npz`, `.txt`.

Owns their names and their repair at a resume: a file is named by its step, so what is logged again replaces itself.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote, unquote

from purestep._cells import located
from purestep.arguments import Location, checked
from purestep.errors import ConfigError
from purestep.loggers.base import Media, remove_partials, write_atomically

FOLDER = "media"
_FILE = re.compile(r"(\d+)\.(png|npz|txt)")


class MediaFiles:
    """The files below `run_dir/media`, for one writer.

    Args:
        run_dir: of the run.
        resume_step: as a logger opens: None removes all files that an earlier run left, a number those beyond it.
    """

    def __init__(self, run_dir: Path, *, resume_step: int | None) -> None:
        self._folder = run_dir / FOLDER
        for files in read_media(run_dir).values():
            for step, path in files.items():
                if resume_step is None or step > resume_step:
                    path.unlink()

    def write(self, step: int, name: str, value: Media) -> None:
        """Write a value, durably."""
        folder = self._folder / _folder_of(name)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{step:09d}{value.suffix}"
        remove_partials(path)
        write_atomically(path, value.content())


def _folder_of(name: str) -> str:
    """Return the directory of a name: any name is one, and no name leads elsewhere."""
    quoted = quote(name, safe=" ()[]=,+@")
    return "%2E" + quoted[1:] if quoted.startswith(".") else quoted


@checked(ConfigError)
def read_media(run_dir: Location) -> dict[str, dict[int, Path]]:
    """Find the images, histograms and texts that `csv()` wrote into a run directory.

    Args:
        run_dir: the run directory.

    Returns:
        For each name the files by step, ascending: PNG, npz with `counts`, `edges` and `not_finite`, or text.

    Examples:
        >>> import tempfile
        >>> from purestep.loggers import Text, csv
        >>> run_dir = Path(tempfile.mkdtemp())
        >>> sink = csv().open(run_dir)
        >>> sink.log(3, {"sample/0": Text("to be")})
        >>> sink.close()
        >>> files = read_media(run_dir)["sample/0"]
        >>> list(files), files[3].name, files[3].read_text()
        ([3], '000000003.txt', 'to be')
    """
    found: dict[str, dict[int, Path]] = {}
    folder = located(run_dir) / FOLDER
    for inner in sorted(path for path in folder.glob("*") if path.is_dir()):
        files = {int(match[1]): path for path in sorted(inner.iterdir()) if (match := _FILE.fullmatch(path.name))}
        if files:
            found[unquote(inner.name)] = dict(sorted(files.items()))
    return found
