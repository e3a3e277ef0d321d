"""Data: batches that are a function of (seed, epoch, position), and every other loader as a source."""

from purestep._cpus import available_cpus as available_cpus
from purestep.data.adapters import ReplayWarning as ReplayWarning
from purestep.data.adapters import UnsavedStateWarning as UnsavedStateWarning
from purestep.data.batches import Batches as Batches
from purestep.data.batches import batches as batches
from purestep.data.loading import BadSampleWarning as BadSampleWarning
from purestep.data.mix import concat as concat
from purestep.data.mix import stream as stream
from purestep.data.mix import take as take
from purestep.data.mix import zip as zip
from purestep.data.per_rank import Share as Share
from purestep.data.per_rank import per_rank as per_rank
from purestep.data.sampler import SampleShard as SampleShard
from purestep.data.source import Shardable as Shardable
from purestep.data.source import Source as Source
from purestep.data.source import as_source as as_source
from purestep.data.to_device import prefetch as prefetch
from purestep.data.to_device import to_device as to_device
from purestep.metrics import sample_count as sample_count
