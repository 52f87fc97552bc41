// An interpreter of PTX: a CTA's warps run one after another up to the next barrier, 32 lanes in lockstep.
//
// What is asynchronous (cp.async, wgmma) takes effect at once or as late as its wait allows, as asked; the order of the
// warps too is a choice. What does not depend on the choice is found by the history of every byte (history.h).
#include <cstdio>

#include "exchange.h"
#include "memory.h"
#include "products.h"
#include "tensor_memory.h"

// ---- instructions of one line: their names and operand sizes

struct Entry { const char* name; int sizes[5]; };
static const Entry ELEMENTWISE[] = {
#define X1(name, D, A, expression) {name, {sizeof(D), sizeof(A)}},
#define X2(name, D, A, B, expression) {name, {sizeof(D), sizeof(A), sizeof(B)}},
#define X3(name, D, A, B, C, expression) {name, {sizeof(D), sizeof(A), sizeof(B), sizeof(C)}},
#define X4(name, D, A, B, C, E, expression) {name, {sizeof(D), sizeof(A), sizeof(B), sizeof(C), sizeof(E)}},
#include "elementwise.def"
#undef X1
#undef X2
#undef X3
#undef X4
};
extern "C" int elementwise_count() { return sizeof ELEMENTWISE / sizeof(Entry); }
extern "C" const char* elementwise_name(int i) { return ELEMENTWISE[i].name; }
extern "C" int elementwise_size(int i, int operand) { return ELEMENTWISE[i].sizes[operand]; }  // 0: there is none

// Of a result of an approximate instruction: the same for the same number, whatever the schedule.
static int error_of(f32 a, int most) { return (int)((bits(a) * 2654435761u >> 7) % (2 * most + 1)) - most; }
static f32 off(f32 a, int units) {
    return !L->rough || a == 0 || !std::isfinite(a) ? a : number(bits(a) + error_of(a, units));
}
static f32 off_by(f32 a, f32 error) { return L->rough && std::isfinite(a) ? a + error * error_of(a, 1) : a; }

enum { BASE = __COUNTER__ + 1 };

static void elementwise(char* r, const Instruction& in, const s32* o, int pc) {
    switch (in.op) {
#define LANEWISE(set) case __COUNTER__ - BASE: { char* const d_ = r + o[0]; _Pragma("GCC ivdep") for (int i = 0; i < LANES; i++) set break; }
#define X1(name, D, A, expression) LANEWISE({ \
    const A a = get<A>(r + o[1], i); put<D>(d_, i, (D)(expression)); })
#define X2(name, D, A, B, expression) LANEWISE({ \
    const A a = get<A>(r + o[1], i); const B b = get<B>(r + o[2], i); put<D>(d_, i, (D)(expression)); })
#define X3(name, D, A, B, C, expression) LANEWISE({ \
    const A a = get<A>(r + o[1], i); const B b = get<B>(r + o[2], i); const C c = get<C>(r + o[3], i); \
    put<D>(d_, i, (D)(expression)); })
#define X4(name, D, A, B, C, E, expression) LANEWISE({ \
    const A a = get<A>(r + o[1], i); const B b = get<B>(r + o[2], i); const C c = get<C>(r + o[3], i); \
    const E d = get<E>(r + o[4], i); put<D>(d_, i, (D)(expression)); })
#include "elementwise.def"
    default: throw Stop{"unknown instruction", pc};
    }
}

static void other(Warp& w, const Instruction& in, int pc, u32 mask) {
    switch (in.op) {
    case LOAD_GLOBAL: load_global(w, in, pc, mask); break;
    case STORE_GLOBAL: store_global(w, in, pc, mask); break;
    case LOAD_SHARED: load_shared(w, in, pc, mask); break;
    case STORE_SHARED: store_shared(w, in, pc, mask); break;
    case CP_ASYNC: start_copy(w, in, pc, mask); break;
    case CP_COMMIT: commit_copies(w); break;
    case CP_WAIT:  // a: groups that may be left; below 0 none, nor what no group holds yet
        if (in.a < 0) commit_copies(w);
        wait_for_copies(w, pc, std::max(in.a, 0));
        break;
    case LDMATRIX: load_matrices(w, in, pc); break;
    case STMATRIX: store_matrices(w, in, pc); break;
    case MMA: multiply(w, in); break;
    case WGMMA: start_product(w, in, pc); break;
    case WGMMA_FENCE: std::fill(w.unfenced.begin(), w.unfenced.end(), 0); break;
    case WGMMA_COMMIT: commit_products(w); break;
    case WGMMA_WAIT: wait_for_products(w, pc, in.a); break;
    case PROXY_FENCE: proxy_fence(w); trace(FENCE, w, WHOLE_WARP, pc, 0, 0); break;
    case SHUFFLE: shuffle(w, in); break;
    case REDUX: reduce(w, in); break;
    case VOTE: vote(w, in); break;
    case ELECT: elect(w, in); break;
    case UNPACK: unpack(w, in); break;
    case PACK: pack(w, in); break;
    case TENSOR_ALLOCATE: allocate(w, in, pc); break;
    case TENSOR_LOAD: tensor_access(w, in, pc, true); break;
    case TENSOR_STORE: tensor_access(w, in, pc, false); break;
    case TENSOR_WAIT: tensor_wait(w, in); break;
    case TENSOR_PRODUCT: issue_product(w, in, pc, mask); break;
    case TENSOR_COMMIT: commit_tensor(w, in, pc, mask); break;
    case MBARRIER_INIT: mbarrier_init(w, in, pc, mask); break;
    case MBARRIER_WAIT: w.spinning = !mbarrier_wait(w, in, pc); break;
    case WARP_BARRIER: w.sync++; break;
    case NOTHING: break;
    default: throw Stop{"unknown instruction", pc};
    }
}

static bool for_each_lane(int op) {  // what lanes do by themselves, and so may do apart
    return op < BRANCH || op == NOTHING || op == LOAD_GLOBAL || op == STORE_GLOBAL || op == LOAD_SHARED ||
           op == STORE_SHARED || op == CP_ASYNC || op == UNPACK || op == PACK || op == TENSOR_PRODUCT || op == TENSOR_COMMIT ||
           op == MBARRIER_INIT;
}

// ---- a warp, up to a barrier or its end

// Lanes that part at a branch: those furthest behind, by an instruction's rank, run first, until all are at one place.
struct Apart {
    bool now = false;
    int lane_pc[LANES];

    void from(int pc) {
        if (!now) std::fill(lane_pc, lane_pc + LANES, pc);
        now = true;
    }
    u32 next(int& pc) {
        auto behind = [](int a, int b) { return L->code[a].rank < L->code[b].rank; };
        pc = *std::min_element(lane_pc, lane_pc + LANES, behind);
        u32 active = 0;
        for (int i = 0; i < LANES; i++) active |= (u32)(lane_pc[i] == pc) << i;
        now = active != ALL_LANES;
        return active;
    }
    void move(u32 lanes, int pc) {
        for (int i = 0; i < LANES; i++) if (lanes >> i & 1) lane_pc[i] = pc;
    }
};

static u32 guarded(const Warp& w, const Instruction& in, u32 active) {
    if (in.guard < 0) return active;
    const char* guard = w.registers.data() + in.guard;
    u32 mask = 0;
    for (int i = 0; i < LANES; i++) mask |= (u32)((get<u32>(guard, i) != 0) != (in.negated != 0)) << i;
    return mask & active;
}

static void execute(Warp& w, const Instruction& in, int pc, u32 mask) {
    const s32* o = L->operands + in.first;
    char* r = w.registers.data();
    if (mask != ALL_LANES && !for_each_lane(in.op)) throw Stop{"lanes of a warp are apart at an instruction of the whole warp", pc};
    if (w.busy_count && in.op != WGMMA) {
        for (int i = 0; i < in.count; i++) {
            u8 busy = w.busy[o[i] / 128];
            if (busy & 1 || (busy & 2 && i < in.results)) report(REGISTER_DURING_PRODUCT, pc, -1, w.id, -1, o[i]);
        }
    }
    // A copy is as old as what it copies: where registers are assigned, both may become one.
    if (in.op < BRANCH && in.d) w.unfenced[o[0] / 128] = w.unfenced[o[1] / 128];
    else if (in.op != WGMMA) for (int i = 0; i < in.results; i++) w.unfenced[o[i] / 128] = 1;
    bool by_registers = in.op < BRANCH || in.op == UNPACK || in.op == PACK, partial = by_registers && mask != ALL_LANES;
    char kept[4][8 * LANES];
    if (partial) for (int q = 0; q < in.results; q++) memcpy(kept[q], r + o[q], (L->wide[o[q] / 128] ? 8 : 4) * LANES);
    if (in.op < BRANCH) elementwise(r, in, o, pc);
    else other(w, in, pc, mask);
    if (partial) for (int q = 0; q < in.results; q++) for (int i = 0; i < LANES; i++) if (!(mask >> i & 1)) {
        if (L->wide[o[q] / 128]) put<u64>(r + o[q], i, get<u64>(kept[q], i));
        else put<u32>(r + o[q], i, get<u32>(kept[q], i));
    }
}

static void run(Warp& w) {
    w.spinning = false;
    Apart apart;
    u32 active = ALL_LANES;
    for (;;) {
        if (apart.now) active = apart.next(w.pc);
        if (w.pc >= L->code_count) throw Stop{"the program ran past its end", w.pc};
        const int pc = w.pc++;
        const Instruction& in = L->code[pc];
        if (apart.now) apart.move(active, pc + 1);
        u32 mask = guarded(w, in, active);
        w.position++;
        L->counts[pc].executed++;
        L->counts[pc].active += __builtin_popcount(mask);
        if (mask) trace(EXECUTED, w, WHOLE_WARP, pc, 0, 0);
        if (in.op == BRANCH) {
            if (mask == ALL_LANES) w.pc = in.a;
            else if (mask || apart.now) {
                apart.from(pc + 1);
                apart.move(mask, in.a);
            }
        } else if (in.op == RETURN) {
            if (mask && mask != ALL_LANES) throw Stop{"lanes of a warp return apart", pc};
            if (mask) { w.done = true; return; }
        } else if (in.op == BARRIER) {
            if (mask != ALL_LANES) throw Stop{"a barrier that some lanes of a warp do not reach", pc};
            return;
        } else if (mask) {
            execute(w, in, pc, mask);
            if (w.spinning) return;
        }
    }
}

// ---- a CTA, and the launch

static std::vector<Warp> warps_at_start() {
    int x = cta % L->grid[0], y = cta / L->grid[0] % L->grid[1], z = cta / L->grid[0] / L->grid[1];
    std::vector<Warp> warps(L->warps);
    for (int i = 0; i < L->warps; i++) {
        Warp& w = warps[i];
        w.registers.assign(L->initial, L->initial + L->register_bytes);
        w.id = i; w.pc = 0; w.done = w.spinning = false; w.busy_count = 0;
        w.position = w.sync = w.fence_epoch = 0; w.fence_event = 0;
        w.busy.assign(L->register_bytes / 128 + 1, 0);
        w.unfenced.assign(L->register_bytes / 128 + 1, 1);
        for (int lane = 0; lane < LANES; lane++) {
            const u32 values[] = {u32(i * LANES + lane), (u32)lane, (u32)x, (u32)y, (u32)z, (u32)i};
            for (int s = 0; s < 6; s++) put<u32>(w.slot(L->lane_slots[s]), lane, values[s]);
        }
    }
    return warps;
}

// Each warp to the next barrier or its end; those at an mbarrier again, until it is over. Returns how many have ended.
static int run_to_barrier(std::vector<Warp>& warps, const std::vector<int>& order) {
    for (auto& w : warps) w.spinning = !w.done;
    for (int round = 0;; round++) {
        int done = 0, spinning = 0;
        for (int i : order) {
            if (warps[i].spinning) run(warps[i]);
            done += warps[i].done;
            spinning += warps[i].spinning;
        }
        if (!spinning) return done;
        if (round > 1000) throw Stop{"warps wait at an mbarrier whose phase nobody ends", -1};
    }
}

static void run_cta(u32& random) {
    first_epoch = ++epoch;
    memset(shared.data(), 0xFF, shared.size());  // NaN
    for (auto& s : shared_history) { s.copies = s.products = s.writers = 0; s.tensor_ticket = 0; }
    tensor_reset(L->warps);
    std::vector<Warp> warps = warps_at_start();
    std::vector<int> order(L->warps);
    for (int i = 0; i < L->warps; i++) order[i] = L->order == 1 ? L->warps - 1 - i : i;
    for (;; epoch++) {
        for (int i = L->warps - 1; L->order == 2 && i > 0; i--) {
            random = random * 1664525 + 1013904223;
            std::swap(order[i], order[(random >> 8) % (i + 1)]);
        }
        int done = run_to_barrier(warps, order);
        if (done == L->warps) return;
        if (done) throw Stop{"some warps ended while others wait at a barrier", -1};
        for (auto& w : warps) {
            if (w.pc != warps[0].pc) throw Stop{"warps of a CTA wait at different barriers", w.pc - 1};
            w.sync++;
        }
        everybody_knows();
    }
}

extern "C" int launch(Launch* l) {  // 0, or 1 and a message
    L = l;
    places.clear();
    events.clear();
    shared.assign(l->shared_base + l->shared_bytes + 16, 0xFF);
    shared_history.assign(l->check ? l->shared_bytes : 0, SharedByte{});
    epoch = 0; event_count = 1; tickets = 0; l->found_count = 0;
    u32 random = l->seed * 2654435761u + 1;
    try {
        for (int i = 0; i < l->cta_count; i++) { cta = l->ctas[i]; run_cta(random); }
    } catch (const Stop& stop) {
        snprintf(l->message, sizeof l->message, "%s", stop.why.c_str());
        l->failed_pc = stop.pc;
        return 1;
    }
    return 0;
}

extern "C" const Event* traced(u64* count) {  // of the last launch
    *count = events.size();
    return events.data();
}
