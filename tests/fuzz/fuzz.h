/* What all fuzzers in C have in common. */
#ifndef AIOKVM_FUZZ_H
#define AIOKVM_FUZZ_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define REQUIRE(condition) \
    do {                   \
        if (!(condition))  \
            abort();       \
    } while (0)

struct input {
    const uint8_t *bytes;
    size_t left;
};

/* The next bytes as a number, 0 behind the end. */
static inline uint32_t take(struct input *input, size_t size)
{
    uint32_t value = 0;
    for (size_t i = 0; i < size && input->left; i++, input->left--)
        value |= (uint32_t)*input->bytes++ << 8 * i;
    return value;
}

/* One input. libFuzzer looks for what leads to code that none before has led to. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
