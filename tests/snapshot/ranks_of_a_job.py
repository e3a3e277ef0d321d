"""Four gloo processes that save and restore one store together; run by `test_ranks.py` in each of them.

Every check writes what this rank has seen into one JSON line; the tests compare the lines of the ranks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from purestep import tree
from purestep.errors import PurestepError
from purestep.sharding import Spec, placement
from purestep.sharding.messages import slice_of
from purestep.sharding.spec import box, placements
from purestep.snapshot import Ranks, Store, all_, durable_directories, free_space, latest, orbax_io

# Collecting doctests imports this, too, and says neither rank nor root.
EVERY_PAIR = "every pair" in sys.argv  # of a layout that saved and one that restores; half of them otherwise
ROOT, RANK, WORLD = Path(sys.argv[1]), int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
SEEN: dict[str, Any] = {}
EXCHANGES = 0

# --- states -----------------------------------------------------------------------------------------------------------


def values(seed: int = 0) -> dict[str, Any]:
    """What is saved, whole: sizes that divide and that do not, every width of an element, ties, python leaves."""
    draw = torch.Generator().manual_seed(seed)

    def bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        width = dtype.itemsize
        count = torch.Size(shape).numel() * width
        raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), generator=draw).to(torch.uint8)
        return raw.view(dtype).reshape(shape)

    weight = torch.randn(10, 6, generator=draw)
    return {
        "large": torch.randn(603, 611, generator=draw),
        "huge_rows": torch.randn(1, 400_000, generator=draw),
        "weight": weight,
        "tied": weight,
        "f64": bits(torch.float64, 8, 4),
        "i64": bits(torch.int64, 7),
        "bf16": bits(torch.bfloat16, 5, 9),
        "fp8": bits(torch.float8_e4m3fn, 16, 2),
        "c64": bits(torch.complex64, 4, 4),
        "c128": bits(torch.complex128, 3, 5),
        "bool": bits(torch.bool, 12, 3),
        "three": torch.arange(3),
        "wide": torch.arange(7.0)[None],
        "empty": torch.empty(0, 4),
        "zero_d": torch.tensor(2.5),
        "step": 7 + seed,
        "name": "run",
    }


PLAIN = {"zero_d"}  # a tensor without dims cannot be split
LAYOUTS = {  # name: (sizes of the mesh, spec of two dims, spec of one dim); "" is plain tensors
    "4 rows": ({"f": 4}, Spec("f"), Spec("f")),
    "2x2 tiles": ({"a": 2, "b": 2}, Spec("a", "b"), Spec("b")),
    "2x2 twice split": ({"a": 2, "b": 2}, Spec(("a", "b")), Spec(("a", "b"))),
    "2x2 hybrid": ({"a": 2, "b": 2}, Spec("b"), Spec("b")),
    "2 columns": ({"f": 2}, Spec(None, "f"), Spec("f")),
    "2 plain": ({"f": 2}, Spec(), Spec()),
    "1 plain": ({"f": 1}, Spec(), Spec()),
}
MESHES: dict[str, DeviceMesh] = {}
GROUPS: dict[int, Any] = {}


def split(layout: str, value: Any) -> Any:
    sizes, *specs = LAYOUTS[layout]
    made: dict[int, Any] = {}  # tied leaves stay tied

    def leaf(path: str, whole: Any) -> Any:
        if not isinstance(whole, torch.Tensor) or path in PLAIN:
            return whole
        spec = specs[0] if whole.dim() == 2 else specs[1]
        if not spec.entries:
            return whole
        mesh = MESHES[layout]
        where = dict(zip(sizes, mesh.get_coordinate(), strict=True))
        part = slice_of(whole, box(spec, sizes, whole.shape, where)).clone()
        meta = TensorMeta(whole.shape, whole.contiguous().stride(), whole.dtype)
        return made.setdefault(
            id(whole), DTensor(part, DTensorSpec(mesh, placements(spec, sizes), tensor_meta=meta), requires_grad=False)
        )

    return {path: leaf(path, whole) for path, whole in value.items()}


def ranks_of(layout: str, timeout: float = 30) -> Ranks | None:
    """This process among those of a layout, None when it is none of them."""
    size = MESHES[layout].size()
    if size <= RANK:
        return None

    def exchange(value: Any) -> list[Any]:
        global EXCHANGES
        EXCHANGES += 1
        found: list[Any] = [None] * size
        dist.all_gather_object(found, json.dumps(value), group=GROUPS[size])
        return [json.loads(text) for text in found]

    return Ranks(RANK, size, exchange, timeout) if size > 1 else Ranks()


def same(a: Any, b: Any) -> bool:
    """Whether two states hold the same bits on this rank, placed in the same way."""
    for path in a:
        if placement.is_split(a[path]) != placement.is_split(b[path]):
            return False
        if placement.is_split(a[path]) and a[path]._spec != b[path]._spec:
            return False
    return tree.equal(placement.local(a), placement.local(b))


def attempt(work: Any) -> Any:
    """What a call gives, or its error as [class, text]."""
    try:
        return work()
    except PurestepError as error:
        return [type(error).__name__, str(error).replace(str(ROOT), "ROOT")]


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


# --- checks -----------------------------------------------------------------------------------------------------------


def saved_and_restored_everywhere() -> None:
    """Each layout saves; layouts restore what others saved: the same bits, and the same digest."""
    whole = values()
    wanted, found, parts = tree.digest(whole), {}, {}
    for number, layout in enumerate(LAYOUTS):
        ranks = ranks_of(layout)
        if ranks is not None:
            with Store(ROOT / "all" / str(number), keep=all_(), ranks=ranks) as store:
                store.save(3, split(layout, whole), metrics={"loss": 0.5}, info={"x": [1]})
                store.wait()
            parts[layout] = sorted(path.name for path in (ROOT / "all" / str(number) / "3" / "parts").iterdir())
    dist.barrier()
    for number, saved in enumerate(LAYOUTS):
        for other, layout in enumerate(LAYOUTS):
            ranks = ranks_of(layout)
            if ranks is not None and (EVERY_PAIR or (number + other) % 2 == 0):
                like = split(layout, values(seed=5))
                back = Store(ROOT / "all" / str(number), ranks=ranks).restore(like)
                good = same(back.value, split(layout, whole)) and back.digest == wanted
                good = good and back.value["tied"] is back.value["weight"]
                found[f"{saved} -> {layout}"] = good and (back.step, back.info) == (3, {"x": [1]})
    SEEN["everywhere"], SEEN["parts"] = found, parts


def answers_are_the_same() -> None:
    """Saving, polling, listing and going back, with what each rank is told."""
    global EXCHANGES
    store, seen = Store(ROOT / "same", keep=latest(2), ranks=ranks_of("4 rows")), []
    EXCHANGES = 0
    seen.append([store.poll(), EXCHANGES])
    for step in (1, 2, 3):
        if step == RANK:
            time.sleep(0.2)  # ranks need not be in step
        store.save(step, split("4 rows", values(step)), metrics={"loss": 1 / step})
    durable = []
    while 3 not in durable:
        durable += store.poll()
        time.sleep(0.005)
    seen.append([durable, store.steps(), store.latest(), store.best("loss"), store.best("loss", "max")])
    EXCHANGES = 0
    seen.append([store.poll(), EXCHANGES])
    seen.append(attempt(lambda: store.save(3, split("4 rows", values(3)))))
    store.delete_after(2)
    seen.append(
        [
            store.steps(),
            store.read_manifest(2).digest == tree.digest(values(2)),
            attempt(lambda: store.read_manifest(9)),
        ]
    )
    seen.append(attempt(lambda: store.save(5 + (RANK == 2), split("4 rows", values(5)))))
    bad = split("4 rows", values(5)) | ({"name": object} if RANK == 3 else {})
    seen.append(attempt(lambda: store.save(5, bad)))
    store.check(split("4 rows", values(5)))
    seen.append(attempt(lambda: store.check(bad)))
    store.close()
    seen.append(attempt(lambda: store.save(6, {})))
    SEEN["answers"] = seen


def a_failure_on_one_rank_reaches_all() -> None:
    """Disk full on rank 1, then on rank 0, then a commit that fails: told everywhere, nothing left, saved again."""
    root, seen = ROOT / "failure", []
    store = Store(root, keep=all_(), ranks=ranks_of("4 rows"))
    store.save(1, split("4 rows", values(1)))
    store.wait()

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    for step, (rank, module, name) in enumerate(
        [
            (1, orbax_io, "write_arrays"),
            (0, orbax_io, "write_arrays"),
            (2, free_space, "check_room"),
            (0, durable_directories, "commit"),
        ],
        2,
    ):
        real = getattr(module, name)
        if rank == RANK:
            setattr(module, name, fails)
        store.save(step, split("4 rows", values(step)))
        begun = time.monotonic()
        told = attempt(store.wait)
        setattr(module, name, real)
        dist.barrier()
        seen.append([told, attempt(store.wait), time.monotonic() - begun < 10, store.restore().step])
        dist.barrier()
    store.save(9, split("4 rows", values(9)))
    store.close()
    SEEN["failure"] = [*seen, files(root)]


def damage_on_one_rank_is_a_verdict_of_all() -> None:
    """A flipped byte in a part that only one rank reads; a template that differs on one rank only."""
    root = ROOT / "damage"
    ranks = ranks_of("4 rows")
    like = split("4 rows", values(0))
    with Store(root, keep=all_(), ranks=ranks) as store:
        for step in (1, 2):
            store.save(step, split("4 rows", values(step)))
    if RANK == 0:
        chunk = root / "2/parts/3/state/arena-0/0"
        content = bytearray(chunk.read_bytes())
        content[99] ^= 1
        chunk.write_bytes(content)
    dist.barrier()
    store = Store(root, keep=all_(), ranks=ranks)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        back = store.restore(like)
    seen = [back.step, same(back.value, split("4 rows", values(1))), len(caught)]
    seen += [[step, reason.replace(str(ROOT), "ROOT")] for step, reason in back.skipped]
    seen.append(attempt(lambda: store.restore(like, step=2).step))
    odd = like | ({"name": 3} if RANK == 2 else {})
    seen.append(attempt(lambda: store.restore(odd).step))
    seen.append(attempt(lambda: store.restore(like, step=7).step))
    SEEN["damage"] = seen


def a_plan_places_what_comes_back() -> None:
    """The states of `ps.init` under plans: fsdp saves, hsdp and one process go on."""
    from purestep import optim
    from purestep.sharding import fsdp, hsdp
    from purestep.state import init

    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4))
    tx = optim.adamw(1e-3)
    plans = {"fsdp": fsdp(min_size=1), "hsdp": hsdp(fsdp=2, min_size=1)}
    state = init(model, tx, seed=1)
    placed = {name: plan.place(state) for name, plan in plans.items()}
    split_leaves = {name: sum(map(placement.is_split, tree.leaves(s))) for name, s in placed.items()}
    with Store(ROOT / "plans", ranks=ranks_of("4 rows")) as store:
        store.save(1, placed["fsdp"])
        store.wait()
        back = store.restore(placed["hsdp"])
    whole = placement.gather(back.value)
    SEEN["plans"] = [
        tree.digest(whole) == back.digest == tree.digest(state),
        tree.equal(placement.local(back.value), placement.local(placed["hsdp"])),
        split_leaves,
    ]


def a_rank_that_dies_in_a_save() -> None:
    """Rank 3 is killed while it writes; rank 0 says who is missing, and the snapshot before stays good."""
    root = ROOT / "death"
    store = Store(root, keep=all_(), ranks=ranks_of("4 rows", timeout=1.0))
    store.save(1, split("4 rows", values(1)))
    store.wait()
    if RANK == 3:
        orbax_io.write_arrays = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    SEEN["death"] = []
    store.save(2, split("4 rows", values(2)))
    store._background.join()
    failure = store._background.job.failure
    SEEN["death"] = [type(failure).__name__, str(failure).replace(str(root), "ROOT")]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{ROOT}/rendezvous", rank=RANK, world_size=WORLD)
    for size in (1, 2, 4):
        GROUPS[size] = dist.new_group(list(range(size)))
    for layout, (sizes, *_) in LAYOUTS.items():
        count = torch.Size(sizes.values()).numel()
        numbers = torch.arange(count).reshape(tuple(sizes.values()))
        MESHES[layout] = DeviceMesh("cpu", numbers, mesh_dim_names=tuple(sizes))
    for check in CHECKS[:1] if EVERY_PAIR else CHECKS:
        check()
        dist.barrier()
    if not EVERY_PAIR:
        a_rank_that_dies_in_a_save()
    print(json.dumps(SEEN), flush=True)
    os._exit(0)  # the process group cannot be left in order, because a rank is gone


CHECKS = [
    saved_and_restored_everywhere,
    answers_are_the_same,
    a_failure_on_one_rank_reaches_all,
    damage_on_one_rank_is_a_verdict_of_all,
    a_plan_places_what_comes_back,
]

if __name__ == "__main__":
    main()
