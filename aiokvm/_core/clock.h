#ifndef AIOKVM_CLOCK_H
#define AIOKVM_CLOCK_H

#include <stdint.h>

/* CLOCK_MONOTONIC. */
uint64_t aiokvm_now_ns(void);
/* Between two looks of one who has polled for so long: lets the other side run if it waits for this CPU. */
void aiokvm_relax(uint64_t waited_ns);

#endif
