"""A sweep on a real Ray of this machine, one of whose workers is killed: ``make ray``."""

import time

import psutil

from .conftest import Sweep, assert_same, wait_for

N_TOKENS = 200_000


def test_a_worker_that_dies_costs_nothing(sweep: Sweep) -> None:
    start = time.monotonic()
    launcher = sweep.start("ray", "hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2")
    try:
        wait_for(lambda: any((r.path / "metrics.csv").exists() for r in sweep.trials("ray")))
        workers = [
            process
            for process in psutil.Process(launcher.pid).children(recursive=True)
            if process.name().startswith("ray::train")
        ]
        assert workers
        workers[0].kill()
        code = launcher.wait(timeout=3600)
    finally:
        launcher.kill()
    print(f"\nRay, a worker killed: {time.monotonic() - start:.0f} s")
    assert code == 0, sweep.printed("ray")
    assert "4 trained" in sweep.printed("ray")
    assert_same(sweep.trials("ray"), sweep.trials("quiet"))
