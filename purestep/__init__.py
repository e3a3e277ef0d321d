"""purestep: training as pure functions `(state, batch) -> (state, metrics)` over one immutable state.

What the user types is re-exported here, and nothing else; it is imported when first used. So importing purestep, in
every worker process too, stays cheap, and the command `purestep` answers without torch where it needs none.
"""

import os
from typing import TYPE_CHECKING

from purestep._lazy import attach

if "PURESTEP_BITS" in os.environ:
    # At once, as it acts on the variable: torch chooses its kernels once, at its first operation.
    from purestep import bits as bits

if TYPE_CHECKING:
    from purestep import bits as bits
    from purestep import callbacks as callbacks
    from purestep import data as data
    from purestep import display as display
    from purestep import errors as errors
    from purestep import interop as interop
    from purestep import launch as launch
    from purestep import loggers as loggers
    from purestep import loop as loop
    from purestep import metrics as metrics
    from purestep import optim as optim
    from purestep import precision as precision
    from purestep import random as random
    from purestep import record as record
    from purestep import sharding as sharding
    from purestep import snapshot as snapshot
    from purestep import testing as testing
    from purestep import tree as tree
    from purestep import tune as tune
    from purestep.activations import Checkpoint as Checkpoint
    from purestep.batchnorm import refresh_batchnorm as refresh_batchnorm
    from purestep.devices import default_device as default_device
    from purestep.display import notebook as notebook
    from purestep.ensembles import ensemble as ensemble
    from purestep.ensembles import stack as stack
    from purestep.ensembles import unstack as unstack
    from purestep.functional import apply as apply
    from purestep.functional import bind as bind
    from purestep.functional import checkpoint as checkpoint
    from purestep.grad import grad_and_value as grad_and_value
    from purestep.inference.evaluate import Evaluation as Evaluation
    from purestep.inference.evaluate import evaluate as evaluate
    from purestep.inference.predict import predict as predict
    from purestep.inference.saved import Predictions as Predictions
    from purestep.inference.saved import load_predictions as load_predictions
    from purestep.interop.export import export as export
    from purestep.interop.lightning import from_lightning as from_lightning
    from purestep.interop.weights import from_module as from_module
    from purestep.interop.weights import load_weights as load_weights
    from purestep.interop.weights import save_weights as save_weights
    from purestep.jit import donate as donate
    from purestep.jit import jit as jit
    from purestep.loop.cadence import Until as Until
    from purestep.loop.cadence import epochs as epochs
    from purestep.loop.cadence import every as every
    from purestep.loop.cadence import hours as hours
    from purestep.loop.cadence import minutes as minutes
    from purestep.loop.cadence import seconds as seconds
    from purestep.loop.cadence import steps as steps
    from purestep.loop.result import Result as Result
    from purestep.loop.resume import restore as restore
    from purestep.loop.until_text import until as until
    from purestep.lora import load_adapters as load_adapters
    from purestep.lora import lora as lora
    from purestep.lora import merge_lora as merge_lora
    from purestep.lora import save_adapters as save_adapters
    from purestep.preflight.step_memory import step_memory as step_memory
    from purestep.record.bisect import bisect as bisect
    from purestep.record.compare import compare as compare
    from purestep.record.compare_bits import compare_bits as compare_bits
    from purestep.record.experiment import Experiment as Experiment
    from purestep.record.experiment import experiment as experiment
    from purestep.record.fork import fork as fork
    from purestep.record.replay import replay as replay
    from purestep.record.run_record import open as open
    from purestep.record.table import runs as runs
    from purestep.record.trace_bits import trace_bits as trace_bits
    from purestep.record.verify import verify as verify
    from purestep.remote.place import Remote as Remote
    from purestep.state import TrainState as TrainState
    from purestep.state import init as init
    from purestep.state import to_module as to_module
    from purestep.step import make_eval as make_eval
    from purestep.step import make_predict as make_predict
    from purestep.step import make_step as make_step
    from purestep.step import weighted as weighted
    from purestep.step_protocol import wrap_step as wrap_step
    from purestep.trainable import freeze as freeze
    from purestep.trainable import thaw as thaw
    from purestep.trainer import fit as fit
    from purestep.trainer import run as run
    from purestep.tree import diff as diff
    from purestep.tree import digest as digest
    from purestep.tree import pytree as pytree
    from purestep.tree import static as static
    from purestep.weights import Weights as Weights
    from purestep.workers.power import power_sgd as power_sgd
    from purestep.workers.state import LocalState as LocalState
    from purestep.workers.state import average_workers as average_workers
    from purestep.workers.step import diloco as diloco
    from purestep.workers.step import local_sgd as local_sgd

__version__ = "0.1.0"

__getattr__, __dir__ = attach(__name__)
