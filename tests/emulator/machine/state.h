// What a launch is, as Python describes it, and the state of the CTA that runs.
#pragma once
#include <deque>
#include <string>
#include <vector>

#include "numbers.h"

// Operations that are more than a function of a lane's operands; encode.py has the same list. What fields a to d of an
// instruction mean is said where the operation is carried out.
enum Operation {
    BRANCH = 100000, RETURN, BARRIER, WARP_BARRIER, NOTHING, LOAD_GLOBAL, STORE_GLOBAL, LOAD_SHARED, STORE_SHARED,
    CP_ASYNC, CP_COMMIT, CP_WAIT, LDMATRIX, STMATRIX, MMA, WGMMA, WGMMA_FENCE, WGMMA_COMMIT, WGMMA_WAIT, PROXY_FENCE,
    SHUFFLE, REDUX, VOTE, ELECT, UNPACK, PACK, TENSOR_ALLOCATE, TENSOR_LOAD, TENSOR_STORE, TENSOR_WAIT, TENSOR_PRODUCT,
    TENSOR_COMMIT, MBARRIER_INIT, MBARRIER_WAIT,
};

// The layouts of these structures are repeated in machine.py.
struct Instruction { s32 op, guard, negated, first, count, results, a, b, c, d, line, rank; s64 offset; };
struct Counts { u64 executed, active, requests, sectors, useful, wavefronts, least_wavefronts, bytes; };
struct Found { s32 kind, pc, other_pc, cta, warp, other_warp; u64 address, times; };
struct Memory { u64 start, end; };
struct Event { s32 kind, cta, warp, lane, pc, bytes; u32 position, epoch; u64 address; s64 ticket; u8 value[16]; };

struct GlobalByte { u32 written, writers, write_pc, read, readers, read_pc, read_cta, write_cta; };

struct Launch {
    const Instruction* code; s32 code_count;
    const s32* operands;                          // byte offsets into a warp's registers
    const u8* wide;                               // by slot, whether it starts a register of 8 bytes a lane
    const char* initial; s32 register_bytes;      // the registers before the first instruction: constants, parameters, poison
    const s32* lane_slots;                        // of tid.x, laneid, ctaid.x, .y, .z, warpid
    const Memory* memories; s32 memory_count;     // what the arguments span
    GlobalByte** global_history;                  // by memory, or null
    s32 grid[3], warps, shared_bytes, shared_base;
    const s32* ctas; s32 cta_count;               // linear numbers of those to run, in order
    s32 late_copies, late_products, order, seed, check, rough, trace, uses_tensor_memory;
    Counts* counts;                               // by instruction
    Found* found; s32 found_room, found_count;
    char message[512]; s32 failed_pc;             // where it stopped, and why
};

struct Copy { u32 to; u64 from; int bytes, real, lane, pc; s64 ticket; };
struct Product { int pc; u64 a_start, b_start; bool accumulate; s64 ticket; u32 a[4][LANES]; };

struct Warp {
    std::vector<char> registers;
    int id, pc;
    bool done, spinning;                          // spinning: at an mbarrier whose phase is not over
    u32 position;                                 // instructions executed
    u32 sync;                                     // barriers passed, of the warp and of the CTA
    u32 fence_epoch; u64 fence_event;             // of its last proxy fence
    std::vector<Copy> copies;                     // not committed yet; then by group, oldest first
    std::deque<std::vector<Copy>> copy_groups;
    std::vector<Product> products;
    std::deque<std::vector<Product>> product_groups;
    std::vector<u8> busy;                         // by slot: 1 accumulates, 2 is read by a product in flight
    int busy_count;
    std::vector<u8> unfenced;                     // by slot: written since the last wgmma.fence, not by a product

    char* slot(s32 offset) { return registers.data() + offset; }
};

struct SharedByte {
    u32 written, writers, write_pc, write_sync;   // epoch, warps, instruction and warp's barriers of the last write
    u32 read, readers, read_pc;
    u32 copy_pc, product_pc;
    u16 copies, products;                         // in flight over it
    u8 by_copy;
    u64 write_lanes, write_event;                 // write_lanes: a bit each, and one for the whole warp
    u32 fenced;                                   // the epoch in which its writer passed a proxy fence, or 0
    s64 tensor_ticket;                            // of the last tcgen05 product that reads it
};

struct Stop { std::string why; int pc; };

static Launch* L;
static std::vector<u8> shared;
static std::vector<SharedByte> shared_history;
static std::vector<Event> events;
static u32 epoch, first_epoch;                    // barriers passed by all CTAs so far, and when this one began
static u64 event_count;
static s64 tickets;
static int cta;
