"""Sharding: one plan from laptop to cluster. A plan says where each tensor of a state lives and who computes what.

Re-exports what users type. Nothing here loads torch's DTensor before a leaf is sharded over more than one process.
"""

from purestep.distributed.control import initialize as initialize
from purestep.distributed.control import rank as rank
from purestep.distributed.control import size as size
from purestep.distributed.mesh import Mesh as Mesh
from purestep.distributed.mesh import mesh as mesh
from purestep.sharding.experts import Experts as Experts
from purestep.sharding.families import tensor_rules as tensor_rules
from purestep.sharding.local_batches import LocalBatch as LocalBatch
from purestep.sharding.local_batches import local_batch as local_batch
from purestep.sharding.plan import Plan as Plan
from purestep.sharding.presets import context_parallel as context_parallel
from purestep.sharding.presets import ddp as ddp
from purestep.sharding.presets import expert_parallel as expert_parallel
from purestep.sharding.presets import fsdp as fsdp
from purestep.sharding.presets import hsdp as hsdp
from purestep.sharding.presets import pipeline as pipeline
from purestep.sharding.presets import single as single
from purestep.sharding.presets import tensor_parallel as tensor_parallel
from purestep.sharding.presets import zero1 as zero1
from purestep.sharding.presets import zero2 as zero2
from purestep.sharding.spec import Spec as Spec
from purestep.sharding.stages import even_stages as even_stages
