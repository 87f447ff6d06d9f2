"""The project's timer of benchmarks, on a GPU between two events on its stream, elsewhere by a clock; the machine."""

import platform
import re
import sys
import time
from pathlib import Path

import torch


def machine(device="cpu"):
    """The name of the GPU or of the processor, as precise as the system tells it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        info = dict(re.findall(r"^(.*?)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
        return f"{info['model name']} (family {info['cpu family']} model {info['model']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def timed(call, device, repeats=1, clock=time.perf_counter):
    """(the last result of `repeats` calls, the seconds of each, the peak of memory in bytes meanwhile).

    On a GPU the calls are queued one after the other, without a wait in between. The peak is the GPU's, on Linux
    without a GPU the process's, None elsewhere.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
        marks = []
        for _ in range(repeats):
            marks.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            marks[-1][0].record()
            result = call()
            marks[-1][1].record()
        torch.cuda.synchronize(device)
        seconds = [start.elapsed_time(end) / 1e3 for start, end in marks]
        return result, seconds, torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    wait, seconds = torch.mps.synchronize if device.type == "mps" else lambda: None, []
    for _ in range(repeats):
        wait()
        start = clock()
        result = call()
        wait()
        seconds.append(clock() - start)
    status = Path("/proc/self/status").read_text() if sys.platform == "linux" else ""
    return result, seconds, 1024 * int(status.split("VmHWM:")[1].split()[0]) if "VmHWM:" in status else None
