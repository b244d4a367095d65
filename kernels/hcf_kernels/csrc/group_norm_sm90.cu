// GroupNorm with its activation for sm_90, x (B, S, C) read once and y written once.
//
//     v = x + add;  y = activation((v - mean_g) * rsqrt(var_g + eps) * weight + bias)
//
// A cluster of CLUSTER blocks holds SLAB channels, whole groups, of one image in the shared memory
// of its blocks, each block a part of the positions. The sums of a group go over the cluster
// through distributed shared memory: first of v, then of (v - mean)^2, so that nothing cancels.
// The order of all sums is fixed. y is fp16 or bf16 as x, or with QUANT the codes of y / scale in
// int8 or e4m3.
// SLAB is a multiple of 8 channels; a thread keeps to 8 of them.
#include "epilogue.cuh"

#ifndef ELEMENT
#define ELEMENT BF16
#endif
#ifndef CLUSTER
#define CLUSTER 8
#endif
#ifndef QUANT
#define QUANT 0  // 1: int8, 2: e4m3
#endif

constexpr int THREADS = 512, PARTS = 4, MAX_GROUPS = 128;
constexpr u32 SCRATCH_BYTES = THREADS * 8 * 4, STATISTIC_BYTES = MAX_GROUPS * 4;
constexpr bool IS_BF16 = ELEMENT == BF16;

// Mirrored by Norm of cuda_group_norm.py. weight, bias (C,) or (B, C): then affine_stride is C.
struct Norm {
    const u16* x;
    void* y;
    const void* weight;
    const void* bias;
    const u16* add;        // (B, C); null for none
    const float* scale;    // of the codes
    int channels, positions, width, slab, affine_stride, affine_fp32, activation;
    float eps;
};

// What a thread has to do with: 8 channels of every `step`th position of its block
struct Share {
    u32 tile;               // its first 16 bytes in shared memory
    int count;              // positions
    u32 stride;             // bytes from one to the next in shared memory
};

HCF_DEVICE void unpack(float (&v)[8], u32 address) {
    u32 words[4];
    shared_load(words, address);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        v[i * 2] = from_half(static_cast<u16>(words[i]), IS_BF16);
        v[i * 2 + 1] = from_half(static_cast<u16>(words[i] >> 16), IS_BF16);
    }
}

// Each thread's sums of its 8 channels -> `total`: sums over the groups' values in the cluster
HCF_DEVICE void sum_groups(const float (&sum)[8], u32 scratch, u32 partial, u32 total,
                           const Norm& p) {
    const int rows = THREADS / (p.slab / 8), groups = p.slab / p.width;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 8; ++i) shared_store(scratch + (threadIdx.x * 8 + i) * 4, sum[i]);
    sync_block();
    for (int group = warp; group < groups; group += THREADS / 32) {
        float found = 0.0f;
        for (int at = lane; at < rows * p.width; at += 32) {
            const int row = at / p.width, channel = group * p.width + at % p.width;
            found += shared_load_float(scratch + (row * p.slab + channel) * 4);
        }
        for (int mask = 16; mask > 0; mask /= 2) found += shuffle_xor(found, mask);
        if (lane == 0) shared_store(partial + group * 4, found);
    }
    sync_cluster();
    for (int group = threadIdx.x; group < groups; group += THREADS) {
        float found = 0.0f;
        for (u32 rank = 0; rank < CLUSTER; ++rank)
            found += cluster_load_float(partial + group * 4, rank);
        shared_store(total + group * 4, found);
    }
}

HCF_DEVICE float affine_at(const void* values, int at, const Norm& p) {
    if (p.affine_fp32) return static_cast<const float*>(values)[at];
    return from_half(static_cast<const u16*>(values)[at], IS_BF16);
}

HCF_DEVICE void store(const Norm& p, long long at, const float (&v)[8], float inverse_scale) {
    if constexpr (QUANT == 0) {
        u32 packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            packed[i] = IS_BF16 ? pack_bf16(v[i * 2], v[i * 2 + 1])
                                : pack_fp16(v[i * 2], v[i * 2 + 1]);
        store_16_bytes(static_cast<u16*>(p.y) + at, packed);
    } else {
        float scaled[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) scaled[i] = v[i] * inverse_scale;
        if constexpr (QUANT == 1)
            store_8_bytes(static_cast<u8*>(p.y) + at, pack_int8(scaled), pack_int8(scaled + 4));
        else
            store_8_bytes(static_cast<u8*>(p.y) + at, pack_e4m3(scaled), pack_e4m3(scaled + 4));
    }
}

HCF_CLUSTER_KERNEL(THREADS, CLUSTER) group_norm_sm90(HCF_GRID_CONSTANT Norm p) {
    const u32 scratch = shared_base(), statistics = scratch + SCRATCH_BYTES;
    const u32 partial_sum = statistics, partial_square = statistics + STATISTIC_BYTES;
    const u32 sum = statistics + 2 * STATISTIC_BYTES, square = statistics + 3 * STATISTIC_BYTES;
    const int slabs = p.channels / p.slab, item = blockIdx.x / CLUSTER;
    const int image = item / slabs, first_channel = item % slabs * p.slab;
    const int chunks = p.slab / 8, step = THREADS / chunks;
    const int row = threadIdx.x / chunks, column = threadIdx.x % chunks;
    const int each = (p.positions + CLUSTER - 1) / CLUSTER, first = cluster_rank() * each;
    const int left = p.positions - first, there = left < each ? left : each;
    // threads beyond the last whole row have nothing to do
    const int count = row < step && row < there ? (there - row + step - 1) / step : 0;
    const Share own{statistics + 4 * STATISTIC_BYTES + threadIdx.x * 16, count,
                    static_cast<u32>(step * chunks * 16)};
    const int channel = first_channel + column * 8;
    const long long start =
        (static_cast<long long>(image) * p.positions + first + row) * p.channels + channel;
    const long long jump = static_cast<long long>(step) * p.channels;

    const int part = (own.count + PARTS - 1) / PARTS;
    for (int i = 0; i < PARTS; ++i) {
        for (int at = i * part; at < (i + 1) * part && at < own.count; ++at)
            copy_async(own.tile + at * own.stride, p.x + start + at * jump, true);
        commit_copies();
    }
    float added[8], total[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        total[i] = 0.0f;
        added[i] = p.add ? from_half(p.add[image * p.channels + channel + i], IS_BF16) : 0.0f;
    }
    const auto sum_part = [&](int index) {
        for (int at = index * part; at < (index + 1) * part && at < own.count; ++at) {
            float v[8];
            unpack(v, own.tile + at * own.stride);
#pragma unroll
            for (int i = 0; i < 8; ++i) total[i] += v[i] + added[i];
        }
    };
    wait_copies<3>();
    sum_part(0);
    wait_copies<2>();
    sum_part(1);
    wait_copies<1>();
    sum_part(2);
    wait_copies<0>();
    sum_part(3);
    sum_groups(total, scratch, partial_sum, sum, p);
    sync_block();

    // v - mean = x - centre
    const float size = static_cast<float>(p.positions) * static_cast<float>(p.width);
    float centre[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        centre[i] = shared_load_float(sum + (column * 8 + i) / p.width * 4) / size - added[i];
        total[i] = 0.0f;
    }
    for (int at = 0; at < own.count; ++at) {
        float v[8];
        unpack(v, own.tile + at * own.stride);
#pragma unroll
        for (int i = 0; i < 8; ++i) total[i] += (v[i] - centre[i]) * (v[i] - centre[i]);
    }
    sum_groups(total, scratch, partial_square, square, p);
    // no block may end while another reads what it has
    sync_cluster();

    float weight[8], bias[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int affine = image * p.affine_stride + channel + i;
        const float variance = shared_load_float(square + (column * 8 + i) / p.width * 4) / size;
        weight[i] = affine_at(p.weight, affine, p) * reciprocal_root(variance + p.eps);
        bias[i] = affine_at(p.bias, affine, p);
    }
    const float inverse_scale = QUANT ? 1.0f / *p.scale : 1.0f;
    for (int at = 0; at < own.count; ++at) {
        float v[8];
        unpack(v, own.tile + at * own.stride);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = (v[i] - centre[i]) * weight[i] + bias[i];
        activate(v, p.activation);
        store(p, start + at * jump, v, inverse_scale);
    }
}

#ifdef HCF_EMULATE
extern "C" const char* emulate(emulation::Launch launch, Norm p) {
    return emulation::run(launch, [&] { group_norm_sm90(p); });
}
#endif
