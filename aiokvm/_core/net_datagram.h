/* Frames over a datagram socket, one in each: what QEMU's -netdev dgram speaks. */
#ifndef AIOKVM_NET_DATAGRAM_H
#define AIOKVM_NET_DATAGRAM_H

#include "net.h"

/* An end over a socket (SOCK_DGRAM, or SOCK_SEQPACKET that is connected), which stays the caller's, must be open for
 * as long as the end is, and is made non-blocking. With `remote`, a sockaddr of remote_size bytes, frames are sent
 * there; without, it is connected already. That nobody is there is no error: frames are dropped. Of UDP nobody but
 * `remote` is heard.
 *
 * A socket of AF_UNIX without `remote`, whose peer has gone, has AIOKVM_NET_NEWS_CLOSED; others wait for it to come
 * back. NULL: *error is an errno. EPROTOTYPE: a socket of another type. */
struct aiokvm_net_end *aiokvm_net_datagram_new(struct aiokvm_net *net, int fd, const void *remote,
                                               uint32_t remote_size, int *error);

#endif
