// The intrinsics of mma.cuh in ordinary C++, as the PTX ISA describes them; see emulate.h.
#pragma once

#define threadIdx (emulation::Index{emulation::state.current->index})
#define blockIdx (emulation::Index{emulation::state.current->block->index})
#define gridDim (emulation::Index{emulation::state.launch.blocks})

HCF_DEVICE u32 shared_base() { return 16; }

HCF_DEVICE void sync_block() {
    emulation::sync(emulation::state.current->block->barrier, emulation::state.launch.threads);
}

HCF_DEVICE u32 shuffle_xor(u32 value, int mask) {
    struct Slot { u32 given, taken; int mask; } slot{value, 0, mask};
    emulation::collective(&slot, [](void** slots) {
        for (int lane = 0; lane < 32; ++lane) {
            Slot& own = *static_cast<Slot*>(slots[lane]);
            own.taken = static_cast<Slot*>(slots[lane ^ own.mask])->given;
        }
    });
    return slot.taken;
}

HCF_DEVICE u32 pack_fp16(float low, float high) {
    return emulation::fp16_bits(low) | u32(emulation::fp16_bits(high)) << 16;
}

HCF_DEVICE u32 pack_bf16(float low, float high) {
    const auto rounded = [](float value) {
        const u32 bits = emulation::bits_of(value);
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    };
    return rounded(low) | rounded(high) << 16;
}

HCF_DEVICE float from_fp16(u16 bits) { return emulation::fp16_value(bits); }
HCF_DEVICE float from_bf16(u16 bits) { return emulation::float_of(u32(bits) << 16); }
HCF_DEVICE float exp2_fast(float x) { return std::exp2(x); }
HCF_DEVICE float reciprocal_fast(float x) { return 1.0f / x; }
HCF_DEVICE void store_16_bytes(void* to, const u32 (&v)[4]) {
    if (reinterpret_cast<std::uintptr_t>(to) % 16) emulation::fail("a store is not aligned");
    std::memcpy(to, v, 16);
}

HCF_DEVICE float reciprocal_root(float x) { return 1.0f / std::sqrt(x); }
HCF_DEVICE u32 pack_int8(const float* v) {
    u32 packed = 0;
    for (int i = 0; i < 4; ++i) {
        const float code = std::nearbyint(std::min(std::max(v[i], -127.0f), 127.0f));
        packed |= (static_cast<u32>(static_cast<int>(code)) & 255) << i * 8;
    }
    return packed;
}
HCF_DEVICE u32 pack_e4m3(const float* v) {
    u32 packed = 0;
    for (int i = 0; i < 4; ++i) packed |= u32(emulation::e4m3_bits(v[i])) << i * 8;
    return packed;
}
HCF_DEVICE float shuffle_xor(float value, int mask) {
    return emulation::float_of(shuffle_xor(emulation::bits_of(value), mask));
}
HCF_DEVICE void store_8_bytes(void* to, u32 low, u32 high) {
    if (reinterpret_cast<std::uintptr_t>(to) % 8) emulation::fail("a store is not aligned");
    const u32 both[2] = {low, high};
    std::memcpy(to, both, 8);
}
HCF_DEVICE void shared_load(u32 (&v)[4], u32 address) {
    if (address % 16) emulation::fail("a load is not aligned");
    std::memcpy(v, emulation::shared_at(address, 16), 16);
}
HCF_DEVICE float shared_load_float(u32 address) {
    float value;
    std::memcpy(&value, emulation::shared_at(address, 4), 4);
    return value;
}
HCF_DEVICE void shared_store(u32 address, float value) {
    std::memcpy(emulation::shared_at(address, 4), &value, 4);
}

// ---- sm_80

HCF_DEVICE void copy_async(u32 to, const void* from, bool inside) {
    if (reinterpret_cast<std::uintptr_t>(from) % 16 || to % 16)
        emulation::fail("a cp.async is not aligned");
    u8* target = emulation::shared_at(to, 16);
    emulation::state.current->copies.push_back([=] {
        if (inside) std::memcpy(target, from, 16); else std::memset(target, 0, 16);
    });
}

HCF_DEVICE void commit_copies() {
    auto& thread = *emulation::state.current;
    thread.copy_groups.push_back(std::move(thread.copies));
    thread.copies.clear();
}

template <int PENDING> HCF_DEVICE void wait_copies() {
    emulation::finish_groups(emulation::state.current->copy_groups, PENDING);
}

// Lane 4g + t of the result holds values 2t, 2t + 1 of row g of each matrix
HCF_DEVICE void load_matrices(u32 (&r)[4], u32 address) {
    struct Slot { u32 address; u32* r; } slot{address, r};
    emulation::collective(&slot, [](void** slots) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            u32 banks = 0;
            for (int row = 0; row < 8; ++row)
                banks |= 1u << static_cast<Slot*>(slots[matrix * 8 + row])->address / 16 % 8;
            if (banks != 255) emulation::fail("bank conflict of an ldmatrix");
        }
        for (int lane = 0; lane < 32; ++lane)
            for (int matrix = 0; matrix < 4; ++matrix) {
                const Slot& row = *static_cast<Slot*>(slots[matrix * 8 + lane / 4]);
                if (row.address % 16) emulation::fail("ldmatrix alignment");
                std::memcpy(&static_cast<Slot*>(slots[lane])->r[matrix],
                            emulation::shared_at(row.address, 16) + lane % 4 * 4, 4);
            }
    });
}

// PTX ISA, "Matrix Fragments for mma.m16n8k32" (8-bit) and "mma.m16n8k16" (16-bit): in bytes of k
// they are the same. a[i]: row g + 8 (i % 2), bytes 4t + 16 (i / 2); b[i]: column g, bytes
// 4t + 16 i; c[i]: row g + 8 (i / 2), column 2t + i % 2.
template <int TYPE>
HCF_DEVICE void mma(typename Accumulator<TYPE>::type* c, const u32* a, const u32* b) {
    using Value = typename Accumulator<TYPE>::type;
    struct Slot { Value* c; const u32 *a, *b; } slot{c, a, b};
    emulation::collective(&slot, [](void** slots) {
        constexpr int BYTES = emulation::element_bytes<TYPE>(), COUNT = 32 / BYTES;
        Value left[16][COUNT], right[8][COUNT];
        for (int lane = 0; lane < 32; ++lane) {
            const Slot& own = *static_cast<Slot*>(slots[lane]);
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; ++i)
                for (int e = 0; e < 4 / BYTES; ++e) {
                    const int k = (4 * t + 16 * (i / 2)) / BYTES + e;
                    const u8* at = reinterpret_cast<const u8*>(own.a + i) + e * BYTES;
                    left[g + 8 * (i % 2)][k] = emulation::value_at<TYPE>(at);
                }
            for (int i = 0; i < 2; ++i)
                for (int e = 0; e < 4 / BYTES; ++e) {
                    const u8* at = reinterpret_cast<const u8*>(own.b + i) + e * BYTES;
                    right[g][(4 * t + 16 * i) / BYTES + e] = emulation::value_at<TYPE>(at);
                }
        }
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                Value& sum = static_cast<Slot*>(slots[lane])->c[i];
                const Value* row = left[lane / 4 + 8 * (i / 2)];
                const Value* column = right[lane % 4 * 2 + i % 2];
                for (int k = 0; k < COUNT; ++k) sum += row[k] * column[k];
            }
    });
}

// ---- sm_90: barriers, bulk tensor copies, clusters

namespace emulation {

// An mbarrier: 8 bytes of shared memory. A phase ends when arrivals and bytes are all there.
struct PhaseBarrier {
    u16 count, pending : 15, phase : 1;
    int bytes;

    void check() {
        if (pending || bytes) return;
        pending = count;
        phase ^= 1;
    }
    void arrive() {
        if (!pending) fail("more arrivals than an mbarrier counts");
        --pending;
        check();
    }
};
static_assert(sizeof(PhaseBarrier) == 8, "");

static PhaseBarrier& barrier_at(Block& block, u32 address) {
    return *reinterpret_cast<PhaseBarrier*>(shared_at(block, address, 8));
}

static PhaseBarrier& barrier_at(u32 address) {
    return barrier_at(*state.current->block, address);
}

// What a test writes into a TensorMap's 128 bytes: x is the innermost dimension, contiguous
struct Tensor {
    const u8* data;
    int rank, element_bytes;
    int sizes[4], box[4];
    u64 strides[4];  // in bytes
};
static_assert(sizeof(Tensor) <= sizeof(TensorMap), "");

// 128-byte swizzle: address bits 4-6 are XORed with bits 7-9
static u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }

static void write_box(const Tensor& tensor, Block& block, u32 to, u32 barrier, const int* start) {
    const int row_bytes = tensor.box[0] * tensor.element_bytes;
    if (row_bytes != 128 || to % 1024 != 0) fail("a box is not of 128-byte rows at 1024 bytes");
    u32 offset = 0;
    int at[4];
    for (at[3] = 0; at[3] < tensor.box[3]; ++at[3])
        for (at[2] = 0; at[2] < tensor.box[2]; ++at[2])
            for (at[1] = 0; at[1] < tensor.box[1]; ++at[1])
                for (at[0] = 0; at[0] < tensor.box[0]; ++at[0], offset += tensor.element_bytes) {
                    const u8* from = tensor.data;
                    bool inside = true;
                    for (int d = 0; d < 4; ++d) {
                        const int where = d < tensor.rank ? start[d] + at[d] : 0;
                        inside = inside && where >= 0 && where < tensor.sizes[d];
                        from += where * static_cast<long long>(tensor.strides[d]);
                    }
                    u8* target = shared_at(block, swizzled(to + offset), tensor.element_bytes);
                    if (inside) std::memcpy(target, from, tensor.element_bytes);
                    else std::memset(target, 0, tensor.element_bytes);
                }
    PhaseBarrier& counted = barrier_at(block, barrier);
    counted.bytes -= offset;
    counted.check();
}

static void load_box(u32 to, const TensorMap& map, u32 barrier, u32 mask, std::vector<int> start) {
    Tensor tensor;
    std::memcpy(&tensor, &map, sizeof(tensor));
    if (tensor.rank != static_cast<int>(start.size())) fail("coordinates are not the map's");
    for (auto& block : state.blocks) {
        if (!(mask >> block->rank & 1)) continue;
        Block* target = block.get();
        state.boxes.push_back([=] { write_box(tensor, *target, to, barrier, start.data()); });
        if (state.launch.timing == EAGER) finish_one_box();
    }
}

}  // namespace emulation

HCF_DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    emulation::barrier_at(barrier) = {u16(arrivals), u16(arrivals), 0, 0};
}
HCF_DEVICE void barrier_init_fence() {}
HCF_DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    emulation::barrier_at(barrier).bytes += bytes;
    emulation::barrier_at(barrier).arrive();
}
HCF_DEVICE void barrier_arrive(u32 barrier, u32 rank) {
    emulation::barrier_at(*emulation::state.blocks.at(rank), barrier).arrive();
}
HCF_DEVICE void barrier_wait(u32 barrier, u32 parity) {
    const auto& waited = emulation::barrier_at(barrier);
    emulation::wait_until([&waited, parity] { return waited.phase != parity; });
}
HCF_DEVICE void prefetch_map(const TensorMap&) {}

template <bool MULTICAST, class... Coordinates>
HCF_DEVICE void load_box(u32 to, const TensorMap& map, u32 barrier, u16 mask, Coordinates... at) {
    const u32 own = 1u << emulation::state.current->block->rank;
    emulation::load_box(to, map, barrier, MULTICAST ? mask : own, {at...});
}

HCF_DEVICE float cluster_load_float(u32 address, u32 rank) {
    float value;
    auto& block = *emulation::state.blocks.at(rank);
    std::memcpy(&value, emulation::shared_at(block, address, 4), 4);
    return value;
}
HCF_DEVICE u32 cluster_rank() { return emulation::state.current->block->rank; }
HCF_DEVICE void sync_cluster() {
    const auto& launch = emulation::state.launch;
    emulation::sync(emulation::state.cluster, launch.threads * launch.cluster);
}

// ---- sm_90a: wgmma

template <int REGISTERS> HCF_DEVICE void take_registers() {}
template <int REGISTERS> HCF_DEVICE void give_registers() {}
HCF_DEVICE void wgmma_fence() {}
HCF_DEVICE void wgmma_commit() {
    auto& thread = *emulation::state.current;
    thread.product_groups.push_back(std::move(thread.products));
    thread.products.clear();
}

// A warp waits as one: what a lane does next, the products of the other lanes are over
template <int PENDING> HCF_DEVICE void wgmma_wait() {
    emulation::collective(emulation::state.current, [](void** slots) {
        for (int lane = 0; lane < 32; ++lane)
            emulation::finish_groups(static_cast<emulation::Thread*>(slots[lane])->product_groups,
                                     PENDING);
    });
}

namespace emulation {

// Row `row`, byte `byte` of 32 of a K-major operand: PTX ISA, "Matrix Descriptor Format", with
// 8-row groups at the stride offset and the swizzle applied to the whole address
static const u8* operand(Block& block, u64 descriptor, int row, int byte) {
    const u32 start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fail("not a 128-byte swizzle");
    return shared_at(block, swizzled(start + row / 8 * stride + row % 8 * 128 + byte), 1);
}

}  // namespace emulation

// PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk32": d[i] of thread 32w + 4g + t is row
// 16w + g + 8 (i / 2 % 2), column 8 (i / 4) + 2t + i % 2.
template <int TYPE, int N>
HCF_DEVICE void wgmma(typename Accumulator<TYPE>::type (&d)[N / 2], u64 a, u64 b, bool add) {
    using Value = typename Accumulator<TYPE>::type;
    emulation::Thread& thread = *emulation::state.current;
    emulation::Block& block = *thread.block;
    const int lane = thread.index % 32, row = thread.index / 32 % 4 * 16 + lane / 4;
    Value* sums = d;
    thread.products.push_back([=, &block] {
        constexpr int BYTES = emulation::element_bytes<TYPE>(), COUNT = 32 / BYTES;
        Value left[2][COUNT];
        for (int half = 0; half < 2; ++half)
            for (int k = 0; k < COUNT; ++k)
                left[half][k] = emulation::value_at<TYPE>(
                    emulation::operand(block, a, row + 8 * half, k * BYTES));
        for (int i = 0; i < N / 2; i += 4)
            for (int odd = 0; odd < 2; ++odd) {
                Value sum[2] = {add ? sums[i + odd] : Value(0), add ? sums[i + odd + 2] : Value(0)};
                for (int k = 0; k < COUNT; ++k) {
                    const Value right = emulation::value_at<TYPE>(
                        emulation::operand(block, b, i * 2 + lane % 4 * 2 + odd, k * BYTES));
                    sum[0] += left[0][k] * right;
                    sum[1] += left[1][k] * right;
                }
                sums[i + odd] = sum[0];
                sums[i + odd + 2] = sum[1];
            }
    });
}
