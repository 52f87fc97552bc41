// Lanes of registers, and the arithmetic that C++ lacks: 16-bit floats, bit fields, byte permutations.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

using u8 = uint8_t; using s8 = int8_t; using u16 = uint16_t; using s16 = int16_t; using u32 = uint32_t; using s32 = int32_t;
using u64 = uint64_t; using s64 = int64_t; using f32 = float; using f64 = double;
using b16 = u16; using b32 = u32; using b64 = u64; using pred = u32;

const int LANES = 32;
const u32 ALL_LANES = ~0u;

// A register is a slot of 32 lanes, 4 bytes a lane; 8 where it is wide. Narrow values take the low end of 4 bytes.
template <class T> static inline T get(const char* slot, int lane) {
    if constexpr (sizeof(T) >= 4) return ((const T*)slot)[lane];
    else return (T)((const u32*)slot)[lane];
}
template <class T> static inline void put(char* slot, int lane, T value) {
    if constexpr (sizeof(T) >= 4) ((T*)slot)[lane] = value;
    else ((u32*)slot)[lane] = (u32)(u16)value;
}

static inline u32 bits(f32 a) { u32 b; memcpy(&b, &a, 4); return b; }
static inline f32 number(u32 b) { f32 a; memcpy(&a, &b, 4); return a; }
static inline f32 flush(f32 a) { return std::fabs(a) < 1.17549435e-38f ? a * 0.0f : a; }

static inline f32 from_bf16(u16 a) { return number((u32)a << 16); }
static inline u16 to_bf16(f32 a) {
    u32 b = bits(a);
    return a != a ? 0x7FFF : (u16)((b + 0x7FFF + ((b >> 16) & 1)) >> 16);
}
static inline f32 from_f16(u16 a) { _Float16 h; memcpy(&h, &a, 2); return (f32)h; }
static inline u16 to_f16(f32 a) {
    if (a != a) return 0x7FFF;
    _Float16 h = (_Float16)a;
    u16 b;
    memcpy(&b, &h, 2);
    return b;
}
static inline f32 from_half(u16 a, bool brain) { return brain ? from_bf16(a) : from_f16(a); }

// 16-bit arithmetic is exact to 53 bits and then rounded once, by way of a float rounded to odd.
static inline f32 to_odd(f64 a) {
    f32 f = (f32)a;
    if (a != a || std::isinf(f) || (f64)f == a) return f;
    if (std::fabs((f64)f) > std::fabs(a)) f = std::nextafter(f, 0.0f);
    return number(bits(f) | 1);
}
struct Brain {
    static f64 in(u16 a) { return from_bf16(a); }
    static u16 out(f64 a) { return to_bf16(to_odd(a)); }
};
struct Half {
    static f64 in(u16 a) { return from_f16(a); }
    static u16 out(f64 a) { return to_f16(to_odd(a)); }
};
// f of two 16-bit numbers that share a register; of a single one too, whose upper half nobody reads.
template <class H, class F> static inline u32 halves(u32 a, u32 b, u32 c, F f) {
    auto one = [&](int s) { return (u32)H::out(f(H::in(a >> s & 0xFFFF), H::in(b >> s & 0xFFFF), H::in(c >> s & 0xFFFF))); };
    return one(0) | one(16) << 16;
}

template <class F> static inline u64 pairs(u64 a, u64 b, u64 c, F f) {  // of two float32 that share a register
    auto one = [&](int s) { return (u64)bits(f(number((u32)(a >> s)), number((u32)(b >> s)), number((u32)(c >> s)))) << s; };
    return one(0) | one(32);
}

// min and max return the number where the other operand is NaN, and order the zeros.
template <class T> static inline T least(T a, T b) {
    return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
}
template <class T> static inline T most(T a, T b) {
    return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? b : a) : a > b ? a : b;
}
template <class T> static inline T to_integer(f32 a) {  // saturates; NaN becomes 0
    if (a != a) return 0;
    if ((f64)a <= (f64)std::numeric_limits<T>::min()) return std::numeric_limits<T>::min();
    if ((f64)a >= (f64)std::numeric_limits<T>::max()) return std::numeric_limits<T>::max();
    return (T)a;
}

// Division by zero is left open by PTX; the least number over -1 wraps, which C++ does not promise.
template <class T> static inline T quotient(T a, T b) {
    if constexpr (std::is_signed_v<T>) if (b == (T)-1) return (T)(0 - (u64)a);
    return b == 0 ? (T)-1 : (T)(a / b);
}
template <class T> static inline T remainder_of(T a, T b) {
    if constexpr (std::is_signed_v<T>) if (b == (T)-1) return 0;
    return b == 0 ? a : (T)(a % b);
}
static inline u64 low_bits(u32 length) { return length >= 64 ? ~0ull : (1ull << length) - 1; }
static inline u64 field(u64 a, u32 start, u32 length) {
    return start >= 64 ? 0 : (a >> start) & low_bits(length);
}
static inline s64 signed_field(s64 a, u32 start, u32 length, u32 width) {
    if (length == 0) return 0;
    u32 last = std::min(start + length - 1, width - 1), kept = start >= width ? 0 : last - start + 1;
    u64 raw = kept ? field((u64)a & low_bits(width), start, kept) : 0;
    bool negative = (u64)a >> last & 1;
    return (s64)(negative ? raw | (kept >= 64 ? 0 : ~0ull << kept) : raw);
}
static inline u64 insert(u64 a, u64 b, u32 start, u32 length, u32 width) {
    if (length == 0 || start >= width) return b;
    u64 mask = low_bits(length) << start;
    return (b & ~mask) | ((a << start) & mask);
}
static inline u32 lop3(u32 a, u32 b, u32 c, u32 table) {
    u32 result = 0;
    for (int i = 0; i < 8; i++)
        if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
}
static inline u32 permute(u32 a, u32 b, u32 chosen) {
    u64 both = (u64)b << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
        u32 which = chosen >> (4 * i) & 15, byte = both >> (8 * (which & 7)) & 255;
        if (which & 8) byte = byte & 128 ? 255 : 0;  // its sign alone
        result |= byte << (8 * i);
    }
    return result;
}
