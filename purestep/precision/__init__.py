"""Precision policies as transforms of the state, loss scales, master weights, float8. Re-exports only."""

from purestep.precision.describe import ModuleDtypes as ModuleDtypes
from purestep.precision.describe import PolicyDescription as PolicyDescription
from purestep.precision.loss_scale import DynamicLossScale as DynamicLossScale
from purestep.precision.loss_scale import LossScale as LossScale
from purestep.precision.loss_scale import NoLossScale as NoLossScale
from purestep.precision.loss_scale import StaticLossScale as StaticLossScale
from purestep.precision.loss_scale import all_finite as all_finite
from purestep.precision.master_params import MasterWeightsState as MasterWeightsState
from purestep.precision.master_params import master_weights as master_weights
from purestep.precision.policies import NAMES as NAMES
from purestep.precision.policies import Policy as Policy
from purestep.precision.policies import policy as policy
from purestep.precision.rules import NORMS as NORMS
from purestep.precision.rules import Rule as Rule
