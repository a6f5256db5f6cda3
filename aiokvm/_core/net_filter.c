#include "net_priv.h"

bool net_filter_passes(struct aiokvm_net_filter *filter, struct aiokvm_net_end *end, const struct net_frame *frame,
                       bool sent, uint64_t now_ns)
{
    (void)filter, (void)end, (void)frame, (void)sent, (void)now_ns;
    return true;
}
