/* A machine with fake vCPUs, and the loop's side of it: wait for the doorbell, take, reply. */
#ifndef AIOKVM_GUEST_H
#define AIOKVM_GUEST_H

#include "check.h"
#include "exits.h"
#include "fake_kvm.h"
#include "turn.h"
#include "vcpu.h"

/* A machine, the only one of its turn. */
struct aiokvm_machine *machine_open(void);
/* Frees both. */
void machine_close(struct aiokvm_machine *machine);
/* Another of a turn that there is. */
struct aiokvm_machine *machine_beside(struct aiokvm_turn *turn, uint32_t id);

/* The next news; the test fails if the doorbell stays silent. */
struct aiokvm_news next_news(struct aiokvm_machine *machine);
/* Whether there is none, now. */
bool no_news(struct aiokvm_machine *machine);
bool doorbell_rings(struct aiokvm_machine *machine, int timeout_ms);
/* As a loop that does not poll: answers the doorbell, takes, and hears the doorbell again if there is more. */
int take(struct aiokvm_machine *machine, struct aiokvm_news *news, size_t max);

struct guest {
    struct aiokvm_turn *turn;
    struct aiokvm_machine *machine;
    struct aiokvm_vcpu *vcpu;
    struct fake *fake;
};

/* A machine with one vCPU, index 0, that has not been started. script must outlive it. */
struct guest guest_new(const struct fake_step *script, size_t length);
/* The same, in the turn of another. */
struct guest guest_beside(struct guest *other, uint32_t id, const struct fake_step *script, size_t length);
/* As guest_new, started and running. */
struct guest guest_open(const struct fake_step *script, size_t length);
/* Stops it if it was started, whatever it does, and frees everything. */
void guest_close(struct guest *guest);
/* The same, of one whose turn has another. */
void guest_leave(struct guest *guest);

/* The next news, which must be this state of the guest's vCPU. */
struct aiokvm_news guest_tells(struct guest *guest, uint32_t state);
/* Stops and joins the vCPU; other news is skipped. */
void vcpu_finish(struct aiokvm_machine *machine, struct aiokvm_vcpu *vcpu);

#endif
