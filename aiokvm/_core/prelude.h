/* Pasted by cffi before the code that it generates for cdef.h. */
#include "exits.h"
#include "file.h"
#include "ioctl.h"
#include "kvm_compat.h"
#include "memory.h"
#include "vcpu.h"
