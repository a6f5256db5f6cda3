/* A guest with a network adapter, in memory with no guest: its RAM, its driver's queues, and eventfds in the place of
 * KVM's. */
#ifndef AIOKVM_NIC_DRIVER_H
#define AIOKVM_NIC_DRIVER_H

#include <linux/virtio_net.h>

#include "net_fake.h"
#include "net_nic.h"
#include "vring.h"
#include "vring_driver.h"

enum { NIC_HDR_SIZE = 12, NIC_RAM = 16 << 20, NIC_SLOT = 1 << 17, NIC_RINGS = 1 << 20, NIC_MAX_PAIRS = 4 };

struct nic_driver_queue {
    struct driver driver;
    struct aiokvm_vring *vring;
    int kick;
};

struct nic_driver {
    uint8_t *ram;
    struct aiokvm_net_end *end;
    uint64_t features;
    uint32_t size;
    int irq;
    uint32_t status;
    struct nic_driver_queue queues[2 * NIC_MAX_PAIRS];
};

/* An adapter whose queues, of size entries, are attached. features: of the ring and of the device. */
void nic_driver_open(struct nic_driver *nic, struct aiokvm_net *net, uint64_t features, uint32_t size, uint32_t pairs);
/* The end was freed, or will be with its plane: that comes first. */
void nic_driver_close(struct nic_driver *nic);
void nic_driver_detach(struct nic_driver *nic);
/* Where buffer number `slot` is in guest memory: NIC_SLOT bytes, up to 96 of them. */
uint64_t nic_driver_gpa(uint32_t slot);
uint8_t *nic_driver_at(struct nic_driver *nic, uint32_t slot);
/* A buffer for what is received, in `pieces` descriptors, at this slot. Returns its id. */
int nic_driver_give(struct nic_driver *nic, uint32_t pair, uint32_t slot, uint32_t size, uint32_t pieces);
/* Puts a frame into a slot behind its header and makes it available, in two descriptors. */
int nic_driver_send(struct nic_driver *nic, uint32_t pair, uint32_t slot, const struct virtio_net_hdr_v1 *hdr,
                    const void *data, uint32_t size);
/* Notifies if the device wants that, or in any case. True: it did. */
bool nic_driver_kick(struct nic_driver *nic, uint32_t queue, bool always);
/* How many interrupts there have been since the last call. */
uint64_t nic_driver_interrupts(struct nic_driver *nic);

/* ---- with an end that records as its peer ---- */

/* Features, as masks. */
enum { F_CSUM = 1 << 0, F_GUEST_CSUM = 1 << 1, F_GUEST_TSO4 = 1 << 7, F_HOST_TSO4 = 1 << 11, F_MRG = 1 << 15 };
#define EVENT AIOKVM_VIRTIO_F_EVENT_IDX
#define PACKED AIOKVM_VIRTIO_F_RING_PACKED
#define IN_ORDER AIOKVM_VIRTIO_F_IN_ORDER

/* A frame of any length: IPv4, with a TCP header of 20 bytes at 34, to 52:54:00:00:00:01. */
extern const uint8_t *const NIC_FRAME;

struct nic_rig {
    struct aiokvm_net *net;
    struct nic_driver nic;
    struct fake_end *peer; /* takes all offloads */
};

void nic_rig_open(struct nic_rig *rig, uint64_t features, uint32_t size, uint32_t pairs);
void nic_rig_close(struct nic_rig *rig);
struct aiokvm_net_stats nic_rig_stats(struct nic_rig *rig);
/* How many chains of a queue have been completed since the last call. */
uint32_t nic_rig_taken(struct nic_rig *rig, uint32_t queue);
/* The program is told that a queue is broken, and nothing else. */
void nic_rig_check_broken(struct nic_rig *rig, int error, uint32_t queue);

#endif
