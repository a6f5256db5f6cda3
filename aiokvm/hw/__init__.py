"""Platform devices: pure, synchronous register models, one file a device, and the bus that finds them."""
