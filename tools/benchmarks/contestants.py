"""What a contestant of the updates measures, in a process of its own."""

from benchmarks import kernels, loop, profiles, steps
from benchmarks.own_process import Result
from benchmarks.steps import StepJob


def measure(job: StepJob) -> Result:
    """Speed, peak memory and losses of the contestant; with `job.profile`, its operations too."""
    steps.start(job)
    if job.name == "fasttrain loop":
        return loop.measure(job)
    return steps.measure(job, profiles.operations if job.profile else None)


def profile(job: StepJob) -> Result:
    """Where an update's time goes: by kernels on a GPU, by operations on a CPU."""
    return kernels.profile(job) if job.gpu else profiles.measure(job)
