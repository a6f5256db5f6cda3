"""Wire and file formats: bytes in, values out and back, with no I/O."""
