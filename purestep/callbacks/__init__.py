"""Callbacks: features of the loop as pure reducers with their own state, one file each."""

from purestep.callbacks.base import Reducer as Reducer
from purestep.callbacks.device_stats import device_stats as device_stats
from purestep.callbacks.early_stopping import early_stopping as early_stopping
from purestep.callbacks.evaluate import evaluate as evaluate
from purestep.callbacks.log import learning_rate as learning_rate
from purestep.callbacks.log import log as log
from purestep.callbacks.observe import observe as observe
from purestep.callbacks.on_saved import on_saved as on_saved
from purestep.callbacks.profile import profile as profile
from purestep.callbacks.progress import progress as progress
from purestep.callbacks.snapshots import snapshots as snapshots
from purestep.callbacks.spike_detection import spike_detection as spike_detection
from purestep.callbacks.tap import tap as tap
from purestep.callbacks.tap import transform as transform
from purestep.callbacks.terminate_on_nan import terminate_on_nan as terminate_on_nan
from purestep.callbacks.throughput import count_flops as count_flops
from purestep.callbacks.throughput import throughput as throughput
from purestep.loop.events import Callback as Callback
from purestep.loop.roles import Evaluator as Evaluator
from purestep.loop.roles import Instrument as Instrument
from purestep.loop.roles import Observer as Observer
from purestep.loop.roles import SnapshotPolicy as SnapshotPolicy
from purestep.loop.roles import Transformer as Transformer
from purestep.loop.roles import Watcher as Watcher
