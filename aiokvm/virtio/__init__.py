"""Virtio 1.2: devices, virtqueues and transports. Models only: no loop, no thread, no KVM."""
