/* Frames over a stream socket, each behind its length in 4 bytes, big-endian: what QEMU's -netdev stream and
 * -netdev socket, passt and others speak. */
#ifndef AIOKVM_NET_STREAM_H
#define AIOKVM_NET_STREAM_H

#include "net.h"

/* An end without a socket drops what it receives. NULL: *error is an errno. */
struct aiokvm_net_end *aiokvm_net_stream_new(struct aiokvm_net *net, int *error);
/* Gives it a connected socket, which stays the caller's and is made non-blocking. It is watched until
 * AIOKVM_NET_NEWS_CLOSED, and then needed no more. That says 0: the peer has closed it; EMSGSIZE: it has sent a
 * length that no frame has, which is the detail; ENODATA: it was closed within a frame; or what the socket said.
 *
 * -EBUSY: it has one. */
int aiokvm_net_stream_attach(struct aiokvm_net_end *end, int fd);

#endif
