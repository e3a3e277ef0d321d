"""The identity of a run: what its data, step, callbacks and code are, and what a resume says of a change.

A snapshot of a run records it, in plain JSON. A resume compares it field by field with that of the run that goes on:
changes are a warning, or an error with `strict=True`; a position that is no place in the data is always an error.
`stable_json` describes the values, `run` asks.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from purestep import snapshot
from purestep.errors import DataError, SnapshotError, TemplateMismatch, explain
from purestep.loop.events import Callback, Cursor
from purestep.loop.stable_json import stable
from purestep.snapshot.codec import JSON
from purestep.step_protocol import Seat, StepFacts, StepFn, facts_of


class RunChangedWarning(UserWarning):
    """A resumed run is not the one that was saved: its data, step, callbacks, code or environment are others."""


@dataclasses.dataclass(frozen=True, eq=False)
class Identity:
    """What makes a run the one that it is, apart from its state.

    Where it runs is not part of it: processes, plan, workers, run directory, loggers, nor when it ends. The device is
    recorded as a condition that bits depend on.

    Args:
        data: the source that it trains on.
        step: its step.
        callbacks: its callbacks; those that only look on are left out.
        settings: what `fit(..., settings=)` was given, as JSON.
        device: what it computes on, see `devices.name_of`.

    Examples:
        >>> import purestep as ps
        >>> Identity(ps.data.as_source([1, 2]), None, ()).plain["data"]
        {'class': 'builtins.list', 'length': 2}
    """

    data: Any
    step: Any
    callbacks: Sequence[Callback]
    settings: Mapping[str, JSON] = dataclasses.field(default_factory=dict)
    device: str = "cpu"

    @functools.cached_property
    def plain(self) -> dict[str, JSON]:
        """The identity as JSON. A run asks at its start: later a source file may have been edited."""
        callbacks = {callback.name: callback for callback in self.callbacks}
        found = stable({"step": self.step, "callbacks": callbacks, "data": self.data})
        watched = {name: said for name, said in found["callbacks"].items() if said is not None}
        version = getattr(sys.modules[__name__.partition(".")[0]], "__version__", None)
        code = {"purestep": version, "python": sys.version.split()[0]}
        said = {"data": found["data"], "step": found["step"], "callbacks": watched, "code": code}
        # A run without settings says nothing of them, so that one which names them later is the same run.
        return {**said, "settings": dict(self.settings)} if self.settings else said


# --- conditions: what bits depend on besides the values of a run, and how to have it as it was ------------------------

_ENVIRONMENT = {
    "torch": "pip install torch=={}",
    "bits": "PURESTEP_BITS={}",
    "threads": "torch.set_num_threads({})",
    "cpu_capability": "a machine of the kind the run began on (CPU capability {})",
    "deterministic": "torch.use_deterministic_algorithms({})",
    "float32_matmul_precision": "torch.set_float32_matmul_precision({!r})",
}

_STEP = {
    "microbatches": "ps.make_step(..., microbatches={})",
    "compiled": "the step compiled as it was: {}",
    "reduction": "a plan with reduction={!r}, or no plan for None",
    "compress": "a plan with compress={!r}",
    "tensor_parallel": "tensor_parallel(rules, size, tensor_parts={})",
    "sequence_parallel": "tensor_parallel(rules, size, sequence_parallel={})",
    "context": "context_parallel(size, parts=...) as it was: {}",
    "attention": "context_parallel(size, attention={!r})",
    "experts": "a plan with experts={!r}",
    "device": "the device it was saved on: {}",
}


def conditions(step: StepFn, device: str = "cpu") -> dict[str, Any]:
    """Return what the bits of a run depend on in its step: microbatches, what compiled it, the precision policy, how a
    plan sums gradients and splits matrix products, and the device. On how many ranks they were computed is not among
    them. Of a run that trains together with others its seat is noted, too; of one with a warm-up where it switches."""
    facts = facts_of(step)
    policy, plan = facts.policy, facts.plan
    seat = {} if facts.seat is None else {"seat": dataclasses.asdict(facts.seat)}
    warmup = {"warmup": facts.warmup} if facts.warmup else {}
    return {
        **seat,
        **warmup,
        "microbatches": None if facts.microbatches == "auto" else facts.microbatches,
        "compiled": _compiled(facts, facts.warmup),
        "policy": None if policy is None else str(policy),
        "reduction": None if plan is None else plan.reduction,
        "compress": None if plan is None else plan.compress,
        "tensor_parallel": 1 if plan is None else plan.parts if plan.tensor_axis else 1,
        "sequence_parallel": plan is not None and plan.sequence_parallel,
        "context": plan is not None and plan.context,
        "attention": "gather" if plan is None else plan.attention,
        "experts": [] if plan is None else list(plan.experts),
        "device": device,
    }


def _compiled(facts: StepFacts, warmup: int | Literal["eager"]) -> str | None:
    backend = f"{facts.backend} unit by unit" if facts.by_unit else facts.backend
    if not warmup:
        return backend
    return f"{backend} once it is compiled" if warmup == "eager" else f"{backend} from step {warmup}"


def warmup_of(info: Mapping[str, Any]) -> int | None:
    """Return the counter of the state from which on a run was compiled; None where its snapshot does not say.

    Args:
        info: of the header or the manifest of the snapshot.
    """
    step = info.get("step")
    told = step.get("warmup") if isinstance(step, Mapping) else None
    return told if isinstance(told, int) and told > 0 else None


def seat_of(info: Mapping[str, Any]) -> Seat | None:
    """Return the seat that a snapshot records; None for a run that trained alone.

    Args:
        info: of the header or the manifest of the snapshot.
    """
    step = info.get("step")
    told = step.get("seat") if isinstance(step, Mapping) else None
    if not isinstance(told, Mapping):
        return None
    number, members = told.get("number"), told.get("members")
    if not (isinstance(number, int) and isinstance(members, int) and 0 <= number < members):
        return None
    return Seat(number, members)


def _changed_conditions(manifest: snapshot.Manifest, identity: Identity) -> list[tuple[str, str]]:
    """Return what is other than it was, and how to have it again."""
    now, then = snapshot.environment(), manifest.environment
    changed = [(name, then[name], now[name], _ENVIRONMENT[name]) for name in _ENVIRONMENT if name in then]
    was, is_ = manifest.info.get("step"), conditions(identity.step, identity.device)
    if isinstance(was, Mapping):
        facts = facts_of(identity.step)
        if was.get("warmup") == "eager" and facts.warmup:  # where it switches was decided after this snapshot
            is_["compiled"] = _compiled(facts, "eager")
        _check_policy(was, is_)
        # Without a number yet ("auto") the run goes on with those it has.
        names = [name for name in _STEP if name in was and not (name == "microbatches" and is_[name] is None)]
        changed += [(name, was[name], is_[name], _STEP[name]) for name in names]
    changed = [entry for entry in changed if entry[1] != entry[2]]
    return [(f"{name}: saved under {old}, now {new}", hint.format(old)) for name, old, new, hint in changed]


def _check_policy(was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if "policy" in was and was["policy"] != now["policy"]:
        raise TemplateMismatch(
            explain(
                "this run was saved under another precision policy than that of the step",
                where=f"saved under {was['policy']}, now {now['policy']}",
                instead="state = ps.restore(run_dir, like=state, policy=policy)   # and go on in another run_dir\n"
                "or ps.make_step(loss_fn, tx, policy=...) with the policy it was saved under",
            )
        )


# --- comparing ------------------------------------------------------------------------------------------------------


def check_resumed(
    manifest: snapshot.Manifest,
    identity: Identity,
    cursor: Cursor,
    length: int | None,
    *,
    strict: bool = False,
    silent: bool = False,
) -> None:
    """Compare the run that goes on with the one that a snapshot is of. Snapshots of older versions record less of it.

    Args:
        manifest: of the snapshot.
        identity: of the run that goes on.
        cursor: position in the data at which it does.
        length: batches an epoch of its data, None when unknown.
        strict: whether a change is an error.
        silent: say nothing, on all ranks but one.

    Raises:
        DataError: the position is no place in the data, because they are other data.
        SnapshotError: `strict`, and something has changed.
        TemplateMismatch: the step has another precision policy.
    """
    changed = differences(manifest, identity)
    _check_position(changed, cursor, length)
    conditioned = _changed_conditions(manifest, identity)
    if not changed and not conditioned:
        return
    text = _words(changed, conditioned, cursor)
    if strict:
        raise SnapshotError(text)
    if not silent:
        warnings.warn(text, RunChangedWarning, stacklevel=2)


def _words(changed: Sequence[str], conditioned: Sequence[tuple[str, str]], cursor: Cursor) -> str:
    what, why = "this run was saved under other conditions, so its bits may differ from here on", []
    if changed:
        what = "the run that goes on here is not the one that was saved"
        why.append("what follows is computed with the new settings, so the result is that of neither run alone")
    if cursor.batch and any(line.startswith("data") for line in changed):
        why.append(f"at batch {cursor.batch} of epoch {cursor.epoch} it may miss samples, or read some a second time")
    if conditioned:
        why.append("the order of sums inside matmul, LayerNorm and the like depends on the conditions")
    another = ["what it was saved with, or another run_dir= for another run"] if changed else []
    return explain(
        what,
        where="\n".join([*changed, *(line for line, _ in conditioned)]),
        why="\n".join(why),
        instead="\n".join([*another, *(hint for _, hint in conditioned)]),
    )


def differences(manifest: snapshot.Manifest, identity: Identity) -> list[str]:
    """Return a line for each field of the identity that differs; none when the snapshot records no identity."""
    was, now = manifest.info.get("identity"), identity.plain
    if not isinstance(was, Mapping):
        return []
    return [line for part in now if part in was for line in _differences(part, was[part], now[part])]


def _check_position(changed: Sequence[str], cursor: Cursor, length: int | None) -> None:
    data = [line for line in changed if line.startswith("data")]
    if not data or length is None or cursor.batch <= length:
        return
    raise DataError(
        explain(
            "the position of the snapshot is no place in the data, which are not those it was saved with",
            where="\n".join([f"epoch {cursor.epoch}, batch {cursor.batch}", *data]),
            why=f"an epoch has {length} batches now",
            instead="the data it was saved with, resume=<n> with a snapshot between two epochs, or another run_dir=",
        )
    )


def _differences(path: str, was: JSON, now: JSON) -> Iterator[str]:
    if was == now:
        return
    if isinstance(was, dict) and isinstance(now, dict):
        if any(was.get(name) != now.get(name) for name in ("class", "function", "tensor")):
            yield f"{path}: saved with {_shown(was)}, now {_shown(now)}"
            return
        for name in [name for name in {**was, **now} if was.get(name) != now.get(name)]:
            yield from _field(path, name, was, now)
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for index, (old, new) in enumerate(zip(was, now, strict=True)):
            yield from _differences(f"{path}[{index}]", old, new)
    else:
        yield f"{path}: saved with {_shown(was)}, now {_shown(now)}"


def _field(path: str, name: str, was: Mapping[str, JSON], now: Mapping[str, JSON]) -> Iterator[str]:
    if name == "source" and "function" in now:
        if None not in (was.get(name), now.get(name)):
            yield f"{path}: the source of {_shown(now)} has changed"
    elif name == "digest" and ("tensor" in now or "length" in now):
        if name in was and name in now:
            yield f"{path}: its content has changed ({_shown(now)})"
    elif name not in was:
        yield f"{path}.{name}: new, {_shown(now[name])}"
    elif name not in now:
        yield f"{path}.{name}: saved with {_shown(was[name])}, now without"
    elif name in ("reads", "wraps") and "function" in was:
        yield from _differences(f"{path}, which {name}" if name == "wraps" else path, was[name], now[name])
    else:
        yield from _differences(f"{path}.{name}", was[name], now[name])


_LONGEST = 100  # characters of a value in a message
_DEEPEST = 4


def _shown(value: JSON) -> str:
    text = _written(value, 0)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _written(value: JSON, depth: int) -> str:
    """A description as code, roughly: `Adam(learning_rate=0.1)`."""
    if depth > _DEEPEST:
        return "..."
    if isinstance(value, list):
        return f"[{', '.join(_written(item, depth + 1) for item in value[:_LONGEST])}]"
    if not isinstance(value, dict):
        return repr(value)
    if "values" in value and "tensor" in value:
        return f"{value['tensor']} {_written(value['values'], depth + 1)}"
    if "tensor" in value:
        return str(value["tensor"])
    if "function" in value and "class" not in value:
        return str(value["function"])
    fields = [(name, _written(field, depth + 1)) for name, field in value.items() if name != "class"]
    if "class" not in value:
        return f"{{{', '.join(f'{name}: {text}' for name, text in fields)}}}"
    return f"{str(value['class']).rpartition('.')[2]}({', '.join(f'{name}={text}' for name, text in fields)})"
