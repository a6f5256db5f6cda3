#include "net_capture.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "net_priv.h"

/* Section 4.3: Enhanced Packet Block, and its option epb_flags. */
enum { BLOCK_TYPE = 6, OPTION_FLAGS = 2, FLAGS_INBOUND = 1, FLAGS_OUTBOUND = 2 };

struct block_header {
    uint32_t type, total_length, interface, timestamp_high, timestamp_low, captured, original;
};

struct block_trailer {
    uint16_t flags_code, flags_length;
    uint32_t flags;
    uint32_t end_of_options;
    uint32_t total_length;
};

struct aiokvm_net_recording {
    pid_t pid; /* of the process whose it is: in a child of fork the lock may be held by nobody */
    pthread_mutex_t lock; /* of all below, and of the counts of its captures */
    uint32_t snaplen;
    uint64_t size; /* of a buffer */
    uint64_t left; /* until the limit */
    bool ended;
    uint64_t filled;
    uint8_t *filling, *taken;
};

struct aiokvm_net_capture {
    struct aiokvm_net_recording *recording;
    uint32_t interface;
    uint64_t frames, dropped;
};

/* `at` has room for the padding too. */
static void write_block(const struct aiokvm_net_capture *capture, uint8_t *at, const struct net_frame *frame,
                        uint32_t captured, uint32_t total, uint32_t flags)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t now_ns = (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
    struct block_header header = {
        BLOCK_TYPE, total, capture->interface, (uint32_t)(now_ns >> 32), (uint32_t)now_ns, captured, frame->size,
    };
    struct block_trailer trailer = { OPTION_FLAGS, sizeof(uint32_t), flags, 0, total };
    memcpy(at, &header, sizeof(header));
    memset(at + total - sizeof(trailer) - 4, 0, 4);
    memcpy(at + total - sizeof(trailer), &trailer, sizeof(trailer));
    at += sizeof(header);
    for (uint32_t i = 0, left = captured; left; i++) {
        size_t length = frame->iov[i].iov_len, part = length < left ? length : left;
        memcpy(at, frame->iov[i].iov_base, part);
        at += part;
        left -= (uint32_t)part;
    }
}

void net_capture_record(struct aiokvm_net_capture *capture, struct aiokvm_net_end *end, const struct net_frame *frame,
                        bool sent)
{
    struct aiokvm_net_recording *recording = capture->recording;
    uint32_t captured = frame->size < recording->snaplen ? frame->size : recording->snaplen;
    uint32_t total = (uint32_t)(sizeof(struct block_header) + ((captured + 3) & ~3u) + sizeof(struct block_trailer));
    bool tell = false;
    pthread_mutex_lock(&recording->lock);
    if (total > recording->left && !recording->ended) {
        recording->ended = tell = true;
    } else if (!recording->ended) {
        uint64_t before = recording->filled, after = before + total;
        capture->frames++;
        if (after > recording->size) {
            capture->dropped++;
        } else {
            /* Inbound is what comes to the guest. */
            write_block(capture, recording->filling + before, frame, captured, total,
                        sent ? FLAGS_INBOUND : FLAGS_OUTBOUND);
            recording->filled = after;
            recording->left -= total;
            tell = !before || (before < recording->size / 2 && after >= recording->size / 2);
        }
    }
    pthread_mutex_unlock(&recording->lock);
    if (tell)
        net_tell(end, AIOKVM_NET_NEWS_CAPTURED, 0, 0);
}

struct aiokvm_net_recording *aiokvm_net_recording_new(uint32_t snaplen, uint64_t buffer_bytes, uint64_t limit_bytes,
                                                      int *error)
{
    struct aiokvm_net_recording *recording = calloc(1, sizeof(*recording));
    if (recording) {
        pthread_mutex_init(&recording->lock, NULL);
        recording->pid = getpid();
        recording->snaplen = snaplen;
        recording->size = buffer_bytes;
        recording->left = limit_bytes ? limit_bytes : UINT64_MAX;
        recording->filling = malloc(buffer_bytes);
        recording->taken = malloc(buffer_bytes);
        if (recording->filling && recording->taken)
            return recording;
        aiokvm_net_recording_free(recording);
    }
    *error = ENOMEM;
    return NULL;
}

/* For the program's calls. False: this is a child of fork. */
static bool enter(struct aiokvm_net_recording *recording)
{
    return recording->pid == getpid() && !pthread_mutex_lock(&recording->lock);
}

uint64_t aiokvm_net_recording_take(struct aiokvm_net_recording *recording, uint8_t **data)
{
    if (!enter(recording))
        return 0;
    uint64_t size = recording->filled;
    *data = recording->filling;
    recording->filling = recording->taken;
    recording->taken = *data;
    recording->filled = 0;
    pthread_mutex_unlock(&recording->lock);
    return size;
}

uint64_t aiokvm_net_recording_pending(struct aiokvm_net_recording *recording)
{
    if (!enter(recording))
        return 0;
    uint64_t size = recording->filled;
    pthread_mutex_unlock(&recording->lock);
    return size;
}

void aiokvm_net_recording_end(struct aiokvm_net_recording *recording)
{
    if (!enter(recording))
        return;
    recording->ended = true;
    pthread_mutex_unlock(&recording->lock);
}

int aiokvm_net_recording_ended(struct aiokvm_net_recording *recording)
{
    if (!enter(recording))
        return 1;
    bool ended = recording->ended;
    pthread_mutex_unlock(&recording->lock);
    return ended;
}

void aiokvm_net_recording_free(struct aiokvm_net_recording *recording)
{
    pthread_mutex_destroy(&recording->lock);
    free(recording->filling);
    free(recording->taken);
    free(recording);
}

struct aiokvm_net_capture *aiokvm_net_capture_new(struct aiokvm_net_recording *recording, uint32_t interface,
                                                  int *error)
{
    struct aiokvm_net_capture *capture = calloc(1, sizeof(*capture));
    if (!capture) {
        *error = ENOMEM;
        return NULL;
    }
    capture->recording = recording;
    capture->interface = interface;
    return capture;
}

void aiokvm_net_capture_counts(struct aiokvm_net_capture *capture, uint64_t *frames, uint64_t *dropped)
{
    *frames = *dropped = 0;
    if (!enter(capture->recording))
        return;
    *frames = capture->frames;
    *dropped = capture->dropped;
    pthread_mutex_unlock(&capture->recording->lock);
}

void aiokvm_net_capture_free(struct aiokvm_net_capture *capture)
{
    free(capture);
}
