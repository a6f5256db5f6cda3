"""Machines: where the device models, the kernel's KVM and the event loop meet."""
