"""Steps: pure functions `(state, batch) -> (state, metrics)` made from a loss function and a gradient transformation.

`make_eval` and `make_predict` make the read-only counterparts. Re-exports only.
"""

from purestep.step.inference import Eval as Eval
from purestep.step.inference import Predict as Predict
from purestep.step.inference import make_eval as make_eval
from purestep.step.inference import make_predict as make_predict
from purestep.step.loss import LossFn as LossFn
from purestep.step.loss import Metrics as Metrics
from purestep.step.loss import Weighted as Weighted
from purestep.step.loss import weighted as weighted
from purestep.step.training import Step as Step
from purestep.step.training import make_step as make_step
