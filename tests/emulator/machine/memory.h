// Loads, stores, asynchronous copies and 8 by 8 matrices of 16-bit numbers.
#pragma once
#include "counts.h"
#include "history.h"

// Fields of the plain accesses: a bytes of an element, b elements, c 1 to extend the sign.
static void spread(const Instruction& in, char* r, const s32* to, int lane, const u8* value) {
    for (int j = 0; j < in.b; j++) {
        u64 x = 0;
        memcpy(&x, value + j * in.a, in.a);
        if (in.c && in.a < 8) x = (u64)((s64)(x << (64 - 8 * in.a)) >> (64 - 8 * in.a));
        if (in.a == 8) put<u64>(r + to[j], lane, x);
        else put<u32>(r + to[j], lane, (u32)x);
    }
}
static void gather(const Instruction& in, const char* r, const s32* from, int lane, u8* value) {
    for (int j = 0; j < in.b; j++) {
        u64 x = in.a == 8 ? get<u64>(r + from[j], lane) : get<u32>(r + from[j], lane);
        memcpy(value + j * in.a, &x, in.a);
    }
}

static void load_global(Warp& w, const Instruction& in, int pc, u32 mask) {  // elements, address
    const s32* o = L->operands + in.first;
    char* r = w.registers.data();
    int bytes = in.a * in.b, count = 0;
    u64 addresses[LANES];
    for (int i = 0; i < LANES; i++) if (mask >> i & 1) {
        u64 from = addresses[count++] = get<u64>(r + o[in.b], i) + in.offset;
        u8 value[32];
        memset(value, 0xFF, 32);
        if (global_fits(from, bytes, bytes, pc, w.id)) {
            memcpy(value, (void*)from, bytes);
            global_read(from, bytes, pc, w);
            trace(READ_GLOBAL, w, i, pc, from, bytes);
        }
        spread(in, r, o, i, value);
    }
    count_sectors(L->counts[pc], addresses, count, bytes);
}

static void store_global(Warp& w, const Instruction& in, int pc, u32 mask) {  // address, elements
    const s32* o = L->operands + in.first;
    char* r = w.registers.data();
    int bytes = in.a * in.b, count = 0;
    u64 addresses[LANES];
    for (int i = 0; i < LANES; i++) if (mask >> i & 1) {
        u64 to = addresses[count++] = get<u64>(r + o[0], i) + in.offset;
        u8 value[32];
        gather(in, r, o + 1, i, value);
        if (!global_fits(to, bytes, bytes, pc, w.id)) continue;
        global_written(to, value, bytes, pc, w);
        trace(WRITE_GLOBAL, w, i, pc, to, bytes, value);
        memcpy((void*)to, value, bytes);
    }
    count_sectors(L->counts[pc], addresses, count, bytes);
}

static void load_shared(Warp& w, const Instruction& in, int pc, u32 mask) {
    const s32* o = L->operands + in.first;
    char* r = w.registers.data();
    int bytes = in.a * in.b;
    u32 addresses[LANES];
    bool active[LANES];
    for (int i = 0; i < LANES; i++) {
        active[i] = mask >> i & 1;
        if (!active[i]) continue;
        u32 from = addresses[i] = get<u32>(r + o[in.b], i) + (u32)in.offset;
        u8 value[32];
        memset(value, 0xFF, 32);
        if (shared_fits(from, bytes, pc, w.id)) {
            memcpy(value, &shared[from], bytes);
            shared_read(from, bytes, pc, w, i);
            trace(READ_SHARED, w, i, pc, from, bytes);
        }
        spread(in, r, o, i, value);
    }
    count_wavefronts(L->counts[pc], addresses, active, bytes);
}

static void store_shared(Warp& w, const Instruction& in, int pc, u32 mask) {
    const s32* o = L->operands + in.first;
    char* r = w.registers.data();
    int bytes = in.a * in.b;
    u32 addresses[LANES];
    bool active[LANES];
    u8 values[LANES][32];
    for (int i = 0; i < LANES; i++) {
        active[i] = mask >> i & 1;
        if (!active[i]) continue;
        addresses[i] = get<u32>(r + o[0], i) + (u32)in.offset;
        gather(in, r, o + 1, i, values[i]);
    }
    for (int i = 0; i < LANES; i++) {
        if (!active[i] || !shared_fits(addresses[i], bytes, pc, w.id)) continue;
        int winner = i;  // where lanes meet at one address a GPU keeps any of them; this one the last
        for (int j = i + 1; j < LANES; j++) if (active[j] && addresses[j] == addresses[i]) winner = j;
        if (L->check && memcmp(values[i], values[winner], bytes)) report(LANES_DIFFER, pc, pc, w.id, w.id, addresses[i]);
        shared_written(addresses[i], values[winner], bytes, pc, w, i);
        trace(WRITE_SHARED, w, i, pc, addresses[i], bytes, values[winner]);
        memcpy(&shared[addresses[i]], values[winner], bytes);
    }
    count_wavefronts(L->counts[pc], addresses, active, bytes);
}

// ---- cp.async

static void copied(const Copy& c, u8* value) {
    memset(value, 0, 16);
    if (c.real) memcpy(value, (void*)c.from, c.real);
}
static void land(const Copy& c) {
    u8 value[16];
    copied(c, value);
    memcpy(&shared[c.to], value, c.bytes);
}

static void start_copy(Warp& w, const Instruction& in, int pc, u32 mask) {  // a: bytes; to, from, how many are not to be 0
    const s32* o = L->operands + in.first;
    char* r = w.registers.data();
    u64 sources[LANES];
    u32 addresses[LANES];
    bool active[LANES];
    int count = 0;
    for (int i = 0; i < LANES; i++) {
        active[i] = mask >> i & 1;
        if (!active[i]) continue;
        u32 to = get<u32>(r + o[0], i) + (u32)in.offset;
        u64 from = get<u64>(r + o[1], i) + (u64)(s64)in.c;
        Copy c{to, from, in.a, std::min((int)get<u32>(r + o[2], i), in.a), i, pc, ++tickets};
        addresses[i] = to;
        if (!shared_fits(to, c.bytes, pc, w.id)) { active[i] = false; continue; }
        if (c.real && !global_fits(from, c.real, c.bytes, pc, w.id)) c.real = 0;
        if (c.real) {
            global_read(from, c.real, pc, w);
            trace(READ_GLOBAL, w, i, pc, from, c.real);
            sources[count++] = from;
        }
        u8 value[16];
        copied(c, value);
        copy_started(to, c.bytes, pc, w);
        trace(COPY, w, i, pc, to, c.bytes, value, c.ticket);
        w.copies.push_back(c);
        if (!L->late_copies) land(c);
    }
    Counts in_shared{}, &n = L->counts[pc];
    count_wavefronts(in_shared, addresses, active, in.a);
    n.wavefronts += in_shared.wavefronts;
    n.least_wavefronts += in_shared.least_wavefronts;
    n.bytes += in_shared.bytes;
    count_sectors(n, sources, count, in.a);
}

static void commit_copies(Warp& w) {
    w.copy_groups.push_back(std::move(w.copies));
    w.copies.clear();
}

static void wait_for_copies(Warp& w, int pc, int left) {
    while ((int)w.copy_groups.size() > left) {
        for (const Copy& c : w.copy_groups.front()) {
            if (L->check) {
                u8 value[16];
                copied(c, value);
                for (int i = 0; i < c.bytes; i++) of_shared(c.to + i).copies--;
                shared_written(c.to, value, c.bytes, c.pc, w, c.lane, true);
            }
            trace(COPY_OVER, w, c.lane, pc, c.to, 0, nullptr, c.ticket);
            if (L->late_copies) land(c);
        }
        w.copy_groups.pop_front();
    }
}

// ---- ldmatrix, stmatrix: a matrices, b 1 transposed. Lane 8q + i holds the address of row i of matrix q; lane l gets
// the two elements of row l / 4 and columns l % 4 * 2 and the next.

static void load_matrices(Warp& w, const Instruction& in, int pc) {
    const s32* o = L->operands + in.first;
    char* r = w.registers.data();
    u32 addresses[LANES];
    bool active[LANES];
    u16 tile[4][8][8];
    for (int i = 0; i < LANES; i++) {
        active[i] = i < 8 * in.a;
        addresses[i] = get<u32>(r + o[in.a], i) + (u32)in.offset;
        if (!active[i]) continue;
        memset(tile[i / 8][i % 8], 0xFF, 16);
        if (!shared_fits(addresses[i], 16, pc, w.id)) continue;
        memcpy(tile[i / 8][i % 8], &shared[addresses[i]], 16);
        shared_read(addresses[i], 16, pc, w, WHOLE_WARP);
        trace(READ_SHARED, w, i, pc, addresses[i], 16);
    }
    for (int q = 0; q < in.a; q++) for (int lane = 0; lane < LANES; lane++) {
        int row = lane / 4, column = lane % 4 * 2;
        u32 low = in.b ? tile[q][column][row] : tile[q][row][column];
        u32 high = in.b ? tile[q][column + 1][row] : tile[q][row][column + 1];
        put<u32>(r + o[q], lane, high << 16 | low);
    }
    count_wavefronts(L->counts[pc], addresses, active, 16);
}

static void store_matrices(Warp& w, const Instruction& in, int pc) {
    const s32* o = L->operands + in.first;
    char* r = w.registers.data();
    u32 addresses[LANES];
    bool active[LANES];
    u16 tile[4][8][8];
    for (int q = 0; q < in.a; q++) for (int lane = 0; lane < LANES; lane++) {
        int row = lane / 4, column = lane % 4 * 2;
        u32 x = get<u32>(r + o[1 + q], lane);
        (in.b ? tile[q][column][row] : tile[q][row][column]) = (u16)x;
        (in.b ? tile[q][column + 1][row] : tile[q][row][column + 1]) = x >> 16;
    }
    for (int i = 0; i < LANES; i++) {
        active[i] = i < 8 * in.a;
        addresses[i] = get<u32>(r + o[0], i) + (u32)in.offset;
        if (!active[i] || !shared_fits(addresses[i], 16, pc, w.id)) continue;
        shared_written(addresses[i], (u8*)tile[i / 8][i % 8], 16, pc, w, WHOLE_WARP);
        trace(WRITE_SHARED, w, i, pc, addresses[i], 16, (u8*)tile[i / 8][i % 8]);
        memcpy(&shared[addresses[i]], tile[i / 8][i % 8], 16);
    }
    count_wavefronts(L->counts[pc], addresses, active, 16);
}
