"""Prints `budgets.py` as it is measured now: `python -m tests.device.measure`, where `make test-device` runs."""

from __future__ import annotations

import sys

import pytest
import torch
from shared_fake_cuda import counted

from tests.device import test_plans, test_steps

HEAD = '"""Launches of a step on a card, without its backward pass; `measure.py` prints this file, on torch {}."""\n'


def plans():
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        test_plans.pretend(patch)
        works = {(plan, work): options for plan in test_plans.PLANS for work, options in test_plans.WORK.items()}
        for (plan, work), options in works.items():
            test_plans.start(4)
            found[plan, work] = test_plans.counted(test_plans.PLANS[plan], 4, **options)[0].total
            test_plans.end()
            print(plan, work, file=sys.stderr)
    return found


def many():
    found = {}
    for case in test_plans.MANY:
        with pytest.MonkeyPatch.context() as patch:
            test_plans.pretend(patch)
            found[case] = test_plans.of_many(case, patch)[0].total
            test_plans.end()
    return found


def main():
    print(HEAD.format(torch.__version__))
    steps = {name: counted(*make())[0].total for name, make in test_steps.STEPS.items()}
    optimizers = {name: test_steps.updated(make())[0].total for name, make in test_steps.ROWS.items()}
    for name, table in (("STEPS", steps), ("OPTIMIZERS", optimizers), ("PLANS", plans()), ("MANY", many())):
        print(f"{name} = {{")
        for key, value in table.items():
            print(f"    {str(key)!r}: {value}," if isinstance(key, str) else f"    {key!r}: {value},")
        print("}")


if __name__ == "__main__":
    main()
