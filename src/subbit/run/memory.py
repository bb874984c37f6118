"""Peak memory of this process, resident and on the GPU."""

import contextlib
import resource
import sys
from pathlib import Path

__all__ = ["format_bytes", "peak_cuda_bytes", "peak_rss_bytes", "reset_peak_rss"]


def peak_rss_bytes() -> int:
    """Return the highest resident memory of this process so far, in bytes.

    On Linux the kernel's own high-water mark is read: `ru_maxrss` survives exec there, so that a
    process started by a large parent would report its parent's size.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def reset_peak_rss() -> None:
    """Let `peak_rss_bytes` start anew from what is resident now, where the kernel lets us."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_cuda_bytes() -> int:
    """Return the highest GPU memory that torch held so far, in bytes, over all GPUs.

    0 without a GPU, and where torch was never imported (torch is not imported for this).
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))


def format_bytes(count: float) -> str:
    """Return `count` bytes as text in binary units, such as `512 MiB` or `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
