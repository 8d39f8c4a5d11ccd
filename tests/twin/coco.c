// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A VMM for confidential guests that knows nothing of this project.
 *
 *   coco td     a TD is launched, accepts a page, stores and loads there, converts another
 *   coco snp    the same of an SNP guest, by PVALIDATE and VMGEXIT
 *
 * Structures and numbers are those of arch/x86/include/uapi/asm/kvm.h, written down here, since
 * headers that are installed are often older. Status 0: everything was as it should be.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096UL
#define RAM_SIZE (1UL << 20)
#define ROM 0xffff0000UL
#define ROM_SIZE 0x10000UL
#define TABLES 0x1000UL
#define TEXT 0x10000UL
#define STACK 0x20000UL
#define FRESH 0x80000UL
#define CONVERTED 0x40000UL
#define SIDE (1UL << 39)
#define PORT 0x80

#define SNP_VM 4
#define TDX_VM 5
#define MEM_GUEST_MEMFD (1u << 2)
#define ATTRIBUTE_PRIVATE (1UL << 3)
#define HC_MAP_GPA_RANGE 12
#define CAP_EXIT_HYPERCALL 201
#define CAP_VM_TYPES 235
#define EXIT_SYSTEM_EVENT 24

struct region2 {
	uint32_t slot, flags;
	uint64_t gpa, size, userspace_addr, gmem_offset;
	uint32_t gmem, pad1;
	uint64_t pad2[14];
};

struct attributes {
	uint64_t address, size, attributes, flags;
};

struct create_gmem {
	uint64_t size, flags, reserved[6];
};

struct tdx_cmd {
	uint32_t id, flags;
	uint64_t data, hw_error;
};

struct cpuid_entry {
	uint32_t function, index, flags, eax, ebx, ecx, edx, padding[3];
};

struct tdx_capabilities {
	uint64_t attrs, xfam, tdvmcallinfo[4], reserved[250];
	uint32_t nent, padding;
	struct cpuid_entry entries[8];
};

struct tdx_init_vm {
	uint64_t attributes, xfam, hashes[18], reserved[12];
	uint32_t nent, padding;
	struct cpuid_entry entries[1];
};

struct tdx_region {
	uint64_t source, gpa, npages;
};

struct sev_cmd {
	uint32_t id, pad;
	uint64_t data;
	uint32_t error, sev_fd;
};

struct sev_init {
	uint64_t vmsa_features;
	uint32_t flags;
	uint16_t ghcb_version, pad1;
	uint32_t pad2[8];
};

struct snp_start {
	uint64_t policy;
	uint8_t gosvw[16];
	uint16_t flags;
	uint8_t pad0[6];
	uint64_t pad1[4];
};

struct snp_update {
	uint64_t gfn, uaddr, len;
	uint8_t type, pad0;
	uint16_t flags;
	uint32_t pad1;
	uint64_t pad2[4];
};

struct snp_finish {
	uint64_t id_block, id_auth;
	uint8_t id_block_en, auth_key_en, vcek_disabled, host_data[32], pad0[3];
	uint16_t flags;
	uint64_t pad1[4];
};

#define SET_REGION2 _IOW(KVMIO, 0x49, struct region2)
#define SET_ATTRIBUTES _IOW(KVMIO, 0xd2, struct attributes)
#define CREATE_GMEM _IOWR(KVMIO, 0xd4, struct create_gmem)
#define ENCRYPT_OP _IOWR(KVMIO, 0xba, unsigned long)

#define CHECK(condition)                                                                  \
	do {                                                                              \
		if (!(condition)) {                                                       \
			fprintf(stderr, "%s:%d: %s (errno %s)\n", __FILE__, __LINE__,     \
				#condition, strerror(errno));                             \
			exit(1);                                                          \
		}                                                                         \
	} while (0)

static int kvm, vm, vcpu;
static struct kvm_run *run;

static void *pages(size_t size)
{
	void *made = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(made != MAP_FAILED);
	return made;
}

static void set_private(uint64_t gpa, uint64_t size, int private)
{
	struct attributes change = { gpa, size, private ? ATTRIBUTE_PRIVATE : 0, 0 };

	CHECK(ioctl(vm, SET_ATTRIBUTES, &change) == 0);
}

static char *add_slot(uint32_t slot, uint64_t gpa, uint64_t size)
{
	struct create_gmem create = { .size = size };
	struct region2 region = {
		.slot = slot, .flags = MEM_GUEST_MEMFD, .gpa = gpa, .size = size,
		.userspace_addr = (uintptr_t)pages(size),
	};
	int gmem = ioctl(vm, CREATE_GMEM, &create);

	CHECK(gmem >= 0);
	region.gmem = gmem;
	CHECK(ioctl(vm, SET_REGION2, &region) == 0);
	set_private(gpa, size, 1);
	return (char *)region.userspace_addr;
}

static void open_kvm(unsigned long type)
{
	struct kvm_enable_cap cap = { .cap = CAP_EXIT_HYPERCALL };

	cap.args[0] = 1 << HC_MAP_GPA_RANGE;
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	CHECK(kvm >= 0);
	CHECK(ioctl(kvm, KVM_CHECK_EXTENSION, CAP_VM_TYPES) & 1 << type);
	vm = ioctl(kvm, KVM_CREATE_VM, type);
	CHECK(vm >= 0);
	CHECK(ioctl(vm, KVM_ENABLE_CAP, &cap) == 0);
}

static void add_vcpu(void)
{
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	CHECK(vcpu >= 0);
	run = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED,
		   vcpu, 0);
	CHECK(run != MAP_FAILED);
}

/* PML4, PDPT and a directory each for the private and the shared view of the first GiB. */
static void fill_tables(uint64_t *to, uint64_t private, uint64_t shared)
{
	to[0] = (TABLES + PAGE) | private | 3;
	to[512] = (TABLES + 2 * PAGE) | private | 3;
	to[513] = (TABLES + 3 * PAGE) | private | 3;
	to[515] = 3UL << 30 | private | 0x83;
	for (uint64_t n = 0; n < 512; n++) {
		to[1024 + n] = n << 21 | private | 0x83;
		to[1536 + n] = n << 21 | shared | 0x83;
	}
}

/* --- code ------------------------------------------------------------------------------------ */

static unsigned char *at;

static void bytes(const char *code, size_t size)
{
	memcpy(at, code, size);
	at += size;
}

#define CODE(text) bytes(text, sizeof(text) - 1)

static void mov(const char opcode[2], uint64_t value)
{
	bytes(opcode, 2);
	memcpy(at, &value, 8);
	at += 8;
}

#define RAX "\x48\xb8"
#define RCX "\x48\xb9"
#define RDX "\x48\xba"
#define RBX "\x48\xbb"
#define R10 "\x49\xba"
#define R11 "\x49\xbb"
#define R12 "\x49\xbc"
#define R13 "\x49\xbd"
#define R14 "\x49\xbe"
#define R15 "\x49\xbf"

/* TDG.VP.VMCALL with R10 to R15. */
static void tdvmcall(uint64_t r11, uint64_t r12, uint64_t r13, uint64_t r14)
{
	mov(R10, 0);
	mov(R11, r11);
	mov(R12, r12);
	mov(R13, r13);
	mov(R14, r14);
	mov(RAX, 0);
	mov(RCX, 0xfc00);
	CODE("\x66\x0f\x01\xcc");
}

static void td_code(void)
{
	mov(RAX, 6); /* TDG.MEM.PAGE.ACCEPT */
	mov(RCX, FRESH);
	mov(RDX, 0);
	CODE("\x66\x0f\x01\xcc");
	mov(RBX, FRESH);
	mov(R15, 1234);
	CODE("\x4c\x89\x3b"); /* mov %r15,(%rbx) */
	mov(R15, 0);
	CODE("\x4c\x8b\x3b"); /* mov (%rbx),%r15 */
	tdvmcall(30, 4, 1, PORT); /* OUT */
	tdvmcall(0x10001, CONVERTED | SIDE, PAGE, 0); /* MapGPA */
	mov(RBX, (1UL << 30) + CONVERTED);
	CODE("\x4c\x8b\x3b");
	tdvmcall(30, 4, 1, PORT);
}

/* The last page below 4 GiB: from the reset vector to 64-bit mode. */
static void reset_code(unsigned char *page)
{
	static const uint64_t gdt[] = { 0, 0x00af9b000000ffff, 0x00cf93000000ffff };
	const uint32_t base = ROM + ROM_SIZE - PAGE, tables = TABLES, text = TEXT;
	const uint32_t cr4 = 0x660, cr0 = 0x80010033, gdtr = base + 0x100, table = base + 0x110;
	const int32_t back = -0xff5;

	at = page;
	CODE("\x0f\x01\x15"); /* lgdt */
	bytes((const char *)&gdtr, 4);
	CODE("\xb8"); /* mov $…,%eax */
	bytes((const char *)&tables, 4);
	CODE("\x0f\x22\xd8\xb8"); /* mov %eax,%cr3 */
	bytes((const char *)&cr4, 4);
	CODE("\x0f\x22\xe0\xb8");
	bytes((const char *)&cr0, 4);
	CODE("\x0f\x22\xc0\xea"); /* ljmp */
	bytes((const char *)&text, 4);
	CODE("\x08\x00");
	memcpy(page + 0x100, &(uint16_t){ sizeof(gdt) - 1 }, 2);
	memcpy(page + 0x102, &table, 4);
	memcpy(page + 0x110, gdt, sizeof(gdt));
	page[0xff0] = 0xe9;
	memcpy(page + 0xff1, &back, 4);
}

/* WRMSR of the GHCB MSR with what RAX and RDX hold, then VMGEXIT. */
static void vmgexit(void)
{
	mov(RCX, 0xc0010130);
	CODE("\x0f\x30\xf3\x0f\x01\xd9");
}

static void snp_code(void)
{
	uint64_t change = 2UL << 52 | CONVERTED | 0x14;

	mov(RAX, FRESH);
	mov(RCX, 0);
	mov(RDX, 1);
	CODE("\xf2\x0f\x01\xff"); /* PVALIDATE */
	mov(RBX, FRESH);
	mov(RAX, 0x3100);
	CODE("\x48\x89\x03\x31\xc0"); /* mov %rax,(%rbx); xor %eax,%eax */
	mov(RAX, change & 0xffffffff);
	mov(RDX, change >> 32);
	vmgexit();
	mov(RBX, (1UL << 30) + CONVERTED);
	CODE("\x48\x8b\x33"); /* mov (%rbx),%rsi */
	mov(RBX, FRESH);
	CODE("\x48\x8b\x03\x48\x01\xf0\x31\xd2"); /* mov (%rbx),%rax; add %rsi,%rax */
	vmgexit(); /* a request to be ended */
}

/* --- exits ----------------------------------------------------------------------------------- */

static void converts(char *ram)
{
	CHECK(ioctl(vcpu, KVM_RUN, 0) == 0);
	CHECK(run->exit_reason == KVM_EXIT_HYPERCALL);
	CHECK(run->hypercall.nr == HC_MAP_GPA_RANGE);
	CHECK(run->hypercall.args[0] == CONVERTED && run->hypercall.args[1] == 1);
	CHECK(!(run->hypercall.args[2] & 1 << 4));
	set_private(CONVERTED, PAGE, 0);
	*(uint64_t *)(ram + CONVERTED) = 0x4000;
	run->hypercall.ret = 0;
}

static void writes(uint32_t value)
{
	CHECK(ioctl(vcpu, KVM_RUN, 0) == 0);
	CHECK(run->exit_reason == KVM_EXIT_IO);
	CHECK(run->io.direction == KVM_EXIT_IO_OUT && run->io.port == PORT && run->io.size == 4);
	CHECK(*(uint32_t *)((char *)run + run->io.data_offset) == value);
}

static void nobody_sees(void)
{
	struct kvm_regs regs;

	CHECK(ioctl(vcpu, KVM_GET_REGS, &regs) == -1 && errno == EINVAL);
	CHECK(ioctl(vcpu, KVM_SET_REGS, &regs) == -1 && errno == EINVAL);
}

/* --- TDs ------------------------------------------------------------------------------------- */

static int tdx(int fd, uint32_t id, uint32_t flags, void *data)
{
	struct tdx_cmd cmd = { id, flags, (uintptr_t)data, 0 };

	return ioctl(fd, ENCRYPT_OP, &cmd);
}

static void load_td(uint64_t gpa, void *from, uint64_t npages)
{
	struct tdx_region region = { (uintptr_t)from, gpa, npages };

	while (region.npages)
		CHECK(tdx(vcpu, 3, 1, &region) == 0 || errno == EINTR || errno == EAGAIN);
	CHECK(region.gpa == gpa + npages * PAGE);
}

static void td(void)
{
	static struct tdx_capabilities caps = { .nent = 8 };
	struct tdx_init_vm init = { .xfam = 3, .nent = 1 };
	char *ram, *page = pages(4 * PAGE);
	uint32_t mask;

	open_kvm(TDX_VM);
	CHECK(tdx(vm, 0, 0, &caps) == 0);
	CHECK(caps.nent == 1 && caps.entries[0].function == 0x80000008);
	mask = caps.entries[0].eax;
	init.entries[0] = (struct cpuid_entry){ .function = 0x80000008, .eax = 40 << 16 & mask };
	CHECK(ioctl(vm, KVM_CREATE_VCPU, 0) == -1 && errno == EIO);
	CHECK(tdx(vm, 1, 0, &init) == 0);
	add_vcpu();
	CHECK(tdx(vcpu, 2, 0, NULL) == 0);
	ram = add_slot(0, 0, RAM_SIZE);
	add_slot(1, ROM, ROM_SIZE);
	fill_tables((uint64_t *)page, 0, SIDE);
	load_td(TABLES, page, 4);
	memset(page, 0, PAGE);
	at = (unsigned char *)page;
	td_code();
	load_td(TEXT, page, 1);
	memset(page, 0, PAGE);
	reset_code((unsigned char *)page);
	load_td(ROM + ROM_SIZE - PAGE, page, 1);
	CHECK(ioctl(vcpu, KVM_RUN, 0) == -1 && errno == EINVAL);
	CHECK(tdx(vm, 4, 0, NULL) == 0);
	nobody_sees();
	writes(1234);
	converts(ram);
	writes(0x4000);
}

/* --- SNP guests ------------------------------------------------------------------------------ */

static int sev(uint32_t id, void *data)
{
	struct sev_cmd cmd = { .id = id, .data = (uintptr_t)data };
	int done = ioctl(vm, ENCRYPT_OP, &cmd);

	CHECK(cmd.error == 0);
	return done;
}

static void load_snp(uint64_t gpa, void *from, uint64_t npages)
{
	struct snp_update update = {
		.gfn = gpa / PAGE, .uaddr = (uintptr_t)from, .len = npages * PAGE, .type = 1,
	};

	while (update.len)
		CHECK(sev(101, &update) == 0);
	CHECK(update.gfn == gpa / PAGE + npages && update.uaddr == (uintptr_t)from + npages * PAGE);
}

static void enter_long_mode(void)
{
	struct kvm_segment code = { 0, 0xffffffff, 0x08, 0xb, 1, 0, 0, 1, 1, 1, 0, 0, 0 };
	struct kvm_segment data = { 0, 0xffffffff, 0x10, 0x3, 1, 0, 0, 1, 0, 1, 0, 0, 0 };
	struct kvm_regs regs = { .rip = TEXT, .rsp = STACK, .rflags = 2 };
	struct kvm_sregs sregs;

	CHECK(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0);
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.ss = data;
	sregs.cr0 = 0x80010033;
	sregs.cr3 = TABLES | SIDE;
	sregs.cr4 = 0x620;
	sregs.efer = 0xd01;
	CHECK(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0);
	CHECK(ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
}

static void set_cpuid(void)
{
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[100];
	} cpuid = { .head.nent = 100 };

	CHECK(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid) == 0);
	CHECK(ioctl(vcpu, KVM_SET_CPUID2, &cpuid) == 0);
}

static void snp(void)
{
	struct sev_init init = { .ghcb_version = 2 };
	struct snp_start start = { .policy = 0x30000 };
	struct snp_finish finish = { .host_data = "host" };
	char *ram, *page = pages(4 * PAGE);
	struct kvm_enc_region region;

	open_kvm(SNP_VM);
	CHECK(ioctl(vm, ENCRYPT_OP, NULL) == 0);
	CHECK(sev(22, &init) == 0);
	CHECK(sev(22, &init) == -1 && errno == EPERM);
	CHECK(sev(100, &start) == 0);
	add_vcpu();
	set_cpuid();
	ram = add_slot(0, 0, RAM_SIZE);
	region = (struct kvm_enc_region){ (uintptr_t)ram, RAM_SIZE };
	CHECK(ioctl(vm, KVM_MEMORY_ENCRYPT_REG_REGION, &region) == 0);
	fill_tables((uint64_t *)page, SIDE, 0);
	load_snp(TABLES, page, 4);
	memset(page, 0, PAGE);
	at = (unsigned char *)page;
	snp_code();
	load_snp(TEXT, page, 1);
	enter_long_mode();
	CHECK(ioctl(vcpu, KVM_RUN, 0) == -1 && errno == EINVAL);
	CHECK(sev(102, &finish) == 0);
	nobody_sees();
	converts(ram);
	CHECK(ioctl(vcpu, KVM_RUN, 0) == 0);
	CHECK(run->exit_reason == EXIT_SYSTEM_EVENT);
	CHECK(run->system_event.type == 6);
	CHECK(*(uint64_t *)((char *)&run->system_event + 8) == 0x3100 + 0x4000);
	CHECK(ioctl(vm, KVM_MEMORY_ENCRYPT_UNREG_REGION, &region) == 0);
	CHECK(ioctl(vm, KVM_MEMORY_ENCRYPT_UNREG_REGION, &region) == -1 && errno == EINVAL);
}

int main(int argc, char **argv)
{
	if (argc == 2 && !strcmp(argv[1], "td"))
		td();
	else if (argc == 2 && !strcmp(argv[1], "snp"))
		snp();
	else
		return fprintf(stderr, "usage: coco td|snp\n"), 2;
	puts("ok");
	return 0;
}
