// What the kernels ask of the hardware, one inline function an instruction (PTX ISA 9.0).
//
// With HCF_EMULATE the same functions are ordinary C++ (emulate.h), so that tests run the kernels
// on a CPU, thread by thread. Shared memory is named by its 32-bit address throughout.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// Types of a and b. A step of all of them is 32 bytes of k, in the same fragments.
constexpr int INT8 = 0, E4M3 = 1, FP16 = 2, BF16 = 3;

template <int TYPE> struct Accumulator { using type = float; };
template <> struct Accumulator<INT8> { using type = int; };

// CUtensorMap of cuda.h, made on the host.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

#ifdef HCF_EMULATE
#include "emulate.h"
#else

#define HCF_DEVICE static __device__ __forceinline__
#define HCF_METHOD __device__ __forceinline__
#define HCF_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)
#define HCF_CLUSTER_KERNEL(threads, cluster) \
    extern "C" __global__ void __cluster_dims__(cluster, 1, 1) __launch_bounds__(threads, 1)
#define HCF_GRID_CONSTANT const __grid_constant__

HCF_DEVICE u32 shared_base() {
    extern __shared__ __align__(1024) u8 memory[];
    return static_cast<u32>(__cvta_generic_to_shared(memory));
}

HCF_DEVICE void sync_block() { __syncthreads(); }

HCF_DEVICE u32 shuffle_xor(u32 value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

// ---- values

// Two floats rounded to nearest even, `low` at the lower address.
HCF_DEVICE u32 pack_fp16(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

HCF_DEVICE u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

HCF_DEVICE float from_fp16(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

HCF_DEVICE float from_bf16(u16 bits) { return __uint_as_float(u32(bits) << 16); }

HCF_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

HCF_DEVICE float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

HCF_DEVICE void store_16_bytes(void* to, const u32 (&v)[4]) {
    *static_cast<uint4*>(to) = make_uint4(v[0], v[1], v[2], v[3]);
}

HCF_DEVICE float reciprocal_root(float x) {
    float y;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Four values to -127 .. 127, to nearest even
HCF_DEVICE u32 pack_int8(const float* v) {
    u32 packed = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int code;
        asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(code) : "f"(v[i] < -127.0f ? -127.0f : v[i]));
        packed |= (static_cast<u32>(code) & 255) << i * 8;
    }
    return packed;
}

// Four values to -448 .. 448, to nearest even
HCF_DEVICE u32 pack_e4m3(const float* v) {
    u16 low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(v[1]), "f"(v[0]));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(v[3]), "f"(v[2]));
    return static_cast<u32>(high) << 16 | low;
}

HCF_DEVICE float shuffle_xor(float value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

HCF_DEVICE void store_8_bytes(void* to, u32 low, u32 high) {
    *static_cast<uint2*>(to) = make_uint2(low, high);
}

HCF_DEVICE void shared_load(u32 (&v)[4], u32 address) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address) : "memory");
}

HCF_DEVICE float shared_load_float(u32 address) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}

HCF_DEVICE void shared_store(u32 address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" :: "r"(address), "f"(value) : "memory");
}

// ---- sm_80: cp.async, ldmatrix, mma.sync

// 16 bytes, zeros where not `inside`.
HCF_DEVICE void copy_async(u32 to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

HCF_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING> HCF_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8.
HCF_DEVICE void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

#define HCF_MMA(SHAPE, C)                                                              \
    asm volatile("mma.sync.aligned." SHAPE                                             \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"    \
                 : C(c[0]), C(c[1]), C(c[2]), C(c[3])                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// c (16, 8) += a (16, 32 bytes of k) @ b (8, 32 bytes of k)^T
template <int TYPE>
HCF_DEVICE void mma(typename Accumulator<TYPE>::type* c, const u32* a, const u32* b) {
    if constexpr (TYPE == INT8) HCF_MMA("m16n8k32.row.col.s32.s8.s8.s32", "+r");
    if constexpr (TYPE == E4M3) HCF_MMA("m16n8k32.row.col.f32.e4m3.e4m3.f32", "+f");
    if constexpr (TYPE == FP16) HCF_MMA("m16n8k16.row.col.f32.f16.f16.f32", "+f");
    if constexpr (TYPE == BF16) HCF_MMA("m16n8k16.row.col.f32.bf16.bf16.f32", "+f");
}

// ---- sm_90: mbarrier, bulk tensor copies, clusters

HCF_DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals));
}

// Makes initialised barriers known to the copy engine and to the other blocks of the cluster.
HCF_DEVICE void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

HCF_DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(barrier), "r"(bytes) : "memory");
}

// On the barrier at the same address in block `rank` of the cluster.
HCF_DEVICE void barrier_arrive(u32 barrier, u32 rank) {
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}"
        :: "r"(barrier), "r"(rank) : "memory");
}

// Until the phase of this parity is over.
HCF_DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred over;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%0], %1;\n"
        "@!over bra again;\n}"
        :: "r"(barrier), "r"(parity) : "memory");
}

HCF_DEVICE void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory");
}

// A box of the tensor to shared memory; its bytes count on `barrier`. A mask of more than this
// block writes, and counts, at the same addresses in every block of the mask.
#define HCF_LOAD_BOX(DIMENSIONS, COORDINATES, MASK_OPERAND, BARRIER_OPERAND, ...)              \
    do {                                                                                       \
        if constexpr (MULTICAST)                                                               \
            asm volatile("cp.async.bulk.tensor." DIMENSIONS ".shared::cluster.global.mbarrier" \
                         "::complete_tx::bytes.multicast::cluster [%0], [%1, {" COORDINATES    \
                         "}], [" BARRIER_OPERAND "], " MASK_OPERAND ";"                        \
                         :: "r"(to), "l"(&map), __VA_ARGS__, "r"(barrier), "h"(mask)           \
                         : "memory");                                                          \
        else                                                                                   \
            asm volatile("cp.async.bulk.tensor." DIMENSIONS ".shared::cluster.global.mbarrier" \
                         "::complete_tx::bytes [%0], [%1, {" COORDINATES                       \
                         "}], [" BARRIER_OPERAND "];"                                          \
                         :: "r"(to), "l"(&map), __VA_ARGS__, "r"(barrier) : "memory");         \
    } while (false)

template <bool MULTICAST>
HCF_DEVICE void load_box(u32 to, const TensorMap& map, u32 barrier, u16 mask, int x, int y) {
    HCF_LOAD_BOX("2d", "%2, %3", "%5", "%4", "r"(x), "r"(y));
}

template <bool MULTICAST>
HCF_DEVICE void load_box(u32 to, const TensorMap& map, u32 barrier, u16 mask, int x, int y,
                         int z) {
    HCF_LOAD_BOX("3d", "%2, %3, %4", "%6", "%5", "r"(x), "r"(y), "r"(z));
}

template <bool MULTICAST>
HCF_DEVICE void load_box(u32 to, const TensorMap& map, u32 barrier, u16 mask, int x, int y,
                         int z, int w) {
    HCF_LOAD_BOX("4d", "%2, %3, %4, %5", "%7", "%6", "r"(x), "r"(y), "r"(z), "r"(w));
}

HCF_DEVICE u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// At the same address in block `rank` of the cluster.
HCF_DEVICE float cluster_load_float(u32 address, u32 rank) {
    float value;
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %1, %2;\n"
        "ld.shared::cluster.f32 %0, [there];\n}"
        : "=f"(value) : "r"(address), "r"(rank) : "memory");
    return value;
}

// All threads of all blocks of the cluster.
HCF_DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// ---- sm_90a: wgmma, registers of a warpgroup

template <int REGISTERS> HCF_DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS));
}

template <int REGISTERS> HCF_DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(REGISTERS));
}

HCF_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

HCF_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING> HCF_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
}

#define HCF_OPERANDS_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HCF_OPERANDS_64 \
    HCF_OPERANDS_32 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HCF_OPERANDS_128 \
    HCF_OPERANDS_64 ", " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define HCF_R4(C, i) C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3])
#define HCF_R16(C, i) HCF_R4(C, i), HCF_R4(C, i + 4), HCF_R4(C, i + 8), HCF_R4(C, i + 12)
#define HCF_R32(C, i) HCF_R16(C, i), HCF_R16(C, i + 16)
#define HCF_R64(C, i) HCF_R32(C, i), HCF_R32(C, i + 32)
#define HCF_REGISTERS_32(C) HCF_R32(C, 0)
#define HCF_REGISTERS_64(C) HCF_R64(C, 0)
#define HCF_REGISTERS_128(C) HCF_R64(C, 0), HCF_R64(C, 64)

#define HCF_WGMMA(SHAPE, TYPES, COUNT, A, B, ADD, TAIL, C)                                 \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n"                      \
                 "wgmma.mma_async.sync.aligned." SHAPE TYPES " {" HCF_OPERANDS_##COUNT "}, " \
                 A ", " B ", add" TAIL ";\n}"                                              \
                 : HCF_REGISTERS_##COUNT(C) : "l"(a), "l"(b), "r"(int(add)))

#define HCF_WGMMA_N(N, COUNT, A, B, ADD)                                                          \
    if constexpr (TYPE == INT8)                                                                   \
        HCF_WGMMA("m64n" N "k32", ".s32.s8.s8", COUNT, A, B, ADD, "", "+r");                      \
    if constexpr (TYPE == E4M3)                                                                   \
        HCF_WGMMA("m64n" N "k32", ".f32.e4m3.e4m3", COUNT, A, B, ADD, ", 1, 1", "+f");            \
    if constexpr (TYPE == FP16)                                                                   \
        HCF_WGMMA("m64n" N "k16", ".f32.f16.f16", COUNT, A, B, ADD, ", 1, 1, 0, 0", "+f");        \
    if constexpr (TYPE == BF16)                                                                   \
        HCF_WGMMA("m64n" N "k16", ".f32.bf16.bf16", COUNT, A, B, ADD, ", 1, 1, 0, 0", "+f")

// d (64, N) = (add ? d : 0) + a (64, 32 bytes of k) @ b (N, 32 bytes of k)^T, asynchronously.
// a and b are descriptors of shared memory; d holds this thread's N / 2 values.
template <int TYPE, int N>
HCF_DEVICE void wgmma(typename Accumulator<TYPE>::type (&d)[N / 2], u64 a, u64 b, bool add) {
    static_assert(N == 64 || N == 128 || N == 256, "");
    if constexpr (N == 64) {
        HCF_WGMMA_N("64", 32, "%32", "%33", "%34");
    } else if constexpr (N == 128) {
        HCF_WGMMA_N("128", 64, "%64", "%65", "%66");
    } else {
        HCF_WGMMA_N("256", 128, "%128", "%129", "%130");
    }
}

#endif
