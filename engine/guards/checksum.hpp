// A checksum of saved states: fast enough that checking one is no reason to skip it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace triollama::native {

// The CRC-32C of the CRC-32Cs (little-endian) of the data's four quarters. A quarter has size / 4 bytes, rounded
// down to a multiple of 8; the last one has the rest. Four at once hide the latency of the CPU's instruction.
uint32_t state_checksum(const uint8_t * data, size_t size);

}  // namespace triollama::native
