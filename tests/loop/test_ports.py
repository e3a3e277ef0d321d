"""Nothing binds a port that was not asked for: not loggers, not worker processes, not Orbax, not JAX."""

import socket

import psutil
import pytest

import purestep as ps


def listening():
    """Return the ports that this process and all that came of it listen on."""
    found = set()
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            connections = process.net_connections(kind="inet")
        except psutil.NoSuchProcess:
            continue
        # A datagram socket does not listen; it is bound, and nobody is at its other end.
        found |= {(process.pid, c.laddr) for c in connections if c.status == psutil.CONN_LISTEN or is_bound(c)}
    return found


def is_bound(connection):
    return connection.type == socket.SOCK_DGRAM and bool(connection.laddr) and not connection.raddr


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_port_is_seen(kind):
    before = listening()
    with socket.socket(socket.AF_INET, kind) as bound:
        bound.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            bound.listen()
        assert [address.port for _, address in listening() - before] == [bound.getsockname()[1]]
    assert listening() == before


def test_a_run_with_everything_binds_no_port(job, tmp_path):
    pytest.importorskip("tensorboard")
    before, seen, workers = listening(), set(), set()

    def look(event, loop):
        seen.update(listening() - before)
        workers.update(child.pid for child in psutil.Process().children(recursive=True))

    children = {child.pid for child in psutil.Process().children(recursive=True)}
    data = ps.data.batches(job.table(37, 0), 8, seed=3, num_workers=1)
    options = job(data=lambda: data)
    options["callbacks"] += [ps.callbacks.tap(look), ps.callbacks.snapshots(every=ps.every.steps(2))]
    loggers = [ps.loggers.csv(), ps.loggers.tensorboard()]
    ps.fit(**options, until=ps.steps(7), run_dir=tmp_path, loggers=loggers)
    ps.restore(tmp_path, options["state"])
    assert workers - children, "there was no worker process to look at"
    assert seen | (listening() - before) == set()
