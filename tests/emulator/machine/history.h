// What every byte of shared and global memory remembers, and what is a fault.
//
// A byte keeps who last wrote it, who has read it since, and in which epoch. Two accesses of different warps in one epoch
// have no barrier between them, whatever order they happened to run in; so have any two of different CTAs.
#pragma once
#include <map>
#include <tuple>

#include "state.h"

// machine.py has the words for these, in this order.
enum Finding {
    RACE_SHARED, RACE_WARP, RACE_GLOBAL, DURING_COPY, DURING_PRODUCT, REGISTER_DURING_PRODUCT, UNFENCED_WRITE, NEVER_WRITTEN,
    OUTSIDE, MISALIGNED, UNFENCED_COPY, REPLICAS_DIFFER, LANES_DIFFER, UNFENCED_REGISTER,
    TENSOR_DURING_PRODUCT, TENSOR_STORE_UNDER_WAY, RACE_TENSOR,
};

static std::map<std::tuple<int, int, int>, int> places;

static void report(int kind, int pc, int other_pc, int warp, int other_warp, u64 address) {
    auto key = std::make_tuple(kind, pc, other_pc);
    auto at = places.find(key);
    if (at != places.end()) { L->found[at->second].times++; return; }
    if (L->found_count >= L->found_room) return;
    places[key] = L->found_count;
    L->found[L->found_count++] = {kind, pc, other_pc, cta, warp, other_warp, address, 1};
}

static u32 bit(int warp) { return 1u << warp; }
static u32 but(u32 warps, int warp) { return warps & ~bit(warp); }
static int one_of(u32 warps, int otherwise) { return warps ? __builtin_ctz(warps) : otherwise; }

// ---- the trace, for a slower judge (judge.py has the same list of kinds)

enum EventKind {
    READ_SHARED, WRITE_SHARED, READ_GLOBAL, WRITE_GLOBAL, COPY, COPY_OVER, PRODUCT, PRODUCT_READ, PRODUCT_OVER, FENCE,
    EXECUTED,
};

static void trace(int kind, const Warp& w, int lane, int pc, u64 address, int bytes, const u8* value = nullptr, s64 ticket = 0) {
    if (!L->trace) return;
    for (int from = 0; from == 0 || from < bytes; from += 16) {
        Event e{kind, cta, w.id, lane, pc, std::min(bytes - from, 16), w.position, epoch, address + from, ticket, {}};
        if (value) memcpy(e.value, value + from, e.bytes);
        events.push_back(e);
    }
}

// ---- shared memory

const int WHOLE_WARP = LANES;  // in the place of a lane

static SharedByte& of_shared(u32 address) { return shared_history[address - L->shared_base]; }

static bool shared_fits(u32 address, int bytes, int pc, int warp) {
    if (address % bytes) report(MISALIGNED, pc, -1, warp, -1, address);
    if (address >= (u32)L->shared_base && address + bytes <= (u32)(L->shared_base + L->shared_bytes)) return true;
    report(OUTSIDE, pc, -1, warp, -1, address);
    return false;
}

// wgmma reads by another path than st.shared writes: a fence has to stand between, on either side's way.
static bool fenced(const SharedByte& s, const Warp& reader) {
    bool alone = s.writers == bit(reader.id);
    if (s.fenced && (s.fenced < epoch || alone)) return true;
    return reader.fence_epoch > s.written || (alone && reader.fence_event > s.write_event);
}

static s64 ended_for(int warp);  // the last tcgen05 product that the warp knows to have ended

static void shared_read(u32 address, int bytes, int pc, const Warp& w, int lane, bool by_product = false, bool until_barrier = true) {
    if (!L->check) return;
    for (int i = 0; i < bytes; i++) {
        SharedByte& s = of_shared(address + i);
        if (s.copies) report(DURING_COPY, pc, s.copy_pc, w.id, -1, address);
        if (s.written < first_epoch) report(NEVER_WRITTEN, pc, -1, w.id, -1, address);
        else if (s.written == epoch) {
            if (!(s.writers & bit(w.id))) report(RACE_SHARED, pc, s.write_pc, w.id, one_of(s.writers, w.id), address);
            else if (s.write_sync == w.sync && !(s.write_lanes >> lane & 1))
                report(RACE_WARP, pc, s.write_pc, w.id, w.id, address);
        }
        if (by_product && s.written >= first_epoch && !fenced(s, w))
            report(s.by_copy ? UNFENCED_COPY : UNFENCED_WRITE, pc, s.write_pc, w.id, one_of(s.writers, w.id), address);
        if (!until_barrier) continue;  // something else says when the read is over
        if (s.read != epoch) { s.read = epoch; s.readers = 0; }
        s.readers |= bit(w.id);
        s.read_pc = pc;
    }
}

static void shared_written(u32 address, const u8* value, int bytes, int pc, const Warp& w, int lane, bool by_copy = false) {
    if (!L->check) return;
    event_count++;
    for (int i = 0; i < bytes; i++) {
        SharedByte& s = of_shared(address + i);
        if (s.copies) report(DURING_COPY, pc, s.copy_pc, w.id, -1, address);
        if (s.products || s.tensor_ticket > ended_for(w.id)) report(DURING_PRODUCT, pc, s.product_pc, w.id, -1, address);
        if (s.read == epoch && but(s.readers, w.id)) report(RACE_SHARED, pc, s.read_pc, w.id, one_of(but(s.readers, w.id), w.id), address);
        bool again = s.written == epoch && s.writers, same = value[i] == shared[address + i];
        if (again && !same && but(s.writers, w.id))
            report(s.write_pc == (u32)pc ? REPLICAS_DIFFER : RACE_SHARED, pc, s.write_pc, w.id, one_of(but(s.writers, w.id), w.id), address);
        if (again && same) {
            s.writers |= bit(w.id);
            s.write_lanes |= u64(1) << lane;
        } else { s.writers = bit(w.id); s.write_lanes = u64(1) << lane; }
        s.written = epoch; s.write_pc = pc; s.write_sync = w.sync; s.write_event = event_count; s.fenced = 0; s.by_copy = by_copy;
    }
}

// From when an asynchronous copy starts, nobody may touch what it will write.
static void copy_started(u32 address, int bytes, int pc, const Warp& w) {
    if (!L->check) return;
    for (int i = 0; i < bytes; i++) {
        SharedByte& s = of_shared(address + i);
        if (s.products || s.tensor_ticket > ended_for(w.id)) report(DURING_PRODUCT, pc, s.product_pc, w.id, -1, address);
        if (s.copies) report(DURING_COPY, pc, s.copy_pc, w.id, -1, address);
        if (s.read == epoch && but(s.readers, w.id)) report(RACE_SHARED, pc, s.read_pc, w.id, one_of(but(s.readers, w.id), w.id), address);
        if (s.written == epoch && but(s.writers, w.id)) report(RACE_SHARED, pc, s.write_pc, w.id, one_of(but(s.writers, w.id), w.id), address);
        s.copies++; s.copy_pc = pc;
    }
}

static void proxy_fence(Warp& w) {
    w.fence_epoch = epoch; w.fence_event = ++event_count;
    if (L->check) for (auto& s : shared_history) if (s.writers & bit(w.id) && !s.fenced) s.fenced = epoch;
}

// ---- global memory

static int memory_of(u64 address, int bytes) {
    static int last = 0;
    auto within = [&](int i) { return address >= L->memories[i].start && address + bytes <= L->memories[i].end; };
    if (last < L->memory_count && within(last)) return last;
    for (int i = 0; i < L->memory_count; i++) if (within(i)) return last = i;
    return -1;
}

static bool global_fits(u64 address, int bytes, int alignment, int pc, int warp) {
    if (address % alignment) report(MISALIGNED, pc, -1, warp, -1, address);
    if (memory_of(address, bytes) >= 0) return true;
    report(OUTSIDE, pc, -1, warp, -1, address);
    return false;
}

static GlobalByte* of_global(u64 address, int bytes) {
    if (!L->check || !L->global_history) return nullptr;
    int m = memory_of(address, bytes);
    return L->global_history[m] + (address - L->memories[m].start);
}

const u32 SEVERAL_CTAS = ~0u;

static void global_read(u64 address, int bytes, int pc, const Warp& w) {
    GlobalByte* g = of_global(address, bytes);
    const u32 me = cta + 1;
    for (int i = 0; g && i < bytes; i++, g++) {
        if (g->written && g->write_cta != me) report(RACE_GLOBAL, pc, g->write_pc, w.id, -1, address);
        else if (g->written == epoch && !(g->writers & bit(w.id))) report(RACE_GLOBAL, pc, g->write_pc, w.id, one_of(g->writers, w.id), address);
        g->read_cta = g->read && g->read_cta != me ? SEVERAL_CTAS : me;
        if (g->read != epoch) { g->read = epoch; g->readers = 0; }
        g->readers |= bit(w.id);
        g->read_pc = pc;
    }
}

static void global_written(u64 address, const u8* value, int bytes, int pc, const Warp& w) {
    GlobalByte* g = of_global(address, bytes);
    const u32 me = cta + 1;
    for (int i = 0; g && i < bytes; i++, g++) {
        bool same = g->written && ((u8*)address)[i] == value[i];
        if (g->read && g->read_cta != me) report(RACE_GLOBAL, pc, g->read_pc, w.id, -1, address);
        else if (g->read == epoch && but(g->readers, w.id)) report(RACE_GLOBAL, pc, g->read_pc, w.id, one_of(but(g->readers, w.id), w.id), address);
        bool unordered = g->write_cta != me || (g->written == epoch && but(g->writers, w.id));
        if (g->written && !same && unordered) report(RACE_GLOBAL, pc, g->write_pc, w.id, one_of(but(g->writers, w.id), w.id), address);
        if (g->written != epoch || !same) g->writers = 0;
        g->writers |= bit(w.id);
        g->written = epoch; g->write_pc = pc; g->write_cta = me;
    }
}
