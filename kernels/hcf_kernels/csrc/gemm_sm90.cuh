// Matrix products and 3x3 convolutions by wgmma for sm_90a: the pipeline of both.
//
//     y = activation(scale_a * scale_b * (a @ b^T) + bias) + residual
//
// a (M, K), b (N, K) row major of ELEMENT; K is a multiple of 16 bytes, N of 8. A block has three
// warpgroups and stays for many tiles. One thread of the first fills a ring of STAGES pairs of
// tiles, 128 bytes of k each, by bulk tensor copies with the 128-byte swizzle; the other two
// multiply ROWS x BLOCK_N values each, together on one tile of 2 ROWS, or with PINGPONG on a tile
// each in turn, so that the one's stores run beside the other's products.
//
// CLUSTER 2: two blocks work on tiles below each other. Each loads half of b's rows for both,
// which takes a third or a quarter off what the L2 cache has to deliver.
// PROMOTE: the tensor cores sum e4m3 with about 14 bits; their sums of 128 bytes of k each are
// added up in float32 registers instead (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
//
// GEGLU: b (2N, K), hidden and then gate; y (M, N) = hidden * gelu(gate). A tile of b is half of
// each, so that a thread has both of a value of y in its registers.
//
// CONVOLUTION: y (B, H, W, N), a (B, H, W, C), b (N, 3, 3, C), padding 1. For each of the nine taps
// a tile of a is a box of pixels shifted by the tap; what is outside of the image is read as zero.
#pragma once

#include "epilogue.cuh"

#ifndef ELEMENT
#define ELEMENT INT8
#endif
#ifndef ROWS
#define ROWS 64
#endif
#ifndef BLOCK_N
#define BLOCK_N 256
#endif
#ifndef PINGPONG
#define PINGPONG 0
#endif
#ifndef CLUSTER
#define CLUSTER 1
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef PROMOTE
#define PROMOTE 0
#endif
#ifndef GROUP
#define GROUP 8
#endif
#ifndef GEGLU
#define GEGLU 0
#endif
#ifndef CONVOLUTION
#define CONVOLUTION 0
#endif

constexpr int THREADS = 384, BLOCKS_M = ROWS / 64, BLOCK_M = PINGPONG ? ROWS : 2 * ROWS;
constexpr int ROW_BYTES = 128, STEPS = ROW_BYTES / 32;
constexpr u32 A_BYTES = BLOCK_M * ROW_BYTES, B_BYTES = BLOCK_N * ROW_BYTES;
constexpr u32 STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int BLOCK_K = ELEMENT == INT8 || ELEMENT == E4M3 ? ROW_BYTES : ROW_BYTES / 2;
constexpr int TAPS = CONVOLUTION ? 9 : 1;
// columns of y of a tile; boxes that the rows of b of a tile are loaded in, by one block each
constexpr int COLUMNS = GEGLU ? BLOCK_N / 2 : BLOCK_N;
constexpr int PARTS = GEGLU || CLUSTER > 1 ? 2 : 1, PART_ROWS = BLOCK_N / PARTS;
// arrivals that empty a stage: of each warp that reads it, in all blocks that it was loaded for
constexpr int READERS = CLUSTER * 4 * (PINGPONG ? 1 : 2);
static_assert(ROWS % 64 == 0 && BLOCK_M <= 256 && CLUSTER <= 2, "");
static_assert(BLOCKS_M * BLOCK_N * (PROMOTE ? 2 : 1) <= 256, "accumulators are 128 registers");
static_assert(!(GEGLU && CONVOLUTION), "");
static_assert(!PROMOTE || ELEMENT == E4M3, "only sums of e4m3 are promoted");

using Value = Accumulator<ELEMENT>::type;

struct Ring {
    u32 base, barriers;

    HCF_METHOD u32 a(u32 at) const { return base + at % STAGES * STAGE_BYTES; }
    HCF_METHOD u32 b(u32 at) const { return a(at) + A_BYTES; }
    HCF_METHOD u32 full(u32 at) const { return barriers + at % STAGES * 8; }
    HCF_METHOD u32 empty(u32 at) const { return barriers + (STAGES + at % STAGES) * 8; }
    HCF_METHOD u32 turn(int group) const { return barriers + (2 * STAGES + group) * 8; }
    HCF_METHOD u32 parity(u32 at) const { return at / STAGES & 1; }
};

// With PINGPONG a group waits for a stage only once the other has seen all of its own: a stage that
// is two phases away has the parity of one that is there.
struct Turns {
    const Ring& ring;
    int group;

    HCF_METHOD void wait(int turn) const {
        if (PINGPONG) barrier_wait(ring.turn(group), (turn & 1) ^ (group == 0));
    }
    HCF_METHOD void pass() const {
        if (PINGPONG && threadIdx.x % 32 == 0)
            barrier_arrive(ring.turn(1 - group), CLUSTER > 1 ? cluster_rank() : 0);
    }
};

// The tiles of y, in the order in which clusters take them
struct Tiles {
    int rows, columns, blocks_k, in_row, in_column;

    HCF_METHOD explicit Tiles(const Problem& p) {
        if (CONVOLUTION) {
            const int images = BLOCK_M / (p.box_h * p.box_w);
            in_row = (p.width + p.box_w - 1) / p.box_w;
            in_column = (p.height + p.box_h - 1) / p.box_h;
            rows = (p.images + images - 1) / images * in_column * in_row;
        } else {
            in_row = in_column = 1;
            rows = (p.m + BLOCK_M - 1) / BLOCK_M;
        }
        columns = (p.n + COLUMNS - 1) / COLUMNS;
        blocks_k = TAPS * ((p.k + BLOCK_K - 1) / BLOCK_K);
    }
    HCF_METHOD int clusters() const { return (rows + CLUSTER - 1) / CLUSTER * columns; }
    HCF_METHOD void place(int index, int rank, int& row, int& column) const {
        place_tile(index, (rows + CLUSTER - 1) / CLUSTER, columns, GROUP, row, column);
        row = row * CLUSTER + rank;
    }
};

// First pixel of a tile of a convolution
struct Pixel {
    int image, y, x;

    HCF_METHOD Pixel(int row, const Tiles& tiles, const Problem& p) {
        x = row % tiles.in_row * p.box_w;
        y = row / tiles.in_row % tiles.in_column * p.box_h;
        image = row / (tiles.in_row * tiles.in_column) * (BLOCK_M / (p.box_h * p.box_w));
    }
};

// Row of y of the `local`th row of tile `row`; below 0 outside
HCF_DEVICE int row_of_y(int row, int local, const Tiles& tiles, const Problem& p) {
    if (!CONVOLUTION) {
        const int found = row * BLOCK_M + local;
        return found < p.m ? found : -1;
    }
    const Pixel first(row, tiles, p);
    const int x = first.x + local % p.box_w, y = first.y + local / p.box_w % p.box_h;
    const int image = first.image + local / (p.box_w * p.box_h);
    const bool inside = x < p.width && y < p.height && image < p.images;
    return inside ? (image * p.height + y) * p.width + x : -1;
}

// One stage: the rows of a, and this block's share of the rows of b for the whole cluster
HCF_DEVICE void load_stage(const Ring& ring, u32 at, const TensorMap& map_a,
                           const TensorMap& map_b, int row, int column, int block_k, u32 rank,
                           const Tiles& tiles, const Problem& p) {
    constexpr u16 ALL = (1 << CLUSTER) - 1;
    const u32 full = ring.full(at);
    barrier_wait(ring.empty(at), ring.parity(at) ^ 1);
    barrier_expect(full, STAGE_BYTES);
    const int block = block_k % (tiles.blocks_k / TAPS) * BLOCK_K;
    const int tap = CONVOLUTION ? block_k / (tiles.blocks_k / TAPS) : 0;
    if constexpr (CONVOLUTION) {
        const Pixel first(row, tiles, p);
        load_box<false>(ring.a(at), map_a, full, 1, block, first.x + tap % 3 - 1,
                        first.y + tap / 3 - 1, first.image);
    } else {
        load_box<false>(ring.a(at), map_a, full, 1, block, row * BLOCK_M);
    }
#pragma unroll
    for (int i = 0; i < PARTS / CLUSTER; ++i) {
        const int part = CLUSTER > 1 ? rank : i;
        const u32 to = ring.b(at) + part * PART_ROWS * ROW_BYTES;
        const int first_n = column * COLUMNS + part * (GEGLU ? p.n : PART_ROWS);
        if constexpr (CONVOLUTION)
            load_box<(CLUSTER > 1)>(to, map_b, full, ALL, block, tap, first_n);
        else
            load_box<(CLUSTER > 1)>(to, map_b, full, ALL, block, first_n);
    }
}

// Of a K-major operand with the 128-byte swizzle: 8 rows are 1024 bytes
HCF_DEVICE u64 descriptor(u32 address) {
    return u64(address >> 4 & 0x3fff) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

HCF_DEVICE void multiply(Value (&acc)[BLOCKS_M][BLOCK_N / 2], u32 a, u32 b, bool add) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int i = 0; i < BLOCKS_M; ++i)
            wgmma<ELEMENT, BLOCK_N>(acc[i], descriptor(a + i * 64 * ROW_BYTES + step * 32),
                                    descriptor(b + step * 32), add || step > 0);
    wgmma_commit();
}

// A warp is done with a stage: said to every block whose copies write to it
HCF_DEVICE void release(const Ring& ring, u32 at) {
    if (threadIdx.x % 32 < CLUSTER) barrier_arrive(ring.empty(at), threadIdx.x % 32);
}

// All of k of a tile, from stage `at` on; `first_row` of the block's rows are another group's
HCF_DEVICE void multiply_tile(Value (&acc)[BLOCKS_M][BLOCK_N / 2], const Ring& ring,
                              const Turns& turns, u32 at, int blocks_k, int first_row) {
    const u32 offset = first_row * ROW_BYTES;
    for (int block = 0; block < blocks_k; ++block, ++at) {
        barrier_wait(ring.full(at), ring.parity(at));
        multiply(acc, ring.a(at) + offset, ring.b(at), block > 0);
        // the products before these are over, their stage is free
        wgmma_wait<1>();
        if (block > 0) release(ring, at - 1);
    }
    turns.pass();
    wgmma_wait<0>();
    release(ring, at - 1);
}

HCF_DEVICE void multiply_tile_promoted(Value (&sum)[BLOCKS_M][BLOCK_N / 2], const Ring& ring,
                                       const Turns& turns, u32 at, int blocks_k, int first_row) {
    const u32 offset = first_row * ROW_BYTES;
    Value part[BLOCKS_M][BLOCK_N / 2];
#pragma unroll
    for (int i = 0; i < BLOCKS_M; ++i)
#pragma unroll
        for (int j = 0; j < BLOCK_N / 2; ++j) sum[i][j] = 0;
    for (int block = 0; block < blocks_k; ++block, ++at) {
        barrier_wait(ring.full(at), ring.parity(at));
        multiply(part, ring.a(at) + offset, ring.b(at), false);
        wgmma_wait<0>();
        release(ring, at);
#pragma unroll
        for (int i = 0; i < BLOCKS_M; ++i)
#pragma unroll
            for (int j = 0; j < BLOCK_N / 2; ++j) sum[i][j] += part[i][j];
    }
    turns.pass();
}

HCF_DEVICE void consume(const Ring& ring, int group, u32 rank, int first, int step,
                        const Tiles& tiles, const Problem& p) {
    const int first_row = PINGPONG ? 0 : group * ROWS;
    const int lane_row = first_row + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    const Turns turns{ring, group};
    u32 at = 0;
    int tile = 0;
    for (int index = first; index < tiles.clusters(); index += step, at += tiles.blocks_k, ++tile) {
        if (PINGPONG && tile % 2 != group) continue;
        int row, column;
        tiles.place(index, rank, row, column);
        turns.wait(tile / 2);
        Value acc[BLOCKS_M][BLOCK_N / 2];
        if constexpr (PROMOTE)
            multiply_tile_promoted(acc, ring, turns, at, tiles.blocks_k, first_row);
        else
            multiply_tile(acc, ring, turns, at, tiles.blocks_k, first_row);
#pragma unroll
        for (int i = 0; i < BLOCKS_M; ++i)
            finish<BLOCK_N, GEGLU>(acc[i], row_of_y(row, lane_row + i * 64, tiles, p),
                                   row_of_y(row, lane_row + i * 64 + 8, tiles, p),
                                   column * COLUMNS, p);
    }
}

HCF_DEVICE void run_pipeline(const TensorMap& map_a, const TensorMap& map_b, const Problem& p) {
    const u32 base = (shared_base() + 1023) & ~1023u;
    const Ring ring{base, base + STAGES * STAGE_BYTES};
    const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
    const int first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;
    const Tiles tiles(p);
    if (threadIdx.x == 0) {
        prefetch_map(map_a);
        prefetch_map(map_b);
        for (u32 stage = 0; stage < STAGES; ++stage) {
            barrier_init(ring.full(stage), 1);
            barrier_init(ring.empty(stage), READERS);
        }
        for (int group = 0; group < 2; ++group) barrier_init(ring.turn(group), 4);
        barrier_init_fence();
    }
    if (CLUSTER > 1) sync_cluster(); else sync_block();

    const int warpgroup = threadIdx.x / 128;
    if (warpgroup == 0) {
        give_registers<40>();
        if (threadIdx.x == 0) {
            u32 at = 0;
            for (int index = first; index < tiles.clusters(); index += step) {
                int row, column;
                tiles.place(index, rank, row, column);
                // unrolled it would not fit in the registers left to this warpgroup
#pragma unroll 1
                for (int block = 0; block < tiles.blocks_k; ++block, ++at)
                    load_stage(ring, at, map_a, map_b, row, column, block, rank, tiles, p);
            }
        }
    } else {
        take_registers<232>();
        consume(ring, warpgroup - 1, rank, first, step, tiles, p);
    }
    // the other block may still write here, and count on the barriers here
    if (CLUSTER > 1) sync_cluster();
}
