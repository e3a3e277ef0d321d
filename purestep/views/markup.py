"""The HTML of blocks: one style sheet, escaped text, tables and folded trees.

Text and background keep the colours of the page, so a view is light on a light page and dark on a dark one. Only curves
have colours of their own, a set for each theme. The browser's preference selects the set, or the theme of the notebook,
which may differ.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from purestep.views import plain

# From the palettes of Okabe and Ito and of Tol, darker or lighter so that a thin line can be seen: each has a contrast
# of 3 to 1 at least with the white, or the near black, behind it. They differ for colour-blind readers too.
LIGHT = ("#0072b2", "#d55e00", "#00855f", "#b0447f", "#9a6700", "#4a6fd8", "#5d5d5d")
DARK = ("#56b4e9", "#ff9248", "#2fc596", "#e78fc0", "#e6b84a", "#9db8ff", "#c4c4c4")

_ON_LIGHT = (
    '[data-jp-theme-light="true"]',
    '[data-vscode-theme-kind="vscode-light"]',
    '[data-md-color-scheme="default"]',
)
_ON_DARK = ('[data-jp-theme-light="false"]', '[data-vscode-theme-kind="vscode-dark"]', '[data-md-color-scheme="slate"]')


def _variables(colours: Sequence[str]) -> str:
    return "{" + "".join(f"--ps{number}:{colour};" for number, colour in enumerate(colours)) + "}"


def _under(themes: Sequence[str]) -> str:
    return ",".join(f"{theme} .purestep" for theme in themes)


STYLE = (
    ".purestep{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:12px;line-height:1.5;"
    "overflow-x:auto}"
    # The class is doubled so that these rules take precedence over the notebook's own rules for tables.
    ".purestep.purestep table{border-collapse:collapse;border:0;margin:.3em 0;font-size:inherit;table-layout:auto}"
    ".purestep.purestep table caption{text-align:left;font-weight:bold;white-space:nowrap;padding:.2em 0;color:inherit}"
    ".purestep.purestep table th,.purestep.purestep table td{text-align:left;vertical-align:top;"
    "padding:.1em 1.2em .1em 0;border:0;max-width:60em;white-space:nowrap;line-height:1.5}"
    ".purestep.purestep table td.wrap{white-space:normal;overflow-wrap:anywhere}"
    ".purestep.purestep table th{font-weight:bold;border-bottom:1px solid}"
    ".purestep.purestep table tfoot td{border-top:1px solid;font-weight:bold}"
    ".purestep.purestep table .number{text-align:right;font-variant-numeric:tabular-nums}"
    ".purestep .faint{opacity:.65}"
    ".purestep .leaf,.purestep details details{margin-left:1.2em}"
    ".purestep summary{cursor:pointer}"
    ".purestep p{margin:.3em 0}"
    ".purestep .panels{display:flex;flex-wrap:wrap;gap:.6em 1.4em;margin:.5em 0}"
    ".purestep figure{margin:0;max-width:100%}"
    ".purestep figcaption{font-weight:bold}"
    ".purestep .key{display:inline-block;margin-right:1.2em;white-space:nowrap}"
    ".purestep svg{max-width:100%;height:auto;vertical-align:middle}"
    f".purestep{_variables(LIGHT)}"
    f"@media (prefers-color-scheme:dark){{.purestep{_variables(DARK)}}}"
    f"{_under(_ON_LIGHT)}{_variables(LIGHT)}"
    f"{_under(_ON_DARK)}{_variables(DARK)}"
)


def page(body: str) -> str:
    """Return a view: the style sheet and the body."""
    return f'<div class="purestep"><style>{STYLE}</style>{body}</div>'


def escaped(text: str) -> str:
    """Return a text escaped for HTML, between tags or in an attribute.

    Examples:
        >>> escaped("<script> & 'quotes\\"")
        '&lt;script&gt; &amp; &#x27;quotes&quot;'
    """
    return html.escape(text)


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    title: str = "",
    widest: int = plain.WIDEST,
    foot: Sequence[object] = (),
    right: Sequence[int] = (),
) -> str:
    """Return a table.

    Examples:
        >>> table(["<b>"], [["a & b"]])
        '<table><thead><tr><th>&lt;b&gt;</th></tr></thead><tbody><tr><td>a &amp; b</td></tr></tbody></table>'
    """
    body = [*rows, foot] if foot else rows
    numbers = [column in right or plain.to_the_right(body, column) for column in range(len(head))]
    wraps = widest > plain.WIDEST  # long texts may wrap, names in the first column do not
    kinds = [' class="number"' if n else ' class="wrap"' if wraps and i else "" for i, n in enumerate(numbers)]

    def line(row: Sequence[object]) -> str:
        cells = zip(row, kinds, strict=True)
        return f"<tr>{''.join(f'<td{kind}>{escaped(plain.cell(value, widest))}</td>' for value, kind in cells)}</tr>"

    heads = zip(head, kinds, strict=True)
    top = "".join(f"<th{kind}>{escaped(name)}</th>" for name, kind in heads)
    return (
        "<table>"
        + (f"<caption>{escaped(title)}</caption>" if title else "")
        + (f"<thead><tr>{top}</tr></thead>" if any(head) else "")
        + f"<tbody>{''.join(map(line, rows))}</tbody>"
        + (f"<tfoot>{line(foot)}</tfoot>" if foot else "")
        + "</table>"
    )


def leaf_line(label: str, text: str = "", note: str = "", *, title: str = "") -> str:
    """Return a leaf of a tree: label, text and note."""
    attribute = f' title="{escaped(title)}"' if title else ""
    words = [f"<b>{escaped(label)}</b>"] if label else []
    words += [escaped(text)] if text else []
    words += [f'<span class="faint">{escaped(note)}</span>'] if note else []
    return f'<div class="leaf"{attribute}>{" ".join(words)}</div>'


def unfolding(label: str, note: str, body: str, *, title: str = "", unfolded: bool = True) -> str:
    """Return a node of a tree, or a whole view, as an element that folds."""
    attribute = f' title="{escaped(title)}"' if title else ""
    faint = f' <span class="faint">{escaped(note)}</span>' if note else ""
    head = f"<summary{attribute}><b>{escaped(label)}</b>{faint}</summary>"
    state = ' open=""' if unfolded else ""  # with a value, as XML needs it
    return f"<details{state}>{head}{body}</details>"
