"""Private names of torch that keyed randomness needs: operators that draw and are called by no public function alone,
which are keys of the table of refusals, and where a generator lies in memory.

Seen to work on torch 2.11.0, 2.13.0 and 2.14.1.

    standard_gamma, sample_dirichlet
                            what `torch.distributions` draws gammas and Dirichlets with. Without them: find by the tag
                            `nondeterministic_seeded` what `Gamma.rsample` calls, and refuse that.
    FLASH_ATTENTION, EFFICIENT_ATTENTION, CUDNN_ATTENTION
                            the kernels that `F.scaled_dot_product_attention` chooses from on a card, which have no
                            public names. Without them: attention with dropout is written out in a graph.
    address_of_generator    where `torch_generator` looks whether a generator has moved. Without it: `get_state`.
"""

from __future__ import annotations

import torch

standard_gamma = torch._standard_gamma
sample_dirichlet = torch._sample_dirichlet
FLASH_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention.default
EFFICIENT_ATTENTION = torch.ops.aten._scaled_dot_product_efficient_attention.default
CUDNN_ATTENTION = torch.ops.aten._scaled_dot_product_cudnn_attention.default


def address_of_generator(generator: torch.Generator) -> int | None:
    """Return the address of the C++ object of a generator; None where torch does not say."""
    address = getattr(generator, "_cdata", None)
    return address if isinstance(address, int) else None
