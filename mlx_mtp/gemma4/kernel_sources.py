"""The source of the kernels in kernels.py: one body for Metal and CUDA, and what each language calls its parts.

In a body, a group of THREADS threads computes one row. `GROUP` is the number of the group and `THREAD` the number of
the thread in it. THREADS is a multiple of 32. Arithmetic is in float. Each norm, sum and rotation is rounded to the
type T once. MLX's operations round more often in some places, so their bits can differ.
"""

from typing import NamedTuple

METAL = """
#include <metal_stdlib>
using namespace metal;
#define SHARED threadgroup
#define SHARED_POINTER threadgroup float*
#define FUNCTION inline
#define BARRIER() threadgroup_barrier(mem_flags::mem_threadgroup)
#define SUM_OF_32(value) simd_sum(value)
#define INVERSE_ROOT(value) metal::precise::rsqrt(value)
#define COS(value) metal::fast::cos(value)
#define SIN(value) metal::fast::sin(value)
"""
METAL_PLACE = """
  const int GROUP = int(threadgroup_position_in_grid.x);
  const int THREAD = int(thread_position_in_threadgroup.x);
"""

CUDA = """
#define SHARED __shared__
#define SHARED_POINTER float*
#define FUNCTION __device__ inline
#define BARRIER() __syncthreads()
#define SUM_OF_32(value) sum_of_32(value)
#define INVERSE_ROOT(value) rsqrtf(value)
#define COS(value) cosf(value)
#define SIN(value) sinf(value)
__device__ inline float sum_of_32(float value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffff, value, distance);
  return value;
}
"""
CUDA_PLACE = """
  const int GROUP = int(blockIdx.x);
  const int THREAD = int(threadIdx.x);
"""

FUNCTIONS = """
// Return the sum of `value` over all threads of the group, in each thread. `sums` has 32 places.
FUNCTION float sum_of_group(float value, SHARED_POINTER sums, int thread, int threads) {
  const float own = SUM_OF_32(value);
  if (thread % 32 == 0) sums[thread / 32] = own;
  BARRIER();
  const float all = SUM_OF_32(thread % 32 < threads / 32 ? sums[thread % 32] : 0.0f);
  // The places may be written again only when all threads have read them.
  BARRIER();
  return all;
}
"""

# Each thread reads four neighbours, then the four that lie THREADS * 4 further on. MLX's norm sums in this order too.
ADD_NORM = """
  SHARED float sums[32];
  const int start = GROUP * WIDTH;
  float squares = 0.0f;
  for (int base = THREAD * 4; base < WIDTH; base += THREADS * 4) {
    for (int i = base; i < base + 4 && i < WIDTH; i++) {
      const float value = float(x[start + i]);
      squares += value * value;
    }
  }
  const float inverse = INVERSE_ROOT(sum_of_group(squares, sums, THREAD, THREADS) / WIDTH + eps[0]);
  squares = 0.0f;
  for (int base = THREAD * 4; base < WIDTH; base += THREADS * 4) {
    for (int i = base; i < base + 4 && i < WIDTH; i++) {
      const T normed_x = T(float(weight[i]) * (float(x[start + i]) * inverse));
      T sum = T(float(h[start + i]) + float(normed_x));
      if (HAS_SCALE) sum = T(float(sum) * float(scale[i]));
      new_h[start + i] = sum;
      squares += float(sum) * float(sum);
    }
  }
  if (HAS_FOLLOWING) {
    const float next = INVERSE_ROOT(sum_of_group(squares, sums, THREAD, THREADS) / WIDTH + eps[0]);
    for (int base = THREAD * 4; base < WIDTH; base += THREADS * 4) {
      for (int i = base; i < base + 4 && i < WIDTH; i++) {
        normed[start + i] = T(float(following[i]) * (float(new_h[start + i]) * next));
      }
    }
  }
"""

# One group for each head of each row. The heads of queries come first, then those of keys, then those of values. If
# keys are also the values, the input has no heads of values.
NORM_ROTATE = """
  SHARED float sums[32];
  SHARED float rotated[DIM];
  const int all_heads = HEADS + 2 * KV_HEADS;
  const int rows = x_shape[1];
  const int row = GROUP / all_heads;
  const int head = GROUP % all_heads;
  const bool is_value = head >= HEADS + KV_HEADS;
  const int input_heads = KEYS_ARE_VALUES ? HEADS + KV_HEADS : all_heads;
  const int input_head = KEYS_ARE_VALUES && is_value ? head - KV_HEADS : head;
  const int start = (row * input_heads + input_head) * DIM;
  float squares = 0.0f;
  for (int i = THREAD * 4; i < THREAD * 4 + 4 && i < DIM; i++) {
    const float value = float(x[start + i]);
    squares += value * value;
  }
  const float inverse = INVERSE_ROOT(sum_of_group(squares, sums, THREAD, THREADS) / DIM + eps[0]);
  const int kv_start = ((head - HEADS) % (KV_HEADS ? KV_HEADS : 1) * rows + row) * DIM;
  for (int i = THREAD * 4; i < THREAD * 4 + 4 && i < DIM; i++) {
    const float normed = float(x[start + i]) * inverse;
    if (is_value) {
      values[kv_start + i] = T(normed);
    } else {
      rotated[i] = float(T(normed * float(weight[head * WEIGHT_STEP + i])));
    }
  }
  BARRIER();
  if (is_value) return;
  const float position = float(offset[0] + row);
  for (int i = THREAD; i < DIM / 2; i += THREADS) {
    const float angle = position * (1.0f / periods[i]);
    const float cosine = COS(angle);
    const float sine = SIN(angle);
    const float first = rotated[i];
    const float second = rotated[i + DIM / 2];
    const T new_first = T(first * cosine - second * sine);
    const T new_second = T(first * sine + second * cosine);
    if (head < HEADS) {
      queries[(head * rows + row) * DIM + i] = new_first;
      queries[(head * rows + row) * DIM + i + DIM / 2] = new_second;
    } else {
      keys[kv_start + i] = new_first;
      keys[kv_start + i + DIM / 2] = new_second;
    }
  }
"""

# One group for each token. A word of 32 bits holds 32 / BITS values.
TABLE_ROWS = """
  const int per_word = 32 / BITS;
  const int words = WIDTH / per_word;
  const size_t token = size_t(tokens[GROUP]);
  for (int word = THREAD; word < words; word += THREADS) {
    const unsigned int packed = table[token * words + word];
    const size_t group = (token * WIDTH + word * per_word) / GROUP_SIZE;
    const float scale = float(scales[group]);
    const float bias = float(biases[group]);
    for (int i = 0; i < per_word; i++) {
      const unsigned int value = (packed >> (i * BITS)) & ((1u << BITS) - 1u);
      const T number = T(scale * float(value) + bias);
      rows[size_t(GROUP) * WIDTH + word * per_word + i] = T(float(number) * float(factor[0]));
    }
  }
"""


class Source(NamedTuple):
    """A kernel: its name, the names of its inputs and outputs, and its body."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str


SOURCES = (
    Source("mlx_mtp_add_norm", ("x", "h", "weight", "scale", "following", "eps"), ("new_h", "normed"), ADD_NORM),
    Source(
        "mlx_mtp_norm_rotate",
        ("x", "weight", "periods", "offset", "eps"),
        ("queries", "keys", "values"),
        NORM_ROTATE,
    ),
    Source("mlx_mtp_table_rows", ("tokens", "table", "scales", "biases", "factor"), ("rows",), TABLE_ROWS),
)
