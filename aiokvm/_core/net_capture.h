/* Frames as they pass, recorded as blocks of a pcapng file: draft-ietf-opsawg-pcapng, in the host's byte order.
 *
 * A recording is one file: a bounded buffer, that the program empties. Its own lock makes it safe for ends of several
 * planes. A capture is one interface of the file, for one end; AIOKVM_NET_NEWS_CAPTURED of that end says that the
 * first block is there, or that the buffer is half full. What finds no room is left out and counted. In a child of
 * fork a recording is empty and over. */
#ifndef AIOKVM_NET_CAPTURE_H
#define AIOKVM_NET_CAPTURE_H

#include <stdint.h>

#include "net.h"

struct aiokvm_net_recording;

/* Of each frame snaplen bytes; two buffers of buffer_bytes, of which one is written to while the other is read from.
 * limit_bytes of blocks are recorded in all, 0: no limit. NULL: *error is an errno. */
struct aiokvm_net_recording *aiokvm_net_recording_new(uint32_t snaplen, uint64_t buffer_bytes, uint64_t limit_bytes,
                                                      int *error);
/* Whole blocks, so many bytes; they stay until the next call. */
uint64_t aiokvm_net_recording_take(struct aiokvm_net_recording *recording, uint8_t **data);
/* How many bytes wait to be taken. */
uint64_t aiokvm_net_recording_pending(struct aiokvm_net_recording *recording);
/* Nothing is recorded any more, nor counted as left out. */
void aiokvm_net_recording_end(struct aiokvm_net_recording *recording);
/* Whether it is over: ended, or at its limit. */
int aiokvm_net_recording_ended(struct aiokvm_net_recording *recording);
/* After all its captures. */
void aiokvm_net_recording_free(struct aiokvm_net_recording *recording);

/* `interface` is its index in the file. */
struct aiokvm_net_capture *aiokvm_net_capture_new(struct aiokvm_net_recording *recording, uint32_t interface,
                                                  int *error);
/* How many frames there were to be recorded, and how many of them were left out. */
void aiokvm_net_capture_counts(struct aiokvm_net_capture *capture, uint64_t *frames, uint64_t *dropped);
void aiokvm_net_capture_free(struct aiokvm_net_capture *capture);

#endif
