"""Data: batches that are a function of (seed, epoch, position), and every other loader as a source."""

from purestep.cpus import available_cpus as available_cpus
from purestep.data.batches import Batches as Batches
from purestep.data.batches import batches as batches
from purestep.data.combine import concat as concat
from purestep.data.combine import stream as stream
from purestep.data.combine import take as take
from purestep.data.combine import zip as zip
from purestep.data.device import prefetch as prefetch
from purestep.data.device import to_device as to_device
from purestep.data.foreign import ReplayWarning as ReplayWarning
from purestep.data.foreign import UnsavedStateWarning as UnsavedStateWarning
from purestep.data.samples import BadSampleWarning as BadSampleWarning
from purestep.data.source import Source as Source
from purestep.data.source import as_source as as_source
from purestep.metrics import sample_count as sample_count
