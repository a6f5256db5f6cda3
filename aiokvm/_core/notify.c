#include "notify.h"

#include <unistd.h>

void aiokvm_notify(const struct aiokvm_notifier *notifier, uint32_t bits)
{
    /* Release: who sees the bit sees what was done before it. */
    __atomic_fetch_or(notifier->status, bits, __ATOMIC_RELEASE);
    if (notifier->irqfd < 0)
        return;
    uint64_t one = 1;
    ssize_t written = write(notifier->irqfd, &one, sizeof(one));
    (void)written; /* an eventfd refuses only when it is about to overflow, and then it has been written to */
}

uint32_t aiokvm_status_read(const uint32_t *status)
{
    return __atomic_load_n(status, __ATOMIC_ACQUIRE);
}

void aiokvm_status_clear(uint32_t *status, uint32_t bits)
{
    __atomic_fetch_and(status, ~bits, __ATOMIC_ACQ_REL);
}
