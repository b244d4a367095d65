// y = activation(scale_a * scale_b * (a @ b^T) + bias) + residual by mma.sync, for sm_80 and later.
//
// a (M, K), b (N, K) row major, of ELEMENT: INT8 (summed exactly in int32), FP16, BF16, or on sm_89
// E4M3.
// A block makes BLOCK_M x BLOCK_N values of y in warps of 64 x WARP_N. cp.async fills a ring of
// STAGES tiles, ROW_BYTES of k each, in 16-byte chunks whose place in a row is XORed with the row,
// so that the 8 rows of an ldmatrix, and of a copy, lie in different banks.
// K is a multiple of 16 bytes, N of 8.
#include "epilogue.cuh"

#ifndef ELEMENT
#define ELEMENT INT8
#endif
#ifndef BLOCK_M
#define BLOCK_M 128
#endif
#ifndef BLOCK_N
#define BLOCK_N 128
#endif
#ifndef WARP_N
#define WARP_N 64
#endif
#ifndef ROW_BYTES
#define ROW_BYTES 64
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef GROUP
#define GROUP 8
#endif

constexpr int WARPS_M = BLOCK_M / 64, WARPS_N = BLOCK_N / WARP_N;
constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr int CHUNKS = ROW_BYTES / 16, STEPS = ROW_BYTES / 32, TILES_N = WARP_N / 8;
constexpr u32 A_BYTES = BLOCK_M * ROW_BYTES, STAGE_BYTES = A_BYTES + BLOCK_N * ROW_BYTES;
constexpr int ELEMENT_BYTES = ELEMENT == INT8 || ELEMENT == E4M3 ? 1 : 2;
static_assert(ROW_BYTES == 64 || ROW_BYTES == 128, "");
static_assert(TILES_N % 4 == 0 && BLOCK_M % 64 == 0 && BLOCK_N % WARP_N == 0, "");
static_assert(BLOCK_M * CHUNKS % THREADS == 0 && BLOCK_N * CHUNKS % THREADS == 0, "");

using Value = Accumulator<ELEMENT>::type;

HCF_DEVICE u32 chunk_at(int row, int chunk) {
    const int moved = chunk ^ (ROW_BYTES == 128 ? row & 7 : row >> 1 & 3);
    return row * ROW_BYTES + moved * 16;
}

// Rows first .. first + ROWS of x (rows, row_bytes) at byte `k`; zeros outside
template <int ROWS>
HCF_DEVICE void load_rows(u32 to, const u8* x, int first, int rows, long long row_bytes,
                          long long k) {
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / THREADS; ++i) {
        const int at = i * THREADS + threadIdx.x;
        const int row = at / CHUNKS, chunk = at % CHUNKS;
        const long long byte = k + chunk * 16;
        const bool inside = first + row < rows && byte < row_bytes;
        copy_async(to + chunk_at(row, chunk), x + (inside ? (first + row) * row_bytes + byte : 0),
                   inside);
    }
}

// One tile of k in shared memory onto a warp's 64 x WARP_N accumulators
HCF_DEVICE void multiply(Value (&acc)[4][TILES_N * 4], u32 a_tile, u32 b_tile, int warp_m,
                         int warp_n, int lane) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        u32 a[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = warp_m * 64 + i * 16 + lane % 16;
            load_matrices(a[i], a_tile + chunk_at(row, step * 2 + lane / 16));
        }
#pragma unroll
        for (int j = 0; j < TILES_N; j += 2) {
            u32 b[4];
            const int row = warp_n * WARP_N + j * 8 + lane / 16 * 8 + lane % 8;
            load_matrices(b, b_tile + chunk_at(row, step * 2 + lane / 8 % 2));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                mma<ELEMENT>(acc[i] + j * 4, a[i], b);
                mma<ELEMENT>(acc[i] + j * 4 + 4, a[i], b + 2);
            }
        }
    }
}

HCF_KERNEL(THREADS) gemm_sm80(const u8* a, const u8* b, Problem p) {
    const u32 base = shared_base();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;
    int tile_m, tile_n;
    place_tile(blockIdx.x, (p.m + BLOCK_M - 1) / BLOCK_M, (p.n + BLOCK_N - 1) / BLOCK_N, GROUP,
               tile_m, tile_n);
    const long long row_bytes = static_cast<long long>(p.k) * ELEMENT_BYTES;
    const int tiles = static_cast<int>((row_bytes + ROW_BYTES - 1) / ROW_BYTES);

    const auto load = [&](int tile) {
        const u32 to = base + tile % STAGES * STAGE_BYTES;
        const long long k = static_cast<long long>(tile) * ROW_BYTES;
        if (tile < tiles) {
            load_rows<BLOCK_M>(to, a, tile_m * BLOCK_M, p.m, row_bytes, k);
            load_rows<BLOCK_N>(to + A_BYTES, b, tile_n * BLOCK_N, p.n, row_bytes, k);
        }
        commit_copies();
    };

    Value acc[4][TILES_N * 4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < TILES_N * 4; ++j) acc[i][j] = 0;

    for (int tile = 0; tile < STAGES - 1; ++tile) load(tile);
    for (int tile = 0; tile < tiles; ++tile) {
        wait_copies<STAGES - 2>();
        // this tile is there for all, and all are done with the one that the next load replaces
        sync_block();
        load(tile + STAGES - 1);
        const u32 at = base + tile % STAGES * STAGE_BYTES;
        multiply(acc, at, at + A_BYTES, warp_m, warp_n, lane);
    }

    const int column = tile_n * BLOCK_N + warp_n * WARP_N;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = tile_m * BLOCK_M + warp_m * 64 + i * 16 + lane / 4;
        finish<WARP_N, false>(acc[i], row < p.m ? row : -1, row + 8 < p.m ? row + 8 : -1, column,
                              p);
    }
}

#ifdef HCF_EMULATE
extern "C" const char* emulate(emulation::Launch launch, const u8* a, const u8* b, Problem p) {
    return emulation::run(launch, [&] { gemm_sm80(a, b, p); });
}
#endif
