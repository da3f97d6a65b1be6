#include "guards/checksum.hpp"

#include <array>
#include <cstring>

#if !defined(TRIOLLAMA_PORTABLE_CHECKSUM) && defined(__GNUC__) && defined(__x86_64__)
#define TRIOLLAMA_CRC_X86
#include <nmmintrin.h>
#elif !defined(TRIOLLAMA_PORTABLE_CHECKSUM) && defined(__ARM_FEATURE_CRC32)
#define TRIOLLAMA_CRC_ARM
#include <arm_acle.h>
#endif

namespace triollama::native {

namespace {

constexpr int LANES = 4;

struct Lane {
    const uint8_t * data;
    size_t size;
    uint32_t crc = 0xFFFFFFFFu;
};

using Lanes = std::array<Lane, LANES>;

uint64_t load64(const uint8_t * p) {
    uint64_t value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

// Castagnoli's polynomial, reflected. table[k][b]: of byte b followed by k zero bytes.
using Tables = std::array<std::array<uint32_t, 256>, 8>;

constexpr Tables make_tables() {
    Tables t{};
    for (uint32_t b = 0; b < 256; b++) {
        uint32_t crc = b;
        for (int bit = 0; bit < 8; bit++) {
            crc = (crc >> 1) ^ (crc & 1 ? 0x82F63B78u : 0u);
        }
        t[0][b] = crc;
    }
    for (size_t k = 1; k < t.size(); k++) {
        for (uint32_t b = 0; b < 256; b++) {
            t[k][b] = (t[k - 1][b] >> 8) ^ t[0][t[k - 1][b] & 0xFF];
        }
    }
    return t;
}

constexpr Tables tables = make_tables();

uint32_t portable(uint32_t crc, const uint8_t * data, size_t size) {
    while (size >= 8) {
        uint32_t low  = crc;
        uint32_t high = 0;
        for (int i = 0; i < 4; i++) {
            low  ^= (uint32_t) data[i] << (8 * i);
            high |= (uint32_t) data[4 + i] << (8 * i);
        }
        crc = tables[7][low & 0xFF] ^ tables[6][(low >> 8) & 0xFF] ^ tables[5][(low >> 16) & 0xFF] ^ tables[4][low >> 24] ^
              tables[3][high & 0xFF] ^ tables[2][(high >> 8) & 0xFF] ^ tables[1][(high >> 16) & 0xFF] ^ tables[0][high >> 24];
        data += 8;
        size -= 8;
    }
    for (; size > 0; data++, size--) {
        crc = (crc >> 8) ^ tables[0][(crc ^ *data) & 0xFF];
    }
    return crc;
}

// The part that all lanes have, 8 bytes of each in turn, by the CPU's own instruction.
#if defined(TRIOLLAMA_CRC_X86)
__attribute__((target("sse4.2"))) void in_step(Lanes & lanes, size_t size) {
    uint64_t a = lanes[0].crc, b = lanes[1].crc, c = lanes[2].crc, d = lanes[3].crc;
    for (size_t at = 0; at < size; at += 8) {
        a = _mm_crc32_u64(a, load64(lanes[0].data + at));
        b = _mm_crc32_u64(b, load64(lanes[1].data + at));
        c = _mm_crc32_u64(c, load64(lanes[2].data + at));
        d = _mm_crc32_u64(d, load64(lanes[3].data + at));
    }
    lanes[0].crc = (uint32_t) a;
    lanes[1].crc = (uint32_t) b;
    lanes[2].crc = (uint32_t) c;
    lanes[3].crc = (uint32_t) d;
}
bool has_instruction() { return __builtin_cpu_supports("sse4.2"); }
#elif defined(TRIOLLAMA_CRC_ARM)
void in_step(Lanes & lanes, size_t size) {
    uint32_t a = lanes[0].crc, b = lanes[1].crc, c = lanes[2].crc, d = lanes[3].crc;
    for (size_t at = 0; at < size; at += 8) {
        a = __crc32cd(a, load64(lanes[0].data + at));
        b = __crc32cd(b, load64(lanes[1].data + at));
        c = __crc32cd(c, load64(lanes[2].data + at));
        d = __crc32cd(d, load64(lanes[3].data + at));
    }
    lanes[0].crc = a;
    lanes[1].crc = b;
    lanes[2].crc = c;
    lanes[3].crc = d;
}
bool has_instruction() { return true; }
#else
void in_step(Lanes &, size_t) {}
bool has_instruction() { return false; }
#endif

}  // namespace

uint32_t state_checksum(const uint8_t * data, size_t size) {
    const size_t quarter = size / LANES / 8 * 8;
    Lanes lanes;
    for (int i = 0; i < LANES; i++) {
        lanes[i] = {data + i * quarter, i + 1 < LANES ? quarter : size - (LANES - 1) * quarter};
    }
    const size_t together = has_instruction() ? quarter : 0;
    in_step(lanes, together);
    uint8_t sums[4 * LANES];
    for (int i = 0; i < LANES; i++) {
        const uint32_t crc = ~portable(lanes[i].crc, lanes[i].data + together, lanes[i].size - together);
        for (int k = 0; k < 4; k++) {
            sums[4 * i + k] = (uint8_t) (crc >> (8 * k));
        }
    }
    return ~portable(0xFFFFFFFFu, sums, sizeof sums);
}

}  // namespace triollama::native
