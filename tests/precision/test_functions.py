"""Functions inside a cast model: each of autocast's float32 list against autocast, and what mixed dtypes become."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from shared_marks import slow_but
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import purestep as ps
from purestep.precision import autocast_functions, policy
from purestep.precision.cast_params import casting
from purestep.random.torch_random import KeyedRandom

f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
TX = ps.optim.sgd(0.1)
N = 8


def signed(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def unit(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape) + 7)) * 0.8 + 0.1


A, B, C, P, IMAGE, SERIES = (
    signed(N, N),
    unit(N, N) - 0.5,
    signed(N, N) + 1,
    unit(N, N),
    unit(1, 2, 8, 8),
    unit(1, 2, 8),
)
LABELS, SIGNS, WEIGHT = torch.arange(N), torch.ones(N), unit(N)

# Operator of autocast's float32 list, or function of torch made of some: how it is called, and with what.
ROWS = {
    **{
        name: (getattr(torch, name), P)
        for name in "acos arccos asin arcsin erfinv log log10 log2 log1p reciprocal rsqrt tan".split()
    },
    **{name: (getattr(torch, name), A) for name in "cosh exp expm1 sinh square".split()},
    "special.log1p": (torch.special.log1p, P),
    "method exp": (torch.Tensor.exp, A),
    "pow": (torch.pow, P, B),
    "pow number": (torch.pow, P, 1.7),
    "** number": (lambda x: x**1.5, P),
    "number **": (lambda x: 1.7**x, P),
    "number /": (lambda x: 1.7 / x, P),
    "softplus": (F.softplus, A),
    "softmax": (torch.softmax, A, 0),
    "F.softmax": (lambda x: F.softmax(x, dim=-1), A),
    "method softmax": (lambda x: x.softmax(-1), A),
    "special.softmax": (torch.special.softmax, A, 0),
    "softmin": (lambda x: F.softmin(x, dim=-1), A),
    "log_softmax": (torch.log_softmax, A, 0),
    "F.log_softmax": (lambda x: F.log_softmax(x, dim=-1), A),
    "layer_norm": (lambda x, w: F.layer_norm(x, (N,), w, w), A, WEIGHT),
    "rms_norm": (lambda x, w: F.rms_norm(x, (N,), w), A, WEIGHT),
    "group_norm": (lambda x, w: F.group_norm(x, 2, w, w), A, WEIGHT),
    "local_response_norm": (lambda x: F.local_response_norm(x, 2), IMAGE),
    "normalize": (F.normalize, A),
    "norm": (torch.norm, A),
    "norm of rows": (lambda x: x.norm(dim=1), A),
    "linalg.norm": (torch.linalg.norm, A),
    "vector_norm": (torch.linalg.vector_norm, A),
    "matrix_norm": (torch.linalg.matrix_norm, A),
    "cosine_similarity": (F.cosine_similarity, A, B),
    "pairwise_distance": (F.pairwise_distance, A, B),
    "dist": (torch.dist, A, B),
    "pdist": (F.pdist, A),
    "cdist": (torch.cdist, A, B),
    "renorm": (lambda x: torch.renorm(x, 2, 0, 1.0), A),
    "lp_pool": (lambda x: F.lp_pool1d(x, 2, 2), SERIES),
    "logsumexp": (lambda x: torch.logsumexp(x, 1), A),
    "trapezoid": (torch.trapezoid, A),
    "cumsum": (lambda x: x.cumsum(0), A),
    "cumprod": (lambda x: torch.cumprod(x, 0), P),
    "prod": (torch.prod, P),
    "prod of rows": (lambda x: x.prod(1), P),
    "sum": (torch.sum, A),
    "sum of rows": (lambda x: x.sum(1), A),
    "upsample_nearest1d": (lambda x: F.interpolate(x, scale_factor=2), SERIES),
    "_upsample_nearest_exact1d": (lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"), SERIES),
    "upsample_nearest2d": (lambda x: F.interpolate(x, scale_factor=2), IMAGE),
    "upsample_linear1d": (lambda x: F.interpolate(x, scale_factor=2, mode="linear"), SERIES),
    "upsample_bilinear2d": (lambda x: F.interpolate(x, None, 2, "bilinear"), IMAGE),
    "upsample_bicubic2d": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), IMAGE),
    "cross_entropy": (lambda x: F.cross_entropy(x, LABELS.to(x.device)), A),
    "cross_entropy of probabilities": (F.cross_entropy, A, P),
    "nll_loss": (lambda x: F.nll_loss(x, LABELS.to(x.device)), A),
    "nll_loss2d": (lambda x: F.nll_loss(x, LABELS.to(x.device).view(2, 2, 2)), signed(2, N, 2, 2)),
    "mse_loss": (F.mse_loss, A, B),
    "mse_loss, not reduced": (lambda x, y: F.mse_loss(x, y, reduction="none"), A, B),
    "l1_loss": (F.l1_loss, A, B),
    "smooth_l1_loss": (F.smooth_l1_loss, A, B),
    "huber_loss": (F.huber_loss, A, B),
    "kl_div": (lambda x, y: F.kl_div(x, y, reduction="batchmean"), A, P),
    "poisson_nll_loss": (F.poisson_nll_loss, A, P),
    "cosine_embedding_loss": (lambda x, y: F.cosine_embedding_loss(x, y, SIGNS.to(x.device)), A, B),
    "hinge_embedding_loss": (lambda x: F.hinge_embedding_loss(x, SIGNS.to(x.device)), A),
    "margin_ranking_loss": (lambda x, y: F.margin_ranking_loss(x, y, torch.ones_like(x)), A, B),
    "soft_margin_loss": (lambda x: F.soft_margin_loss(x, SIGNS.to(x.device).long()), A),
    "multi_margin_loss": (lambda x: F.multi_margin_loss(x, LABELS.to(x.device)), A),
    "multilabel_margin_loss": (lambda x: F.multilabel_margin_loss(x, LABELS.to(x.device).expand(N, N)), A),
    "multilabel_soft_margin_loss": (F.multilabel_soft_margin_loss, A, P),
    "triplet_margin_loss": (F.triplet_margin_loss, A, B, C),
    "triplet_margin_with_distance_loss": (F.triplet_margin_with_distance_loss, A, B, C),
    "binary_cross_entropy_with_logits": (F.binary_cross_entropy_with_logits, A, P),
}
HEADER = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
every_row = pytest.mark.parametrize("name", ROWS)
halves = pytest.mark.parametrize("half", [bf16, f16], ids=["bf16", "f16"])


def called(name, *, half=None, device=None, context=contextlib.nullcontext):
    function, *args = ROWS[name]
    as_given = [a.to(half or f32) if isinstance(a, torch.Tensor) else a for a in args]
    if device is not None:  # shapes without memory, on a device that need not be there
        as_given = [
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=device) if isinstance(a, torch.Tensor) else a
            for a in as_given
        ]
    with context():
        return function(*as_given)


def under_policy(key=None):
    return KeyedRandom(key, handlers=casting(policy("bf16-mixed"), nn.Linear(1, 1)).handlers)


@contextlib.contextmanager
def cuda_autocast(half=bf16):
    torch.set_autocast_enabled("cuda", True)
    old = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", half)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", old)


# --- the float32 list -------------------------------------------------------------------------------------------------


@every_row
@halves
def test_it_has_the_value_of_float32_as_autocast_has(name, half):
    exact = called(name, half=half, context=lambda: WideInputs())
    found = called(name, half=half, context=under_policy)
    assert found.dtype == exact.dtype == f32
    assert torch.equal(found, exact)


class WideInputs(torch.overrides.TorchFunctionMode):
    """The plain meaning of the list: everything in float32, from the first function on."""

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        wide = lambda v: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v  # noqa: E731
        return func(*[wide(a) for a in args], **{k: wide(v) for k, v in (kwargs or {}).items()})


@every_row
@halves
def test_it_has_the_dtype_that_autocast_on_cuda_gives(name, half):
    """Autocast dispatches fake tensors as it does those of a GPU, so its own list is asked."""
    if name not in HEADER and name == "rms_norm":
        pytest.skip("no part of the list of this torch; ours is the newest")
    with FakeTensorMode(allow_non_fake_inputs=True):
        oracle = called(name, half=half, device="cuda", context=lambda: cuda_autocast(half))
        assert called(name, half=half, device="cuda", context=under_policy).dtype == oracle.dtype == f32


@every_row
@halves
def test_where_autocast_on_cpu_computes_in_float32_it_has_the_same_bits(name, half):
    try:
        found = called(name, half=half, context=lambda: torch.autocast("cpu", dtype=half))
    except NotImplementedError:
        pytest.skip("no kernel of a CPU in this precision")
    # The square inside this one is rounded by autocast, and not by the module of the same name under a policy.
    if found.dtype == f32 and name != "local_response_norm":
        assert torch.equal(called(name, half=half, context=under_policy), found)
    else:
        # CPU's list is shorter; its kernels compute in float32 and round what they return.
        assert torch.allclose(called(name, half=half, context=under_policy), found.float(), rtol=0.1, atol=0.1)


def test_autocast_on_cpu_has_some_of_the_list():
    """The test above would hold nothing if CPU's autocast were off."""
    with torch.autocast("cpu", dtype=bf16):
        assert F.mse_loss(A.to(bf16), B.to(bf16)).dtype == f32


def test_every_name_of_autocast_has_a_handler():
    """The lists stand in a header of torch; a name that a newer torch adds is missed here."""
    named = set()
    for macro in ("FP32", "FP32_SET_OPT_DTYPE", "PROMOTE", "LOWER_PRECISION_FP"):
        body = HEADER.split(f"#define AT_FORALL_{macro}(_)")[1].split("\n\n")[0]
        named |= set(re.findall(r"_\((\w+)", body))
    assert len(named) > 100
    by_name = {
        getattr(f, "__name__", "").removeprefix("special_").removeprefix("linalg_")
        for f in autocast_functions.autocast_list()
    }
    missing = {n for n in named if n.removeprefix("linalg_") not in by_name}
    # Reached by other names: F.interpolate, F.nll_loss, kernels behind modules and behind attention.
    inner = re.compile(r"_?upsample_.*|nll_loss2d|_convolution|_thnn_fused_.*|_scaled_dot_product_.*")
    assert not {n for n in missing if not inner.fullmatch(n)}


def test_what_the_caller_asks_for_is_left():
    x = A.to(bf16)
    with under_policy():
        assert x.sum(dtype=bf16).dtype == bf16
        assert torch.softmax(x, 0, bf16).dtype == bf16
        assert torch.exp(x, out=torch.empty_like(x)).dtype == bf16
        assert F.interpolate(IMAGE.to(bf16), (4, 4), mode="area").dtype == bf16
        assert x.double().sum().dtype == torch.float64
        assert LABELS.sum().dtype == torch.int64
        assert x.clone().exp_().dtype == bf16  # in place, as with autocast


# --- what meets a float32 result --------------------------------------------------------------------------------------


def test_a_product_of_two_dtypes_is_made_in_the_half_precision_and_float32_alone_stays():
    x, wide = A.to(bf16), B.clone()
    with under_policy():
        for made in (
            x @ wide,
            wide @ x,
            F.linear(wide, x),
            torch.einsum("ij,jk->ik", x, wide),
            torch.bmm(x[None], wide[None]),
        ):
            assert made.dtype == bf16
        assert torch.equal(x @ wide, x @ wide.to(bf16))
        assert torch.equal(wide @ wide, torch.mm(wide, wide))
        assert F.scaled_dot_product_attention(x[None], x[None], x[None], attn_mask=wide).dtype == bf16
        assert torch.linalg.multi_dot([x, wide, x]).dtype == bf16
    with pytest.raises(RuntimeError):
        x @ wide


def test_what_takes_one_dtype_is_promoted_and_what_is_written_keeps_its_own():
    x, wide, index = A.to(bf16), B.clone(), torch.tensor([1, 0])
    with under_policy():
        assert torch.addcmul(x, wide, x).dtype == f32
        assert torch.lerp(x, wide, 0.5).dtype == f32
        assert torch.dot(x[0], wide[0]).dtype == f32
        assert torch.index_add(x, 0, index, wide[:2]).dtype == f32
        for target in (x.clone(), wide.clone()):
            for source in (x, wide):
                kept = target.clone()
                kept[index] = source[:2]
                kept.index_add_(0, index, source[:2])
                kept.scatter_(0, index[None], source[:1])
                assert kept.dtype == target.dtype
                kept.zero_()[index] = source[:2]
                assert torch.equal(kept[index], source[:2].to(kept.dtype))


def test_attention_that_returns_its_weights():
    attention, x = nn.MultiheadAttention(8, 2, dropout=0.5).to(bf16), signed(3, 2, 8).to(bf16)
    with under_policy(ps.random.key(0)):
        out, weights = attention(x, x, x)
    assert (out.dtype, weights.dtype) == (bf16, f32)


def test_gumbel_softmax_draws_what_it_draws_in_float32():
    x = A.to(bf16)
    with under_policy(ps.random.key(0)):
        found = F.gumbel_softmax(x)
    with KeyedRandom(ps.random.key(0)):
        assert torch.equal(found, F.gumbel_softmax(x.float()))


# --- in a step --------------------------------------------------------------------------------------------------------


class LossInside(nn.Module):
    """A model that returns its own loss, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.ones(16))

    def logits(self, x):
        hidden = self.body(x)
        weights = F.softmax(hidden @ hidden.transpose(-1, -2), dim=-1)
        return self.head(F.layer_norm(weights @ hidden, (16,), self.scale))

    def forward(self, x, y=None):
        logits = self.logits(x)
        return logits if y is None else F.cross_entropy(logits, y)


def inside(net, batch):
    return net(batch["x"], batch["y"])


def outside(net, batch):
    return F.cross_entropy(net(batch["x"]), batch["y"])


BATCH = {"x": signed(16, 16), "y": torch.arange(16) % 5}
HALF = ["bf16-mixed", "16-mixed", "bf16-master", "float8", "bf16-true", "16-true"]


def begun(name, model=LossInside):
    p = policy(name)
    return p, p.apply(ps.init(model, TX, seed=0))


@pytest.mark.parametrize("name", HALF)
def test_a_loss_inside_the_model_is_the_loss_outside_of_it(name):
    p, state = begun(name)
    found = [ps.make_step(f, TX, policy=p)(state, BATCH) for f in (inside, outside)]
    assert not ps.diff(*found)
    loss = found[0][1]["loss"].compute()
    assert float(loss) != float(loss.to(p.compute))


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("microbatches", slow_but([1, 2], 2))
def test_a_compiled_step_has_its_bits(name, microbatches):
    if name == "float8" and microbatches == 2:
        pytest.skip("8 rows are no multiple of 16")
    p, state = begun(name)
    step = ps.make_step(inside, TX, policy=p, microbatches=microbatches)
    assert not ps.diff(ps.jit(step, backend="eager")(state, BATCH), step(state, BATCH))


@pytest.mark.parametrize("name", [n for n in HALF if n != "float8"])
def test_vmap_and_grad_see_the_same_loss(name):
    p, state = begun(name)
    step = ps.make_step(inside, TX, policy=p)
    _, metrics = step(state, BATCH)
    stacked = ps.tree.map(lambda x: torch.stack([x, x]), state)
    _, together = torch.func.vmap(step, in_dims=(0, None))(stacked, BATCH)
    for value in together["loss"].compute():
        torch.testing.assert_close(value, metrics["loss"].compute(), rtol=1e-2, atol=1e-3)
        assert float(value) != float(value.to(p.compute))


def test_evaluation_computes_it_too():
    p, state = begun("bf16-mixed")
    found = [ps.make_eval(f, policy=p)(state, BATCH)["loss"].compute() for f in (inside, outside)]
    assert torch.equal(*found)


def test_only_a_half_precision_has_handlers():
    model = nn.Sequential(nn.Linear(2, 2))
    assert casting(policy("32"), model).handlers is None
    assert casting(policy("64"), model).handlers is None
    assert casting(policy("bf16-mixed", autocast=True), model).handlers is None
    assert casting(policy("params=bf16"), model).handlers is None
    assert casting(policy("32").where("0", compute="bf16"), model).handlers is autocast_functions.autocast_list()
    assert casting(policy("params=f32,compute=f16"), model).handlers is autocast_functions.autocast_list()
    assert casting(policy("bf16-true"), model).handlers is autocast_functions.losses()


def test_a_policy_that_keeps_all_but_the_loss_in_half_precision_does():
    x = A.to(bf16)
    with KeyedRandom(None, handlers=autocast_functions.losses()):
        assert F.softmax(x, -1).dtype == bf16
        assert x.sum().dtype == bf16
        assert F.mse_loss(x, x).dtype == f32


def test_a_sum_that_float16_cannot_hold():
    class Energy(nn.Linear):
        def forward(self, x):
            return (super().forward(x) * 300).pow(2).sum() / 1e6

    p, state = begun("16-mixed", lambda: Energy(16, 16))
    _, metrics = ps.make_step(lambda net, batch: net(batch["x"]), TX, policy=p)(state, BATCH)
    assert metrics["loss"].compute().isfinite()
    assert float(metrics["loss"].compute()) > 0.0655
