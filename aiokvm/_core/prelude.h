/* Pasted by cffi before the code that it generates for cdef.h. */
#include "exits.h"
#include "ioctl.h"
#include "kvm_compat.h"
#include "memory.h"
#include "notify.h"
#include "vcpu.h"
#include "vring.h"
