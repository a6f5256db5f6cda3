/* What aiokvm uses of the KVM UAPI and headers of older kernels do not declare. */
#ifndef AIOKVM_KVM_COMPAT_H
#define AIOKVM_KVM_COMPAT_H

#include <linux/kvm.h>

/* Linux 6.8: KVM_CAP_USER_MEMORY2 */
#ifndef KVM_SET_USER_MEMORY_REGION2
struct kvm_userspace_memory_region2 {
    __u32 slot;
    __u32 flags;
    __u64 guest_phys_addr;
    __u64 memory_size;
    __u64 userspace_addr;
    __u64 guest_memfd_offset;
    __u32 guest_memfd;
    __u32 pad1;
    __u64 pad2[14];
};
#define KVM_SET_USER_MEMORY_REGION2 _IOW(KVMIO, 0x49, struct kvm_userspace_memory_region2)
#endif

/* Linux 6.8: KVM_CAP_MEMORY_ATTRIBUTES */
#ifndef KVM_SET_MEMORY_ATTRIBUTES
struct kvm_memory_attributes {
    __u64 address;
    __u64 size;
    __u64 attributes;
    __u64 flags;
};
#define KVM_SET_MEMORY_ATTRIBUTES _IOW(KVMIO, 0xd2, struct kvm_memory_attributes)
#endif

/* Linux 6.8: KVM_CAP_GUEST_MEMFD */
#ifndef KVM_CREATE_GUEST_MEMFD
struct kvm_create_guest_memfd {
    __u64 size;
    __u64 flags;
    __u64 reserved[6];
};
#define KVM_CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, struct kvm_create_guest_memfd)
#endif

/* Linux 6.11: KVM_CAP_PRE_FAULT_MEMORY */
#ifndef KVM_PRE_FAULT_MEMORY
struct kvm_pre_fault_memory {
    __u64 gpa;
    __u64 size;
    __u64 flags;
    __u64 padding[5];
};
#define KVM_PRE_FAULT_MEMORY _IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)
#endif

/* The memory_fault member of kvm_run's union (Linux 6.8), and the I/O APIC with its entries as plain
 * numbers: cffi does not lay bit-fields out. */
struct aiokvm_memory_fault {
    __u64 flags;
    __u64 gpa;
    __u64 size;
};

struct aiokvm_ioapic_state {
    __u64 base_address;
    __u32 ioregsel;
    __u32 id;
    __u32 irr;
    __u32 pad;
    __u64 redirtbl[KVM_IOAPIC_NUM_PINS];
};
_Static_assert(sizeof(struct aiokvm_ioapic_state) == sizeof(struct kvm_ioapic_state),
               "the two layouts of the I/O APIC differ");

#endif
