// mma.sync, and wgmma with its descriptors of shared memory and its products in flight.
#pragma once
#include "history.h"

// A sum as float32: to nearest, or, if it is to be rough, towards zero, further off than any tensor core is known to be.
static f32 narrowed(f64 a) {
    f32 f = (f32)a;
    return L->rough && std::fabs((f64)f) > std::fabs(a) ? std::nextafter(f, 0.0f) : f;
}

// m16n8. a: k, 8 or 16; b: 1 bfloat16. Operands: four of d, k / 4 of A, k / 8 of B, four of c.
static void multiply(Warp& w, const Instruction& in) {
    const s32* o = L->operands + in.first;
    char* r = w.registers.data();
    int of_a = in.a / 4, of_b = of_a / 2;
    f32 A[16][16], B[16][8], C[16][8];
    for (int lane = 0; lane < LANES; lane++) {
        int row = lane / 4, column = lane % 4 * 2;
        for (int h = 0; h < 2; h++) {
            for (int q = 0; q < of_a; q++)
                A[row + q % 2 * 8][column + h + q / 2 * 8] = from_half(get<u32>(r + o[4 + q], lane) >> (16 * h), in.b);
            for (int q = 0; q < of_b; q++)
                B[column + h + q * 8][row] = from_half(get<u32>(r + o[4 + of_a + q], lane) >> (16 * h), in.b);
        }
        for (int q = 0; q < 4; q++) C[row + q / 2 * 8][column + q % 2] = get<f32>(r + o[4 + of_a + of_b + q], lane);
    }
    for (int i = 0; i < 16; i++) {
        f64 sum[8] = {};
        for (int k = 0; k < in.a; k++) for (int j = 0; j < 8; j++) sum[j] += (f64)(A[i][k] * B[k][j]);
        for (int j = 0; j < 8; j++) C[i][j] = narrowed(sum[j] + C[i][j]);
    }
    for (int lane = 0; lane < LANES; lane++)
        for (int q = 0; q < 4; q++) put<f32>(r + o[q], lane, C[lane / 4 + q / 2 * 8][lane % 4 * 2 + q % 2]);
}

// ---- descriptors: 14 bits each of start, leading and stride offset, in units of 16 bytes; the swizzle in the top two bits

static u32 swizzled(u32 address, int mode) {  // 0 none, 1 over 128 bytes, 2 over 64, 3 over 32
    int width = mode ? 4 - mode : 0;
    return address ^ (address >> 3 & ((1u << width) - 1) << 4);
}

// Where element (i, k) of a 16-bit operand lies; i counts rows of A or columns of B, and may be the contiguous direction.
static u32 element_address(u64 descriptor, int i, int k, bool i_contiguous) {
    u32 start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    int mode = descriptor >> 62 & 3, chunks = mode ? 1 << (4 - mode) : 1;  // of 16 bytes, contiguous before swizzling
    u32 at;
    if (!i_contiguous) at = i % 8 * (16 * chunks) + i / 8 * stride + (mode ? 2 * k : 2 * (k % 8) + k / 8 * leading);
    else if (mode) at = 2 * (i % (8 * chunks)) + i / (8 * chunks) * leading + k % 8 * (16 * chunks) + k / 8 * stride;
    else at = 2 * (i % 8) + i / 8 * stride + k % 8 * 16 + k / 8 * leading;
    return swizzled(start + at, mode);
}

// f(address, i, k) of each 16-byte piece of an operand's rows from .. to.
template <class F> static void pieces(u64 descriptor, int from, int to, bool i_contiguous, F f) {
    int i_step = i_contiguous ? 8 : 1, k_step = i_contiguous ? 1 : 8;
    for (int i = from; i < to; i += i_step)
        for (int k = 0; k < 16; k += k_step) f(element_address(descriptor, i, k, i_contiguous), i, k);
}

// ---- wgmma m64nNk16. a: n; b: flags; c, d: signs of A and B. Operands: accumulators, A, descriptor of B, scale-d.

enum { A_IN_REGISTERS = 1, A_TRANSPOSED = 2, B_TRANSPOSED = 4, BFLOAT16 = 8 };

static int first_row(const Warp& w) { return w.id % 4 * 16; }  // of the 64, a warp's

static void hold(const Product& p, std::vector<u8>& busy) {
    const Instruction& in = L->code[p.pc];
    const s32* o = L->operands + in.first;
    for (int i = 0; i < in.results; i++) busy[o[i] / 128] |= 1;
    if (in.b & A_IN_REGISTERS) for (int i = 0; i < 4; i++) busy[o[in.results + i] / 128] |= 2;
}

static void reads_of(Warp& w, const Product& p, int step) {  // +1 they start, -1 they are over
    const Instruction& in = L->code[p.pc];
    auto mark = [&](u32 address, int, int) {
        if (!shared_fits(address, 16, p.pc, w.id)) return;
        shared_read(address, 16, p.pc, w, WHOLE_WARP, true);
        if (step > 0) trace(PRODUCT_READ, w, WHOLE_WARP, p.pc, address, 16, nullptr, p.ticket);
        if (L->check) for (int i = 0; i < 16; i++) {
            SharedByte& s = of_shared(address + i);
            s.products += step;
            s.product_pc = p.pc;
        }
    };
    if (!(in.b & A_IN_REGISTERS)) pieces(p.a_start, first_row(w), first_row(w) + 16, in.b & A_TRANSPOSED, mark);
    pieces(p.b_start, 0, in.a, in.b & B_TRANSPOSED, mark);
}

static void carry_out(Warp& w, const Product& p) {
    const Instruction& in = L->code[p.pc];
    const s32* o = L->operands + in.first;
    int n = in.a, row = first_row(w);
    bool brain = in.b & BFLOAT16;
    static f32 A[16][16], B[16][256];
    static f64 sum[256];
    auto piece_at = [&](u32 address, u16* to) {
        bool fits = address >= (u32)L->shared_base && address + 16 <= (u32)(L->shared_base + L->shared_bytes);
        if (fits) memcpy(to, &shared[address], 16);
        else memset(to, 0xFF, 16);
    };
    if (in.b & A_IN_REGISTERS) {
        for (int q = 0; q < 4; q++) for (int lane = 0; lane < LANES; lane++) for (int h = 0; h < 2; h++)
            A[lane / 4 + q % 2 * 8][lane % 4 * 2 + h + q / 2 * 8] = from_half(p.a[q][lane] >> (16 * h), brain);
    } else pieces(p.a_start, row, row + 16, in.b & A_TRANSPOSED, [&](u32 address, int i, int k) {
        u16 piece[8];
        piece_at(address, piece);
        for (int j = 0; j < 8; j++) (in.b & A_TRANSPOSED ? A[i + j - row][k] : A[i - row][k + j]) = from_half(piece[j], brain);
    });
    pieces(p.b_start, 0, n, in.b & B_TRANSPOSED, [&](u32 address, int i, int k) {
        u16 piece[8];
        piece_at(address, piece);
        for (int j = 0; j < 8; j++) (in.b & B_TRANSPOSED ? B[k][i + j] : B[k + j][i]) = from_half(piece[j], brain);
    });
    f32 sign = (f32)in.c * in.d;
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < n; j++) sum[j] = 0;
        for (int k = 0; k < 16; k++) {
            f32 a = A[i][k] * sign;
            for (int j = 0; j < n; j++) sum[j] += (f64)(a * B[k][j]);
        }
        for (int j = 0; j < n; j++) {
            int lane = i % 8 * 4 + j % 8 / 2;
            f32* d = (f32*)w.slot(o[j / 8 * 4 + i / 8 * 2 + j % 2]) + lane;
            *d = narrowed(p.accumulate ? sum[j] + *d : sum[j]);
        }
    }
}

static void start_product(Warp& w, const Instruction& in, int pc) {
    const s32 *o = L->operands + in.first, *at = o + in.results;
    Product p{};
    p.pc = pc;
    p.ticket = ++tickets;
    int of_a = in.b & A_IN_REGISTERS ? 4 : 0;
    if (of_a) { for (int q = 0; q < 4; q++) memcpy(p.a[q], w.slot(at[q]), 4 * LANES); at += 4; }
    else p.a_start = get<u64>(w.slot(*at++), 0);
    p.b_start = get<u64>(w.slot(*at++), 0);
    p.accumulate = get<u32>(w.slot(*at), 0) != 0;
    for (int i = 0; i < in.results + of_a; i++)
        if (w.unfenced[o[i] / 128]) { report(UNFENCED_REGISTER, pc, -1, w.id, -1, o[i]); break; }
    trace(PRODUCT, w, WHOLE_WARP, pc, p.accumulate, 0, nullptr, p.ticket);
    reads_of(w, p, 1);
    if (!L->late_products) carry_out(w, p);
    w.products.push_back(p);
    hold(p, w.busy);
    w.busy_count++;
    L->counts[pc].bytes += 32 * in.a + (of_a ? 0 : 512);
}

static void commit_products(Warp& w) {
    w.product_groups.push_back(std::move(w.products));
    w.products.clear();
}

static void wait_for_products(Warp& w, int pc, int left) {
    while ((int)w.product_groups.size() > left) {
        for (const Product& p : w.product_groups.front()) {
            reads_of(w, p, -1);
            trace(PRODUCT_OVER, w, WHOLE_WARP, pc, 0, 0, nullptr, p.ticket);
            if (L->late_products) carry_out(w, p);
        }
        w.product_groups.pop_front();
    }
    std::fill(w.busy.begin(), w.busy.end(), 0);
    w.busy_count = 0;
    for (auto& group : w.product_groups) for (auto& p : group) { hold(p, w.busy); w.busy_count++; }
    for (auto& p : w.products) { hold(p, w.busy); w.busy_count++; }
}
