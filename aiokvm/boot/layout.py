"""Where things lie in the first MiB of the guest: the one list of places that all loaders use.

The structures lie at the upper end of conventional memory, so that a flat image has everything from 0 to
``STACK`` for itself. Nothing is put into the last pages before the EBDA, as Linux's decompressor borrows
them for the trampoline that switches paging modes.
"""

from __future__ import annotations

PAGE_SIZE = 0x1000

STACK = 0x8_0000
STACK_SIZE = 0x1_0000
GDT = 0x9_0000
ZERO_PAGE = 0x9_1000
START_INFO = 0x9_2000
# A PML4, a PDPT and four page directories: 4 GiB in pages of 2 MiB.
PAGE_TABLES = 0x9_3000
PAGE_TABLES_SIZE = 6 * PAGE_SIZE
CMDLINE = 0x9_9000
CMDLINE_SIZE = PAGE_SIZE

EBDA = 0x9_FC00
VIDEO = 0xA_0000
ACPI = 0xE_0000
# f000:fff0, the last 16 bytes of what a PC has as firmware.
RESET_VECTOR = 0xF_FFF0
HIGH_MEMORY = 0x10_0000

FOUR_GIB = 1 << 32
