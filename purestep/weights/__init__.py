"""Named tensors of files: what a file holds, which name is whose, directories of shards. Re-exports only."""

from purestep.weights.files import read_weights as read_weights
from purestep.weights.matching import Weights as Weights
