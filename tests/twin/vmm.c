// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A small VMM that knows nothing of this project: it uses /dev/kvm as any other does.
 *
 *   vmm add          a guest adds two numbers of its RAM, prints them by port, halts
 *   vmm threads      four vCPUs, a thread each, count in shared RAM while the host looks on
 *   vmm alarm        a signal ends KVM_RUN of a guest that spins; it goes on afterwards
 *   vmm spin         a guest that spins for ever
 *   vmm fork         a child may not use the VM, and the parent's RAM stays its own
 *   vmm fault        bad pointers and bad descriptors
 *   vmm many         slots made and deleted over one mapping, contents kept
 *   vmm discard      a guest reads zeros where the host said MADV_DONTNEED
 *   vmm unmap        a guest meets EFAULT where the host unmapped memory under a slot
 *   vmm move         the same for mremap; a slot at the new place has the contents
 *   vmm anew         a guest sees private memory that the host mapped under a slot that was there
 *   vmm late         the same where the memory was the host's own shared memory before
 *   vmm protect      the same for mprotect, and all is well when it is undone
 *   vmm snapshot     a child has the RAM as it was when it was forked, and what it writes is its own
 *   vmm poor         a child that there is no memory for has no RAM
 *   vmm breeding     children without end, none of which writes to the RAM; ends when there are no more
 *   vmm helpers      children that share the RAM, or run other programs, and threads
 *   vmm full         no descriptor is left for a VM, or to share memory by: EMFILE, nothing lost
 *
 * RAM is private anonymous memory. Several can follow each other. Status 0: all was as it should be.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/sched.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define RAM_SIZE (4 << 20)
#define CODE 0x10000
#define DATA 0x20000
#define FAR 0x10000000
#define PORT 0x42
#define MAX_VCPUS 4

#define CHECK(condition)                                                          \
	do {                                                                      \
		if (!(condition)) {                                               \
			fprintf(stderr, "%s:%d: %s (errno %s)\n", __FILE__,       \
				__LINE__, #condition, strerror(errno));           \
			exit(1);                                                  \
		}                                                                 \
	} while (0)

static int kvm, vm, run_size, shared;
static char *ram;

struct vcpu {
	int fd;
	struct kvm_run *run;
	pthread_t thread;
};

static void add_ram(unsigned slot, uint64_t gpa, uint64_t size, void *where)
{
	struct kvm_userspace_memory_region region = {
		.slot = slot, .guest_phys_addr = gpa, .memory_size = size,
		.userspace_addr = (uintptr_t)where,
	};

	CHECK(!ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
}

static void *map(size_t size)
{
	int file = shared ? memfd_create("ram", 0) : -1;
	int flags = shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
	void *where;

	CHECK(!shared || !ftruncate(file, size));
	where = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, file, 0);
	CHECK(where != MAP_FAILED);
	return where;
}

static void make_vm(void)
{
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	CHECK(kvm >= 0);
	CHECK(ioctl(kvm, KVM_GET_API_VERSION, 0) == 12);
	run_size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	CHECK(run_size >= (int)sizeof(struct kvm_run));
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	CHECK(vm >= 0);
	ram = map(RAM_SIZE);
	/* Long mode: one page of each level, the first GiB in pages of 2 MiB. */
	*(uint64_t *)(ram + 0x1000) = 0x2003;
	*(uint64_t *)(ram + 0x2000) = 0x3003;
	for (uint64_t i = 0; i < 512; i++)
		*(uint64_t *)(ram + 0x3000 + i * 8) = i << 21 | 0x83;
}

static void load(const void *code, size_t size)
{
	memcpy(ram + CODE, code, size);
	add_ram(0, 0, RAM_SIZE, ram);
}

static struct vcpu make_vcpu(unsigned id)
{
	struct kvm_segment segment = { .limit = ~0u, .present = 1, .s = 1, .g = 1 };
	struct vcpu vcpu = { .fd = ioctl(vm, KVM_CREATE_VCPU, id) };
	struct kvm_regs regs = { .rip = CODE, .rflags = 2, .rsi = DATA + id * 64, .rsp = 0x8000 };
	struct kvm_sregs sregs;

	CHECK(vcpu.fd >= 0);
	vcpu.run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu.fd, 0);
	CHECK(vcpu.run != MAP_FAILED);
	CHECK(!ioctl(vcpu.fd, KVM_GET_SREGS, &sregs));
	sregs.cr3 = 0x1000;
	sregs.cr4 |= 1 << 5;
	sregs.cr0 |= 1u << 31 | 1;
	sregs.efer |= 1 << 8 | 1 << 10;
	segment.type = 11, segment.l = 1, segment.selector = 8;
	sregs.cs = segment;
	segment.type = 3, segment.l = 0, segment.db = 1, segment.selector = 16;
	sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = segment;
	CHECK(!ioctl(vcpu.fd, KVM_SET_SREGS, &sregs));
	CHECK(!ioctl(vcpu.fd, KVM_SET_REGS, &regs));
	return vcpu;
}

static void add(void)
{
	static const uint8_t code[] = {
		0x8b, 0x06,             /* mov eax, [rsi] */
		0x03, 0x46, 0x04,       /* add eax, [rsi+4] */
		0x89, 0x46, 0x08,       /* mov [rsi+8], eax */
		0xe6, PORT,             /* out PORT, al */
		0xf4,                   /* hlt */
	};
	struct vcpu vcpu;

	make_vm();
	load(code, sizeof(code));
	vcpu = make_vcpu(0);
	*(uint32_t *)(ram + DATA) = 40;
	*(uint32_t *)(ram + DATA + 4) = 2;
	CHECK(!ioctl(vcpu.fd, KVM_RUN, 0));
	CHECK(vcpu.run->exit_reason == KVM_EXIT_IO);
	CHECK(vcpu.run->io.port == PORT && vcpu.run->io.direction == KVM_EXIT_IO_OUT);
	CHECK(*((uint8_t *)vcpu.run + vcpu.run->io.data_offset) == 42);
	CHECK(*(uint32_t *)(ram + DATA + 8) == 42);
	CHECK(!ioctl(vcpu.fd, KVM_RUN, 0));
	CHECK(vcpu.run->exit_reason == KVM_EXIT_HLT);
}

static const uint8_t spinning[] = {
	0x48, 0xff, 0x06, /* 1: inc qword [rsi] */
	0xeb, 0xfb,       /* jmp 1b */
};

static volatile uint64_t *counter(unsigned id)
{
	return (volatile uint64_t *)(ram + DATA + id * 64);
}

static void nothing(int number)
{
	(void)number;
}

static void *run_thread(void *argument)
{
	struct vcpu *vcpu = argument;

	CHECK(ioctl(vcpu->fd, KVM_RUN, 0) == -1 && errno == EINTR);
	return NULL;
}

static void wait_for_count(unsigned id, uint64_t above)
{
	for (int i = 0; i < 20000 && *counter(id) <= above; i++)
		usleep(1000);
	CHECK(*counter(id) > above);
}

static void threads(void)
{
	struct vcpu vcpus[MAX_VCPUS];

	make_vm();
	load(spinning, sizeof(spinning));
	for (unsigned i = 0; i < MAX_VCPUS; i++)
		vcpus[i] = make_vcpu(i);
	for (unsigned i = 0; i < MAX_VCPUS; i++)
		CHECK(!pthread_create(&vcpus[i].thread, NULL, run_thread, &vcpus[i]));
	for (unsigned i = 0; i < MAX_VCPUS; i++)
		wait_for_count(i, 0);
	/* A slot more, while they run and the host writes to its memory. */
	add_ram(1, 1 << 30, 1 << 20, mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE,
					  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	for (unsigned i = 0; i < MAX_VCPUS; i++)
		wait_for_count(i, *counter(i));
	for (unsigned i = 0; i < MAX_VCPUS; i++)
		CHECK(!pthread_kill(vcpus[i].thread, SIGUSR1));
	for (unsigned i = 0; i < MAX_VCPUS; i++)
		CHECK(!pthread_join(vcpus[i].thread, NULL));
}

static void alarm_ends_it(void)
{
	struct itimerval soon = { .it_value = { .tv_usec = 100000 } };
	struct vcpu vcpu;
	uint64_t before;

	make_vm();
	load(spinning, sizeof(spinning));
	vcpu = make_vcpu(0);
	for (int i = 0; i < 3; i++) {
		before = *counter(0);
		CHECK(!setitimer(ITIMER_REAL, &soon, NULL));
		CHECK(ioctl(vcpu.fd, KVM_RUN, 0) == -1 && errno == EINTR);
		CHECK(vcpu.run->exit_reason == KVM_EXIT_INTR);
		CHECK(*counter(0) > before);
	}
	vcpu.run->immediate_exit = 1;
	CHECK(ioctl(vcpu.fd, KVM_RUN, 0) == -1 && errno == EINTR);
}

static void spin(void)
{
	struct vcpu vcpu;

	make_vm();
	load(spinning, sizeof(spinning));
	vcpu = make_vcpu(0);
	puts("spinning");
	fflush(stdout);
	ioctl(vcpu.fd, KVM_RUN, 0);
	CHECK(!"KVM_RUN came back");
}

static void forks(void)
{
	int status;
	pid_t child;

	make_vm();
	load(spinning, sizeof(spinning));
	make_vcpu(0);
	child = fork();
	CHECK(child >= 0);
	if (!child) {
		CHECK(ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == -1 && errno == EIO);
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child && !status);
	CHECK(ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1);
}

static void fault(void)
{
	int null = open("/dev/null", O_RDWR);

	make_vm();
	load(spinning, sizeof(spinning));
	CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, (void *)8) == -1 && errno == EFAULT);
	CHECK(ioctl(null, KVM_CREATE_VM, 0) == -1 && errno == ENOTTY);
	CHECK(ioctl(999, KVM_CREATE_VM, 0) == -1 && errno == EBADF);
	CHECK(ioctl(kvm, KVM_RUN, 0) == -1 && errno == EINVAL);
	CHECK(ioctl(vm, KVM_CREATE_VCPU, 1u << 20) == -1 && errno == EINVAL);
	CHECK(ioctl(vm, _IO(KVMIO, 0xfe), 0) == -1 && errno == ENOTTY);
	CHECK(dup(vm) >= 0);
}

static void many(void)
{
	struct kvm_userspace_memory_region gone = { .slot = 1 };

	make_vm();
	load(spinning, sizeof(spinning));
	for (int round = 0; round < 3; round++) {
		char *more = mmap(NULL, 64 << 20, PROT_READ | PROT_WRITE,
				  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		for (unsigned i = 0; i < 64; i++) {
			more[i << 20] = (char)(i + 1);
			add_ram(1 + i, (1ull << 30) + ((uint64_t)i << 20), 1 << 20, more + (i << 20));
		}
		for (unsigned i = 0; i < 64; i++)
			CHECK(more[i << 20] == (char)(i + 1));
		for (gone.slot = 1; gone.slot <= 64; gone.slot++)
			CHECK(!ioctl(vm, KVM_SET_USER_MEMORY_REGION, &gone));
		CHECK(!munmap(more, 64 << 20));
	}
}

static const uint8_t peeking[] = {
	0x8b, 0x06,  /* 1: mov eax, [rsi] */
	0xe6, PORT,  /* out PORT, al */
	0xeb, 0xfa,  /* jmp 1b */
};

/* What the guest finds at rsi, or -errno. */
static int peek(struct vcpu *vcpu)
{
	if (ioctl(vcpu->fd, KVM_RUN, 0))
		return -errno;
	CHECK(vcpu->run->exit_reason == KVM_EXIT_IO);
	return *((uint8_t *)vcpu->run + vcpu->run->io.data_offset);
}

/* A guest that peeks at the first byte of 1 MiB of its own slot, which is 5. */
static struct vcpu make_peeking(char **more)
{
	struct vcpu vcpu;
	struct kvm_regs regs;

	make_vm();
	load(peeking, sizeof(peeking));
	*more = map(1 << 20);
	**more = 5;
	add_ram(1, FAR, 1 << 20, *more);
	vcpu = make_vcpu(0);
	CHECK(!ioctl(vcpu.fd, KVM_GET_REGS, &regs));
	regs.rsi = FAR;
	CHECK(!ioctl(vcpu.fd, KVM_SET_REGS, &regs));
	CHECK(peek(&vcpu) == 5);
	return vcpu;
}

static void discard(void)
{
	char *more;
	struct vcpu vcpu = make_peeking(&more);

	more[4096] = 6;
	CHECK(!madvise(more, 4096, MADV_DONTNEED));
	CHECK(more[0] == 0 && more[4096] == 6);
	CHECK(peek(&vcpu) == 0);
	more[0] = 7;
	CHECK(peek(&vcpu) == 7);
	CHECK(madvise(more + 1, 4096, MADV_DONTNEED) == -1 && errno == EINVAL);
	CHECK(more[0] == 7);
}

static void unmap(void)
{
	char *more;
	struct vcpu vcpu = make_peeking(&more);

	CHECK(!munmap(more + 4096, 4096));
	CHECK(peek(&vcpu) == 5);
	CHECK(!munmap(more, 4096));
	CHECK(peek(&vcpu) == -EFAULT);
}

static void move(void)
{
	struct kvm_userspace_memory_region gone = { .slot = 1 };
	char *more, *there = map(1 << 20);
	struct vcpu vcpu = make_peeking(&more);

	CHECK(mremap(more, 1 << 20, 1 << 20, MREMAP_MAYMOVE | MREMAP_FIXED, there) == there);
	CHECK(there[0] == 5);
	CHECK(peek(&vcpu) == -EFAULT);
	CHECK(!ioctl(vm, KVM_SET_USER_MEMORY_REGION, &gone));
	add_ram(1, FAR, 1 << 20, there);
	CHECK(peek(&vcpu) == 5);
	there[0] = 8;
	CHECK(peek(&vcpu) == 8);
}

/* Private memory, zeros but for the first byte, at a place that is under a slot. */
static void map_at(char *where, size_t size, char first)
{
	CHECK(mmap(where, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
		   -1, 0) == where);
	*where = first;
}

static void *peek_in_thread(void *vcpu)
{
	return (void *)(intptr_t)peek(vcpu);
}

static void anew(void)
{
	char *more;
	struct vcpu vcpu = make_peeking(&more);
	struct vcpu other = make_vcpu(1);
	struct kvm_regs regs;
	pthread_t thread;
	void *found;

	map_at(more, 4096, 6);
	CHECK(peek(&vcpu) == 6);
	*more = 7;
	CHECK(peek(&vcpu) == 7);
	CHECK(!madvise(more, 4096, MADV_DONTNEED));
	CHECK(peek(&vcpu) == 0);
	/* Elsewhere in the slot, a page of its own, for another vCPU and a thread. */
	map_at(more + 8192, 1 << 19, 8);
	more[12288] = 9;
	CHECK(!ioctl(other.fd, KVM_GET_REGS, &regs));
	regs.rsi = FAR + 8192;
	CHECK(!ioctl(other.fd, KVM_SET_REGS, &regs));
	CHECK(!pthread_create(&thread, NULL, peek_in_thread, &other));
	CHECK(peek(&vcpu) == 0);
	CHECK(!pthread_join(thread, &found) && (intptr_t)found == 8);
	CHECK(more[8192] == 8 && more[12288] == 9);
	/* Nothing, and something again. */
	CHECK(!munmap(more, 1 << 20));
	CHECK(peek(&vcpu) == -EFAULT);
	map_at(more, 1 << 20, 10);
	CHECK(peek(&vcpu) == 10);
}

static void late(void)
{
	struct vcpu vcpu;
	char *more;
	int found = 5;

	shared = 1;
	vcpu = make_peeking(&more);
	shared = 0;
	map_at(more, 4096, 6);
	for (int i = 0; i < 2000 && found == 5; i++) {
		usleep(10000);
		found = peek(&vcpu);
	}
	CHECK(found == 6);
}

static void protect(void)
{
	char *more;
	struct vcpu vcpu = make_peeking(&more);
	int found = 5;

	CHECK(!mprotect(more, 4096, PROT_NONE));
	for (int i = 0; i < 2000 && found == 5; i++) {
		usleep(10000);
		found = peek(&vcpu);
	}
	CHECK(found == -EFAULT);
	CHECK(!mprotect(more, 4096, PROT_READ | PROT_WRITE));
	CHECK(peek(&vcpu) == 5);
}

/* The child's status, 0 if all it CHECKed was so. */
static int end_of(pid_t child)
{
	int status;

	CHECK(child > 0);
	CHECK(waitpid(child, &status, 0) == child);
	return status;
}

static int is_there(void *page)
{
	unsigned char there;

	return !mincore(page, 4096, &there);
}

static void look_at_the_past(char *more, int told)
{
	pid_t child;
	char byte;

	CHECK(read(told, &byte, 1) == 1);
	CHECK(more[0] == 5 && more[4096] == 1 && !more[8192]);
	more[0] = 9;
	child = fork();
	if (!child) {
		CHECK(more[0] == 9 && more[4096] == 1);
		more[4096] = 10;
		exit(0);
	}
	CHECK(!end_of(child));
	CHECK(more[4096] == 1);
	CHECK(!madvise(more, 8192, MADV_DONTNEED));
	CHECK(!more[0] && !more[4096]);
	CHECK(read(told, &byte, 1) == 1);
	CHECK(!more[0]);
}

static void snapshot(void)
{
	char *more, *kept;
	struct vcpu vcpu = make_peeking(&more);
	int tell[2];
	pid_t child;

	more[4096] = 1;
	CHECK(!pipe(tell));
	CHECK(!mprotect(more + (512 << 10), 4096, PROT_READ));
	for (unsigned with = 0; with < 2; with++) {
		*more = 5, more[8192] = 0;
		child = with ? (pid_t)syscall(SYS_clone3, &(struct clone_args){
				.exit_signal = SIGCHLD }, sizeof(struct clone_args)) : fork();
		CHECK(child >= 0);
		if (!child) {
			look_at_the_past(more, tell[0]);
			exit(0);
		}
		*more = 6, more[8192] = 7;
		CHECK(peek(&vcpu) == 6);
		CHECK(write(tell[1], "a", 1) == 1);
		CHECK(peek(&vcpu) == 6);
		CHECK(write(tell[1], "b", 1) == 1);
		CHECK(!end_of(child));
		CHECK(*more == 6 && more[4096] == 1 && more[8192] == 7);
		CHECK(peek(&vcpu) == 6);
	}
	kept = map(4096);
	CHECK(!madvise(kept, 4096, MADV_DONTFORK));
	add_ram(2, 2 * FAR, 4096, kept);
	CHECK(!madvise(more, 4096, MADV_DONTFORK));
	child = fork();
	if (!child) {
		CHECK(!is_there(more) && !is_there(kept));
		CHECK(more[4096] == 1);
		exit(0);
	}
	CHECK(!end_of(child));
	CHECK(peek(&vcpu) == 6);
}

static void breeding(void)
{
	char *more;
	pid_t child;
	int status = 0;

	make_peeking(&more);
	puts("breeding");
	fflush(stdout);
	while (!status) {
		child = fork();
		if (!child) {
			CHECK(*more == 5);
			*more = 6;
			_exit(0);
		}
		status = child < 0 ? errno : end_of(child);
		CHECK(*more == 5);
	}
	CHECK(status == ENOSYS || status == EAGAIN || status == SIGKILL);
	puts("kept");
}

static void poor(void)
{
	char *more;
	struct vcpu vcpu = make_peeking(&more);
	struct rlimit before, none;
	pid_t child;

	CHECK(!getrlimit(RLIMIT_DATA, &before));
	none = before;
	none.rlim_cur = 1 << 16;
	CHECK(!setrlimit(RLIMIT_DATA, &none));
	child = fork();
	if (!child) {
		CHECK(!is_there(more));
		_exit(0);
	}
	CHECK(!setrlimit(RLIMIT_DATA, &before));
	CHECK(!end_of(child));
	CHECK(peek(&vcpu) == 5);
}

static int write_seven(void *where)
{
	*(char *)where = 7;
	return 0;
}

static void *write_eight(void *where)
{
	*(char *)where = 8;
	return NULL;
}

static void helpers(void)
{
	char *more, said[8] = "", *stack = map(1 << 16);
	struct vcpu vcpu = make_peeking(&more);
	pthread_t thread;
	pid_t child;
	FILE *other;

	CHECK(!system("true"));
	other = popen("echo heard", "r");
	CHECK(other && fgets(said, sizeof(said), other) && !strcmp(said, "heard\n"));
	CHECK(!pclose(other));
	child = fork();
	if (!child) {
		execlp("true", "true", NULL);
		_exit(1);
	}
	CHECK(!end_of(child));
	child = vfork();
	if (!child) {
		execlp("true", "true", NULL);
		_exit(1);
	}
	CHECK(!end_of(child));
	CHECK(peek(&vcpu) == 5);
	CHECK(!end_of(clone(write_seven, stack + (1 << 16), CLONE_VM | SIGCHLD, more)));
	CHECK(peek(&vcpu) == 7);
	CHECK(!pthread_create(&thread, NULL, write_eight, more));
	CHECK(!pthread_join(thread, NULL));
	CHECK(peek(&vcpu) == 8);
}

static int open_files(void)
{
	DIR *folder = opendir("/proc/self/fd");
	int count = 0;

	CHECK(folder);
	while (readdir(folder))
		count++;
	closedir(folder);
	return count;
}

static void full(void)
{
	struct kvm_userspace_memory_region region = {
		.slot = 1, .guest_phys_addr = FAR, .memory_size = 1 << 20,
	};
	struct rlimit before, none;
	int open;
	char *more;

	make_vm();
	load(peeking, sizeof(peeking));
	open = open_files();
	more = map(1 << 20);
	more[0] = 5;
	region.userspace_addr = (uintptr_t)more;
	CHECK(!getrlimit(RLIMIT_NOFILE, &before));
	none = before;
	none.rlim_cur = 3;
	CHECK(!setrlimit(RLIMIT_NOFILE, &none));
	CHECK(ioctl(kvm, KVM_CREATE_VM, 0) == -1 && errno == EMFILE);
	CHECK(ioctl(vm, KVM_CREATE_VCPU, 0) == -1 && errno == EMFILE);
	CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == -1 && errno == EMFILE);
	CHECK(!setrlimit(RLIMIT_NOFILE, &before));
	CHECK(open_files() == open && more[0] == 5);
	CHECK(!ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
	CHECK(more[0] == 5);
	CHECK(close(ioctl(kvm, KVM_CREATE_VM, 0)) == 0);
	CHECK(close(ioctl(vm, KVM_CREATE_VCPU, 1)) == 0);
	CHECK(open_files() == open);
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} modes[] = {
		{ "add", add }, { "threads", threads }, { "alarm", alarm_ends_it }, { "spin", spin },
		{ "fork", forks }, { "fault", fault }, { "many", many },
		{ "discard", discard }, { "unmap", unmap }, { "move", move },
		{ "anew", anew }, { "late", late }, { "protect", protect },
		{ "snapshot", snapshot }, { "poor", poor },
		{ "breeding", breeding }, { "helpers", helpers },
		{ "full", full },
	};
	const size_t count = sizeof(modes) / sizeof(modes[0]);
	struct sigaction action = { .sa_handler = nothing };

	sigaction(SIGUSR1, &action, NULL);
	sigaction(SIGALRM, &action, NULL);
	for (int i = 1; i < argc; i++) {
		size_t mode = 0;

		while (mode < count && strcmp(argv[i], modes[mode].name))
			mode++;
		if (mode == count)
			return 2;
		modes[mode].run();
	}
	return argc < 2 ? 2 : 0;
}
