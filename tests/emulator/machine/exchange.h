// What lanes of a warp tell each other, and registers cut in parts or put together.
#pragma once
#include "state.h"

// a: 0 bfly, 1 idx, 2 up, 3 down; b: 1 where a predicate says whether the source was in range. Operands d, [p], value, b, c.
static void shuffle(Warp& w, const Instruction& in) {
    const s32 *o = L->operands + in.first, *at = o + 1 + in.b;
    u32 result[LANES], valid[LANES];
    for (int i = 0; i < LANES; i++) {
        u32 by = get<u32>(w.slot(at[1]), i) & 31, c = get<u32>(w.slot(at[2]), i), segment = c >> 8 & 31, clamp = c & 31;
        int last = (i & segment) | (clamp & ~segment), first = i & segment;
        int from = in.a == 0 ? i ^ by : in.a == 1 ? first | (by & ~segment) : in.a == 2 ? i - (int)by : i + (int)by;
        valid[i] = in.a == 2 ? from >= last : from <= last;
        result[i] = get<u32>(w.slot(at[0]), valid[i] ? from : i);
    }
    memcpy(w.slot(o[0]), result, sizeof result);
    if (in.b) memcpy(w.slot(o[1]), valid, sizeof valid);
}

static void reduce(Warp& w, const Instruction& in) {  // a: 0 add, 1 min, 2 max, 3 and, 4 or, 5 xor; b: 1 signed
    const s32* o = L->operands + in.first;
    u32 x = get<u32>(w.slot(o[1]), 0);
    for (int i = 1; i < LANES; i++) {
        u32 y = get<u32>(w.slot(o[1]), i);
        bool less = in.b ? (s32)y < (s32)x : y < x;
        switch (in.a) {
        case 0: x += y; break;
        case 1: x = less ? y : x; break;
        case 2: x = less ? x : y; break;
        case 3: x &= y; break;
        case 4: x |= y; break;
        default: x ^= y;
        }
    }
    for (int i = 0; i < LANES; i++) put<u32>(w.slot(o[0]), i, x);
}

static void vote(Warp& w, const Instruction& in) {  // a: 0 ballot, 1 any, 2 all
    const s32* o = L->operands + in.first;
    u32 ballot = 0;
    for (int i = 0; i < LANES; i++) ballot |= (u32)(get<u32>(w.slot(o[1]), i) != 0) << i;
    u32 x = in.a == 0 ? ballot : in.a == 1 ? ballot != 0 : ballot == ALL_LANES;
    for (int i = 0; i < LANES; i++) put<u32>(w.slot(o[0]), i, x);
}

static void elect(Warp& w, const Instruction& in) {  // lane 0
    const s32* o = L->operands + in.first;
    for (int i = 0; i < LANES; i++) {
        put<u32>(w.slot(o[0]), i, 0);
        put<u32>(w.slot(o[1]), i, i == 0);
    }
}

// a: parts, b: bytes of a part
static void unpack(Warp& w, const Instruction& in) {
    const s32* o = L->operands + in.first;
    u64 mask = low_bits(8 * in.b);
    for (int i = 0; i < LANES; i++) {
        u64 x = in.a * in.b == 8 ? get<u64>(w.slot(o[in.a]), i) : get<u32>(w.slot(o[in.a]), i);
        for (int j = 0; j < in.a; j++) put<u32>(w.slot(o[j]), i, (u32)(x >> (8 * in.b * j) & mask));
    }
}
static void pack(Warp& w, const Instruction& in) {
    const s32* o = L->operands + in.first;
    u64 mask = low_bits(8 * in.b);
    for (int i = 0; i < LANES; i++) {
        u64 x = 0;
        for (int j = 0; j < in.a; j++) x |= (get<u32>(w.slot(o[1 + j]), i) & mask) << (8 * in.b * j);
        if (in.a * in.b == 8) put<u64>(w.slot(o[0]), i, x);
        else put<u32>(w.slot(o[0]), i, (u32)x);
    }
}
