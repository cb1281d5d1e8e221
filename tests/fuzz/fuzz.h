// What the fuzz targets share: choices and numbers from the fuzzer's bytes, buffers that end where they say, and calls of
// the registered kernels with the checks that hold for every one of them.
#pragma once
#include <math.h>
#include <sanitizer/asan_interface.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <vector>

#include "rk.h"

namespace fuzz {

#define REQUIRE(condition, ...)                                     \
    do {                                                            \
        if (!(condition)) {                                         \
            fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);         \
            fprintf(stderr, __VA_ARGS__);                           \
            fprintf(stderr, "  [%s is false]\n", #condition);       \
            abort();                                                \
        }                                                           \
    } while (0)

struct Bf16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline float value(float x) { return x; }
inline float value(Bf16 x) { return from_bits((uint32_t)x.bits << 16); }
inline float value(Half x) {
    const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    const float sign = x.bits & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * ldexpf((float)(exponent ? mantissa + 1024 : mantissa), (exponent ? exponent : 1) - 25);
}
inline void assign(float& to, float x) { to = x; }
inline void assign(Bf16& to, float x) {  // cut off, not rounded: any number will do
    uint32_t bits;
    memcpy(&bits, &x, 4);
    to.bits = (uint16_t)(bits >> 16) | (x != x ? 0x40 : 0);
}
inline void assign(Half& to, float x) {
    if (x != x) {
        to.bits = 0x7e00;
        return;
    }
    const uint16_t sign = signbit(x) ? 0x8000 : 0;
    int exponent;
    const float mantissa = frexpf(fabsf(x), &exponent);
    if (isinf(x) || exponent > 16)
        to.bits = sign | 0x7c00;
    else if (x == 0.0f || exponent < -13)
        to.bits = sign;
    else
        to.bits = sign | (uint16_t)(exponent + 14) << 10 | ((uint16_t)(mantissa * 2048.0f) & 1023);
}

// What numbers a buffer gets. Tame ones are finite and small, so that results must be finite, too.
struct Numbers {
    int kind;
    float scale, offset;
    int rarity;        // one special number in so many; 0: none
    uint8_t specials;  // which ones, a bit each
};

// Choices come from the fuzzer's bytes, zeros when these run out; the many numbers from a generator that they seed.
class Source {
  public:
    Source(const uint8_t* data, size_t size) : data_(data), end_(data + size) {}
    uint8_t byte() { return data_ < end_ ? *data_++ : 0; }
    bool coin() { return byte() & 1; }
    int64_t below(int64_t n) { return n <= 256 ? byte() % n : (byte() << 8 | byte()) % n; }
    template <class T>
    T pick(std::initializer_list<T> options) {
        return options.begin()[below((int64_t)options.size())];
    }
    // Sizes on both sides of a vector's, and rarely of a block's.
    int64_t size(int64_t most, int64_t rare = 0) {
        const uint8_t b = byte();
        if (rare && b >= 250) return rare - 3 + below(7);
        return b < 160 ? b % (most < 20 ? most + 1 : 20) : b % (most + 1);
    }
    void seed() {
        state_ = 0x9e3779b97f4a7c15u;
        for (int i = 0; i < 4; ++i) state_ = (state_ ^ byte()) * 0x100000001b3u;
    }
    uint32_t random() {
        state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
        return (uint32_t)(state_ >> 16);
    }
    float unit() { return (float)(random() >> 8) / (1 << 24); }

    Numbers numbers(bool tame) {
        Numbers n = {(int)below(8), pick({1.0f, 0.01f, 5.0f, 20.0f}), pick({0.0f, 0.0f, -3.0f, 3.0f}), 0, 0};
        n.kind = tame ? n.kind % 4 : n.kind;
        if (tame) return n;
        n.rarity = pick({0, 2, 5, 50, 1});
        n.specials = byte();
        return n;
    }
    // Quiet, full and signalling NaN, the infinities, the smallest and the largest numbers.
    static float special(int which) {
        static const uint32_t kBits[8] = {0x7fc00000, 0xffffffff, 0x7f800001, 0x7f800000,
                                          0xff800000, 0x00000001, 0x7f7fffff, 0xff7fffff};
        return from_bits(kBits[which]);
    }
    float garbage() { return special((int)(random() % 8)); }
    float number(const Numbers& n) {
        if (n.rarity && random() % (uint32_t)n.rarity == 0) {
            const int which = (int)(random() % 8);
            if (n.specials >> which & 1) return special(which);
        }
        switch (n.kind) {
            case 0: return n.offset;                                                   // all the same
            case 1: return n.scale * (float)((int)(random() % 5) - 2);                 // many ties
            case 4: return (unit() - 0.5f) * 1e38f;                                    // huge
            case 5: return from_bits(random() & 0x807fffff);                           // subnormal
            case 6: return from_bits(random());                                        // any bits
            default: return n.offset + n.scale * (unit() + unit() + unit() - 1.5f);  // a bell
        }
    }

  private:
    const uint8_t *data_, *end_;
    uint64_t state_ = 1;
};

enum class Use { input, output, both };

// A buffer of exactly so many bytes, with red zones around it, and perhaps gaps inside that nobody may touch.
struct Region {
    Use use;
    size_t bytes;
    std::unique_ptr<uint8_t, decltype(&free)> data;
    std::vector<std::pair<uint8_t*, size_t>> gaps;
    std::vector<uint8_t> before, first;  // contents before the call, and after the first run

    Region(Use use_, size_t bytes_) : use(use_), bytes(bytes_), data((uint8_t*)malloc(bytes_), free) {}
    void open(bool opened) {
        for (auto& gap : gaps)
            if (opened)
                ASAN_UNPOISON_MEMORY_REGION(gap.first, gap.second);
            else
                ASAN_POISON_MEMORY_REGION(gap.first, gap.second);
    }
    std::vector<uint8_t> contents() {
        open(true);
        std::vector<uint8_t> copy(data.get(), data.get() + bytes);
        open(false);
        return copy;
    }
    void restore(const std::vector<uint8_t>& copy) {
        open(true);
        if (bytes) memcpy(data.get(), copy.data(), bytes);
        open(false);
    }
};

template <class T>
struct Matrix {  // [rows, columns], rows `stride` apart; stride 0: one row for all
    T* data;
    int64_t rows, columns, stride;
    T* row(int64_t r) const { return data + r * stride; }
    float at(int64_t r, int64_t c) const { return value(row(r)[c]); }
};

extern bool reverse_pieces;  // parallel_for takes the pieces from the last to the first

class Memory {
  public:
    explicit Memory(Source& source) : source_(source) {}
    ~Memory() {
        for (Region& r : regions_) r.open(true);
    }

    template <class T>
    T* array(int64_t n, Use use = Use::output) {
        regions_.emplace_back(use, (size_t)n * sizeof(T));
        return (T*)regions_.back().data.get();
    }
    template <class T = float>
    T* numbers(int64_t n, const Numbers& kind) {
        T* x = array<T>(n, Use::input);
        for (int64_t i = 0; i < n; ++i) assign(x[i], source_.number(kind));
        return x;
    }
    template <class T = float>
    Matrix<T> matrix(int64_t rows, int64_t columns, const Numbers& kind, Use use = Use::input) {
        Matrix<T> m = empty_matrix<T>(rows, columns, use);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c) assign(m.row(r)[c], source_.number(kind));
        return m;
    }
    // What has been an input is now written over.
    void overwrite(const void* data) {
        for (Region& r : regions_)
            if (r.data.get() == data) r.use = Use::both;
    }
    // 1 = keep.
    Matrix<uint8_t> mask(int64_t rows, int64_t columns) {
        Matrix<uint8_t> m = empty_matrix<uint8_t>(rows, columns, Use::input);
        const int64_t kind = source_.below(4), share = source_.pick({8, 1, 15});
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t length = source_.random() % (uint32_t)(columns + 1);
            for (int64_t c = 0; c < columns; ++c)
                m.row(r)[c] = kind == 0 ? 1 : kind == 1 ? c < length : (int64_t)(source_.random() % 16) < share;
        }
        return m;
    }
    // Offsets 0, .., total of `rows` parts of at most `most` entries.
    int64_t* offsets(int64_t rows, int64_t most) {
        int64_t* cu = array<int64_t>(rows + 1, Use::input);
        cu[0] = 0;
        for (int64_t r = 0; r < rows; ++r) cu[r + 1] = cu[r] + source_.random() % (uint32_t)(most + 1);
        return cu;
    }

    // Calls the kernel twice, the second time with its pieces in reverse order: the same bits, no input changed. What is
    // left unwritten holds other bytes each time.
    template <class... A>
    void call(const char* name, A... arguments) {
        const rk::Entry* entry = find(name);
        const char kinds[] = {kind_of(arguments)..., 'i', 0};
        REQUIRE(!strcmp(entry->signature, kinds), "%s takes %s, got %s", name, entry->signature, kinds);
        const rk::Value values[] = {pack(arguments)..., pack((int64_t)1)};
        for (Region& r : regions_) r.before = r.contents();
        for (const bool again : {false, true}) {
            for (Region& r : regions_) {
                r.restore(r.before);
                if (r.use == Use::output) memset(r.data.get(), again ? 0x5a : 0xa5, r.bytes);
            }
            reverse_pieces = again;
            entry->base(values);
            for (Region& r : regions_) {
                if (r.use == Use::input) REQUIRE(r.contents() == r.before, "%s changed an input", name);
                if (again) REQUIRE(r.contents() == r.first, "%s gave other bits in another order", name);
                r.first = r.contents();
            }
        }
        for (Region& r : regions_)
            if (r.use == Use::output) r.use = Use::input;  // of what is called next
    }

  private:
    static char kind_of(double) { return 'd'; }
    static char kind_of(int64_t) { return 'i'; }
    static char kind_of(const void*) { return 'i'; }
    static rk::Value pack(double x) {
        rk::Value v;
        v.d = x;
        return v;
    }
    static rk::Value pack(int64_t x) {
        rk::Value v;
        v.i = x;
        return v;
    }
    static rk::Value pack(const void* x) { return pack((int64_t)(intptr_t)x); }
    static const rk::Entry* find(const char* name);

    template <class T>
    Matrix<T> empty_matrix(int64_t rows, int64_t columns, Use use) {
        int64_t stride = columns;
        if (use != Use::output && source_.below(4) == 0) stride = columns + 1 + source_.below(20);
        if (use == Use::input && source_.below(8) == 0) stride = 0;
        const int64_t entries = rows == 0 || columns == 0 ? 0 : (rows - 1) * stride + columns;
        T* data = array<T>(entries, use);
        if (stride > columns && entries > 0) {
            memset(data, 0, (size_t)entries * sizeof(T));
            for (int64_t r = 0; r + 1 < rows; ++r)
                regions_.back().gaps.emplace_back((uint8_t*)(data + r * stride + columns),
                                                  (size_t)(stride - columns) * sizeof(T));
            regions_.back().open(false);
        }
        return {data, rows, columns, stride};
    }

    Source& source_;
    std::vector<Region> regions_;
};

}  // namespace fuzz
