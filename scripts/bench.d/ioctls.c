// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What ioctls of KVM cost their caller, and system calls that have nothing to do with KVM.
 *
 *   ioctls CPU CALLS kvm      KVM_CHECK_EXTENSION, KVM_GET_REGS, KVM_RUN with immediate_exit
 *   ioctls CPU CALLS other    getppid(2), ioctl(2) FIONREAD of a pipe, pread(2) of 64 bytes
 *
 * It runs on CPU, wherever it was started, and prints one JSON object.  The other calls take
 * hardly longer than reading the clock: BATCH of them are a sample, divided.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <sched.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "measure.h"

#define BATCH 64

static int vm, vcpu, pipe_end, file;

static bool check_extension(void)
{
	return ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) > 0;
}

static bool get_regs(void)
{
	struct kvm_regs regs;

	return !ioctl(vcpu, KVM_GET_REGS, &regs);
}

static bool run(void)
{
	return ioctl(vcpu, KVM_RUN, 0) < 0 && errno == EINTR;
}

static bool parent(void)
{
	return syscall(SYS_getppid) > 0;
}

static bool fionread(void)
{
	int waiting = -1;

	return !ioctl(pipe_end, FIONREAD, &waiting) && !waiting;
}

static bool read_file(void)
{
	char bytes[64];

	return pread(file, bytes, sizeof(bytes), 0) == sizeof(bytes);
}

static void measure(const char *name, bool (*call)(void), size_t calls, unsigned batch)
{
	uint64_t *samples = new_samples(calls);

	for (size_t i = 0; i < calls; i++) {
		uint64_t start = now_ns();

		for (unsigned j = 0; j < batch; j++)
			if (!call())
				give_up(name);
		samples[i] = (now_ns() - start) / batch;
	}
	print_latency(name, samples, calls);
}

static void make_vcpu(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	struct kvm_run *shared;
	int size;

	if (kvm < 0)
		give_up("/dev/kvm");
	size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (size < 0 || vm < 0)
		give_up("KVM_CREATE_VM");
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	if (vcpu < 0)
		give_up("KVM_CREATE_VCPU");
	shared = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (shared == MAP_FAILED)
		give_up("kvm_run");
	shared->immediate_exit = 1;
}

static void make_files(void)
{
	int ends[2];

	file = memfd_create("ioctls", MFD_CLOEXEC);
	if (pipe2(ends, O_CLOEXEC) || file < 0 || ftruncate(file, 4096))
		give_up("files");
	pipe_end = ends[0];
}

static void stay_on(int cpu)
{
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	if (sched_setaffinity(0, sizeof(cpus), &cpus))
		give_up("sched_setaffinity");
}

int main(int argc, char **argv)
{
	size_t calls;

	if (argc != 4 || (strcmp(argv[3], "kvm") && strcmp(argv[3], "other"))) {
		fprintf(stderr, "usage: ioctls CPU CALLS kvm|other\n");
		return 2;
	}
	stay_on(atoi(argv[1]));
	calls = number(argv[2]);
	printf("{");
	if (!strcmp(argv[3], "kvm")) {
		make_vcpu();
		measure("check_extension", check_extension, calls, 1);
		printf(", ");
		measure("get_regs", get_regs, calls, 1);
		printf(", ");
		measure("run", run, calls, 1);
	} else {
		make_files();
		measure("getppid", parent, calls, BATCH);
		printf(", ");
		measure("fionread", fionread, calls, BATCH);
		printf(", ");
		measure("pread", read_file, calls, BATCH);
	}
	printf("}\n");
	return 0;
}
