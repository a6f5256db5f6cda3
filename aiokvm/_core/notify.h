/* How a device interrupts its driver from any thread: a word of events, which the driver reads and acknowledges,
 * and an eventfd that raises the interrupt (an irqfd). */
#ifndef AIOKVM_NOTIFY_H
#define AIOKVM_NOTIFY_H

#include <stdint.h>

/* Neither changes while there is a thread that notifies. */
struct aiokvm_notifier {
    int irqfd;        /* below 0: none */
    uint32_t *status; /* shared by vCPUs, the loop and all who notify; only atomically */
};

/* Sets bits of the word, then interrupts. Any thread. */
void aiokvm_notify(const struct aiokvm_notifier *notifier, uint32_t bits);
/* What is set in a word, and clearing bits of it. Any thread. */
uint32_t aiokvm_status_read(const uint32_t *status);
void aiokvm_status_clear(uint32_t *status, uint32_t bits);

#endif
