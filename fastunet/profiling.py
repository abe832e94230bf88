"""Where the time of a training step goes: a trace for viewers, and a sum for each of its phases."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from .files import replacing

PHASES = ("input", "forward", "loss", "backward", "optimiser")
TRACE = "trace.json"
# the first steps allocate and choose kernels
SKIPPED_STEPS, PROFILED_STEPS = 3, 10


def phase(name: str) -> record_function:
    """A block that counts as the phase ``name`` of a step; nothing without a profiler."""
    return record_function(f"fastunet.{name}")


class StepProfile:
    """The profile of a run's first steps.

    Args:
        folder: gets ``trace.json``, for chrome://tracing or Perfetto; made if need be.

    ``time_ms`` holds the milliseconds a step of each phase on the host when the steps are done, and
    ``device_time_ms`` those of its kernels on a GPU, which the host does not wait for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.time_ms: dict[str, float] = {}
        self.device_time_ms: dict[str, float] = {}
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=SKIPPED_STEPS, active=PROFILED_STEPS, repeat=1),
            on_trace_ready=self._keep,
        )

    def step(self) -> None:
        """Say that a step has ended."""
        self._profiler.step()

    def _keep(self, profiler: profile) -> None:
        with replacing(self.folder / TRACE) as temporary:
            profiler.export_chrome_trace(str(temporary))
        # on a GPU a phase comes again as a range of the device's own clock
        rows = [row for row in profiler.key_averages() if row.device_type == DeviceType.CPU]
        events = {row.key: row for row in rows}
        # a phase may have several blocks a step
        steps = min(PROFILED_STEPS, profiler.step_num - SKIPPED_STEPS)
        for name in PHASES:
            event = events[f"fastunet.{name}"]
            self.time_ms[name] = event.cpu_time_total / steps / 1000
            device_time = event.device_time_total
            if name == "backward":
                # autograd launches it from a thread of its own
                device_time += sum(
                    row.device_time_total
                    for key, row in events.items()
                    if key.startswith("autograd::engine::evaluate_function")
                )
            self.device_time_ms[name] = device_time / steps / 1000


@contextmanager
def profiled(folder: Path | None) -> Iterator[StepProfile | None]:
    """Profile the steps within; nothing without a folder."""
    if folder is None:
        yield None
        return
    steps = StepProfile(folder)
    with steps._profiler:
        yield steps
