"""Kernels for Metal and CUDA that run on the CPU: their source is compiled as C++, and threads are simulated.

MLX writes a signature around the body of a kernel. `Simulated` writes the same signature and compiles the text as C++,
with the words of the language defined by a header. The threads of a group are fibers, which run in turn up to the next
barrier. A barrier that not all threads of a group reach is an error.

This shows arithmetic, indices, types and barriers. It does not show the rules of the real compilers (for address
spaces see tests/decoding/test_kernels.py), their contraction of products and sums, or speed.
"""

import ctypes
import hashlib
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

_COMMON = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

typedef unsigned int uint;
struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float value) {
    uint32_t all;
    memcpy(&all, &value, 4);
    bits = (all + 0x7fff + ((all >> 16) & 1)) >> 16;
  }
  explicit operator float() const {
    uint32_t all = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &all, 4);
    return value;
  }
};
typedef _Float16 float16_t;
struct uint3 { uint x, y, z; };

static const int most_threads = 1024, stack_size = 16 * 1024;
static ucontext_t scheduler, fibers[most_threads];
static char stacks[most_threads][stack_size], is_done[most_threads];
static uint thread_number, group_number;
static float lanes[most_threads];

static void barrier() { swapcontext(&fibers[thread_number], &scheduler); }

static float sum_over_lanes(float value) {
  lanes[thread_number] = value;
  barrier();
  float sum = 0.0f;
  for (uint lane = 0; lane < 32; lane++) sum += lanes[thread_number / 32 * 32 + lane];
  barrier();
  return sum;
}

static float shuffled(float value, int distance) {
  lanes[thread_number] = value;
  barrier();
  const float other = lanes[thread_number ^ distance];
  barrier();
  return other;
}
"""

_METAL = r"""
#define threadgroup
#define constant
#define device
namespace metal {
enum class mem_flags { mem_threadgroup };
inline float simd_sum(float value) { return sum_over_lanes(value); }
inline void threadgroup_barrier(mem_flags) { barrier(); }
namespace precise { inline float rsqrt(float value) { return 1.0f / sqrtf(value); } }
namespace fast {
inline float cos(float value) { return cosf(value); }
inline float sin(float value) { return sinf(value); }
}
}
"""

_CUDA = r"""
#define __shared__ static
#define __device__
struct { uint x; } threadIdx, blockIdx;
inline void __syncthreads() { barrier(); }
inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
inline float __shfl_xor_sync(uint, float value, int distance) { return shuffled(value, distance); }
"""

_RUN = r"""
extern "C" int run(void** arrays, int* const* shapes, const int* numbers, int groups, int threads) {
  the_arrays = arrays;
  the_shapes = shapes;
  the_numbers = numbers;
  for (int group = 0; group < groups; group++) {
    group_number = group;
    for (int i = 0; i < threads; i++) {
      is_done[i] = 0;
      getcontext(&fibers[i]);
      fibers[i].uc_stack.ss_sp = stacks[i];
      fibers[i].uc_stack.ss_size = stack_size;
      fibers[i].uc_link = &scheduler;
      makecontext(&fibers[i], start, 0);
    }
    for (int done = 0; done < threads;) {
      int at_barrier = 0;
      done = 0;
      for (int i = 0; i < threads; i++) {
        thread_number = i;
        swapcontext(&scheduler, &fibers[i]);
        if (is_done[i]) done++; else at_barrier++;
      }
      if (done && at_barrier) return 1;
    }
  }
  return 0;
}
"""

_TYPES = {
    mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t", mx.int32: "int", mx.uint32: "uint32_t"
}  # fmt: skip
_PLACES = {
    "metal": """
  const uint3 threadgroup_position_in_grid = {group_number, 0, 0};
  const uint3 thread_position_in_threadgroup = {thread_number, 0, 0};
""",
    "cuda": "  blockIdx.x = group_number;\n  threadIdx.x = thread_number;\n",
}


class Simulated:
    """A kernel of `mx.fast.metal_kernel` or `mx.fast.cuda_kernel`, on the CPU. `folder` keeps what is compiled."""

    def __init__(self, folder: Path, language: str, **kernel: Any) -> None:
        self.folder = folder
        self.language = language
        self.kernel = kernel

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, Any]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """Run the kernel and return its outputs. Places that the kernel does not write are NaN."""
        inputs = [mx.contiguous(array) for array in inputs]
        outputs = [mx.full(s, float("nan"), t) for s, t in zip(output_shapes, output_dtypes, strict=True)]
        arrays = [*inputs, *outputs]
        mx.eval(arrays)
        library = ctypes.CDLL(str(self._compile(inputs, template, output_dtypes)))
        copies = [np.array(array.reshape(-1).view(mx.uint8)) for array in arrays]
        pointers = (ctypes.c_void_p * len(arrays))(*(copy.ctypes.data for copy in copies))
        shapes = [(ctypes.c_int * max(1, array.ndim))(*array.shape) for array in inputs]
        shape_pointers = (ctypes.c_void_p * len(inputs))(*(ctypes.addressof(shape) for shape in shapes))
        numbers = [int(value) for _, value in template if not isinstance(value, mx.Dtype)]
        number_array = (ctypes.c_int * len(numbers))(*numbers)
        groups, rest = divmod(grid[0], threadgroup[0])
        assert rest == 0, "a group has fewer threads than the others"
        assert library.run(pointers, shape_pointers, number_array, groups, threadgroup[0]) == 0, (
            "not all threads reach a barrier"
        )
        return [
            mx.array(copy).view(output.dtype).reshape(output.shape)
            for copy, output in zip(copies[len(inputs) :], outputs, strict=True)
        ]

    def text(self, inputs: Sequence[mx.array], template: Sequence[tuple[str, Any]], outputs: Sequence[mx.Dtype]) -> str:
        """Return the kernel as C++."""
        header = self.kernel["header"].replace("#include <metal_stdlib>", "")
        # Memory of a group: its threads run in turn, and one group after the other.
        header = header.replace("#define SHARED threadgroup", "#define SHARED static")
        lines = [_COMMON, _METAL if self.language == "metal" else _CUDA, header]
        lines += ["static void** the_arrays;", "static int* const* the_shapes;", "static const int* the_numbers;"]
        lines += ["static void compute() {", *(f"  using {n} = {_TYPES[v]};" for n, v in template if n == "T")]
        # The numbers are arguments here and not constants, so that one compilation serves all sizes.
        for i, (name, _) in enumerate((n, v) for n, v in template if n != "T"):
            lines.append(f"  const int {name} = the_numbers[{i}];")
        for i, (name, array) in enumerate(zip(self.kernel["input_names"], inputs, strict=True)):
            kind = _TYPES[array.dtype]
            lines.append(f"  const {kind}* {name} = static_cast<const {kind}*>(the_arrays[{i}]);")
            lines.append(f"  const int* {name}_shape = the_shapes[{i}]; (void){name}_shape;")
        for i, (name, dtype) in enumerate(zip(self.kernel["output_names"], outputs, strict=True), len(inputs)):
            lines.append(f"  {_TYPES[dtype]}* {name} = static_cast<{_TYPES[dtype]}*>(the_arrays[{i}]);")
        lines += [_PLACES[self.language], self.kernel["source"].replace("[DIM]", "[most_threads]"), "}"]
        lines += ["static void start() { compute(); is_done[thread_number] = 1; }", _RUN]
        return "\n".join(lines)

    def _compile(
        self, inputs: Sequence[mx.array], template: Sequence[tuple[str, Any]], outputs: Sequence[mx.Dtype]
    ) -> Path:
        text = self.text(inputs, template, outputs)
        file = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.so"
        if not file.exists():
            source = file.with_suffix(".cpp")
            source.write_text(text)
            compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
            command = [compiler, "-std=c++17", "-O1", "-w", "-ffp-contract=off", "-shared", "-fPIC"]
            subprocess.run([*command, str(source), "-o", str(file)], check=True, capture_output=True, text=True)
        return file
