/* What leads into the guest's network from outside, forwarded ports, and what leads from there to the program. */
#define _GNU_SOURCE
#include "net_slirp_priv.h"

#ifdef AIOKVM_HAVE_SLIRP

#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { BACKLOG = 128 };

bool slirp_has_descriptors(void)
{
    int spare[3];
    size_t count = 0;
    while (count < 3 && (spare[count] = eventfd(0, EFD_CLOEXEC)) >= 0)
        count++;
    for (size_t i = 0; i < count; i++)
        close(spare[i]);
    return count == 3;
}

static struct slirp_end *self_of(struct aiokvm_net_end *end)
{
    return (struct slirp_end *)end;
}

/* ---- forwards ---- */

union address {
    struct sockaddr any;
    struct sockaddr_in in;
    struct sockaddr_in6 in6;
    struct sockaddr_un un;
    /* libslirp compares by this. */
    struct sockaddr_storage storage;
};

/* The length, or 0 if it is none. `family`: what "" means. */
static socklen_t parse(const char *text, uint16_t port, int family, union address *address)
{
    *address = (union address){ 0 };
    if (*text == '/') {
        address->un.sun_family = AF_UNIX;
        if (strlen(text) >= sizeof(address->un.sun_path))
            return 0;
        strcpy(address->un.sun_path, text);
        return sizeof(address->un);
    }
    if (strchr(text, ':') || (!*text && family == AF_INET6)) {
        address->in6.sin6_family = AF_INET6;
        address->in6.sin6_port = htons(port);
        return !*text || inet_pton(AF_INET6, text, &address->in6.sin6_addr) == 1 ? sizeof(address->in6) : 0;
    }
    address->in.sin_family = AF_INET;
    address->in.sin_port = htons(port);
    return !*text || inet_pton(AF_INET, text, &address->in.sin_addr) == 1 ? sizeof(address->in) : 0;
}

static int flags_of(int udp, const union address *host)
{
    return (udp ? SLIRP_HOSTFWD_UDP : 0) | (host->any.sa_family == AF_INET6 ? SLIRP_HOSTFWD_V6ONLY : 0);
}

static int port_of(int fd)
{
    union address address;
    socklen_t size = sizeof(address);
    if (fd < 0 || getsockname(fd, &address.any, &size) < 0 || address.any.sa_family == AF_UNIX)
        return 0;
    return ntohs(address.any.sa_family == AF_INET6 ? address.in6.sin6_port : address.in.sin_port);
}

int aiokvm_net_slirp_add_forward(struct aiokvm_net_end *end, int udp, const char *host, uint16_t host_port,
                                 const char *guest, uint16_t guest_port)
{
    struct slirp_end *self = self_of(end);
    union address from, to;
    socklen_t from_size = parse(host, host_port, AF_INET, &from);
    socklen_t to_size = parse(guest, guest_port, from.any.sa_family, &to);
    bool is_unix = from.any.sa_family == AF_UNIX;
    if (!from_size || !to_size || to.any.sa_family == AF_UNIX || (is_unix && udp) ||
        to.any.sa_family != (is_unix ? AF_INET : from.any.sa_family))
        return -EINVAL;
    if (!net_enter(end->net))
        return -EOWNERDEAD;
    self->found = -1;
    int result = is_unix && !slirp_has_descriptors() ? -EMFILE : 0;
    if (!result && slirp_add_hostxfwd(self->slirp, &from.any, from_size, &to.any, to_size, flags_of(udp, &from)) < 0)
        result = errno ? -errno : -EINVAL;
    if (!result) {
        slirp_ask(self);
        result = port_of(self->found);
    }
    net_leave(end->net);
    return result;
}

int aiokvm_net_slirp_remove_forward(struct aiokvm_net_end *end, int udp, const char *host, uint16_t host_port)
{
    union address from;
    socklen_t size = parse(host, host_port, AF_INET, &from);
    if (!size)
        return -EINVAL;
    if (!net_enter(end->net))
        return -EOWNERDEAD;
    int found = slirp_remove_hostxfwd(self_of(end)->slirp, &from.any, size, flags_of(udp, &from));
    slirp_ask(self_of(end));
    net_leave(end->net);
    return found == 0 ? 0 : -ENOENT;
}

/* ---- services ---- */

static bool cut_connection(struct slirp_end *self, uint32_t id)
{
    struct slirp_socket *socket = slirp_sockets_by_id(&self->sockets, id);
    if (socket)
        slirp_cut(self, socket);
    return socket;
}

/* False: one could not be accepted. */
static bool accept_of(struct slirp_end *self, struct slirp_service *service)
{
    for (;;) {
        int fd = accept4(service->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0)
            return errno == EAGAIN;
        struct slirp_waiting *waiting = service->count < service->max ? malloc(sizeof(*waiting)) : NULL;
        if (!waiting) {
            self->end.stats.dropped_full++;
            close(fd);
            cut_connection(self, self->sender.id);
            continue;
        }
        aiokvm_share_add(&self->descriptors, 1);
        *waiting = (struct slirp_waiting){ .fd = fd, .connection = self->sender };
        *service->last = waiting;
        service->last = &waiting->next;
        service->count++;
        net_tell(&self->end, AIOKVM_NET_NEWS_READABLE, 0, 0);
    }
}

void slirp_accept(struct slirp_end *self)
{
    self->is_connected = self->is_starved = false;
    for (struct slirp_service *service = self->services; service; service = service->next)
        if (!accept_of(self, service))
            self->is_starved = true;
}

/* The first that waits, whose descriptor is the caller's. */
static int take_waiting(struct slirp_end *self, struct slirp_service *service,
                        struct aiokvm_net_slirp_connection *connection)
{
    struct slirp_waiting *waiting = service->first;
    int fd = waiting->fd;
    service->first = waiting->next;
    if (!service->first)
        service->last = &service->first;
    service->count--;
    *connection = waiting->connection;
    free(waiting);
    aiokvm_share_give(&self->descriptors, 1);
    return fd;
}

static void free_service(struct slirp_end *self, struct slirp_service *service)
{
    struct aiokvm_net_slirp_connection connection;
    while (service->first)
        close(take_waiting(self, service, &connection));
    close(service->listener);
    free(service);
}

void slirp_free_services(struct slirp_end *self)
{
    while (self->services) {
        struct slirp_service *service = self->services;
        self->services = service->next;
        free_service(self, service);
    }
}

static int listen_at(const char *path)
{
    union address address;
    if (*path != '/' || !parse(path, 0, AF_UNIX, &address))
        return -EINVAL;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    if (bind(fd, &address.any, sizeof(address.un)) < 0 || listen(fd, BACKLOG) < 0) {
        int error = errno;
        close(fd);
        return -error;
    }
    return fd;
}

int aiokvm_net_slirp_add_service(struct aiokvm_net_end *end, uint32_t address, uint16_t port, const char *path,
                                 uint32_t max)
{
    struct slirp_end *self = self_of(end);
    struct slirp_service *service = malloc(sizeof(*service));
    if (!service)
        return -ENOMEM;
    int listener = listen_at(path);
    if (listener < 0 || !net_enter(end->net)) {
        if (listener >= 0)
            close(listener);
        free(service);
        return listener < 0 ? listener : -EOWNERDEAD;
    }
    *service = (struct slirp_service){
        .id = ++self->next_service & INT32_MAX, .address = address, .port = port, .max = max, .listener = listener,
        .last = &service->first, .next = self->services,
    };
    int result = (int)service->id;
    struct in_addr at = { htonl(address) };
    if (address && slirp_add_unix(self->slirp, path, &at, port) == 0) {
        self->services = service;
    } else {
        result = -EADDRINUSE;
        free_service(self, service);
    }
    net_leave(end->net);
    return result;
}

int aiokvm_net_slirp_remove_service(struct aiokvm_net_end *end, uint32_t id)
{
    struct slirp_end *self = self_of(end);
    if (!net_enter(end->net))
        return -EOWNERDEAD;
    int result = -ENOENT;
    for (struct slirp_service **at = &self->services; *at; at = &(*at)->next) {
        struct slirp_service *service = *at;
        if (service->id != id)
            continue;
        slirp_remove_guestfwd(self->slirp, (struct in_addr){ htonl(service->address) }, service->port);
        *at = service->next;
        for (struct slirp_waiting *waiting = service->first; waiting; waiting = waiting->next)
            cut_connection(self, waiting->connection.id);
        free_service(self, service);
        result = 0;
        break;
    }
    net_leave(end->net);
    return result;
}

int aiokvm_net_slirp_accept(struct aiokvm_net_end *end, uint32_t id, struct aiokvm_net_slirp_connection *connection)
{
    struct slirp_end *self = self_of(end);
    if (!net_enter(end->net))
        return -EOWNERDEAD;
    struct slirp_service *service = self->services;
    while (service && service->id != id)
        service = service->next;
    int fd = service ? -EAGAIN : -ENOENT;
    if (service && service->first)
        fd = take_waiting(self, service, connection);
    net_leave(end->net);
    return fd;
}

int aiokvm_net_slirp_abort(struct aiokvm_net_end *end, uint32_t connection)
{
    struct slirp_end *self = self_of(end);
    if (!net_enter(end->net))
        return -EOWNERDEAD;
    struct slirp_socket *socket = slirp_sockets_by_id(&self->sockets, connection);
    int result = socket ? 0 : -ENOENT;
    /* A socket that is closed with something unread in it is reset, behind what was written to it. Where the guest has
     * closed its side that cannot be, and what was written and not read yet is lost. */
    if (socket && send(socket->fd, "", 1, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 && errno != EAGAIN)
        slirp_cut(self, socket);
    net_leave(end->net);
    return result;
}

int aiokvm_net_slirp_cut_some(struct aiokvm_net_end *end)
{
    struct slirp_end *self = self_of(end);
    if (!net_enter(end->net))
        return -EOWNERDEAD;
    for (; self->cut_buckets < SLIRP_SOCKET_BUCKETS && !end->net->is_over; self->cut_buckets++)
        for (struct slirp_socket *socket = self->sockets.buckets[self->cut_buckets], *next; socket; socket = next) {
            next = socket->next;
            net_spend(end->net, NET_COST_CALL);
            if (socket->flow.is_tcp)
                slirp_cut(self, socket);
        }
    /* What is not connected. */
    for (; !end->net->is_over && self->cut_watched < self->size; self->cut_watched++)
        if (self->watched[self->cut_watched].is_counted) {
            net_spend(end->net, NET_COST_CALL);
            slirp_close_early(self, (int)self->cut_watched);
        }
    bool more = self->cut_watched < self->size;
    net_leave(end->net);
    return more;
}

int aiokvm_net_slirp_take_broken(struct aiokvm_net_end *end, uint32_t *connection)
{
    struct slirp_end *self = self_of(end);
    if (!net_enter(end->net))
        return -EOWNERDEAD;
    struct slirp_broken *broken = self->broken;
    if (broken) {
        self->broken = broken->next;
        *connection = broken->id;
        aiokvm_share_give(&self->bytes, sizeof(*broken));
        free(broken);
    }
    net_leave(end->net);
    return broken != NULL;
}

#endif
