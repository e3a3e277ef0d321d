"""Portable bits: torch's CPU kernels pinned to those that compute alike on every x86-64 processor with AVX2.

Owns the mode: what it pins, when it is too late for that, the check at the start of a run and the probe by which two
machines compare their kernels. torch reads most of what is pinned once, at its first operation, so importing
this module asks for `PURESTEP_BITS`, and `purestep` imports it first.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform

import torch
from torch.nn import functional as F

from purestep import _torch_cpu, portable_kernels
from purestep.errors import ConfigError, explain

VARIABLE = "PURESTEP_BITS"

# Read once by torch, MKL, oneDNN and Inductor, each at its first use.
_ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own kernels: the vector width is the order of a sum
    "MKL_CBWR": "COMPATIBLE",  # matrix products, FFT, LAPACK, exp and log of MKL: one branch for all vendors
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # oneDNN is off; this holds for what asks for it explicitly
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",  # bags of embeddings
    "TORCHINDUCTOR_CPP_MARCH": "x86-64-v3",  # compiled steps: AVX2 and FMA, whatever the processor has besides
    "TORCHINDUCTOR_CPP_ENABLE_FLOATING_POINT_CONTRACT_FLAG": "off",  # no product and sum rounded as one
    "TORCHINDUCTOR_CPP_ENABLE_UNSAFE_MATH_OPT_FLAG": "0",  # no sums in another order
}
_INDUCTOR = {
    "march": "x86-64-v3",
    "simdlen": 256,
    "enable_floating_point_contract_flag": "off",
    "enable_unsafe_math_opt_flag": False,
}

# What the probe gives, by torch version; seen on an AMD EPYC with AVX-512 and on an emulated Intel Haswell.
_KNOWN = {"2.13.0": "c47f75de23f03e59"}

_threads: int | None = None  # intra-op threads that the mode was entered with; None while bits are native


def mode() -> str:
    """Return "portable" or "native"."""
    return "native" if _threads is None else "portable"


def portable(*, threads: int = 1) -> None:
    """Compute on CPUs with the kernels that give the same bits on every x86-64 processor with AVX2, from here on.

    `PURESTEP_BITS=portable` in the environment does it when purestep is imported. Processes started afterwards inherit
    it. The mode is entered once and for the life of the process.

    Args:
        threads: intra-op threads, 1 or more. Sums are split over them, so another number gives other bits.

    Raises:
        ConfigError: it is too late (torch has computed already with other kernels), the processor has no AVX2, this
            build of torch has no MKL, or another number of threads was pinned before.

    Examples:
        >>> import purestep as ps
        >>> ps.bits.portable()  # doctest: +SKIP
        >>> ps.bits.mode()
        'native'
    """
    global _threads
    if _threads is not None:
        if threads != _threads:
            raise ConfigError(
                explain(
                    "portable bits were entered with another number of threads",
                    where=f"threads={threads}, before threads={_threads}",
                    instead=f"ps.bits.portable(threads={_threads})",
                )
            )
        return
    if type(threads) is not int or threads < 1:
        raise ConfigError(explain("threads is a number from 1 on", where=f"threads={threads!r}"))
    _check_machine()
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        _check_in_time()
    except ConfigError:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        raise
    os.environ[VARIABLE] = "portable"
    _torch_cpu.set_inductor(_INDUCTOR)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    _switch_libraries_off()
    portable_kernels.install()
    _threads = threads
    _check_probe()


def portable_here() -> bool:
    """Return whether this machine can compute portable bits: x86-64 with AVX2, and a torch for Linux with MKL.

    It does not say whether it is too late for them.
    """
    return _x86_64() and _torch_cpu.has_mkl() and _torch_cpu.has_avx2()


def from_environment() -> None:
    """Enter the mode that `PURESTEP_BITS` names; importing this module, and so purestep, does so.

    Raises:
        ConfigError: an unknown name, or as of `portable`.
    """
    given = os.environ.get(VARIABLE, "native")
    name, _, threads = given.partition(":")
    if name not in ("native", "portable") or (threads and not (threads.isdigit() and name == "portable")):
        raise ConfigError(
            explain(
                "there are no such bits",
                where=f"{VARIABLE}={given}",
                instead=f"{VARIABLE}=native, {VARIABLE}=portable, or {VARIABLE}=portable:4 with 4 threads",
            )
        )
    if name == "portable":
        portable(threads=int(threads or 1))


def record() -> str:
    """Return what a snapshot records, and `PURESTEP_BITS` takes: "native", "portable" or "portable:<threads>"."""
    if _threads is None:
        return "native"
    return "portable" if _threads == 1 else f"portable:{_threads}"


def check() -> None:
    """Check that everything that `portable` pinned is still as it was; `fit` does at its start.

    Raises:
        ConfigError: with what has been changed since.
    """
    if _threads is None:
        return
    now = {
        "torch.get_num_threads()": (torch.get_num_threads(), _threads),
        "torch.backends.mkldnn.enabled": (bool(torch.backends.mkldnn.enabled), False),
        "torch.backends.nnpack, enabled": (_torch_cpu.nnpack_enabled(), False),
        "torch.get_float32_matmul_precision()": (torch.get_float32_matmul_precision(), "highest"),
        "torch.backends.cpu.get_cpu_capability()": (torch.backends.cpu.get_cpu_capability(), "AVX2"),
        "MKL's branch": (_torch_cpu.mkl_branch(), _torch_cpu.COMPATIBLE),
    }
    changed = [f"{name} is {is_}, portable bits need {pinned}" for name, (is_, pinned) in now.items() if is_ != pinned]
    if changed:
        raise ConfigError(
            explain(
                "bits are not portable any more: a setting has changed since the mode was entered",
                where="\n".join(changed),
                why="these decide which kernels run and in which order they add",
                instead=f"leave them as they are; {VARIABLE}=portable:<n> for n threads",
            )
        )


# --- entering ---------------------------------------------------------------------------------------------------------


def _x86_64() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def _check_machine() -> None:
    if not _x86_64():
        machine = platform.machine()
        why = "portable bits are those of x86-64 kernels; other processors have kernels of their own"
        raise ConfigError(explain("bits cannot be portable here", where=f"a processor of kind {machine}", why=why))


def _check_in_time() -> None:
    """Ask torch and MKL which kernels they have taken. Asking settles it, so this runs with the environment set."""
    capability, branch = torch.backends.cpu.get_cpu_capability(), _torch_cpu.mkl_branch()
    if branch is None:
        why = "its matrix products come from a library that purestep cannot pin"
        raise ConfigError(explain("this build of torch has no MKL", where=f"torch {torch.__version__}", why=why))
    if capability not in ("AVX2", "AVX512"):
        raise ConfigError(
            explain(
                "portable bits need a processor with AVX2 and FMA",
                where=f"{_torch_cpu.processor()}: torch runs its {capability} kernels",
                why="kernels of another vector width add in another order",
            )
        )
    taken = [f"torch's kernels: {capability}, not AVX2"] if capability != "AVX2" else []
    taken += [f"MKL's branch: {branch}, not {_torch_cpu.COMPATIBLE}"] if branch != _torch_cpu.COMPATIBLE else []
    if taken:
        raise ConfigError(
            explain(
                "it is too late for portable bits: torch has chosen its kernels",
                where="\n".join(taken),
                why="they are chosen once, at the first operation, and something has computed before",
                instead=f"{VARIABLE}=portable python train.py\n"
                "or import purestep as ps; ps.bits.portable()   # before the first tensor is made",
            )
        )


def _switch_libraries_off() -> None:
    """Leave convolutions and the like to torch and MKL: oneDNN and NNPACK choose their blocks by the processor."""
    torch.backends.mkldnn.set_flags(False)
    torch.backends.nnpack.set_flags(False)


# --- the probe --------------------------------------------------------------------------------------------------------


@functools.cache
def probe() -> str:
    """Return a digest of some results of torch's CPU kernels: 16 hex digits that are equal where kernels compute alike.

    A few matrix products, convolutions, sums, exponentials and denormal numbers, forward and backward. It draws nothing
    at random, and asks for no function of the C library, whose versions differ.
    """
    total, threads = hashlib.sha256(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.enable_grad():
            for result in _results():
                total.update(result.detach().contiguous().numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    return total.hexdigest()[:16]


def _numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    """Numbers in (-1, 1) from integer arithmetic alone."""
    count = torch.Size(shape).numel()
    mixed = (torch.arange(1, count + 1, dtype=torch.int64, device="cpu") * (2654435761 * seed)) % 16777213
    return (mixed.to(torch.float32) * (2.0 / 16777213) - 1.0).reshape(shape)


def _results() -> list[torch.Tensor]:
    image, kernel = _numbers(4, 3, 9, 9), _numbers(8, 3, 3, 3, seed=3)
    x, weight, bias = _numbers(33, 129), _numbers(17, 129, seed=5), _numbers(17, seed=7)
    leaves = [leaf.requires_grad_() for leaf in (image, kernel, x, weight, bias)]
    out = F.linear(x, weight, bias)
    normed = F.layer_norm(out, (17,)) + torch.tanh(out) * F.gelu(out) + torch.exp(out * 0.01)
    hidden = F.batch_norm(F.conv2d(image, kernel, padding=1), None, None, training=True)
    loss = normed.log_softmax(-1).sum() + torch.log1p(hidden.square()).mean() + x.std()
    loss = loss + torch.sqrt(x.square() + 1).sum() + torch.atan(out).sum()
    gradients = torch.autograd.grad(loss, leaves)
    denormal = torch.full((8,), 1e-30, device="cpu", dtype=torch.float32) * 1e-12
    double = (x.detach().double() @ x.detach().double().t()).exp().sum()
    return [out, hidden, loss, *gradients, denormal, double, x.detach().cumsum(1), torch.bmm(image[0], image[1])]


def _check_probe() -> None:
    """Compare the probe with what it is known to give. Versions of torch without a known probe are only recorded."""
    known = _KNOWN.get(torch.__version__.partition("+")[0])
    if known is not None and probe() != known:
        raise ConfigError(
            explain(
                "this machine does not compute the portable bits",
                where=f"{_torch_cpu.processor()}, torch {torch.__version__}: probe {probe()}, expected {known}",
                why="a kernel that purestep does not pin depends on this processor, or denormal numbers are flushed",
                instead=f"{VARIABLE}=native, and digests that hold on machines of this kind",
            )
        )


from_environment()  # once, when purestep is imported
