"""To and from other libraries: weights by name, export, LightningModules. Re-exports only."""

from purestep.interop.distributed_checkpoint import load_dcp_optimizer as load_dcp_optimizer
from purestep.interop.distributed_checkpoint import save_dcp as save_dcp
from purestep.interop.export import export as export
from purestep.interop.lightning import FromLightning as FromLightning
from purestep.interop.lightning import from_lightning as from_lightning
from purestep.interop.weights import from_module as from_module
from purestep.interop.weights import load_weights as load_weights
from purestep.interop.weights import save_weights as save_weights
from purestep.weights.files import read_weights as read_weights
