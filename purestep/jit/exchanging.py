"""Plans whose ranks exchange in the middle of a microbatch, so that no graph holds all of it.

Owns which plans these are, and why. `step` compiles what a rank computes between two exchanges, unit by unit, or the
update alone.
"""

from __future__ import annotations

from purestep.errors import ConfigError, explain
from purestep.sharding.plan import Plan


def why(plan: Plan) -> str | None:
    """Return why a microbatch of a plan is no graph; None where it is one.

    The answer is the same on every number of ranks, so the same is compiled on all of them.

    Examples:
        >>> from purestep.sharding import ddp, pipeline
        >>> why(pipeline([["embed"], ["head"]])), why(ddp())
        ('ranks send and receive in the middle of the model', None)
    """
    if plan.stages:
        return "ranks send and receive in the middle of the model"
    if plan.expert_axis:
        return "how many tokens a rank sends to another is known only once the router has run"
    if plan.sync_batchnorm:
        return "ranks exchange statistics in the middle of the model"
    return None


def by_unit(plan: Plan | None) -> bool:
    """Tell whether a step of a plan is compiled unit by unit without being asked to: it exchanges between units."""
    return plan is not None and not plan.sync_batchnorm and bool(plan.stages or plan.expert_axis)


def refusal(plan: Plan, reason: str, *, units: bool) -> ConfigError:
    """Return the error of a step of which only the update can be compiled.

    Args:
        plan: of the step.
        reason: why a microbatch is no graph.
        units: whether units were looked for, and not found.
    """
    lacking = ", and the model has no units that could be compiled each by itself" if units else ""
    named = "\nor pipeline(stages, units=[...])   # modules that are compiled, each in one stage"
    return ConfigError(
        explain(
            "no gradients of this step can be compiled, only its update",
            where=repr(plan.mesh),
            why=f"{reason}{lacking}",
            instead='ps.jit(step, unjittable="eager")   # the update is compiled, gradients are computed as without jit'
            + (named if units and plan.stages else ""),
        )
    )


def check_whole(plan: Plan, unit: str) -> None:
    """Refuse a unit of which several ranks have a part.

    Raises:
        ConfigError: a stage begins in the middle of the unit.
    """
    if plan.pipelined and plan.stage_of(unit) is None:
        raise ConfigError(
            explain(
                "a stage begins in the middle of what is compiled",
                where=f"the unit {unit!r}",
                why="a unit is compiled as one piece, which has to be on one rank",
                instead=f"name {unit!r} in a stage, and no submodule of it\n"
                "or pipeline(stages, units=[...]), modules that each lie in one stage",
            )
        )
