/* Changes whatever of a processor and of the chips a guest can change, and writes 1 to port 0xf1. Entered at 4 KiB in
 * protected mode, with paging off; code is selector 0x10. MSRs that are not there are skipped. */
.code32
.globl start
start:
  movl $ud-start+0x1000,%eax; mov $0x4000+8*6,%edi; call gate
  movl $gp-start+0x1000,%eax; mov $0x4000+8*13,%edi; call gate
  lidt idt
  mov %cr4,%eax; or $(1<<18 | 3<<9),%eax; mov %eax,%cr4 /* OSXSAVE, OSFXSR, OSXMMEXCPT */
  mov $7,%eax; xor %ecx,%ecx; cpuid; test $8,%ecx; jz 1f /* PKU */
  mov %cr4,%eax; or $(1<<22),%eax; mov %eax,%cr4
  mov $0x55555554,%eax; xor %edx,%edx; xor %ecx,%ecx; .byte 0x0f,0x01,0xef /* wrpkru */
1:
  mov $1,%eax; cpuid; bt $26,%ecx; jnc 1f /* XSAVE */
  push %ecx; xor %ecx,%ecx; xor %edx,%edx; mov $3,%eax; xsetbv; pop %ecx
  bt $28,%ecx; jnc 1f /* AVX */
  movl $100,0x3008 /* so often a #UD may follow: an emulator does not tell KVM of XSETBV, and an exit takes it back */
avx:
  xor %ecx,%ecx; xor %edx,%edx; mov $7,%eax; xsetbv
  vpcmpeqb %xmm4,%xmm4,%xmm4; vinsertf128 $1,%xmm4,%ymm4,%ymm4
  movl $0,0x3008
1:
  movl $0x1f00,0x3000; ldmxcsr 0x3000
  fninit; fld1
  pcmpeqb %xmm3,%xmm3
  mov $0x1234,%eax; mov %eax,%cr2
  mov $0x1234,%eax; mov %eax,%dr0; mov $0xf0400,%eax; mov %eax,%dr7 /* enables nothing */
  mov $table,%esi
2:
  mov (%esi),%ecx; mov 4(%esi),%eax; mov 8(%esi),%edx; add $12,%esi
  jecxz 3f
  wrmsr
  jmp 2b
3:
  mov $0xff,%al; out %al,$0x21 /* PIC */
  mov $0x34,%al; out %al,$0x43; mov $0x10,%al; out %al,$0x40; out %al,$0x40 /* PIT */
  movl $0x18,0xfec00000; movl $0x131,0xfec00010 /* IOAPIC pin 4 */
  movl $0x1ff,0xfee000f0 /* SVR */
  movl $0x20030,0xfee00320 /* LVTT periodic */
  movl $0x1000000,0xfee00380 /* initial count */
  movl $0x0b,0xfee003e0
  mov $1,%al; out %al,$0xf1
4: cli; hlt; jmp 4b
gate:
  mov %ax,(%edi); movw $0x10,2(%edi); movw $0x8e00,4(%edi); shr $16,%eax; mov %ax,6(%edi); ret
gp: /* wrmsr has two bytes; without iret, which emulators of ring 0 lack */
  add $4,%esp; pop %eax; add $4,%esp; popfl; add $2,%eax; jmp *%eax
ud:
  add $12,%esp; decl 0x3008; jns avx
  mov $66,%al; out %al,$0xf4; hlt
idt:
  .word 8*32-1; .long 0x4000
.align 4
table:
  .long 0x2ff,0,0,  0x200,6,0, 0x201,0x800,0xff, 0x277,0x01010101,0x01010101, 0x250,0x06060606,0x06060606
  .long 0x268,0x05050505,0x05050505
  .long 0x400,0xffffffff,0xffffffff
  .long 0xc0000080,0x1001,0 /* EFER: SCE, SVME */
  .long 0xc0000081,0,0x230010, 0xc0000082,0x1234,0, 0xc0000084,0x700,0, 0xc0000102,0x1234,0, 0xc0000103,7,0
  .long 0xc0000100,0x111,0, 0xc0000101,0x222,0
  .long 0xc0010117,0x5000,0
  .long 0x174,0x33,0, 0x175,0x44,0, 0x176,0x55,0
  .long 0x4b564d00,0x6000,0, 0x4b564d01,0x6041,0, 0x4b564d03,0x7001,0, 0x4b564d04,0x6081,0
  .long 0x3b,0x1000,0
  .long 0,0,0
