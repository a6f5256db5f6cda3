#include "net_checksum.h"

#include <arpa/inet.h>
#include <string.h>

static uint16_t fold(uint64_t value)
{
    value = (value & 0xffffffff) + (value >> 32);
    value = (value & 0xffff) + (value >> 16 & 0xffff) + (value >> 32);
    value = (value & 0xffff) + (value >> 16);
    return (uint16_t)((value & 0xffff) + (value >> 16));
}

/* Halves of 32 bits are added: a sum of 64 KiB is far from 64 bits. `to` is NULL, or gets what was summed. */
static inline __attribute__((always_inline)) uint64_t sum_words(uint8_t *to, const uint8_t *from, size_t size)
{
    uint64_t sums[4] = { 0 };
    for (; size >= 32; size -= 32, from += 32) {
        uint64_t words[4];
        memcpy(words, from, 32);
        if (to) {
            memcpy(to, words, 32);
            to += 32;
        }
        for (int i = 0; i < 4; i++)
            sums[i] += (words[i] & 0xffffffff) + (words[i] >> 32);
    }
    uint64_t sum = sums[0] + sums[1] + sums[2] + sums[3];
    for (uint32_t word; size >= 4; size -= 4, from += 4) {
        memcpy(&word, from, 4);
        if (to) {
            memcpy(to, &word, 4);
            to += 4;
        }
        sum += word;
    }
    if (size) {
        uint32_t word = 0;
        memcpy(&word, from, size);
        if (to)
            memcpy(to, &word, size);
        sum += word;
    }
    return sum;
}

static void add(struct net_sum *sum, uint64_t part, size_t size)
{
    uint16_t folded = fold(part);
    /* Behind an odd number of bytes what is even is odd. */
    sum->value += sum->odd ? __builtin_bswap16(folded) : folded;
    sum->odd ^= size & 1;
}

void net_sum_add(struct net_sum *sum, const void *data, size_t size)
{
    add(sum, sum_words(NULL, data, size), size);
}

void net_sum_copy(struct net_sum *sum, uint8_t *to, const void *data, size_t size)
{
    add(sum, sum_words(to, data, size), size);
}

void net_sum_add16(struct net_sum *sum, uint16_t number)
{
    sum->value += htons(number);
}

uint16_t net_sum_fold(const struct net_sum *sum)
{
    return fold(sum->value);
}
