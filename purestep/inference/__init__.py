"""Use of a trained state: `evaluate`, `predict`, and predictions on disk. Re-exports only."""

from purestep.inference.evaluate import Evaluation as Evaluation
from purestep.inference.evaluate import evaluate as evaluate
from purestep.inference.predict import Predictions as Predictions
from purestep.inference.predict import predict as predict
from purestep.inference.saved import load_predictions as load_predictions
