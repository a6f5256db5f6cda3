/* A build without libslirp. */
#ifndef AIOKVM_HAVE_SLIRP

#include "net_slirp.h"

#include <errno.h>
#include <stddef.h>

int aiokvm_net_slirp_built(void)
{
    return 0;
}

struct aiokvm_net_end *aiokvm_net_slirp_new(struct aiokvm_net *net, const struct aiokvm_net_slirp_config *config,
                                            int *error)
{
    (void)net;
    (void)config;
    *error = ENOSYS;
    return NULL;
}

int aiokvm_net_slirp_add_forward(struct aiokvm_net_end *end, int udp, const char *host, uint16_t host_port,
                                 const char *guest, uint16_t guest_port)
{
    (void)end, (void)udp, (void)host, (void)host_port, (void)guest, (void)guest_port;
    return -ENOSYS;
}

int aiokvm_net_slirp_remove_forward(struct aiokvm_net_end *end, int udp, const char *host, uint16_t host_port)
{
    (void)end, (void)udp, (void)host, (void)host_port;
    return -ENOSYS;
}

int aiokvm_net_slirp_add_service(struct aiokvm_net_end *end, uint32_t address, uint16_t port, const char *path,
                                 uint32_t max)
{
    (void)end, (void)address, (void)port, (void)path, (void)max;
    return -ENOSYS;
}

int aiokvm_net_slirp_remove_service(struct aiokvm_net_end *end, uint32_t service)
{
    (void)end, (void)service;
    return -ENOSYS;
}

int aiokvm_net_slirp_accept(struct aiokvm_net_end *end, uint32_t service,
                            struct aiokvm_net_slirp_connection *connection)
{
    (void)end, (void)service, (void)connection;
    return -ENOSYS;
}

int aiokvm_net_slirp_abort(struct aiokvm_net_end *end, uint32_t connection)
{
    (void)end, (void)connection;
    return -ENOSYS;
}

int aiokvm_net_slirp_cut_some(struct aiokvm_net_end *end)
{
    (void)end;
    return -ENOSYS;
}

int aiokvm_net_slirp_take_broken(struct aiokvm_net_end *end, uint32_t *connection)
{
    (void)end, (void)connection;
    return -ENOSYS;
}

int aiokvm_net_slirp_take_query(struct aiokvm_net_end *end, uint32_t *id, void *data)
{
    (void)end, (void)id, (void)data;
    return -ENOSYS;
}

int aiokvm_net_slirp_answer(struct aiokvm_net_end *end, uint32_t id, const void *data, uint32_t size)
{
    (void)end, (void)id, (void)data, (void)size;
    return -ENOSYS;
}

#endif
