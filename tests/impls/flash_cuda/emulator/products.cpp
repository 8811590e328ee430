// The tensor cores: wgmma, its matrix descriptors and its fragments (PTX ISA, "Asynchronous warpgroup level matrix
// instructions").
//
// A product is computed as late as it may be, when its warp waits for it. Until then its accumulators hold NaN. What it
// reads, registers and shared memory, is taken when it is started and compared when it is done: it belonged to the
// tensor cores meanwhile. Each warp computes its own 16 rows of the 64, when it gets there.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "state.h"

namespace emulator {

namespace {

constexpr int ROWS = 16, DEPTH = 16;                // of a warp's part of a product
constexpr std::uint32_t POISON = 0xFFFFDEAD;        // NaN that nothing computes

float brain_to_float(std::uint16_t x) {
    const std::uint32_t bits = std::uint32_t{x} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

/// A matrix descriptor taken apart; addresses and strides in bytes.
struct Matrix {
    Address start;
    std::uint32_t leading, stride;

    explicit Matrix(std::uint64_t bits)
        : start((bits & 0x3FFF) << 4), leading((bits >> 16 & 0x3FFF) << 4), stride((bits >> 32 & 0x3FFF) << 4) {
        const auto shown = static_cast<unsigned long long>(bits);
        if (bits >> 62 != 1) fail("matrix descriptor 0x%016llx: only the swizzle of 128 bytes (1) is emulated", shown);
        if (bits >> 49 & 7) fail("matrix descriptor 0x%016llx: no base offset is emulated", shown);
        if (bits & 0x3FF1C000C000C000) fail("matrix descriptor 0x%016llx: bits that must be 0 are not", shown);
    }

    /// Where element (m or n = i, k) lies, if k is contiguous: rows of 128 bytes, groups of 8 of them a stride apart.
    Address along_rows(std::uint32_t i, std::uint32_t k) const { return start + i / 8 * stride + i % 8 * 128 + k * 2; }
    /// If m or n is contiguous: 64 of them in a row, further ones a leading stride apart; k in groups of 8 rows.
    Address along_columns(std::uint32_t i, std::uint32_t k) const {
        return start + i / 64 * leading + i % 64 * 2 + k % 8 * 128 + k / 8 * stride;
    }
};

/// 16-bit elements (first + i, k) of an operand: i < count, k < 16, to tile[i * by_i + k * by_k]. What lies in shared
/// memory comes in chunks of 16 bytes. `starts`: the product does, and is not done.
void take(std::vector<std::uint16_t>& tile, std::uint64_t descriptor, bool transposed, int first, int count, int by_i,
          int by_k, Block& block, bool starts, const char* what) {
    const Matrix matrix(descriptor);
    constexpr int CHUNK = GRANULE / 2;
    tile.resize(static_cast<std::size_t>(count) * DEPTH);
    const int outer = transposed ? DEPTH : count, inner = transposed ? count : DEPTH;
    for (int o = 0; o < outer; ++o) {
        for (int c = 0; c < inner; c += CHUNK) {
            const int i = transposed ? c : o, k = transposed ? o : c;
            const Address plain = transposed ? matrix.along_columns(first + i, k) : matrix.along_rows(first + i, k);
            const Address address = swizzled(plain) | block.rank << RANK_SHIFT;  // of which a descriptor has nothing
            std::uint16_t chunk[CHUNK];
            std::memcpy(chunk, at(address, GRANULE, block, what), GRANULE);
            starts ? start_async_read(address, GRANULE, what) : end_async_read(address, GRANULE, what);
            for (int e = 0; e < CHUNK; ++e) {
                tile[(i + (transposed ? e : 0)) * by_i + (k + (transposed ? 0 : e)) * by_k] = chunk[e];
            }
        }
    }
}

int first_row(const Warp& warp) { return warp.index % WARPGROUP_WARPS * ROWS; }

void take_shared(const Product& product, Warp& warp, bool starts, std::vector<std::uint16_t>& a,
                 std::vector<std::uint16_t>& b) {
    if (!product.kind.a_in_registers) {
        take(a, product.a, product.kind.a_transposed, first_row(warp), ROWS, DEPTH, 1, *warp.block, starts,
             "operand A of a product reads");
    }
    take(b, product.b, product.kind.b_transposed, 0, product.kind.n, 1, product.kind.n, *warp.block, starts,
         "operand B of a product reads");
}

/// Fragments: lane l holds rows l / 4 and + 8, columns 2 (l % 4) and + 1 of every 8.
int row_of(int lane, int half) { return lane / 4 + 8 * half; }
int column_of(int lane, int group, int element) { return 8 * group + 2 * (lane % 4) + element; }

std::shared_ptr<Claim> claim_of(Warp& warp, const float* d) {
    for (auto& claim : warp.claims) {
        if (claim->registers[current->lane] == d) return claim;
    }
    return nullptr;
}

/// This lane's accumulators go to the tensor cores, if they are not there.
void hand_over(Claim& claim, float* d, int count) {
    float*& known = claim.registers[current->lane];
    if (known && known != d) fail("the warp's lanes mean different accumulators");
    if (known) return;
    known = d;
    std::memcpy(&claim.values[current->lane * count], d, count * sizeof *d);
    for (int i = 0; i < count; ++i) std::memcpy(&d[i], &POISON, sizeof POISON);
}

void hand_back(Claim& claim) {
    for (unsigned lane = 0; lane < WARP; ++lane) {
        float* d = claim.registers[lane];
        for (int i = 0; i < claim.count; ++i) {
            if (std::memcmp(&d[i], &POISON, sizeof POISON) != 0) {
                fail("race: thread %u changed accumulators before their product was done",
                     current->warp->index * WARP + lane);
            }
        }
        std::memcpy(d, &claim.values[lane * claim.count], claim.count * sizeof *d);
    }
}

void compute(const Product& product, Warp& warp) {
    const int n = product.kind.n;
    static std::vector<std::uint16_t> a_tile, b_tile;
    static std::vector<float> a(ROWS * DEPTH), b, d;
    a_tile.clear();
    take_shared(product, warp, false, a_tile, b_tile);
    if (a_tile != product.a_tile || b_tile != product.b_tile) {
        current->pc = product.pc;
        fail("race: shared memory changed under this product, before it was done");
    }
    if (product.kind.a_in_registers) {
        a_tile.resize(ROWS * DEPTH);
        for (unsigned lane = 0; lane < WARP; ++lane) {
            for (int r = 0; r < 4; ++r) {
                const std::uint32_t pair = product.operand[lane][r];
                if (*product.registers[lane][r] != pair) {
                    current->pc = product.pc;
                    fail("race: thread %u changed operand registers of this product before it was done",
                         warp.index * WARP + lane);
                }
                for (int e = 0; e < 2; ++e) {
                    a_tile[row_of(lane, r % 2) * DEPTH + column_of(lane, r / 2, e)] =
                        static_cast<std::uint16_t>(pair >> 16 * e);
                }
            }
        }
    }
    const auto widen = [&](std::vector<float>& to, const std::vector<std::uint16_t>& from) {
        to.resize(from.size());
        if (product.kind.bf16) {
            for (std::size_t i = 0; i < from.size(); ++i) to[i] = brain_to_float(from[i]);
        } else {
            for (std::size_t i = 0; i < from.size(); ++i) to[i] = half_to_float(from[i]);
        }
    };
    widen(a, a_tile);
    widen(b, b_tile);

    Claim& claim = *product.claim;
    d.assign(static_cast<std::size_t>(ROWS) * n, 0.f);
    const auto each = [&](auto use) {
        for (unsigned lane = 0; lane < WARP; ++lane) {
            for (int i = 0; i < n / 2; ++i) {
                use(d[row_of(lane, i >> 1 & 1) * n + column_of(lane, i >> 2, i & 1)], claim.values[lane * claim.count + i]);
            }
        }
    };
    if (product.accumulate) each([](float& sum, float value) { sum = value; });
    for (int r = 0; r < ROWS; ++r) {
        float* sums = &d[r * n];
        for (int k = 0; k < DEPTH; ++k) {
            const float factor = a[r * DEPTH + k];
            const float* line = &b[k * n];
            for (int c = 0; c < n; ++c) sums[c] += factor * line[c];
        }
    }
    each([](float sum, float& value) { value = sum; });
}

/// Computes products until `end` of all that the warp started.
void finish_until(Warp& warp, std::uint64_t end) {
    for (; warp.done < end; ++warp.done) {
        Product& product = warp.products.front();
        compute(product, warp);
        if (--product.claim->products == 0) {
            hand_back(*product.claim);
            std::erase(warp.claims, product.claim);
        }
        warp.products.pop_front();
    }
}

}  // namespace

float half_to_float(std::uint32_t bits) {
    static const std::vector<float> table = [] {
        std::vector<float> values(1 << 16);
        for (std::uint32_t i = 0; i < values.size(); ++i) {
            const std::uint32_t exponent = i >> 10 & 31, mantissa = i & 1023;
            float value = std::ldexp(static_cast<float>(exponent ? mantissa + 1024 : mantissa), exponent ? static_cast<int>(exponent) - 25 : -24);
            if (exponent == 31) value = mantissa ? NAN : INFINITY;
            values[i] = i >> 15 ? -value : value;
        }
        return values;
    }();
    return table[bits & 0xFFFF];
}

void begin_products() {
    CALLED;
    Warp& warp = *current->warp;
    meet(ALL_LANES, "wgmma.fence", 0, [&] { warp.fenced = true; });
}

void start_product(ProductKind kind, float* d, std::uint64_t a, const std::uint32_t* const* a_registers, std::uint64_t b,
                   bool accumulate) {
    CALLED;
    Warp& warp = *current->warp;
    const unsigned lane = current->lane;
    const std::uint64_t index = warp.started[lane]++ - warp.done;
    const int count = kind.n / 2;
    if (index == warp.products.size()) {
        Product& product = warp.products.emplace_back();
        product.kind = kind;
        product.a = a;
        product.b = b;
        product.accumulate = accumulate;
        product.pc = current->pc;
        product.claim = claim_of(warp, d);
        if ((!product.claim || kind.a_in_registers) && !warp.fenced) {
            fail("registers reach a product without wgmma.fence since the last wait");
        }
        if (!product.claim) {
            product.claim = std::make_shared<Claim>();
            product.claim->count = count;
            product.claim->values.resize(std::size_t{WARP} * count);
            warp.claims.push_back(product.claim);
        }
        if (product.claim->count != count) fail("accumulators of two widths");
        ++product.claim->products;
    }
    Product& product = warp.products[index];
    if (std::memcmp(&product.kind, &kind, sizeof kind) != 0 || product.a != a || product.b != b ||
        product.accumulate != accumulate) {
        fail("the warp's lanes start different products");
    }
    hand_over(*product.claim, d, count);
    if (kind.a_in_registers) {
        for (int r = 0; r < 4; ++r) {
            product.registers[lane][r] = a_registers[r];
            product.operand[lane][r] = *a_registers[r];
        }
    }
    product.lanes |= 1u << lane;
    if (product.lanes == ALL_LANES) {
        take_shared(product, warp, true, product.a_tile, product.b_tile);
        const std::uint64_t word = a * 3 + b * 5 + kind.n * 7 + accumulate;
        warp.history = (warp.history ^ word) * 0x100000001b3 + 1;
    }
}

void commit_products() {
    CALLED;
    Warp& warp = *current->warp;
    meet(ALL_LANES, "wgmma.commit_group", 0, [&] { warp.groups.push_back(warp.started[current->lane]); });
}

void wait_products(int pending) {
    CALLED;
    Warp& warp = *current->warp;
    meet(ALL_LANES, "wgmma.wait_group", 0, [&] {
        warp.fenced = false;
        while (warp.groups.size() > static_cast<std::size_t>(pending)) {
            finish_until(warp, warp.groups.front());
            warp.groups.pop_front();
        }
    });
}

void end_warps(Block& block) {
    for (Warp& warp : block.warps) {
        current = &block.fibers[warp.index * WARP];
        if (!warp.products.empty()) fail("the warp ends before its products are done");
        const Warp& first = block.warps[warp.index / WARPGROUP_WARPS * WARPGROUP_WARPS];
        if (warp.history != first.history) fail("the warps of a warpgroup started different products");
    }
}

void store_matrices(Address row, const std::uint32_t (&registers)[4]) {
    CALLED;
    struct Lane {
        Address row;
        const std::uint32_t* registers;
    } own{row, registers};
    if (row % GRANULE) fail("stmatrix to shared address 0x%x, which is not a multiple of 16", row);
    // Lane l addresses row l % 8 of matrix l / 8, which it is the writer of; 2 elements of it come from each of 4 lanes.
    const std::uint64_t* lanes = meet(ALL_LANES, "stmatrix", reinterpret_cast<std::uint64_t>(&own), nullptr);
    std::uint32_t line[4];
    for (int part = 0; part < 4; ++part) {
        line[part] = reinterpret_cast<const Lane*>(lanes[current->lane % 8 * 4 + part])->registers[current->lane / 8];
    }
    note_write(row, sizeof line);
    std::memcpy(at(row, sizeof line, *current->block, "stmatrix"), line, sizeof line);
    // Nobody leaves before all have read.
    meet(ALL_LANES, "stmatrix", 0, nullptr);
}

}  // namespace emulator
