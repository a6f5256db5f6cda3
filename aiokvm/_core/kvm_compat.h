/* What aiokvm uses of the KVM UAPI and headers of older kernels do not declare. */
#ifndef AIOKVM_KVM_COMPAT_H
#define AIOKVM_KVM_COMPAT_H

#include <linux/kvm.h>

#endif
