/* The only C surface that Python sees; _core.pyi gives it types. Read by cffi, not by the C compiler. */

/* ---- file.h ---- */

int aiokvm_punch_hole(int fd, uint64_t offset, uint64_t length);

/* ---- exits.h: a machine: the table of its buses, and the news of its vCPUs ---- */

#define AIOKVM_BUS_PIO ...
#define AIOKVM_BUS_MMIO ...

struct aiokvm_region {
    uint64_t base;
    uint64_t size;
    uint32_t id;
    uint32_t posted;
    uint32_t *latch;
    uint32_t *status;
    uint32_t status_offset;
    uint32_t clear_offset;
    ...;
};

struct aiokvm_notifier {
    int irqfd;
    uint32_t *status;
};
void aiokvm_notify(const struct aiokvm_notifier *notifier, uint32_t bits);
uint32_t aiokvm_status_read(const uint32_t *status);
void aiokvm_status_clear(uint32_t *status, uint32_t bits);

#define AIOKVM_FAST_OFFSETS ...
#define AIOKVM_POSTED_ALL ...
#define AIOKVM_NO_REGION ...

#define AIOKVM_VCPU_EXIT ...
#define AIOKVM_VCPU_PARKED ...
#define AIOKVM_VCPU_STOPPED ...
#define AIOKVM_POSTED ...

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
    uint32_t bus;
    ...;
};

struct aiokvm_machine *aiokvm_machine_new(struct aiokvm_turn *turn, uint32_t id, int *error);
int aiokvm_machine_free(struct aiokvm_machine *machine);
int aiokvm_machine_alive(const struct aiokvm_machine *machine);
int aiokvm_machine_publish(struct aiokvm_machine *machine, unsigned bus,
                           const struct aiokvm_region *regions, size_t count);
int aiokvm_machine_ask_unclaimed(struct aiokvm_machine *machine, int ask);
int aiokvm_machine_set_poll(struct aiokvm_machine *machine, uint32_t ns);

struct aiokvm_machine_stats {
    uint64_t serving_ns;
    uint64_t poll_hits;
    uint64_t poll_misses;
    uint64_t rings;
    ...;
};

int aiokvm_machine_get_stats(const struct aiokvm_machine *machine, struct aiokvm_machine_stats *stats);
const uint8_t *aiokvm_machine_posted(const struct aiokvm_machine *machine);
void aiokvm_latch_set(uint32_t *latch, unsigned offset, int value);

/* ---- turn.h: all machines of one event loop ---- */

struct aiokvm_turn *aiokvm_turn_new(int *error);
void aiokvm_turn_free(struct aiokvm_turn *turn);
int aiokvm_turn_doorbell(const struct aiokvm_turn *turn);
int aiokvm_turn_answer(struct aiokvm_turn *turn);
int aiokvm_turn_watch(struct aiokvm_turn *turn, struct aiokvm_machine *machine);
int aiokvm_turn_unwatch(struct aiokvm_turn *turn);
int aiokvm_turn_ready(const struct aiokvm_turn *turn);
int aiokvm_serve(struct aiokvm_turn *turn, uint64_t deadline_ns, struct aiokvm_news *news, size_t max,
                 uint32_t *which);
uint64_t aiokvm_now_ns(void);

/* ---- vcpu.h: the thread of a vCPU ---- */

#define AIOKVM_REASONS ...

struct aiokvm_vcpu_stats {
    uint64_t exits;
    uint64_t unclaimed;
    uint64_t kicks;
    uint64_t posted;
    uint64_t guest_ns;
    uint64_t wait_ns;
    uint64_t poll_hits;
    uint64_t reasons[...];
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
int aiokvm_vcpu_tid(struct aiokvm_vcpu *vcpu);
int aiokvm_vcpu_reply(struct aiokvm_vcpu *vcpu, uint32_t seq, uint64_t value);
int aiokvm_vcpu_skip(struct aiokvm_vcpu *vcpu, uint32_t seq);
void *aiokvm_vcpu_data(struct aiokvm_vcpu *vcpu);
void aiokvm_vcpu_stats(const struct aiokvm_vcpu *vcpu, struct aiokvm_vcpu_stats *stats);

/* ---- memory.h: mappings that a fork does not inherit and a core dump leaves out ---- */

void *aiokvm_map(int fd, size_t size, size_t align, int *error);
void *aiokvm_map_anonymous(size_t size, size_t align, int overcommit, int *error);
void aiokvm_unmap(void *address, size_t size);
void aiokvm_zero(void *address, size_t size);
int aiokvm_discard(void *address, size_t size);

/* ---- vring.h: the device's side of virtqueues ---- */

#define AIOKVM_VRING_MAX_SIZE ...

struct iovec {
    void *iov_base;
    size_t iov_len;
};
struct aiokvm_ram {
    uint64_t gpa;
    uint64_t size;
    uint8_t *host;
};
struct aiokvm_chain {
    uint32_t id;
    uint32_t readable;
    uint32_t writable;
    uint64_t readable_bytes;
    uint64_t writable_bytes;
    struct iovec *iov;
    ...;
};
struct aiokvm_vring;
struct aiokvm_vring *aiokvm_vring_new(const struct aiokvm_ram *ram, size_t count, uint32_t max_size);
void aiokvm_vring_free(struct aiokvm_vring *vring);
int aiokvm_vring_start(struct aiokvm_vring *vring, uint32_t size, uint64_t desc, uint64_t driver,
                       uint64_t device, uint64_t features);
void aiokvm_vring_stop(struct aiokvm_vring *vring);
int aiokvm_vring_pop(struct aiokvm_vring *vring, struct aiokvm_chain **chain);
void aiokvm_vring_push(struct aiokvm_vring *vring, struct aiokvm_chain *chain, uint32_t written);
void aiokvm_vring_drop(struct aiokvm_vring *vring, struct aiokvm_chain *chain);
size_t aiokvm_chain_read(const struct aiokvm_chain *chain, uint64_t offset, void *to, size_t n);
size_t aiokvm_chain_write(const struct aiokvm_chain *chain, uint64_t offset, const void *from, size_t n);
int aiokvm_vring_publish(struct aiokvm_vring *vring);
int aiokvm_vring_enable_notify(struct aiokvm_vring *vring);
void aiokvm_vring_disable_notify(struct aiokvm_vring *vring);
int aiokvm_vring_error(const struct aiokvm_vring *vring);
const char *aiokvm_vring_strerror(int error);

/* ---- budget.h: what the guests of a process share ---- */

#define AIOKVM_BUDGET_DESCRIPTORS ...
#define AIOKVM_BUDGET_NET_BYTES ...
#define AIOKVM_BUDGET_FRAME_BYTES ...
#define AIOKVM_BUDGET_BOUNCE_BYTES ...
#define AIOKVM_BUDGET_LOG_LINES ...

struct aiokvm_budget_state {
    uint64_t total, used, shares;
};

struct aiokvm_budget *aiokvm_budget_of_process(int which);
void aiokvm_budget_state(struct aiokvm_budget *budget, struct aiokvm_budget_state *state);
struct aiokvm_share *aiokvm_share_new(int which);
struct aiokvm_share *aiokvm_share_new_part(struct aiokvm_share *whole);
void aiokvm_share_free(struct aiokvm_share *share);
int aiokvm_share_take(struct aiokvm_share *share, uint64_t amount);
int aiokvm_share_fits(struct aiokvm_share *share, uint64_t amount);
void aiokvm_share_add(struct aiokvm_share *share, uint64_t amount);
void aiokvm_share_give(struct aiokvm_share *share, uint64_t amount);

/* ---- blk.h: disks; ratelimit.h ---- */

struct aiokvm_ratelimit *aiokvm_ratelimit_new(uint64_t bytes_per_second, uint64_t burst_bytes,
                                              uint64_t operations_per_second, uint64_t burst_operations);
void aiokvm_ratelimit_free(struct aiokvm_ratelimit *limit);
uint64_t aiokvm_ratelimit_take(struct aiokvm_ratelimit *limit, uint64_t now_ns, uint64_t bytes,
                               uint64_t operations);

#define AIOKVM_BLK_AUTO ...
#define AIOKVM_BLK_IO_URING ...
#define AIOKVM_BLK_THREADS ...
#define AIOKVM_BLK_IDLE ...
#define AIOKVM_BLK_RUNNING ...
#define AIOKVM_BLK_EXITED ...
#define AIOKVM_BLK_FAILED ...
#define AIOKVM_BLK_MISSED ...
#define AIOKVM_BLK_BROKEN ...
#define AIOKVM_BLK_EHEADER ...
#define AIOKVM_BLK_ESTATUS ...
#define AIOKVM_BLK_QUEUES ...
#define AIOKVM_BLK_SEGMENTS ...
#define AIOKVM_BLK_CLEAR_SECTORS ...

struct aiokvm_blk_config {
    int fd;
    uint32_t engine;
    uint32_t threads;
    uint32_t readonly;
    uint32_t discard;
    uint32_t pause;
    uint32_t align;
    uint64_t capacity_sectors;
    struct aiokvm_ratelimit *limit;
    const char *name;
    const char *id;
    ...;
};

struct aiokvm_blk_event {
    uint32_t kind;
    uint32_t queue;
    int32_t error;
    uint32_t type;
    uint64_t offset;
    uint64_t length;
    uint64_t missed;
    ...;
};

struct aiokvm_blk_stats {
    uint64_t reads;
    uint64_t writes;
    uint64_t flushes;
    uint64_t discards;
    uint64_t read_bytes;
    uint64_t written_bytes;
    uint64_t errors;
    uint64_t throttled;
    uint64_t batches;
    uint64_t interrupts;
    uint64_t in_flight;
    uint64_t copied_bytes;
    ...;
};

struct aiokvm_blk *aiokvm_blk_new(const struct aiokvm_blk_config *config, int *error);
void aiokvm_blk_free(struct aiokvm_blk *blk);
uint32_t aiokvm_blk_engine(const struct aiokvm_blk *blk, int *refused);
int aiokvm_blk_fd(const struct aiokvm_blk *blk);
uint32_t aiokvm_blk_state(const struct aiokvm_blk *blk);
int aiokvm_blk_tid(const struct aiokvm_blk *blk);
int aiokvm_blk_take(struct aiokvm_blk *blk, struct aiokvm_blk_event *event);
void aiokvm_blk_stats(const struct aiokvm_blk *blk, struct aiokvm_blk_stats *stats);
int aiokvm_blk_set_queue(struct aiokvm_blk *blk, uint32_t index, struct aiokvm_vring *vring, int kick);
int aiokvm_blk_set_features(struct aiokvm_blk *blk, uint64_t features);
int aiokvm_blk_run(struct aiokvm_blk *blk, const struct aiokvm_notifier *notifier);
int aiokvm_blk_stop(struct aiokvm_blk *blk, int32_t queue);
int aiokvm_blk_exit(struct aiokvm_blk *blk);
int aiokvm_blk_join(struct aiokvm_blk *blk);
int aiokvm_blk_retry(struct aiokvm_blk *blk);
void aiokvm_blk_set_capacity(struct aiokvm_blk *blk, uint64_t sectors);
void aiokvm_blk_set_writeback(struct aiokvm_blk *blk, int writeback);
int aiokvm_fallocate(int fd, int mode, uint64_t offset, uint64_t length);

/* ---- ioctl, with a failure as the negative errno ---- */

long aiokvm_ioctl(int fd, unsigned long request, void *arg);

/* ---- the KVM UAPI (linux/kvm.h, asm/kvm.h) ---- */

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef short __s16;
typedef int __s32;
typedef long long __s64;

struct kvm_regs {
    __u64 rax, rbx, rcx, rdx;
    __u64 rsi, rdi, rsp, rbp;
    __u64 r8, r9, r10, r11;
    __u64 r12, r13, r14, r15;
    __u64 rip, rflags;
};

struct kvm_segment {
    __u64 base;
    __u32 limit;
    __u16 selector;
    __u8 type;
    __u8 present, dpl, db, s, l, g, avl;
    __u8 unusable;
    __u8 padding;
};

struct kvm_dtable {
    __u64 base;
    __u16 limit;
    __u16 padding[3];
};

struct kvm_sregs {
    struct kvm_segment cs, ds, es, fs, gs, ss;
    struct kvm_segment tr, ldt;
    struct kvm_dtable gdt, idt;
    __u64 cr0, cr2, cr3, cr4, cr8;
    __u64 efer;
    __u64 apic_base;
    __u64 interrupt_bitmap[4];
};

struct kvm_sregs2 {
    struct kvm_segment cs, ds, es, fs, gs, ss;
    struct kvm_segment tr, ldt;
    struct kvm_dtable gdt, idt;
    __u64 cr0, cr2, cr3, cr4, cr8;
    __u64 efer;
    __u64 apic_base;
    __u64 flags;
    __u64 pdptrs[4];
};

struct kvm_fpu {
    __u8 fpr[8][16];
    __u16 fcw;
    __u16 fsw;
    __u8 ftwx;
    __u16 last_opcode;
    __u64 last_ip;
    __u64 last_dp;
    __u8 xmm[16][16];
    __u32 mxcsr;
    ...;
};

struct kvm_msr_entry {
    __u32 index;
    __u64 data;
    ...;
};

struct kvm_msrs {
    __u32 nmsrs;
    struct kvm_msr_entry entries[];
    ...;
};

struct kvm_msr_list {
    __u32 nmsrs;
    __u32 indices[];
};

struct kvm_msr_filter_range {
    __u32 flags;
    __u32 nmsrs;
    __u32 base;
    __u8 *bitmap;
};

struct kvm_msr_filter {
    __u32 flags;
    struct kvm_msr_filter_range ranges[16];
};

struct kvm_cpuid_entry2 {
    __u32 function;
    __u32 index;
    __u32 flags;
    __u32 eax, ebx, ecx, edx;
    ...;
};

struct kvm_cpuid2 {
    __u32 nent;
    struct kvm_cpuid_entry2 entries[];
    ...;
};

struct kvm_vcpu_events {
    struct {
        __u8 injected;
        __u8 nr;
        __u8 has_error_code;
        __u8 pending;
        __u32 error_code;
    } exception;
    struct {
        __u8 injected;
        __u8 nr;
        __u8 soft;
        __u8 shadow;
    } interrupt;
    struct {
        __u8 injected;
        __u8 pending;
        __u8 masked;
        __u8 pad;
    } nmi;
    __u32 sipi_vector;
    __u32 flags;
    struct {
        __u8 smm;
        __u8 pending;
        __u8 smm_inside_nmi;
        __u8 latched_init;
    } smi;
    struct {
        __u8 pending;
    } triple_fault;
    __u8 reserved[26];
    __u8 exception_has_payload;
    __u64 exception_payload;
};

struct kvm_debugregs {
    __u64 db[4];
    __u64 dr6;
    __u64 dr7;
    __u64 flags;
    ...;
};

struct kvm_xcr {
    __u32 xcr;
    __u64 value;
    ...;
};

struct kvm_xcrs {
    __u32 nr_xcrs;
    __u32 flags;
    struct kvm_xcr xcrs[16];
    ...;
};

struct kvm_sync_regs {
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_vcpu_events events;
};

struct kvm_debug_exit_arch {
    __u32 exception;
    __u32 pad;
    __u64 pc;
    __u64 dr6;
    __u64 dr7;
};

struct kvm_guest_debug_arch {
    __u64 debugreg[8];
};

struct kvm_guest_debug {
    __u32 control;
    struct kvm_guest_debug_arch arch;
    ...;
};

struct kvm_translation {
    __u64 linear_address;
    __u64 physical_address;
    __u8 valid;
    __u8 writeable;
    __u8 usermode;
    ...;
};

struct kvm_tpr_access_ctl {
    __u32 enabled;
    ...;
};

struct kvm_vapic_addr {
    __u64 vapic_addr;
};

struct kvm_x86_mce {
    __u64 status;
    __u64 addr;
    __u64 misc;
    __u64 mcg_status;
    __u8 bank;
    ...;
};

struct kvm_signal_mask {
    __u32 len;
    __u8 sigset[];
};

struct kvm_pre_fault_memory {
    __u64 gpa;
    __u64 size;
    __u64 flags;
    ...;
};

struct aiokvm_memory_fault {
    __u64 flags;
    __u64 gpa;
    __u64 size;
};

struct kvm_run {
    __u8 request_interrupt_window;
    __u8 immediate_exit;
    __u32 exit_reason;
    __u8 ready_for_interrupt_injection;
    __u8 if_flag;
    __u16 flags;
    __u64 cr8;
    __u64 apic_base;
    union {
        struct {
            __u64 hardware_exit_reason;
        } hw;
        struct {
            __u64 hardware_entry_failure_reason;
            __u32 cpu;
        } fail_entry;
        struct {
            __u32 exception;
            __u32 error_code;
        } ex;
        struct {
            __u8 direction;
            __u8 size;
            __u16 port;
            __u32 count;
            __u64 data_offset;
        } io;
        struct {
            struct kvm_debug_exit_arch arch;
        } debug;
        struct {
            __u64 phys_addr;
            __u8 data[8];
            __u32 len;
            __u8 is_write;
        } mmio;
        struct {
            __u64 nr;
            __u64 args[6];
            __u64 ret;
            __u32 longmode;
            __u32 pad;
        } hypercall;
        struct {
            __u64 rip;
            __u32 is_write;
        } tpr_access;
        struct {
            __u32 suberror;
            __u32 ndata;
            __u64 data[16];
        } internal;
        struct {
            __u32 type;
            __u32 ndata;
            __u64 data[16];
        } system_event;
        struct {
            __u8 vector;
        } eoi;
        struct {
            __u8 error;
            __u8 pad[7];
            __u32 reason;
            __u32 index;
            __u64 data;
        } msr;
        struct {
            __u32 flags;
        } notify;
        char padding[256];
    };
    __u64 kvm_valid_regs;
    __u64 kvm_dirty_regs;
    union {
        struct kvm_sync_regs regs;
        char padding[2048];
    } s;
    ...;
};

struct kvm_coalesced_mmio_zone {
    __u64 addr;
    __u32 size;
    __u32 pio;
};

struct kvm_coalesced_mmio {
    __u64 phys_addr;
    __u32 len;
    __u32 pio;
    __u8 data[8];
};

struct kvm_coalesced_mmio_ring {
    __u32 first;
    __u32 last;
    struct kvm_coalesced_mmio coalesced_mmio[];
};

struct kvm_dirty_gfn {
    __u32 flags;
    __u32 slot;
    __u64 offset;
};

struct kvm_userspace_memory_region {
    __u32 slot;
    __u32 flags;
    __u64 guest_phys_addr;
    __u64 memory_size;
    __u64 userspace_addr;
};

struct kvm_userspace_memory_region2 {
    __u32 slot;
    __u32 flags;
    __u64 guest_phys_addr;
    __u64 memory_size;
    __u64 userspace_addr;
    __u64 guest_memfd_offset;
    __u32 guest_memfd;
    ...;
};

struct kvm_memory_attributes {
    __u64 address;
    __u64 size;
    __u64 attributes;
    __u64 flags;
};

struct kvm_create_guest_memfd {
    __u64 size;
    __u64 flags;
    ...;
};

struct kvm_dirty_log {
    __u32 slot;
    void *dirty_bitmap;
    ...;
};

struct kvm_clear_dirty_log {
    __u32 slot;
    __u32 num_pages;
    __u64 first_page;
    void *dirty_bitmap;
    ...;
};

struct kvm_irq_level {
    union {
        __u32 irq;
        __s32 status;
    };
    __u32 level;
};

struct kvm_pic_state {
    __u8 last_irr;
    __u8 irr;
    __u8 imr;
    __u8 isr;
    __u8 priority_add;
    __u8 irq_base;
    __u8 read_reg_select;
    __u8 poll;
    __u8 special_mask;
    __u8 init_state;
    __u8 auto_eoi;
    __u8 rotate_on_auto_eoi;
    __u8 special_fully_nested_mode;
    __u8 init4;
    __u8 elcr;
    __u8 elcr_mask;
};

struct aiokvm_ioapic_state {
    __u64 base_address;
    __u32 ioregsel;
    __u32 id;
    __u32 irr;
    __u64 redirtbl[24];
    ...;
};

struct kvm_irqchip {
    __u32 chip_id;
    union {
        char dummy[512];
        struct kvm_pic_state pic;
    } chip;
    ...;
};

struct kvm_pit_config {
    __u32 flags;
    ...;
};

struct kvm_pit_channel_state {
    __u32 count;
    __u16 latched_count;
    __u8 count_latched;
    __u8 status_latched;
    __u8 status;
    __u8 read_state;
    __u8 write_state;
    __u8 write_latch;
    __u8 rw_mode;
    __u8 mode;
    __u8 bcd;
    __u8 gate;
    __s64 count_load_time;
};

struct kvm_pit_state2 {
    struct kvm_pit_channel_state channels[3];
    __u32 flags;
    ...;
};

struct kvm_reinject_control {
    __u8 pit_reinject;
    ...;
};

struct kvm_irq_routing_irqchip {
    __u32 irqchip;
    __u32 pin;
};

struct kvm_irq_routing_msi {
    __u32 address_lo;
    __u32 address_hi;
    __u32 data;
    __u32 devid;
};

/* Never used on x86; it gives the union of routes its alignment. */
struct kvm_irq_routing_s390_adapter {
    __u64 ind_addr;
    __u64 summary_addr;
    __u64 ind_offset;
    __u32 summary_offset;
    __u32 adapter_id;
};

struct kvm_irq_routing_hv_sint {
    __u32 vcpu;
    __u32 sint;
};

struct kvm_irq_routing_xen_evtchn {
    __u32 port;
    __u32 vcpu;
    __u32 priority;
};

struct kvm_irq_routing_entry {
    __u32 gsi;
    __u32 type;
    __u32 flags;
    __u32 pad;
    union {
        struct kvm_irq_routing_irqchip irqchip;
        struct kvm_irq_routing_msi msi;
        struct kvm_irq_routing_s390_adapter adapter;
        struct kvm_irq_routing_hv_sint hv_sint;
        struct kvm_irq_routing_xen_evtchn xen_evtchn;
        __u32 pad[8];
    } u;
};

struct kvm_irq_routing {
    __u32 nr;
    __u32 flags;
    struct kvm_irq_routing_entry entries[];
};

struct kvm_irqfd {
    __u32 fd;
    __u32 gsi;
    __u32 flags;
    __u32 resamplefd;
    ...;
};

struct kvm_ioeventfd {
    __u64 datamatch;
    __u64 addr;
    __u32 len;
    __s32 fd;
    __u32 flags;
    ...;
};

struct kvm_msi {
    __u32 address_lo;
    __u32 address_hi;
    __u32 data;
    __u32 flags;
    __u32 devid;
    ...;
};

struct kvm_clock_data {
    __u64 clock;
    __u32 flags;
    __u64 realtime;
    __u64 host_tsc;
    ...;
};

struct kvm_enable_cap {
    __u32 cap;
    __u32 flags;
    __u64 args[4];
    ...;
};

struct kvm_create_device {
    __u32 type;
    __u32 fd;
    __u32 flags;
};

struct kvm_device_attr {
    __u32 flags;
    __u32 group;
    __u64 attr;
    __u64 addr;
};

struct kvm_pmu_event_filter {
    __u32 action;
    __u32 nevents;
    __u32 fixed_counter_bitmap;
    __u32 flags;
    __u64 events[];
    ...;
};

struct kvm_stats_header {
    __u32 flags;
    __u32 name_size;
    __u32 num_desc;
    __u32 id_offset;
    __u32 desc_offset;
    __u32 data_offset;
};

struct kvm_stats_desc {
    __u32 flags;
    __s16 exponent;
    __u16 size;
    __u32 offset;
    __u32 bucket_size;
    char name[];
};

#define KVM_GET_API_VERSION ...
#define KVM_CREATE_VM ...
#define KVM_GET_MSR_INDEX_LIST ...
#define KVM_CHECK_EXTENSION ...
#define KVM_GET_VCPU_MMAP_SIZE ...
#define KVM_GET_SUPPORTED_CPUID ...
#define KVM_GET_EMULATED_CPUID ...
#define KVM_GET_MSR_FEATURE_INDEX_LIST ...
#define KVM_GET_SUPPORTED_HV_CPUID ...
#define KVM_CREATE_VCPU ...
#define KVM_GET_DIRTY_LOG ...
#define KVM_CLEAR_DIRTY_LOG ...
#define KVM_RESET_DIRTY_RINGS ...
#define KVM_SET_NR_MMU_PAGES ...
#define KVM_SET_USER_MEMORY_REGION ...
#define KVM_SET_USER_MEMORY_REGION2 ...
#define KVM_SET_MEMORY_ATTRIBUTES ...
#define KVM_CREATE_GUEST_MEMFD ...
#define KVM_SET_TSS_ADDR ...
#define KVM_SET_IDENTITY_MAP_ADDR ...
#define KVM_CREATE_IRQCHIP ...
#define KVM_IRQ_LINE ...
#define KVM_IRQ_LINE_STATUS ...
#define KVM_GET_IRQCHIP ...
#define KVM_SET_IRQCHIP ...
#define KVM_CREATE_PIT2 ...
#define KVM_GET_PIT2 ...
#define KVM_SET_PIT2 ...
#define KVM_REINJECT_CONTROL ...
#define KVM_SET_GSI_ROUTING ...
#define KVM_IRQFD ...
#define KVM_IOEVENTFD ...
#define KVM_SIGNAL_MSI ...
#define KVM_REGISTER_COALESCED_MMIO ...
#define KVM_UNREGISTER_COALESCED_MMIO ...
#define KVM_SET_BOOT_CPU_ID ...
#define KVM_GET_CLOCK ...
#define KVM_SET_CLOCK ...
#define KVM_ENABLE_CAP ...
#define KVM_CREATE_DEVICE ...
#define KVM_SET_DEVICE_ATTR ...
#define KVM_GET_DEVICE_ATTR ...
#define KVM_HAS_DEVICE_ATTR ...
#define KVM_X86_SET_MSR_FILTER ...
#define KVM_SET_PMU_EVENT_FILTER ...
#define KVM_GET_STATS_FD ...
#define KVM_RUN ...
#define KVM_GET_REGS ...
#define KVM_SET_REGS ...
#define KVM_GET_SREGS ...
#define KVM_SET_SREGS ...
#define KVM_GET_SREGS2 ...
#define KVM_SET_SREGS2 ...
#define KVM_GET_FPU ...
#define KVM_SET_FPU ...
#define KVM_GET_XSAVE ...
#define KVM_GET_XSAVE2 ...
#define KVM_SET_XSAVE ...
#define KVM_GET_XCRS ...
#define KVM_SET_XCRS ...
#define KVM_GET_MSRS ...
#define KVM_SET_MSRS ...
#define KVM_GET_CPUID2 ...
#define KVM_SET_CPUID2 ...
#define KVM_GET_LAPIC ...
#define KVM_SET_LAPIC ...
#define KVM_GET_VCPU_EVENTS ...
#define KVM_SET_VCPU_EVENTS ...
#define KVM_GET_DEBUGREGS ...
#define KVM_SET_DEBUGREGS ...
#define KVM_GET_MP_STATE ...
#define KVM_SET_MP_STATE ...
#define KVM_GET_NESTED_STATE ...
#define KVM_SET_NESTED_STATE ...
#define KVM_TRANSLATE ...
#define KVM_INTERRUPT ...
#define KVM_NMI ...
#define KVM_SMI ...
#define KVM_SET_GUEST_DEBUG ...
#define KVM_SET_SIGNAL_MASK ...
#define KVM_SET_TSC_KHZ ...
#define KVM_GET_TSC_KHZ ...
#define KVM_KVMCLOCK_CTRL ...
#define KVM_TPR_ACCESS_REPORTING ...
#define KVM_SET_VAPIC_ADDR ...
#define KVM_X86_SETUP_MCE ...
#define KVM_X86_GET_MCE_CAP_SUPPORTED ...
#define KVM_X86_SET_MCE ...
#define KVM_PRE_FAULT_MEMORY ...

/* ---- net.h: planes of ends, and the frames between them ---- */

#define AIOKVM_NET_MAX_FRAME ...
#define AIOKVM_NET_MIN_FRAME ...
#define AIOKVM_NET_NEWS_READABLE ...
#define AIOKVM_NET_NEWS_WRITABLE ...
#define AIOKVM_NET_NEWS_CLOSED ...
#define AIOKVM_NET_NEWS_BROKEN ...
#define AIOKVM_NET_NEWS_FLOW ...
#define AIOKVM_NET_NEWS_CAPTURED ...
#define AIOKVM_NET_OFFLOAD_CSUM ...
#define AIOKVM_NET_OFFLOAD_TSO4 ...
#define AIOKVM_NET_OFFLOAD_TSO6 ...
#define AIOKVM_NET_OFFLOAD_USO ...
#define AIOKVM_NET_OFFLOAD_ECN ...

struct aiokvm_net_news {
    uint32_t end;
    uint32_t news;
    int32_t error;
    uint32_t detail;
};

struct aiokvm_net_stats {
    uint64_t sent_frames, sent_bytes;
    uint64_t received_frames, received_bytes;
    uint64_t dropped_down;
    uint64_t dropped_filtered;
    uint64_t dropped_full;
    uint64_t dropped_unresolved;
    uint64_t dropped_unsupported;
    uint64_t dropped_invalid;
    uint64_t throttled;
    uint64_t segmented;
    uint64_t interrupts;
};

struct aiokvm_net *aiokvm_net_new(const char *name, int *error);
void aiokvm_net_free(struct aiokvm_net *net);
int aiokvm_net_fd(const struct aiokvm_net *net);
int aiokvm_net_serve(struct aiokvm_net *net, uint64_t budget_ns);
int aiokvm_net_tid(const struct aiokvm_net *net);
int aiokvm_net_news_fd(const struct aiokvm_net *net);
int aiokvm_net_take(struct aiokvm_net *net, struct aiokvm_net_news *news);
uint32_t aiokvm_net_end_id(const struct aiokvm_net_end *end);
int aiokvm_net_link(struct aiokvm_net_end *one, struct aiokvm_net_end *other);
void aiokvm_net_unlink(struct aiokvm_net_end *end);
void aiokvm_net_set_up(struct aiokvm_net_end *end, int up);
void aiokvm_net_set_policy(struct aiokvm_net_end *end, struct aiokvm_net_filter *filter,
                           struct aiokvm_net_capture *capture, struct aiokvm_ratelimit *sent,
                           struct aiokvm_ratelimit *received);
void aiokvm_net_end_stats(struct aiokvm_net_end *end, struct aiokvm_net_stats *stats);
void aiokvm_net_end_free(struct aiokvm_net_end *end);

/* ---- net_nic.h: the adapter of a guest ---- */

#define AIOKVM_NET_NIC_PAIRS ...
#define AIOKVM_NET_NIC_MACS ...
#define AIOKVM_NET_NIC_EHEADER ...
#define AIOKVM_NET_NIC_MAC_FILTER ...
#define AIOKVM_NET_NIC_ALLUNI ...
#define AIOKVM_NET_NIC_ALLMULTI ...
#define AIOKVM_NET_NIC_VLAN_FILTER ...

struct aiokvm_net_nic_filter {
    uint32_t flags;
    uint32_t macs;
    uint8_t mac[64][6];
    uint32_t vlans[128];
};

struct aiokvm_net_end *aiokvm_net_nic_new(struct aiokvm_net *net, int *error);
int aiokvm_net_nic_set_features(struct aiokvm_net_end *end, uint64_t features, uint32_t mtu);
int aiokvm_net_nic_set_offloads(struct aiokvm_net_end *end, uint64_t features);
int aiokvm_net_nic_set_pairs(struct aiokvm_net_end *end, uint32_t pairs);
int aiokvm_net_nic_set_filter(struct aiokvm_net_end *end, const struct aiokvm_net_nic_filter *filter);
int aiokvm_net_nic_set_queue(struct aiokvm_net_end *end, uint32_t index, struct aiokvm_vring *vring, uint32_t size,
                             int kick, const struct aiokvm_notifier *notifier);
int aiokvm_net_nic_move(struct aiokvm_net_end *from, struct aiokvm_net_end *to);

/* ---- net_tap.h: TAP devices ---- */

#define AIOKVM_NET_TAP_QUEUES ...
struct aiokvm_net_end *aiokvm_net_tap_new(struct aiokvm_net *net, const int *fds, uint32_t count, int offload,
                                          int *error);
uint32_t aiokvm_net_tap_offloads(const struct aiokvm_net_end *end);

/* ---- net_stream.h, net_datagram.h: the framing of QEMU's netdevs ---- */

struct aiokvm_net_end *aiokvm_net_stream_new(struct aiokvm_net *net, int *error);
int aiokvm_net_stream_attach(struct aiokvm_net_end *end, int fd);
struct aiokvm_net_end *aiokvm_net_datagram_new(struct aiokvm_net *net, int fd, const void *remote,
                                               uint32_t remote_size, int *error);

/* ---- net_slirp.h: user-mode NAT ---- */

#define AIOKVM_NET_SLIRP_MIN_MTU ...
#define AIOKVM_NET_SLIRP_MAX_MTU ...
#define AIOKVM_NET_SLIRP_MAX_QUERY ...

struct aiokvm_net_slirp_config {
    uint32_t network, netmask;
    uint32_t host;
    uint32_t dhcp_start;
    uint32_t nameserver;
    uint8_t prefix6[16], host6[16], nameserver6[16];
    uint32_t prefix6_length;
    const char *hostname;
    const char *domain;
    const char **search;
    uint32_t mtu;
    uint32_t restricted;
    uint32_t host_loopback;
    uint32_t own_nameserver;
    uint32_t has_dns;
    uint32_t max_connections;
    struct aiokvm_share *descriptors;
};

struct aiokvm_net_slirp_connection {
    uint32_t address;
    uint16_t port;
    uint32_t id;
};

int aiokvm_net_slirp_built(void);
struct aiokvm_net_end *aiokvm_net_slirp_new(struct aiokvm_net *net, const struct aiokvm_net_slirp_config *config,
                                            int *error);
int aiokvm_net_slirp_add_forward(struct aiokvm_net_end *end, int udp, const char *host, uint16_t host_port,
                                 const char *guest, uint16_t guest_port);
int aiokvm_net_slirp_remove_forward(struct aiokvm_net_end *end, int udp, const char *host, uint16_t host_port);
int aiokvm_net_slirp_add_service(struct aiokvm_net_end *end, uint32_t address, uint16_t port, const char *path,
                                 uint32_t max);
int aiokvm_net_slirp_remove_service(struct aiokvm_net_end *end, uint32_t service);
int aiokvm_net_slirp_accept(struct aiokvm_net_end *end, uint32_t service,
                            struct aiokvm_net_slirp_connection *connection);
int aiokvm_net_slirp_abort(struct aiokvm_net_end *end, uint32_t connection);
int aiokvm_net_slirp_cut_some(struct aiokvm_net_end *end);
int aiokvm_net_slirp_take_broken(struct aiokvm_net_end *end, uint32_t *connection);
int aiokvm_net_slirp_take_query(struct aiokvm_net_end *end, uint32_t *id, void *data);
int aiokvm_net_slirp_answer(struct aiokvm_net_end *end, uint32_t id, const void *data, uint32_t size);

/* ---- net_port.h: the program as the peer ---- */

#define AIOKVM_NET_PORT_MAX_DEPTH ...
#define AIOKVM_NET_PORT_BATCH ...

struct aiokvm_net_port_config {
    uint32_t depth;
    uint64_t bytes;
    uint32_t offloads;
    uint32_t drop;
};

struct aiokvm_net_port_header {
    uint8_t flags, gso_type;
    uint16_t gso_size;
    uint16_t csum_start, csum_offset;
};

struct aiokvm_net_port_batch {
    const uint8_t *data;
    uint32_t count;
    uint32_t special;
    uint32_t ends[...];
    struct aiokvm_net_port_header headers[...];
};

struct aiokvm_net_end *aiokvm_net_port_new(struct aiokvm_net *net, const struct aiokvm_net_port_config *config,
                                           int *error);
int aiokvm_net_port_take(struct aiokvm_net_end *end, uint32_t most, struct aiokvm_net_port_batch *batch);
void aiokvm_net_port_release(struct aiokvm_net_end *end, uint32_t count);
int aiokvm_net_port_clear_some(struct aiokvm_net_end *end);
int aiokvm_net_port_send(struct aiokvm_net_end *end, const uint8_t *data, const uint32_t *sizes,
                         const struct aiokvm_net_port_header *headers, uint32_t count);

/* ---- net_switch.h ---- */

#define AIOKVM_NET_SWITCH_ADDRESSES ...
#define AIOKVM_NET_SWITCH_PORTS ...

struct aiokvm_net_switch;

struct aiokvm_net_switch_config {
    uint64_t ageing_ns;
    ...;
};

struct aiokvm_net_switch_port_config {
    uint32_t vlan;
    uint32_t isolated;
    const uint16_t *trunk;
    uint32_t trunks;
};

struct aiokvm_net_switch_entry {
    uint8_t mac[6];
    uint16_t vlan;
    uint32_t port;
    uint64_t age_ns;
};

struct aiokvm_net_switch_stats {
    uint64_t forwarded;
    uint64_t flooded;
    uint64_t filtered;
    uint64_t dropped_source;
    uint64_t dropped_vlan;
    uint64_t learned, moved, forgotten;
};

struct aiokvm_net_switch *aiokvm_net_switch_new(struct aiokvm_net *net, const struct aiokvm_net_switch_config *config,
                                                int *error);
void aiokvm_net_switch_free(struct aiokvm_net_switch *sw);
struct aiokvm_net_end *aiokvm_net_switch_port_new(struct aiokvm_net_switch *sw,
                                                  const struct aiokvm_net_switch_port_config *config, int *error);
int aiokvm_net_switch_table(struct aiokvm_net_switch *sw, struct aiokvm_net_switch_entry *entries, uint32_t most);
void aiokvm_net_switch_stats(struct aiokvm_net_switch *sw, struct aiokvm_net_switch_stats *stats);

/* ---- net_filter.h, net_capture.h ---- */

#define AIOKVM_NET_DENY ...
#define AIOKVM_NET_ALLOW ...
#define AIOKVM_NET_ASK ...
#define AIOKVM_NET_EGRESS ...
#define AIOKVM_NET_INGRESS ...
#define AIOKVM_NET_MAX_RULES ...
#define AIOKVM_NET_HAS_SRC ...
#define AIOKVM_NET_HAS_DST ...
#define AIOKVM_NET_HAS_SRC_MAC ...
#define AIOKVM_NET_HAS_DST_MAC ...
#define AIOKVM_NET_HAS_ETHERTYPE ...
#define AIOKVM_NET_HAS_PROTOCOL ...
#define AIOKVM_NET_HAS_SRC_PORT ...
#define AIOKVM_NET_HAS_DST_PORT ...
#define AIOKVM_NET_HAS_ICMP_TYPE ...
#define AIOKVM_NET_NO_REPLIES ...

struct aiokvm_net_recording;

struct aiokvm_net_rule {
    uint16_t has;
    uint8_t verdict;
    uint8_t directions;
    uint16_t hook;
    uint16_t ethertype;
    uint8_t src[16], dst[16];
    uint8_t address_size;
    uint8_t src_bits, dst_bits;
    uint8_t protocol;
    uint8_t src_mac[6], dst_mac[6];
    uint16_t src_ports[2], dst_ports[2];
    uint8_t icmp_types[2];
};

struct aiokvm_net_flow {
    uint64_t id;
    uint16_t hook;
    uint8_t egress;
    uint8_t protocol;
    uint8_t address_size;
    uint8_t has_ports;
    uint16_t src_port, dst_port;
    uint8_t src[16], dst[16];
    uint32_t frame_size;
};

struct aiokvm_net_filter *aiokvm_net_filter_new(struct aiokvm_net_end *end, const struct aiokvm_net_rule *rules,
                                                uint32_t count, int *error);
int aiokvm_net_filter_replace(struct aiokvm_net_filter *filter, const struct aiokvm_net_rule *rules, uint32_t count);
int aiokvm_net_filter_take(struct aiokvm_net_filter *filter, struct aiokvm_net_flow *flow, uint8_t *frame,
                           uint32_t size);
int aiokvm_net_filter_decide(struct aiokvm_net_filter *filter, uint64_t id, int allow);
void aiokvm_net_filter_forget(struct aiokvm_net_filter *filter, uint32_t hook);
void aiokvm_net_filter_free(struct aiokvm_net_filter *filter);

struct aiokvm_net_recording *aiokvm_net_recording_new(uint32_t snaplen, uint64_t buffer_bytes, uint64_t limit_bytes,
                                                      int *error);
uint64_t aiokvm_net_recording_take(struct aiokvm_net_recording *recording, uint8_t **data);
uint64_t aiokvm_net_recording_pending(struct aiokvm_net_recording *recording);
void aiokvm_net_recording_end(struct aiokvm_net_recording *recording);
int aiokvm_net_recording_ended(struct aiokvm_net_recording *recording);
void aiokvm_net_recording_free(struct aiokvm_net_recording *recording);
struct aiokvm_net_capture *aiokvm_net_capture_new(struct aiokvm_net_recording *recording, uint32_t interface,
                                                  int *error);
void aiokvm_net_capture_counts(struct aiokvm_net_capture *capture, uint64_t *frames, uint64_t *dropped);
void aiokvm_net_capture_free(struct aiokvm_net_capture *capture);
