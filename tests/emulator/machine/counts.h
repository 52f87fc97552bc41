// What an access costs: 32-byte sectors of global memory, wavefronts of shared memory.
#pragma once
#include "state.h"

// One instruction of a warp; sorts addresses. Each sector counts once, and each byte that was asked for.
static void count_sectors(Counts& n, u64* addresses, int count, int bytes) {
    if (!count) return;
    std::sort(addresses, addresses + count);
    u64 last = ~0ull;
    int distinct = 0;
    for (int i = 0; i < count; i++) {
        if (i && addresses[i] == addresses[i - 1]) continue;
        distinct++;
        for (u64 s = addresses[i] / 32; s <= (addresses[i] + bytes - 1) / 32; s++)
            if (s != last) { n.sectors++; last = s; }
    }
    n.requests++;
    n.useful += (u64)distinct * bytes;
}

// One instruction of a warp, in phases of 32, 16 or 8 lanes by width. A phase takes as many wavefronts as different
// words of the fullest bank; the least is what 32 words a wavefront would take.
static void count_wavefronts(Counts& n, const u32* addresses, const bool* active, int bytes) {
    int phase = bytes >= 16 ? 8 : bytes == 8 ? 16 : 32, total = 0;
    u32 all[LANES * 4];
    for (int from = 0; from < LANES; from += phase) {
        u32 words[64];
        int count = 0;
        for (int i = from; i < from + phase; i++)
            if (active[i]) for (int j = 0; j < std::max(bytes / 4, 1); j++) words[count++] = addresses[i] / 4 + j;
        if (!count) continue;
        std::sort(words, words + count);
        count = std::unique(words, words + count) - words;
        int load[32] = {}, fullest = 0;
        for (int i = 0; i < count; i++) {
            fullest = std::max(fullest, ++load[words[i] % 32]);
            all[total++] = words[i];
        }
        n.wavefronts += fullest;
    }
    if (!total) return;
    std::sort(all, all + total);
    total = std::unique(all, all + total) - all;
    n.least_wavefronts += (total + 31) / 32;
    n.bytes += total * 4;
    n.requests++;
}
