/* A guest that writes to the virtio-blk device behind the first virtio-mmio slot for ever, and tells what a
 * completed FLUSH has covered. Long mode, one CPU, interrupts off, no libraries.
 *
 * Write number n (counted from the number at FIRST on) fills sector n * 7 % SECTORS. After each batch of writes it
 * flushes, and then says up to which number on a port. A request that fails ends it, with its status. */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define MMIO 0xd0000000ull
#define FIRST 0x8000ull
#define RINGS 0x200000ull
#define DATA 0x300000ull
#define PORT 0x500
#define DEBUG_EXIT 0xf4

enum { SECTORS = 251, BATCH = 4, SIZE = 16, SECTOR = 512 };
enum { VIRTIO_BLK_T_OUT = 1, VIRTIO_BLK_T_FLUSH = 4 };
enum { VRING_DESC_F_NEXT = 1, VRING_DESC_F_WRITE = 2 };
/* virtio 1.2, section 4.2.2 */
enum {
    MAGIC = 0x000, DRIVER_FEATURES = 0x020, DRIVER_FEATURES_SEL = 0x024, QUEUE_SEL = 0x030, QUEUE_NUM = 0x038,
    QUEUE_READY = 0x044, QUEUE_NOTIFY = 0x050, STATUS = 0x070, QUEUE_DESC = 0x080, QUEUE_DRIVER = 0x090,
    QUEUE_DEVICE = 0x0a0,
};

struct desc { u64 addr; u32 len; u16 flags, next; };
struct avail { u16 flags, idx, ring[SIZE]; };
struct used { u16 flags, idx; struct { u32 id, len; } ring[SIZE]; };
struct header { u32 type, reserved; u64 sector; };
struct request { struct header header; u8 status; u8 pad[15]; };

static volatile struct desc *const descs = (void *)RINGS;
static volatile struct avail *const avail = (void *)(RINGS + 0x1000);
static volatile struct used *const used = (void *)(RINGS + 0x2000);
static volatile struct request *const requests = (void *)(RINGS + 0x3000);

static void set(u64 offset, u32 value)
{
    *(volatile u32 *)(MMIO + offset) = value;
}

static u32 get(u64 offset)
{
    return *(volatile u32 *)(MMIO + offset);
}

static void out(u16 port, u32 value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

static void fail(u32 code)
{
    for (;;)
        out(DEBUG_EXIT, code);
}

static void set_up(void)
{
    if (get(MAGIC) != 0x74726976)
        fail(101);
    set(STATUS, 0);
    set(STATUS, 1 | 2); /* ACKNOWLEDGE, DRIVER */
    set(DRIVER_FEATURES_SEL, 0);
    set(DRIVER_FEATURES, 1 << 9); /* VIRTIO_BLK_F_FLUSH */
    set(DRIVER_FEATURES_SEL, 1);
    set(DRIVER_FEATURES, 1); /* VERSION_1 */
    set(STATUS, 1 | 2 | 8);
    if (!(get(STATUS) & 8))
        fail(102);
    set(QUEUE_SEL, 0);
    set(QUEUE_NUM, SIZE);
    set(QUEUE_DESC, (u32)RINGS);
    set(QUEUE_DESC + 4, 0);
    set(QUEUE_DRIVER, (u32)RINGS + 0x1000);
    set(QUEUE_DRIVER + 4, 0);
    set(QUEUE_DEVICE, (u32)RINGS + 0x2000);
    set(QUEUE_DEVICE + 4, 0);
    set(QUEUE_READY, 1);
    set(STATUS, 1 | 2 | 8 | 4);
}

/* Puts request i, of up to three descriptors, into the ring. */
static void submit(u32 i, u32 type, u64 sector, u64 data)
{
    u32 d = i * 3;
    volatile struct request *request = &requests[i];
    request->header.type = type;
    request->header.reserved = 0;
    request->header.sector = sector;
    request->status = 0xff;
    descs[d].addr = (u64)&request->header;
    descs[d].len = sizeof(struct header);
    descs[d].flags = VRING_DESC_F_NEXT;
    descs[d].next = d + (data ? 1 : 2);
    descs[d + 1].addr = data;
    descs[d + 1].len = SECTOR;
    descs[d + 1].flags = VRING_DESC_F_NEXT;
    descs[d + 1].next = d + 2;
    descs[d + 2].addr = (u64)&request->status;
    descs[d + 2].len = 1;
    descs[d + 2].flags = VRING_DESC_F_WRITE;
    avail->ring[avail->idx % SIZE] = d;
    avail->idx = avail->idx + 1;
}

static void finish(u32 count)
{
    set(QUEUE_NOTIFY, 0);
    while (used->idx != avail->idx)
        ;
    for (u32 i = 0; i < count; i++)
        if (requests[i].status)
            fail(requests[i].status);
}

__attribute__((section(".start"))) void start(void)
{
    u64 number = *(volatile u64 *)FIRST;
    set_up();
    for (;;) {
        for (u32 i = 0; i < BATCH; i++, number++) {
            volatile u64 *words = (void *)(DATA + i * SECTOR);
            words[0] = number;
            for (u32 j = 1; j < SECTOR / 8; j++)
                words[j] = number * 0x9e3779b97f4a7c15ull + j;
            submit(i, VIRTIO_BLK_T_OUT, number * 7 % SECTORS, (u64)words);
        }
        finish(BATCH);
        submit(0, VIRTIO_BLK_T_FLUSH, 0, 0);
        finish(1);
        out(PORT, (u32)number);
    }
}
