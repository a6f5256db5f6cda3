"""virtio devices: queues, transports and register models, as pure state machines (virtio 1.2)."""
