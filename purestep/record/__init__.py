"""The record of a run: a run directory read as data, re-executed, forked, compared and verified."""

from purestep.loop.origin import Program as Program
from purestep.record.run_record import Columns as Columns
from purestep.record.run_record import RunRecord as RunRecord
from purestep.record.run_record import open as open
from purestep.record.summary import Parent as Parent
from purestep.record.summary import Summary as Summary
from purestep.record.table import Runs as Runs
from purestep.record.table import runs as runs
