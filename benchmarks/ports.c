/* The guests of benchmarks/ports.py: their RAM and their drivers' queues, tests/core/vring_driver.c. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "vring_driver.h"

enum { RINGS = 0x10000, DATA = 0x100000, SLOT = 2048, RAM = 0x400000, HEADER = 12 };
enum { RECEIVE, TRANSMIT };

struct guest {
    uint8_t *ram;
    uint32_t size, next;
    struct driver queues[2];
};

struct guest *guest_new(uint64_t features, uint32_t size)
{
    struct guest *guest = calloc(1, sizeof(*guest));
    guest->ram = aligned_alloc(4096, RAM);
    memset(guest->ram, 0, RAM);
    guest->size = size;
    for (int i = 0; i < 2; i++)
        driver_open(&guest->queues[i], guest->ram, size, features, (uint64_t)i * RINGS);
    return guest;
}

void guest_free(struct guest *guest)
{
    free(guest->ram);
    free(guest);
}

uint8_t *guest_ram(struct guest *guest, uint64_t *bytes)
{
    *bytes = RAM;
    return guest->ram;
}

/* The descriptor, driver and device areas. */
void guest_areas(struct guest *guest, uint32_t queue, uint64_t areas[3])
{
    const struct driver *driver = &guest->queues[queue];
    areas[0] = driver->desc;
    areas[1] = driver->driver;
    areas[2] = driver->device;
}

/* A buffer of its own for each entry of each queue. */
static uint64_t slot(const struct guest *guest, uint32_t queue, uint32_t number)
{
    return DATA + (uint64_t)(queue * guest->size + number % guest->size) * SLOT;
}

/* Makes so many frames of this size available, of one buffer each, as Linux does. Whether to notify. */
int guest_send(struct guest *guest, uint32_t count, uint32_t size, uint8_t to, uint8_t from)
{
    struct driver *driver = &guest->queues[TRANSMIT];
    const uint8_t head[] = { 2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 0x08, 0x00, 0x45 };
    uint32_t id, written;
    while (driver_take(driver, &id, &written))
        continue;
    while (count--) {
        const struct driver_buffer buffer = { slot(guest, TRANSMIT, guest->next++), HEADER + size, false };
        memcpy(guest->ram + buffer.gpa + HEADER, head, sizeof(head));
        if (driver_add(driver, &buffer, 1, 0) < 0)
            return -1;
    }
    return driver_notifies(driver);
}

/* Gives all buffers that it has back. Returns how many it had: frames that it was sent, at first all. */
uint32_t guest_receive(struct guest *guest)
{
    struct driver *driver = &guest->queues[RECEIVE];
    uint32_t id, written, count = 0;
    while (driver_take(driver, &id, &written))
        count++;
    for (uint32_t number = 0; driver->free; number++) {
        const struct driver_buffer buffer = { slot(guest, RECEIVE, number), SLOT, true };
        driver_add(driver, &buffer, 1, 0);
    }
    driver_notifies(driver);
    return count;
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

/* Sends count frames through a switch, so many at a time: serve is aiokvm_net_serve. Returns the nanoseconds that
 * serving took, 0 if something went wrong. receiver: NULL, or the guest that is to get them. */
uint64_t guest_flood(uintptr_t serve, void *net, struct guest *sender, struct guest *receiver, int kick, uint32_t count,
                     uint32_t batch)
{
    int (*serves)(void *, uint64_t) = (int (*)(void *, uint64_t))serve;
    uint64_t spent = 0, one = 1;
    for (uint32_t done = 0; done < count; done += batch) {
        if (guest_send(sender, batch, 60, 2, 1) < 0)
            return 0;
        uint64_t begin = now_ns();
        /* It is the driver that pays for this, but the plane that is woken. */
        ssize_t result = write(kick, &one, sizeof(one));
        while (serves(net, 1000000) == 1)
            continue;
        spent += now_ns() - begin;
        if (result != sizeof(one) || (receiver && guest_receive(receiver) != batch))
            return 0;
    }
    return spent;
}
