// tcgen05, as Triton uses it on sm_100: tensor memory of 128 lanes by 512 columns of 32 bits, products that one thread
// issues for a whole CTA, and the mbarriers by which their end is learned.
//
// Products end in the order of their issue. A warp knows of an end once its wait on the mbarrier of a later commit succeeds,
// or once a barrier follows such a wait of another warp: until then it may not touch what the product reads or writes.
#pragma once
#include <map>

#include "products.h"

struct Cell { u32 written, writers, write_pc, read, readers, read_pc; s64 ticket; int product_pc; u8 storing, by_product; };
struct TensorProduct { int pc, warp; u64 a, b; u32 to, a_column, shape; bool accumulate; s64 ticket; };
struct MBarrier { int count, left; u32 phase; s64 ticket, committed; };

const int TENSOR_LANES = 128, TENSOR_COLUMNS = 512;
static std::vector<u32> tensor;                  // content, by lane and column
static std::vector<Cell> cells;
static u32 allocated;                            // columns
static std::deque<TensorProduct> issued;         // and not carried out yet
static std::map<u32, MBarrier> mbarriers;        // by address
static std::vector<s64> known;                   // by warp: the last product that it knows to have ended

static void tensor_reset(int warps) {
    tensor.assign(L->uses_tensor_memory ? TENSOR_LANES * TENSOR_COLUMNS : 0, 0xFFFFFFFFu);
    cells.assign(L->uses_tensor_memory ? TENSOR_LANES * TENSOR_COLUMNS : 0, Cell{});
    allocated = 0;
    issued.clear();
    mbarriers.clear();
    known.assign(warps, tickets);
}

static s64 ended_for(int warp) { return known[warp]; }
static void everybody_knows() {  // after a barrier of the CTA
    s64 most = *std::max_element(known.begin(), known.end());
    std::fill(known.begin(), known.end(), most);
}

static bool tensor_fits(u32 lane, u32 column, int pc, int warp) {
    if (lane < (u32)TENSOR_LANES && column < allocated) return true;
    report(OUTSIDE, pc, -1, warp, -1, (u64)lane << 16 | column);
    return false;
}
static Cell& cell(u32 lane, u32 column) { return cells[lane * TENSOR_COLUMNS + column]; }

static void cell_read(u32 lane, u32 column, int pc, const Warp& w, bool by_product) {
    Cell& c = cell(lane, column);
    u64 address = (u64)lane << 16 | column;
    if (!by_product && c.ticket > known[w.id]) report(TENSOR_DURING_PRODUCT, pc, c.product_pc, w.id, -1, address);
    if (c.storing) report(TENSOR_STORE_UNDER_WAY, pc, c.write_pc, w.id, c.storing - 1, address);
    if (c.written < first_epoch) report(NEVER_WRITTEN, pc, -1, w.id, -1, address);
    else if (c.written == epoch && !c.by_product && !(c.writers & bit(w.id))) report(RACE_TENSOR, pc, c.write_pc, w.id, one_of(c.writers, w.id), address);
    if (by_product) return;  // its ticket says when that is over
    if (c.read != epoch) { c.read = epoch; c.readers = 0; }
    c.readers |= bit(w.id);
    c.read_pc = pc;
}
static void cell_written(u32 lane, u32 column, int pc, const Warp& w, bool by_product) {
    Cell& c = cell(lane, column);
    u64 address = (u64)lane << 16 | column;
    if (!by_product && c.ticket > known[w.id]) report(TENSOR_DURING_PRODUCT, pc, c.product_pc, w.id, -1, address);
    if (c.storing && (by_product || c.storing - 1 != w.id)) report(TENSOR_STORE_UNDER_WAY, pc, c.write_pc, w.id, c.storing - 1, address);
    if (c.read == epoch && but(c.readers, w.id)) report(RACE_TENSOR, pc, c.read_pc, w.id, one_of(but(c.readers, w.id), w.id), address);
    if (c.written == epoch && !c.by_product && but(c.writers, w.id)) report(RACE_TENSOR, pc, c.write_pc, w.id, one_of(but(c.writers, w.id), w.id), address);
    c.written = epoch; c.writers = bit(w.id); c.write_pc = pc;
    c.storing = by_product ? 0 : w.id + 1; c.by_product = by_product;
}

static int first_lane(u32 mask) { return __builtin_ctz(mask); }

static void allocate(Warp& w, const Instruction& in, int pc) {  // a: columns; writes where they begin to shared memory
    u32 to = get<u32>(w.slot(L->operands[in.first]), 0), from = allocated;
    if (allocated + in.a > (u32)TENSOR_COLUMNS) throw Stop{"tensor memory is used up", pc};
    allocated += in.a;
    if (!shared_fits(to, 4, pc, w.id)) return;
    shared_written(to, (const u8*)&from, 4, pc, w, WHOLE_WARP);
    memcpy(&shared[to], &from, 4);
}

// a: registers; b: how the threads share the lanes and columns. Of four warps each reaches 32 lanes.
enum { LANE_A_THREAD = 0, TWO_HALVES = 1, AS_ACCUMULATORS = 2 };  // 32x32b, 16x32bx2 (the second c columns on), 16x256b
static void tensor_access(Warp& w, const Instruction& in, int pc, bool load) {
    const s32* o = L->operands + in.first;
    u32 at = get<u32>(w.slot(o[load ? in.a : 0]), 0) + (u32)in.offset, lane_from = at >> 16, column_from = at & 0xFFFF;
    if (lane_from / 32 != (u32)w.id % 4) throw Stop{"lanes of tensor memory that another warp reaches", pc};
    for (int j = 0; j < in.a; j++) {
        char* slot = w.slot(o[load ? j : 1 + j]);
        for (int i = 0; i < LANES; i++) {
            u32 lane = lane_from + i, column = column_from + j;
            if (in.b == TWO_HALVES) { lane = lane_from + i % 16; column += i / 16 * in.c; }
            if (in.b == AS_ACCUMULATORS) { lane = lane_from + i / 4 + j / 2 % 2 * 8; column = column_from + j / 4 * 8 + i % 4 * 2 + j % 2; }
            if (!tensor_fits(lane, column, pc, w.id)) continue;
            u32& held = tensor[lane * TENSOR_COLUMNS + column];
            if (load) { cell_read(lane, column, pc, w, false); put<u32>(slot, i, held); }
            else { cell_written(lane, column, pc, w, false); held = get<u32>(slot, i); }
        }
    }
    if (load) {
        for (int j = 0; j < in.a; j++) w.busy[o[j] / 128] |= 1;
        w.busy_count++;
    }
}
static void tensor_wait(Warp& w, const Instruction& in) {  // a: 1 for stores, else for loads
    if (in.a) { for (Cell& c : cells) if (c.storing == w.id + 1) c.storing = 0; }
    else { std::fill(w.busy.begin(), w.busy.end(), 0); w.busy_count = 0; }
}

// ---- products. Fields of a shape: bits 7 to 9 and 10 to 12 types of A and B, 15 and 16 transposed, 17 on N / 8, 24 on M / 16.

static u64 as_of_wgmma(u64 descriptor, int pc) {  // the same fields, but for the swizzle
    static const int modes[8] = {0, -1, 1, -1, 2, -1, 3, -1};
    int mode = modes[descriptor >> 61 & 7];
    if (mode < 0 || descriptor >> 49 & 15) throw Stop{"a descriptor of shared memory of an unknown kind", pc};
    return (descriptor & 0x00003FFF3FFF3FFFull) | (u64)mode << 62;
}
static u32 lane_of_row(int row, int m) { return m == 128 ? row : row / 16 * 32 + row % 16; }

static void carry_out(const TensorProduct& p) {
    int m = (p.shape >> 24 & 31) * 16, n = (p.shape >> 17 & 63) * 8;
    bool brain_a = p.shape >> 7 & 1, brain_b = p.shape >> 10 & 1, a_transposed = p.shape >> 15 & 1, b_transposed = p.shape >> 16 & 1;
    std::vector<f32> A(m * 16), B(16 * n);
    auto piece_at = [&](u32 address, u16* to) {
        bool fits = address >= (u32)L->shared_base && address + 16 <= (u32)(L->shared_base + L->shared_bytes);
        if (fits) memcpy(to, &shared[address], 16);
        else memset(to, 0xFF, 16);
    };
    if (p.a_column != ~0u) {
        for (int i = 0; i < m; i++) for (int k = 0; k < 16; k++) {
            u32 two = tensor[(lane_of_row(i, m) + (p.a_column >> 16)) * TENSOR_COLUMNS + (p.a_column & 0xFFFF) + k / 2];
            A[i * 16 + k] = from_half(two >> (k % 2 * 16), brain_a);
        }
    } else pieces(as_of_wgmma(p.a, p.pc), 0, m, a_transposed, [&](u32 address, int i, int k) {
        u16 piece[8];
        piece_at(address, piece);
        for (int j = 0; j < 8; j++) (a_transposed ? A[(i + j) * 16 + k] : A[i * 16 + k + j]) = from_half(piece[j], brain_a);
    });
    pieces(as_of_wgmma(p.b, p.pc), 0, n, b_transposed, [&](u32 address, int i, int k) {
        u16 piece[8];
        piece_at(address, piece);
        for (int j = 0; j < 8; j++) (b_transposed ? B[k * n + i + j] : B[(k + j) * n + i]) = from_half(piece[j], brain_b);
    });
    std::vector<f64> sum(n);
    for (int i = 0; i < m; i++) {
        std::fill(sum.begin(), sum.end(), 0.0);
        for (int k = 0; k < 16; k++) for (int j = 0; j < n; j++) sum[j] += (f64)(A[i * 16 + k] * B[k * n + j]);
        u32* d = &tensor[(lane_of_row(i, m) + (p.to >> 16)) * TENSOR_COLUMNS + (p.to & 0xFFFF)];
        for (int j = 0; j < n; j++) d[j] = bits(narrowed(p.accumulate ? sum[j] + number(d[j]) : sum[j]));
    }
}

// a: 1 where A lies in tensor memory, c columns on. Operands: to, A or its descriptor, descriptor of B, shape, whether to add.
static void issue_product(Warp& w, const Instruction& in, int pc, u32 mask) {
    const s32* o = L->operands + in.first;
    int by = first_lane(mask);
    TensorProduct p{pc, w.id, 0, get<u64>(w.slot(o[2]), by), get<u32>(w.slot(o[0]), by) + (u32)in.offset, ~0u, get<u32>(w.slot(o[3]), by),
                    get<u32>(w.slot(o[4]), by) != 0, ++tickets};
    if (in.a) p.a_column = get<u32>(w.slot(o[1]), by) + (u32)in.c;
    else p.a = get<u64>(w.slot(o[1]), by);
    int m = (p.shape >> 24 & 31) * 16, n = (p.shape >> 17 & 63) * 8;
    if ((m != 64 && m != 128) || (p.shape >> 4 & 3) != 1 || p.shape >> 13 & 3) throw Stop{"a product of an unknown kind", pc};
    auto read = [&](u32 address, int, int) {
        if (!shared_fits(address, 16, pc, w.id)) return;
        shared_read(address, 16, pc, w, WHOLE_WARP, true, false);
        if (L->check) for (int i = 0; i < 16; i++) { of_shared(address + i).tensor_ticket = p.ticket; of_shared(address + i).product_pc = pc; }
    };
    auto use = [&](u32 at, int columns, bool write) {
        for (int i = 0; i < m; i++) for (int j = 0; j < columns; j++) {
            u32 lane = lane_of_row(i, m) + (at >> 16), column = (at & 0xFFFF) + j;
            if (!tensor_fits(lane, column, pc, w.id)) throw Stop{"a product outside of what was allocated", pc};
            if (!write || p.accumulate) cell_read(lane, column, pc, w, true);
            if (write) cell_written(lane, column, pc, w, true);
            cell(lane, column).ticket = p.ticket;
            cell(lane, column).product_pc = pc;
        }
    };
    if (in.a) use(p.a_column, 8, false);
    else pieces(as_of_wgmma(p.a, pc), 0, m, p.shape >> 15 & 1, read);
    pieces(as_of_wgmma(p.b, pc), 0, n, p.shape >> 16 & 1, read);
    use(p.to, n, true);
    if (L->late_products) issued.push_back(p);
    else carry_out(p);
    L->counts[pc].bytes += 32 * n + (in.a ? 0 : 32 * m);
}

// ---- mbarriers. A phase ends when all that it counts have arrived; a commit arrives once the products before it have ended.

static MBarrier& mbarrier_at(u32 address, int pc) {
    auto found = mbarriers.find(address);
    if (found == mbarriers.end()) throw Stop{"an mbarrier that was not initialised", pc};
    return found->second;
}
static void mbarrier_init(Warp& w, const Instruction& in, int pc, u32 mask) {
    const s32* o = L->operands + in.first;
    u32 at = get<u32>(w.slot(o[0]), first_lane(mask)) + (u32)in.offset;
    int count = get<u32>(w.slot(o[1]), first_lane(mask));
    if (shared_fits(at, 8, pc, w.id)) mbarriers[at] = {count, count, 0, 0, 0};
}
static void commit_tensor(Warp& w, const Instruction& in, int pc, u32 mask) {
    MBarrier& b = mbarrier_at((u32)get<u64>(w.slot(L->operands[in.first]), first_lane(mask)) + (u32)in.offset, pc);
    if (b.committed) throw Stop{"a second commit to an mbarrier before the first was waited for", pc};
    b.committed = tickets + 1;
}
static bool mbarrier_wait(Warp& w, const Instruction& in, int pc) {  // operands: whether it is over, address, parity
    const s32* o = L->operands + in.first;
    MBarrier& b = mbarrier_at(get<u32>(w.slot(o[1]), 0) + (u32)in.offset, pc);
    u32 parity = get<u32>(w.slot(o[2]), 0);
    if ((b.phase & 1) == (parity & 1) && b.committed) {  // the products before the commit end now at the latest
        while (!issued.empty() && issued.front().ticket < b.committed) { carry_out(issued.front()); issued.pop_front(); }
        b.ticket = b.committed - 1;
        b.committed = 0;
        if (--b.left == 0) { b.phase++; b.left = b.count; }
    }
    bool over = (b.phase & 1) != (parity & 1);
    if (over) known[w.id] = std::max(known[w.id], b.ticket);
    for (int i = 0; i < LANES; i++) put<u32>(w.slot(o[0]), i, over);
    return over;
}
