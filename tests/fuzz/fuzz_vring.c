/* vring.c under libFuzzer: the input is what a driver writes into the rings, and what the device does meanwhile.
 *
 * The two ranges of RAM are separate allocations: AddressSanitizer sees every byte outside them. */
#include <stdbool.h>

#include "fuzz.h"
#include "vring.h"

enum { SIZE = 8, RANGE = 0x2000, HIGH = 0x8000 };
enum { DESC = 0x100, DRIVER = 0x400, DEVICE = 0x600, TABLE = 0x800 };
enum { HELD = 3 * SIZE }; /* more than the pool has */

/* A descriptor of either layout, more often possible than not. */
static void write_descriptor(struct input *input, uint8_t *at)
{
    uint32_t kind = take(input, 1);
    uint64_t addr = kind & 1 ? TABLE : take(input, 2);
    if (kind & 2)
        addr = (uint64_t)take(input, 4) << 32 | take(input, 4);
    uint32_t len = kind & 4 ? take(input, 4) : take(input, 1);
    uint16_t halves[] = { (uint16_t)take(input, 2), (uint16_t)take(input, 2) };
    memcpy(at, &addr, 8);
    memcpy(at + 8, &len, 4);
    memcpy(at + 12, halves, 4);
}

static void check_chain(const struct aiokvm_chain *chain, const struct aiokvm_ram ranges[2])
{
    uint64_t bytes[2] = { 0 };
    REQUIRE(chain->readable + chain->writable <= SIZE);
    for (uint32_t i = 0; i < chain->readable + chain->writable; i++) {
        volatile uint8_t *base = chain->iov[i].iov_base;
        size_t len = chain->iov[i].iov_len;
        bool low = base >= ranges[0].host && base < ranges[0].host + RANGE;
        const struct aiokvm_ram *ram = &ranges[low ? 0 : 1];
        REQUIRE(len && base >= ram->host && len <= RANGE && base - ram->host <= (ptrdiff_t)(RANGE - len));
        bytes[i >= chain->readable] += len;
        base[0] ^= 1;
        base[len - 1] ^= 1;
    }
    REQUIRE(bytes[0] == chain->readable_bytes && bytes[1] == chain->writable_bytes);
}

static int start(struct aiokvm_vring *vring, uint32_t seed)
{
    uint64_t features = (uint64_t)(seed & 3) << 28 | (uint64_t)(seed >> 2 & 3) << 34;
    uint64_t places[] = { DESC, HIGH, RANGE - SIZE * 16, HIGH + RANGE - 32 };
    uint32_t size = seed & 0x40 ? seed >> 8 : SIZE;
    return aiokvm_vring_start(vring, size, places[seed >> 4 & 3 ? seed >> 12 & 3 : 0], seed & 0x80 ? DESC : DRIVER,
                              DEVICE, features);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = { data, size };
    struct aiokvm_ram ranges[] = {
        { .gpa = 0, .size = RANGE, .host = aligned_alloc(16, RANGE) },
        { .gpa = HIGH, .size = RANGE, .host = aligned_alloc(16, RANGE) },
    };
    struct aiokvm_vring *vring = aiokvm_vring_new(ranges, 2, SIZE);
    REQUIRE(vring && ranges[0].host && ranges[1].host);
    memset(ranges[0].host, 0, RANGE);
    memset(ranges[1].host, 0, RANGE);
    struct aiokvm_chain *held[HELD], *chain;
    uint32_t count = 0;
    start(vring, take(&input, 2));
    while (input.left) {
        switch (take(&input, 1) % 12) {
        case 0:
            write_descriptor(&input, ranges[0].host + DESC + take(&input, 1) % SIZE * 16);
            break;
        case 1:
            write_descriptor(&input, ranges[0].host + TABLE + take(&input, 1) % (2 * SIZE) * 16);
            break;
        case 2: { /* split: one more is available */
            uint16_t idx, head = (uint16_t)take(&input, 1);
            memcpy(&idx, ranges[0].host + DRIVER + 2, 2);
            memcpy(ranges[0].host + DRIVER + 4 + idx % SIZE * 2, &head, 2);
            idx++;
            memcpy(ranges[0].host + DRIVER + 2, &idx, 2);
            break;
        }
        case 3: { /* anything anywhere near the rings */
            uint32_t word = take(&input, 2), at = take(&input, 2) % (TABLE - 2);
            memcpy(ranges[word & 1].host + at, &word, 2);
            break;
        }
        case 4:
        case 5:
            if (count < HELD && aiokvm_vring_pop(vring, &chain) == 1) {
                check_chain(chain, ranges);
                held[count++] = chain;
            }
            break;
        case 6:
        case 7:
            if (count) {
                uint32_t which = take(&input, 1) % count;
                check_chain(held[which], ranges);
                aiokvm_vring_push(vring, held[which], take(&input, 2));
                held[which] = held[--count];
            }
            break;
        case 8:
            if (count)
                aiokvm_vring_drop(vring, held[--count]);
            break;
        case 9:
            aiokvm_vring_publish(vring);
            break;
        case 10:
            if (take(&input, 1) & 1)
                aiokvm_vring_enable_notify(vring);
            else
                aiokvm_vring_disable_notify(vring);
            break;
        default:
            start(vring, take(&input, 2));
        }
        int error = aiokvm_vring_error(vring);
        REQUIRE(error <= 0 && aiokvm_vring_strerror(error));
    }
    aiokvm_vring_free(vring);
    free(ranges[0].host);
    free(ranges[1].host);
    return 0;
}
