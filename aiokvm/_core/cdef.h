/* The only C surface that Python sees; _core.pyi gives it types. Read by cffi, not by the C compiler. */

/* ---- exits.h: a machine: the table of its buses, and the news of its vCPUs ---- */

#define AIOKVM_BUS_PIO ...
#define AIOKVM_BUS_MMIO ...

struct aiokvm_region {
    uint64_t base;
    uint64_t size;
    uint32_t id;
    ...;
};

#define AIOKVM_VCPU_EXIT ...
#define AIOKVM_VCPU_PARKED ...
#define AIOKVM_VCPU_STOPPED ...

struct aiokvm_news {
    uint32_t vcpu;
    uint32_t state;
    uint32_t seq;
    int32_t error;
    uint32_t reason;
    uint32_t region;
    uint64_t offset;
    uint64_t value;
    uint32_t size;
    uint32_t count;
    uint32_t is_write;
    ...;
};

struct aiokvm_machine *aiokvm_machine_new(int *error);
int aiokvm_machine_free(struct aiokvm_machine *machine);
int aiokvm_machine_alive(const struct aiokvm_machine *machine);
int aiokvm_machine_doorbell(const struct aiokvm_machine *machine);
int aiokvm_machine_publish(struct aiokvm_machine *machine, unsigned bus,
                           const struct aiokvm_region *regions, size_t count);
int aiokvm_machine_take(struct aiokvm_machine *machine, struct aiokvm_news *news, size_t max);

/* ---- vcpu.h: the thread of a vCPU ---- */

struct aiokvm_vcpu_stats {
    uint64_t exits;
    uint64_t unclaimed;
    uint64_t kicks;
    ...;
};

struct aiokvm_vcpu *aiokvm_vcpu_new(struct aiokvm_machine *machine, uint32_t index, int fd, void *run,
                                    size_t run_size, const char *name, int *error);
void aiokvm_vcpu_free(struct aiokvm_vcpu *vcpu);
int aiokvm_vcpu_start(struct aiokvm_vcpu *vcpu);
int aiokvm_vcpu_pause(struct aiokvm_vcpu *vcpu);
int aiokvm_vcpu_resume(struct aiokvm_vcpu *vcpu);
int aiokvm_vcpu_stop(struct aiokvm_vcpu *vcpu);
int aiokvm_vcpu_kick(struct aiokvm_vcpu *vcpu);
int aiokvm_vcpu_join(struct aiokvm_vcpu *vcpu);
int aiokvm_vcpu_tid(const struct aiokvm_vcpu *vcpu);
int aiokvm_vcpu_reply(struct aiokvm_vcpu *vcpu, uint32_t seq, uint64_t value);
int aiokvm_vcpu_skip(struct aiokvm_vcpu *vcpu, uint32_t seq);
void *aiokvm_vcpu_data(struct aiokvm_vcpu *vcpu);
void aiokvm_vcpu_stats(const struct aiokvm_vcpu *vcpu, struct aiokvm_vcpu_stats *stats);

/* ---- memory.h: mappings that a fork does not inherit and a core dump leaves out ---- */

void *aiokvm_map(int fd, size_t size, size_t align, int *error);
void aiokvm_unmap(void *address, size_t size);

/* ---- ioctl, with a failure as the negative errno ---- */

long aiokvm_ioctl(int fd, unsigned long request, void *arg);

/* ---- the KVM UAPI (linux/kvm.h, asm/kvm.h) ---- */

