/* The two sides of benchmarks/vring.py, on one thread: a driver (tests/core/vring_driver.c) and vring.c. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "vring.h"
#include "vring_driver.h"

enum { SIZE = 256, RINGS = 0x1000, DATA = 0x10000, TABLES = 0x20000, RAM = 0x40000 };

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

/* Takes count chains of three descriptors, as a disk has, through a queue, so many at a time. Returns the
 * nanoseconds that the device's side took, 0 if something went wrong. */
uint64_t run_vring(uint64_t features, uint32_t count, uint32_t batch)
{
    static struct driver driver;
    const struct driver_buffer buffers[] = {
        { DATA, 16, false }, { DATA + 4096, 4096, true }, { DATA + 16, 1, true },
    };
    uint8_t *ram = aligned_alloc(4096, RAM);
    if (!ram)
        return 0;
    memset(ram, 0, RAM);
    struct aiokvm_ram range = { .size = RAM, .host = ram };
    struct aiokvm_vring *vring = aiokvm_vring_new(&range, 1, SIZE);
    uint64_t spent = 0;
    driver_open(&driver, ram, SIZE, features, RINGS);
    if (!vring || aiokvm_vring_start(vring, SIZE, driver.desc, driver.driver, driver.device, features))
        goto end;
    for (uint32_t done = 0; done < count; done += batch) {
        uint32_t id, written, taken = 0;
        for (uint32_t i = 0; i < batch; i++)
            driver_add(&driver, buffers, 3, features & AIOKVM_VIRTIO_F_INDIRECT_DESC ? TABLES + i * 64 : 0);
        driver_enable_interrupt(&driver);
        struct aiokvm_chain *chain, *chains[SIZE];
        uint32_t popped = 0;
        uint64_t begin = now_ns();
        aiokvm_vring_disable_notify(vring);
        while (aiokvm_vring_pop(vring, &chain) == 1)
            chains[popped++] = chain;
        for (uint32_t i = 0; i < popped; i++)
            aiokvm_vring_push(vring, chains[i], 4097);
        int interrupt = aiokvm_vring_publish(vring);
        aiokvm_vring_enable_notify(vring);
        spent += now_ns() - begin;
        while (driver_take(&driver, &id, &written))
            taken++;
        if (taken != batch || !interrupt) {
            spent = 0;
            break;
        }
    }
end:
    if (vring)
        aiokvm_vring_free(vring);
    free(ram);
    return spent;
}
