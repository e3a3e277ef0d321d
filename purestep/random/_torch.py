"""Private names of torch that keyed randomness needs: operators that draw and are called by no public function alone.

Seen to work on torch 2.11.0, 2.13.0 and 2.14.1. They are keys of the table of refusals.

    standard_gamma, sample_dirichlet
                            what `torch.distributions` draws gammas and Dirichlets with. Without them: find by the tag
                            `nondeterministic_seeded` what `Gamma.rsample` calls, and refuse that.
"""

from __future__ import annotations

import torch

standard_gamma = torch._standard_gamma
sample_dirichlet = torch._sample_dirichlet
