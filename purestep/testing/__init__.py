"""Proofs for users: that a step is pure, that a transformation has the declared scope, that a run resumes with the
same bits and survives faults, that trees are equal.

Purestep's own tests and examples use them. The checks raise AssertionError with the first path that differs; the fault
harness returns a report.
"""

from purestep.testing.faults import FAULTS as FAULTS
from purestep.testing.faults import Report as Report
from purestep.testing.faults import check_faults as check_faults
from purestep.testing.purity import check_pure as check_pure
from purestep.testing.resume import check_resume as check_resume
from purestep.testing.resume import comparable as comparable
from purestep.testing.transformation import check_transformation as check_transformation
from purestep.testing.trees import assert_trees_close as assert_trees_close
from purestep.testing.trees import assert_trees_equal as assert_trees_equal
