"""Workers that share each batch and exchange less than gradients: local SGD, DiLoCo, PowerSGD.

Re-exports what users type. The number of workers belongs to the state and the step, not to the job: a process may hold
several of them, so the bits are those of any other number of processes.
"""

from purestep.workers.power import PowerStep as PowerStep
from purestep.workers.power import power_sgd as power_sgd
from purestep.workers.state import LocalState as LocalState
from purestep.workers.state import PowerState as PowerState
from purestep.workers.state import average_workers as average_workers
from purestep.workers.step import LocalStep as LocalStep
from purestep.workers.step import diloco as diloco
from purestep.workers.step import local_sgd as local_sgd
