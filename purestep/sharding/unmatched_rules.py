"""Rules and units of a plan that match nothing in a state: almost always a misspelt path, so they are errors.

`placement` and deferred init call it, where the names of all parameters are known. Rules that a preset brings match
every name; only what a caller wrote can fail.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from purestep import tree
from purestep.errors import ConfigError, explain
from purestep.sharding.families import OfFamily
from purestep.sharding.leaf_roles import Leaf, follow
from purestep.sharding.spec import Both, Layout


def check_matches(plan: Layout, state: object) -> None:
    """Refuse a rule that matches no parameter of a state, and an entry of `units` that matches no submodule.

    A bare tree of tensors passes: it may be a part of what the rules are for.

    Args:
        plan: the plan.
        state: a state, or a pytree of several; a rule has to match in one of them.

    Raises:
        ConfigError: names the filter, and the paths that are closest to it.
    """
    if not plan.rules and not plan.units:
        return
    leaves = [leaf for leaf in follow(state) if leaf.kind in ("params", "frozen") and _in_state(leaf)]
    names = [leaf.name or "" for leaf in leaves]
    if not names:
        return
    filters = [each for rule, _ in plan.rules for each in _factors(rule)]
    families = sorted({each.family for each in filters if isinstance(each, OfFamily)})
    if families:
        _check_families(families, filters, leaves)
    for filter in filters:
        if not isinstance(filter, OfFamily) and not any(tree.matches(filter, name) for name in names):
            _refuse("a rule of the plan matches no parameter", filter, names)
    modules = list(dict.fromkeys(prefix for name in names for prefix in _parents(name)))
    for glob in plan.units or ():
        if not any(tree.matches(glob, module) for module in modules):
            _refuse("an entry of units= matches no submodule with parameters", glob, modules)


def _check_families(families: Sequence[str], filters: Sequence[tree.Filter], leaves: Sequence[Leaf]) -> None:
    """Refuse matrices that the rules of a family do not know: they would be whole, and computed by every rank."""
    own = [each for each in filters if each != "*"]
    left = [x.name or "" for x in leaves if len(x.shape) > 1 and not any(tree.matches(f, x.name or "") for f in own)]
    if left:
        shown = list(dict.fromkeys(left))
        raise ConfigError(
            explain(
                f"the rules of {', '.join(families)} do not know {len(shown)} matrices of the model",
                where=", ".join(shown[:8]) + (", ..." if len(shown) > 8 else ""),
                why="each rank would hold the whole of them, and compute with the whole",
                instead=f'{{**ps.sharding.tensor_rules("{families[0]}"), "{shown[0]}": Spec("tensor")}}\n'
                'Spec("tensor") splits a matrix by its outputs, Spec(None, "tensor") by its inputs; Spec() does not',
            )
        )


def _in_state(leaf: Leaf) -> bool:
    """Tell a parameter of a state from a leaf of a bare tree, whose path is its name."""
    return ".".join(map(str, leaf.path)) != leaf.name


def _factors(filter: tree.Filter) -> Iterator[tree.Filter]:
    """The filters as they were written: products of plans pair them, and a pair may rightly match nothing."""
    if isinstance(filter, Both):
        yield from _factors(filter.first)
        yield from _factors(filter.second)
    else:
        yield filter


def _parents(name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _refuse(what: str, filter: tree.Filter, names: Sequence[str]) -> None:
    globs = [] if callable(filter) else [filter] if isinstance(filter, str) else list(filter)
    close = dict.fromkeys(near for glob in globs for near in difflib.get_close_matches(glob, names, n=3, cutoff=0.4))
    shown = list(close)[:3] or list(names)[:3]
    raise ConfigError(
        explain(
            what,
            where=f"{getattr(filter, '__name__', None) or repr(filter)}; {'closest' if close else 'there are'}: "
            f"{', '.join(shown) or 'none'}",
            why="it would have no effect; filters are globs over dotted names, such as '*.weight' or 'blocks.0.*'",
            instead="mend the path, or leave the entry out",
        )
    )
