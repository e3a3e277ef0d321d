"""A training on a local Ray cluster, which the tests of `ps.launch.ray` start: what, where, and what happens to it."""

import json
import os
import signal
import sys
from pathlib import Path

import torch

import purestep as ps


def experiment(directory: str, lose: str = "", home: str = "", steps: int = 12) -> ps.Experiment:
    plan = ps.sharding.ddp()
    tx = ps.optim.adamw(1e-2)

    def loss_fn(net, batch):
        return (net(batch["x"]) - batch["y"]).square().mean()

    def around(inner, state, batch):
        """In the first life of the job, a worker is killed in the middle, and with it, maybe, its node."""
        mark = Path(directory, "lost")
        if lose and not state.step.is_meta and int(state.step) == 7 and not mark.exists():
            import ray

            # The node to be lost is not that of the script which waits for the run.
            node = ray.get_runtime_context().get_node_id()
            if node != home if lose == "node" else ps.sharding.rank() == 1:
                mark.write_text(node)
                if lose == "node":
                    os.kill(os.getppid(), signal.SIGKILL)  # the raylet, which started it
                os.kill(os.getpid(), signal.SIGKILL)
        return inner(state, batch)

    step = ps.wrap_step(ps.make_step(loss_fn, tx, plan=plan, microbatches=4), around)

    def model():
        return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Dropout(0.3), torch.nn.Linear(7, 1))

    state = ps.init(model, tx, plan=plan)
    x = torch.randn(41, 5, generator=torch.Generator().manual_seed(0))
    data = ps.data.batches({"x": x, "y": x.sum(1, keepdim=True)}, 8, seed=3)
    callbacks = [ps.callbacks.snapshots(every=ps.every.steps(3)), ps.callbacks.log(every=ps.every.steps(2))]
    return ps.Experiment(step, state, data, until=ps.steps(steps), callbacks=callbacks)


def main() -> None:
    import ray
    from ray.cluster_utils import Cluster

    lose, directory = sys.argv[1:]
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    small = {"num_cpus": 1, "object_store_memory": 100 << 20}  # Ray takes a third of the machine's memory otherwise
    head = {**small, "include_dashboard": False, "_system_config": soon}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**small)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        workers = (1, 2) if lose == "node" else 2
        home = ray.get_runtime_context().get_node_id()
        settings = {"directory": directory, "lose": lose, "home": home}
        run = ps.launch.ray(experiment, workers=workers, storage=f"{directory}/run", settings=settings)
        nodes = {node["NodeID"]: node["Alive"] for node in ray.nodes()}
        told = {
            "digest": run.digest,
            "why": run.why,
            "metrics": list(run.metrics),
            "workers": run.environment["world_size"],
            "nodes": sum(nodes.values()),
            "lost": not nodes[Path(directory, "lost").read_text()],
        }
        Path(directory, "told.json").write_text(json.dumps(told))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
