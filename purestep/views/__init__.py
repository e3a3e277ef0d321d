"""Displays of values: blocks of text, tables, trees and curves, each as HTML and as plain text.

Owns the markup and its style sheet: no script, all text escaped, in the light or dark theme of the page. Nothing here
depends on training: other rooms describe their values in blocks.
"""

from __future__ import annotations

from purestep.views.blocks import Block as Block
from purestep.views.blocks import Curves as Curves
from purestep.views.blocks import Facts as Facts
from purestep.views.blocks import Note as Note
from purestep.views.blocks import Printed as Printed
from purestep.views.blocks import Table as Table
from purestep.views.blocks import Tree as Tree
from purestep.views.blocks import View as View
from purestep.views.chart import Line as Line
from purestep.views.chart import Mark as Mark
from purestep.views.chart import Panel as Panel
from purestep.views.markup import DARK as DARK
from purestep.views.markup import LIGHT as LIGHT
from purestep.views.markup import escaped as escaped
from purestep.views.markup import leaf_line as leaf_line
from purestep.views.markup import page as page
from purestep.views.markup import unfolding as unfolding
from purestep.views.plain import cell as cell
from purestep.views.plain import shortened as shortened
from purestep.views.plain import sparkline as sparkline
from purestep.views.plain import table as table
from purestep.views.plain import written as written
