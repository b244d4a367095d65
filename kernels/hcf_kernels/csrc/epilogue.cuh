// What is left to do with a tile of accumulators: scales, bias, activation, residual, stores.
//
//     y = activation(scale_a * scale_b * acc + bias) + residual
//     y = h * gelu(g),  h and g = scale_a * scale_b * acc + bias       GEGLU
//
// mma.sync and wgmma leave a warp's 16 rows in the same place: of each 8 columns, lane 4g + t holds
// columns 2t, 2t + 1 of rows g and g + 8. Four threads with a row exchange pairs so that each
// stores 8 neighbouring columns, 16 bytes: a warp writes 64 bytes of 8 rows at a time.
#pragma once

#include "mma.cuh"

constexpr int NO_ACTIVATION = 0, SILU = 1, GELU = 2;

// Mirrored by Problem of cuda_gemm.py. y (M, N) and residual (M, N) are fp16 or bf16, row major.
struct Problem {
    u16* y;
    const float* scale_a;   // (M,), or one for all and stride_a 0, or null for 1
    const float* scale_b;   // (N,), or one for all and stride_b 0, or null for 1; of GEGLU (2N,)
    const void* bias;       // (N,) float32 or as y; null for none; of GEGLU (2N,)
    const u16* residual;    // null for none
    int stride_a, stride_b, bias_fp32, bf16, activation;
    int m, n, k;
    // convolution only: y is (B, H, W, N), m = B * H * W, k = C; its tile of box_h x box_w pixels
    int height, width, images, box_h, box_w;
};

HCF_DEVICE float from_half(u16 bits, bool bf16) {
    return bf16 ? from_bf16(bits) : from_fp16(bits);
}

HCF_DEVICE float silu(float v) {
    return v * reciprocal_fast(1.0f + exp2_fast(-1.4426950408889634f * v));
}

// x Phi(x), erf by Abramowitz and Stegun 7.1.26 (error below 1.5e-7)
HCF_DEVICE float gelu(float v) {
    const float x = 0.70710678118654752f * (v < 0.0f ? -v : v);
    const float t = reciprocal_fast(1.0f + 0.3275911f * x);
    const float series =
        t * (0.254829592f +
             t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    const float tail = 0.5f * series * exp2_fast(-1.4426950408889634f * x * x);
    return v * (v < 0.0f ? tail : 1.0f - tail);
}

// 4 pairs of columns, one of each of four 8-column tiles, become the 4 pairs of one tile
HCF_DEVICE void transpose_quad(u32 (&v)[4], int t) {
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = t & bit;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (j & bit) continue;
            const u32 received = shuffle_xor(upper ? v[j] : v[j | bit], bit);
            if (upper) v[j] = received; else v[j | bit] = received;
        }
    }
}

struct alignas(8) Pair {
    float first, second;
};

// Values n and n + 1 of a vector, or of one that stands for all (n even); 1 of none
HCF_DEVICE Pair load_pair(const float* values, int stride, int n) {
    if (!values) return {1.0f, 1.0f};
    if (stride) return *reinterpret_cast<const Pair*>(values + n);
    return {values[0], values[0]};
}

HCF_DEVICE Pair load_halves(const u16* values, bool bf16) {
    const u32 pair = *reinterpret_cast<const u32*>(values);
    return {from_half(static_cast<u16>(pair), bf16), from_half(static_cast<u16>(pair >> 16), bf16)};
}

HCF_DEVICE Pair load_bias(const Problem& p, int n) {
    if (!p.bias) return {0.0f, 0.0f};
    if (p.bias_fp32) return load_pair(static_cast<const float*>(p.bias), 1, n);
    return load_halves(static_cast<const u16*>(p.bias) + n, p.bf16);
}

// Of 32 columns of a row, this lane's 8: four pairs, 8 columns apart
struct Columns {
    Pair scale_b[4], bias[4];

    // `first` is the first column, `last` the number of columns of y, a multiple of 8: of columns
    // that are not there it reads others
    HCF_METHOD Columns(const Problem& p, int first, int last, int t) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int n = (first + j * 8 < last ? first + j * 8 : first) + t * 2;
            scale_b[j] = load_pair(p.scale_b, p.stride_b, n);
            bias[j] = load_bias(p, n);
        }
    }

    template <class T>
    HCF_METHOD void apply(float (&v)[8], const T* acc, float scale_a) const {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            v[j * 2] = static_cast<float>(acc[j * 4]) * (scale_a * scale_b[j].first);
            v[j * 2 + 1] = static_cast<float>(acc[j * 4 + 1]) * (scale_a * scale_b[j].second);
            v[j * 2] += bias[j].first;
            v[j * 2 + 1] += bias[j].second;
        }
    }
};

HCF_DEVICE void activate(float (&v)[8], int activation) {
    if (activation == SILU) {
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = silu(v[i]);
    } else if (activation == GELU) {
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = gelu(v[i]);
    }
}

// acc: this lane's values of (16, WIDTH), of which `column` is the first column of y; row_0 and
// row_1 are the rows of y of rows g and g + 8, below 0 where there is none. HALVED: the first
// half of the columns is hidden, the other gate. Whole warps call it.
template <int WIDTH, bool HALVED, class T>
HCF_DEVICE void finish(const T (&acc)[WIDTH / 2], int row_0, int row_1, int column,
                       const Problem& p) {
    constexpr int COLUMNS = HALVED ? WIDTH / 2 : WIDTH;
    static_assert(COLUMNS % 32 == 0, "");
    const int t = threadIdx.x & 3;
    const bool there[2] = {row_0 >= 0, row_1 >= 0};
    // of a row that is not there the first is read, and nothing is stored
    const int rows[2] = {there[0] ? row_0 : 0, there[1] ? row_1 : 0};
    float scale_a[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
        scale_a[half] = p.scale_a ? p.scale_a[rows[half] * p.stride_a] : 1.0f;
#pragma unroll
    for (int group = 0; group < COLUMNS / 32; ++group) {
        const int first = column + group * 32;
        if (first >= p.n) break;
        const Columns columns(p, first, p.n, t);
        const Columns gates(p, HALVED ? p.n + first : first, HALVED ? 2 * p.n : p.n, t);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const T* sums = acc + group * 16 + half * 2;
            float v[8];
            columns.apply(v, sums, scale_a[half]);
            if constexpr (HALVED) {
                float gate[8];
                gates.apply(gate, sums + COLUMNS / 2, scale_a[half]);
#pragma unroll
                for (int i = 0; i < 8; ++i) v[i] *= gelu(gate[i]);
            } else {
                activate(v, p.activation);
            }
            const long long start = static_cast<long long>(rows[half]) * p.n + first;
            if (p.residual) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    if (first + j * 8 >= p.n) continue;
                    const Pair pair = load_halves(p.residual + start + j * 8 + t * 2, p.bf16);
                    v[j * 2] += pair.first;
                    v[j * 2 + 1] += pair.second;
                }
            }
            u32 packed[4];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                packed[j] = p.bf16 ? pack_bf16(v[j * 2], v[j * 2 + 1])
                                   : pack_fp16(v[j * 2], v[j * 2 + 1]);
            transpose_quad(packed, t);
            if (there[half] && first + t * 8 < p.n) store_16_bytes(p.y + start + t * 8, packed);
        }
    }
}

// Tile `index` of rows x columns tiles: `group` rows at a time, columns outside, so that what
// runs together shares both operands in the L2 cache.
HCF_DEVICE void place_tile(int index, int rows, int columns, int group, int& row, int& column) {
    const int band = index / (group * columns), inside = index % (group * columns);
    const int left = rows - band * group, height = left < group ? left : group;
    row = band * group + inside % height;
    column = inside / height;
}
