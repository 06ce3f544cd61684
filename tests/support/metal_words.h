// The words of Metal in which the kernels of this project are written, as OpenCL C++: address spaces are checked.
typedef unsigned int uint;
typedef unsigned long size_t;
typedef uint uint3 __attribute__((ext_vector_type(3)));
namespace metal {
enum class mem_flags { mem_threadgroup };
void threadgroup_barrier(mem_flags);
float simd_sum(float);
namespace precise { float rsqrt(float); }
namespace fast { float cos(float); float sin(float); }
}
#define device __global
#define threadgroup __local
#define constant __constant
