// The checksum by the CPU's instruction and without it: this program prints it for data of many lengths.
#include "guards/checksum.hpp"

#include <cstdio>
#include <random>
#include <vector>

int main() {
    std::mt19937 rng(1);
    std::vector<uint8_t> data(5000);
    for (uint8_t & byte : data) {
        byte = (uint8_t) rng();
    }
    for (size_t size = 0; size < data.size(); size += size < 100 ? 1 : 97) {
        std::printf("%08x\n", (unsigned) triollama::native::state_checksum(data.data() + size % 7, size - size % 7));
    }
}
