"""The record of a run: a run directory read as data, re-executed, forked, compared and verified."""

from typing import TYPE_CHECKING

from purestep._lazy import attach

if TYPE_CHECKING:
    from purestep.loop.origin import Program as Program
    from purestep.record.bisect import Bisection as Bisection
    from purestep.record.bisect import FirstBatch as FirstBatch
    from purestep.record.bisect import bisect as bisect
    from purestep.record.bits_trace import BitsTrace as BitsTrace
    from purestep.record.compare import Comparison as Comparison
    from purestep.record.compare import Parted as Parted
    from purestep.record.compare import compare as compare
    from purestep.record.compare_bits import BitsComparison as BitsComparison
    from purestep.record.experiment import Experiment as Experiment
    from purestep.record.experiment import experiment as experiment
    from purestep.record.fork import fork as fork
    from purestep.record.replay import Replayed as Replayed
    from purestep.record.replay import replay as replay
    from purestep.record.run_record import Columns as Columns
    from purestep.record.run_record import RunRecord as RunRecord
    from purestep.record.run_record import open as open
    from purestep.record.summary import Parent as Parent
    from purestep.record.summary import Summary as Summary
    from purestep.record.table import Runs as Runs
    from purestep.record.table import runs as runs
    from purestep.record.verify import Span as Span
    from purestep.record.verify import Verification as Verification
    from purestep.record.verify import verify as verify

__getattr__, __dir__ = attach(__name__)
