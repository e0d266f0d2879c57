"""Device slots: where the trials that run at the same time on this machine are trained."""

from omegaconf import DictConfig

from experiments.system.machine import n_cores, visible_gpus

Slot = dict[str, str]  # what the environment of a process there has besides ours


def device_slots(jobs: int | str, trainer: DictConfig) -> list[Slot]:
    """One slot for each of the trials that are trained at once.

    A GPU is given by name. Cores are only counted: pinned to one that another program uses, a
    process would starve while others are idle.

    Args:
        jobs: how many, or "auto": as many as there are GPUs or, without, cores.
        trainer: the trials' conf/trainer, which says what one needs.

    Raises:
        ValueError: if a trial needs more than there is.
    """
    if jobs == 1:
        return [{}]
    gpus = [] if trainer.accelerator == "cpu" else visible_gpus()
    n_here = len(gpus) or n_cores()
    each = n_here if trainer.devices in ("auto", -1, "-1") else trainer.devices
    if not isinstance(each, int) or not 0 < each <= n_here:
        raise ValueError(
            f"jobs={jobs} with execution.trainer.devices={trainer.devices}: this machine has "
            f"{n_here} {'GPUs' if gpus else 'cores'}; set it to how many a trial gets"
        )
    n_jobs = n_here // each if jobs == "auto" else int(jobs)
    if not gpus:  # what a run with n_threads=null takes
        threads = str(max(1, n_here // (n_jobs * each)))
        return [{"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}] * n_jobs
    groups = [gpus[i : i + each] for i in range(0, n_here - each + 1, each)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(groups[i % len(groups)])} for i in range(n_jobs)]
