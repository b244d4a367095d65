// The functions of mma.cuh in ordinary C++, for tests: one fibre a CUDA thread.
//
// Fragments, descriptors, swizzles and barriers are those of the PTX ISA. What the hardware does
// asynchronously happens here as late as it is allowed to (a cp.async or a wgmma when its group is
// waited for), or, for bulk tensor copies, at a time drawn from a seed; shared memory starts full
// of 0x7f (NaN in e4m3, fp16 and bf16). A wait that is missing, a stage given back too early or a
// barrier that counts wrong then shows as wrong numbers, or as a failure that `run` returns.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define HCF_DEVICE static inline
#define HCF_METHOD inline
#define HCF_KERNEL(threads) static void
#define HCF_CLUSTER_KERNEL(threads, cluster) static void
#define HCF_GRID_CONSTANT const

namespace emulation {

// When a bulk tensor copy writes: at its issue, once nothing else can run, or at a random time
enum Timing { EAGER = 0, LATE = 1, RANDOM = 2 };

struct Launch {
    int blocks, threads, cluster, shared_bytes, timing, seed;
};

struct Index {
    int x;
};

struct Barrier {
    int arrived = 0, generation = 0;
};

struct Exchange {
    Barrier barrier;
    void* slots[32];
};

struct Block {
    int index, rank, running;
    std::vector<u8> shared;
    Barrier barrier;
    std::vector<Exchange> warps;
};

using Work = std::function<void()>;

struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    Block* block;
    int index;
    bool done = false;
    std::function<bool()> blocked;
    std::vector<Work> copies, products;
    std::deque<std::vector<Work>> copy_groups, product_groups;
};

struct State {
    Launch launch;
    std::minstd_rand random;
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<Work> boxes;
    Barrier cluster;
    Thread* current = nullptr;
    ucontext_t scheduler;
    const std::function<void()>* body = nullptr;
    const char* failure = nullptr;
};

static State state;

struct Failure {
    const char* what;
};

[[noreturn]] static void fail(const char* what) { throw Failure{what}; }

static void wait_until(std::function<bool()> over) {
    if (over()) return;
    state.current->blocked = std::move(over);
    swapcontext(&state.current->context, &state.scheduler);
}

static void sync(Barrier& barrier, int count) {
    const int generation = barrier.generation;
    if (++barrier.arrived == count) {
        barrier.arrived = 0;
        ++barrier.generation;
    } else {
        wait_until([&barrier, generation] { return barrier.generation != generation; });
    }
}

// Every lane of a warp comes here with its own slot; the last one does the work of all.
template <class F> static void collective(void* slot, const F& work) {
    Thread& thread = *state.current;
    Exchange& exchange = thread.block->warps[thread.index / 32];
    exchange.slots[thread.index % 32] = slot;
    if (exchange.barrier.arrived == 31) work(exchange.slots);
    sync(exchange.barrier, 32);
}

static void finish_one_box() {
    const size_t at = state.random() % state.boxes.size();
    const Work work = std::move(state.boxes[at]);
    state.boxes.erase(state.boxes.begin() + at);
    work();
}

static void enter() {
    try {
        (*state.body)();
    } catch (const Failure& failure) {
        state.failure = failure.what;
    }
    state.current->done = true;
    --state.current->block->running;
    swapcontext(&state.current->context, &state.scheduler);
}

static void schedule() {
    const size_t count = state.threads.size();
    for (;;) {
        bool moved = false, left = false;
        const size_t start = state.random() % count;
        for (size_t i = 0; i < count; ++i) {
            Thread& thread = *state.threads[(start + i) % count];
            if (thread.done) continue;
            left = true;
            if (thread.blocked && !thread.blocked()) continue;
            thread.blocked = nullptr;
            state.current = &thread;
            swapcontext(&state.scheduler, &thread.context);
            if (state.failure) throw Failure{state.failure};
            moved = true;
            if (state.launch.timing == RANDOM && !state.boxes.empty() && state.random() % 64 == 0)
                finish_one_box();
        }
        if (!left) break;
        if (moved) continue;
        if (state.boxes.empty()) fail("deadlock");
        finish_one_box();
    }
    if (!state.boxes.empty()) fail("a block ended before its copies had arrived");
    for (auto& thread : state.threads)
        if (!thread->product_groups.empty() || !thread->products.empty())
            fail("a thread ended before its wgmma had");
}

static void run_clusters(Launch launch, const std::function<void()>& body) {
    for (int first = 0; first < launch.blocks; first += launch.cluster) {
        state = State{};
        state.launch = launch;
        state.random.seed(launch.seed + first + 1);
        state.body = &body;
        for (int rank = 0; rank < launch.cluster; ++rank) {
            auto block = std::make_unique<Block>();
            block->index = first + rank;
            block->rank = rank;
            block->running = launch.threads;
            block->shared.assign(launch.shared_bytes, 0x7f);
            block->warps.resize(launch.threads / 32);
            for (int index = 0; index < launch.threads; ++index) {
                auto thread = std::make_unique<Thread>();
                thread->stack.resize(64 * 1024);
                thread->block = block.get();
                thread->index = index;
                getcontext(&thread->context);
                thread->context.uc_stack.ss_sp = thread->stack.data();
                thread->context.uc_stack.ss_size = thread->stack.size();
                thread->context.uc_link = nullptr;
                makecontext(&thread->context, enter, 0);
                state.threads.push_back(std::move(thread));
            }
            state.blocks.push_back(std::move(block));
        }
        schedule();
    }
}

// Null, or what went wrong
static const char* run(Launch launch, const std::function<void()>& body) {
    try {
        run_clusters(launch, body);
    } catch (const Failure& failure) {
        return failure.what;
    }
    return nullptr;
}

static u8* shared_at(Block& block, u32 address, u32 bytes) {
    if (!block.running) fail("a block that has ended is read or written");
    // the kernels align what they are given by themselves: the base is odd multiples of 16
    const u32 offset = address - 16;
    if (address < 16 || offset + bytes > block.shared.size()) fail("outside shared memory");
    return block.shared.data() + offset;
}

static u8* shared_at(u32 address, u32 bytes) {
    return shared_at(*state.current->block, address, bytes);
}

// Last groups first kept: runs the oldest until at most `pending` are left.
static void finish_groups(std::deque<std::vector<Work>>& groups, int pending) {
    while (static_cast<int>(groups.size()) > pending) {
        for (const Work& work : groups.front()) work();
        groups.pop_front();
    }
}

// ---- values

static float float_of(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static u32 bits_of(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// Of `mantissa` bits and exponents of that bias, subnormals included; to nearest even
static float round_to(float value, int mantissa, int bias) {
    if (value == 0.0f || !std::isfinite(value)) return value;
    const int exponent = std::max(std::ilogb(value), 1 - bias);
    return std::ldexp(std::nearbyint(std::ldexp(value, mantissa - exponent)), exponent - mantissa);
}

static u16 fp16_bits(float value) {
    const float rounded = round_to(value, 10, 15);
    const u32 sign = bits_of(rounded) >> 16 & 0x8000;
    const float size = std::fabs(rounded);
    if (std::isnan(size)) return 0x7fff;
    if (size > 65504.0f) return sign | 0x7c00;
    if (size < 0x1p-14f) return sign | static_cast<u16>(std::ldexp(size, 24));
    return sign | ((bits_of(size) >> 13) - (112 << 10));
}

static float fp16_value(u16 bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                       : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25)
                                      : std::ldexp(static_cast<float>(mantissa), -24);
    return bits & 0x8000 ? -size : size;
}

static float e4m3_value(u8 bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    const float size = (bits & 127) == 127 ? NAN
                       : exponent          ? std::ldexp(8.0f + mantissa, exponent - 10)
                                           : std::ldexp(static_cast<float>(mantissa), -9);
    return bits & 0x80 ? -size : size;
}

static u8 e4m3_bits(float value) {
    const u8 sign = bits_of(value) >> 31 << 7;
    if (std::isnan(value)) return sign | 0x7f;
    const float size = std::min(std::fabs(round_to(value, 3, 7)), 448.0f);
    if (size < 0x1p-6f) return sign | static_cast<u8>(std::ldexp(size, 9));
    return sign | static_cast<u8>((bits_of(size) >> 20) - (120 << 3));
}

template <int TYPE> constexpr int element_bytes() { return TYPE == INT8 || TYPE == E4M3 ? 1 : 2; }

template <int TYPE> static typename Accumulator<TYPE>::type value_at(const u8* at) {
    u16 two;
    if constexpr (TYPE == INT8) return static_cast<signed char>(*at);
    else if constexpr (TYPE == E4M3) return e4m3_value(*at);
    else {
        std::memcpy(&two, at, 2);
        return TYPE == FP16 ? fp16_value(two) : float_of(u32(two) << 16);
    }
}

}  // namespace emulation

#include "emulate_intrinsics.h"
