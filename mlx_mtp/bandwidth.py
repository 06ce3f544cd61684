"""The memory bandwidth of this machine, which bounds the speed of decoding."""

import time

import mlx.core as mx

# Memory bandwidth of Apple's chips in GB/s, from Apple's specifications. If a chip has variants, this is the largest
# value.
_BANDWIDTH = {
    "M1": 68, "M2": 100, "M3": 102, "M4": 120, "M5": 153,
    "M1 Pro": 200, "M2 Pro": 200, "M3 Pro": 150, "M4 Pro": 273, "M5 Pro": 307,
    "M1 Max": 400, "M2 Max": 400, "M3 Max": 410, "M4 Max": 546, "M5 Max": 614,
    "M1 Ultra": 800, "M2 Ultra": 800, "M3 Ultra": 819,
}  # fmt: skip


def memory_bandwidth() -> tuple[float, str]:
    """Return the memory bandwidth in bytes per second, and its source: "listed", or "measured" for other chips."""
    name = str(mx.device_info().get("device_name"))
    listed = _BANDWIDTH.get(name.removeprefix("Apple ").strip())
    return (listed * 1e9, "listed") if listed else (measured_bandwidth(), "measured")


def measured_bandwidth() -> float:
    """Measure the memory bandwidth in bytes per second.

    It is the best of four reductions over an array that is too large for the caches.
    """
    block = mx.ones(64 * 1024 * 1024, mx.float32)
    mx.eval(block)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        mx.eval(mx.max(block))
        best = min(best, time.perf_counter() - start)
    return block.nbytes / best
