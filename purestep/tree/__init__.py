"""Pytrees: what a state is made of. Re-exports only.

Owns the one registration of our nodes (in optree and in `torch.utils._pytree`), mapping, paths, and `digest` and
`diff` of whole trees (`bits` does those of a leaf). It is the only room that imports optree. Nothing here knows about
training.
"""

from purestep.bits import Difference as Difference
from purestep.bits import Differences as Differences
from purestep.bits import describe as describe
from purestep.bits import digest_leaves as digest_leaves
from purestep.bits import tensor_bytes as tensor_bytes
from purestep.tree.compare import diff as diff
from purestep.tree.compare import digest as digest
from purestep.tree.compare import equal as equal
from purestep.tree.consumed import Consumed as Consumed
from purestep.tree.consumed import consume as consume
from purestep.tree.nodes import node_build as node_build
from purestep.tree.nodes import node_class as node_class
from purestep.tree.nodes import node_fields as node_fields
from purestep.tree.nodes import node_name as node_name
from purestep.tree.nodes import pytree as pytree
from purestep.tree.nodes import replaced as replaced
from purestep.tree.nodes import stable_name as stable_name
from purestep.tree.nodes import static as static
from purestep.tree.walk import Filter as Filter
from purestep.tree.walk import Structure as Structure
from purestep.tree.walk import count as count
from purestep.tree.walk import find as find
from purestep.tree.walk import flatten as flatten
from purestep.tree.walk import leaves as leaves
from purestep.tree.walk import map as map
from purestep.tree.walk import map_with_name as map_with_name
from purestep.tree.walk import matches as matches
from purestep.tree.walk import names as names
from purestep.tree.walk import nbytes as nbytes
from purestep.tree.walk import parts as parts
from purestep.tree.walk import paths as paths
from purestep.tree.walk import select as select
from purestep.tree.walk import structure as structure
from purestep.tree.walk import unflatten as unflatten
