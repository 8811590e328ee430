// Kernels that do one thing as fast as the hardware lets them, where no library has one to time.
// What is read is not used, and must be read all the same. Loads of shared memory are volatile in PTX too: volatile
// asm alone keeps the compiler from dropping them, and the assembler then merges four laps into one.

extern "C" __global__ void empty() {}

__device__ uint4 load_global(const uint4* from) {  // .cg: past L1, so that what is timed is L2 or HBM
    uint4 x;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
    return x;
}

__device__ uint4 load_shared(unsigned from) {
    uint4 x;
    asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from));
    return x;
}

// Every thread of the grid reads 16 bytes at a time, eight loads in flight; `count` is a multiple of eight grids.
extern "C" __global__ void __launch_bounds__(512) read_global(const uint4* data, long long count, int repeats, unsigned* sink) {
    const long long grid = (long long)gridDim.x * blockDim.x;
    const long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    unsigned seen = 0;
    for (int r = 0; r < repeats; ++r)
        for (long long at = first; at < count; at += 8 * grid) {
            uint4 x[8];
#pragma unroll
            for (int u = 0; u < 8; ++u) x[u] = load_global(data + at + u * grid);
#pragma unroll
            for (int u = 0; u < 8; ++u) seen ^= x[u].x ^ x[u].y ^ x[u].z ^ x[u].w;
        }
    if (seen == 1) *sink = seen;
}

// Eight loads of 16 bytes a thread and repeat; a warp reads 512 bytes in a row, so no bank is asked twice.
extern "C" __global__ void __launch_bounds__(256) read_shared(int repeats, unsigned* sink) {
    __shared__ uint4 tile[8 * 256];
    for (int i = threadIdx.x; i < 8 * 256; i += 256) tile[i] = uint4{0, 0, 0, 0};
    __syncthreads();
    const unsigned base = (unsigned)__cvta_generic_to_shared(tile + threadIdx.x);
    unsigned seen = 0;
    for (int r = 0; r < repeats; ++r) {
        uint4 x[8];
#pragma unroll
        for (int u = 0; u < 8; ++u) x[u] = load_shared(base + u * 256 * sizeof(uint4));
#pragma unroll
        for (int u = 0; u < 8; ++u) seen ^= x[u].x ^ x[u].y ^ x[u].z ^ x[u].w;
    }
    if (seen == 1) *sink = seen;
}

// Sixteen chains of x = 2^-x a thread, which settle at 0.641: the special-function unit and nothing else.
extern "C" __global__ void __launch_bounds__(512) exponentials(int repeats, float* sink) {
    float x[16];
#pragma unroll
    for (int u = 0; u < 16; ++u) x[u] = 0.01f * (threadIdx.x % 32 + u);
    for (int r = 0; r < repeats; ++r)
#pragma unroll
        for (int u = 0; u < 16; ++u) asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(x[u]) : "f"(-x[u]));
    float sum = 0;
#pragma unroll
    for (int u = 0; u < 16; ++u) sum += x[u];
    if (sum == 1) *sink = sum;
}
