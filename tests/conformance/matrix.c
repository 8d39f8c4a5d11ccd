/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A second opinion: the same questions as the conformance suite, by another
 * program in another language.  Raw system calls, nothing of the project.
 *
 *	matrix memfd | gmem FLAGS | dir PATH
 *
 * prints "row<TAB>outcome".  Every row gets a fresh file of 16 pages (all
 * allocated, or all holes) and a process of its own.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <linux/openat2.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096L
#define SIZE (16 * PAGE)
#define LIMIT (LONG_MAX - PAGE + 1)	/* 2^63 - 4096 */
#define KEEP 1
#define PUNCH 3
#define ZERO 16

enum start { HOLES, FILLED };

static const char *kind, *place;
static int vm = -1;
static unsigned long gmem_flags;
static char path[4096];
static char data[PAGE];

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static const char *name_of(int code)
{
	const char *name = strerrorname_np(code);

	return !name ? "?" : !strcmp(name, "ENOTSUP") ? "EOPNOTSUPP" : name;
}

static int fresh(enum start start)
{
	int fd;

	if (!strcmp(kind, "gmem")) {
		struct { unsigned long size, flags, reserved[6]; } ask = { SIZE, gmem_flags, { 0 } };

		fd = ioctl(vm, 0xC040AED4UL, &ask);
	} else if (!strcmp(kind, "memfd")) {
		fd = syscall(SYS_memfd_create, "matrix", 2);	/* MFD_ALLOW_SEALING */
	} else {
		snprintf(path, sizeof(path), "%s/matrix-%d", place, getpid());
		fd = open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
	}
	if (fd < 0)
		die("fresh file");
	if (strcmp(kind, "gmem") && syscall(SYS_ftruncate, fd, SIZE))
		die("ftruncate");
	if (start == FILLED && syscall(SYS_fallocate, fd, KEEP, 0L, SIZE))
		die("fallocate");
	return fd;
}

static void finish(const char *name, pid_t child, int fd)
{
	int status;

	if (child < 0 || waitpid(child, &status, 0) != child)
		die(name);
	if (WIFSIGNALED(status))
		printf("%s\t%s\n", name, WTERMSIG(status) == SIGALRM ? "hangs" : "a signal");
	close(fd);
	if (!strcmp(kind, "dir"))
		unlink(path);
}

/* A changed size is part of the outcome. */
static void say(const char *name, long result, int fd)
{
	int code = errno;
	struct stat st;

	if (fstat(fd, &st))
		die("fstat");
	if (result == -1)
		printf("%s\t%s", name, name_of(code));
	else
		printf("%s\t%ld", name, result);
	if (result <= 0 && st.st_size != SIZE)
		printf(" size=%ld", st.st_size);
	putchar('\n');
}

/* EXPR is evaluated in the child; the file is `fd` there. */
#define R(name, start, expr) do {			\
	int fd = fresh(start);				\
	pid_t child;					\
							\
	fflush(stdout);					\
	child = fork();					\
	if (!child) {					\
		alarm(5);				\
		errno = 0;				\
		say(name, (expr), fd);			\
		fflush(stdout);				\
		_exit(0);				\
	}						\
	finish(name, child, fd);			\
} while (0)

/* The same for mmap: an address is not worth showing. */
#define M(name, prot, flags, length, offset)					\
	R("mmap." name, FILLED, syscall(SYS_mmap, 0L, (long)(length), (long)(prot),	\
		(long)(flags), (long)fd, (long)(offset)) == -1 ? -1 : 77777)

static long allocate(int fd, long mode, long offset, long length)
{
	return syscall(SYS_fallocate, fd, mode, offset, length);
}

#define F(name, mode, offset, length)						\
	R("fallocate." name, HOLES, allocate(fd, mode, offset, length))

#define RANGES(kind, mode)						\
	F(kind ".page", mode, PAGE, PAGE);				\
	F(kind ".whole", mode, 0, SIZE);				\
	F(kind ".unaligned-offset", mode, PAGE + 1, PAGE);		\
	F(kind ".unaligned-length", mode, PAGE, 100);			\
	F(kind ".unaligned-both", mode, 1, 1);				\
	F(kind ".last-page", mode, SIZE - PAGE, PAGE);			\
	F(kind ".across-eof", mode, SIZE - PAGE, 2 * PAGE);		\
	F(kind ".at-eof", mode, SIZE, PAGE);				\
	F(kind ".beyond-eof", mode, SIZE + 4 * PAGE, PAGE);		\
	F(kind ".end-overflows", mode, LIMIT, 2 * PAGE);		\
	F(kind ".empty", mode, PAGE, 0);				\
	F(kind ".negative-length", mode, PAGE, -PAGE);			\
	F(kind ".negative-offset", mode, -PAGE, PAGE)

#define REFUSED(kind, mode)						\
	F(kind ".page", mode, PAGE, PAGE);				\
	F(kind ".unaligned-both", mode, 1, 1);				\
	F(kind ".empty", mode, PAGE, 0)

static int a_pipe(int end, int full)
{
	int ends[2];

	if (pipe(ends))
		die("pipe");
	if (full && write(ends[1], data, PAGE) != PAGE)
		die("write");
	return ends[end];
}

static int another(void)
{
	int fd = memfd_create("another", 0);

	if (fd < 0 || ftruncate(fd, SIZE))
		die("memfd_create");
	return fd;
}

static struct iovec vector = { data, sizeof(data) };

static void memory(void)
{
	RANGES("allocate", 0);
	RANGES("keep", KEEP);
	RANGES("punch", PUNCH);
	RANGES("zero", ZERO);
	RANGES("zero-keep", ZERO | KEEP);
	F("punch.to-the-limit", PUNCH, 0, LIMIT);
	F("punch.terabyte", PUNCH, 0, 1L << 40);
	REFUSED("punch-without-keep", 2);
	REFUSED("no-hide-stale", 4);
	REFUSED("collapse", 8);
	REFUSED("insert", 32);
	REFUSED("unshare", 64);
	REFUSED("unshare-keep", 65);
	REFUSED("punch-zero", 19);
	REFUSED("unknown-bit", 0x100);
	R("ftruncate.same", HOLES, syscall(SYS_ftruncate, fd, SIZE));
	R("ftruncate.up", HOLES, syscall(SYS_ftruncate, fd, 2 * SIZE));
	R("ftruncate.down", HOLES, syscall(SYS_ftruncate, fd, PAGE));
	R("ftruncate.zero", HOLES, syscall(SYS_ftruncate, fd, 0L));
	R("ftruncate.unaligned-up", HOLES, syscall(SYS_ftruncate, fd, SIZE + 1));
	R("ftruncate.negative", HOLES, syscall(SYS_ftruncate, fd, -PAGE));
	R("ftruncate.limit", HOLES, syscall(SYS_ftruncate, fd, LONG_MAX));
	R("lseek.set", FILLED, syscall(SYS_lseek, fd, PAGE, SEEK_SET));
	R("lseek.current", FILLED, syscall(SYS_lseek, fd, 0L, SEEK_CUR));
	R("lseek.end", FILLED, syscall(SYS_lseek, fd, 0L, SEEK_END));
	R("lseek.data", FILLED, syscall(SYS_lseek, fd, PAGE, SEEK_DATA));
	R("lseek.hole", FILLED, syscall(SYS_lseek, fd, 0L, SEEK_HOLE));
	R("lseek.data-at-eof", FILLED, syscall(SYS_lseek, fd, SIZE, SEEK_DATA));
}

static void bytes(void)
{
	long at = 0;

	R("read", FILLED, syscall(SYS_read, fd, data, PAGE));
	R("read.zero-bytes", FILLED, syscall(SYS_read, fd, data, 0L));
	R("write", FILLED, syscall(SYS_write, fd, data, PAGE));
	R("write.zero-bytes", FILLED, syscall(SYS_write, fd, data, 0L));
	R("readv", FILLED, syscall(SYS_readv, fd, &vector, 1));
	R("writev", FILLED, syscall(SYS_writev, fd, &vector, 1));
	R("pread", FILLED, syscall(SYS_pread64, fd, data, PAGE, 0L));
	R("pread.past-eof", FILLED, syscall(SYS_pread64, fd, data, PAGE, 2 * SIZE));
	R("pread.negative", FILLED, syscall(SYS_pread64, fd, data, PAGE, -PAGE));
	R("pwrite", FILLED, syscall(SYS_pwrite64, fd, data, PAGE, 0L));
	R("preadv", FILLED, syscall(SYS_preadv, fd, &vector, 1, 0L, 0L));
	R("preadv2", FILLED, syscall(SYS_preadv2, fd, &vector, 1, 0L, 0L, 0));
	R("preadv2.position", FILLED, syscall(SYS_preadv2, fd, &vector, 1, -1L, -1L, 0));
	R("preadv2.nowait", FILLED, syscall(SYS_preadv2, fd, &vector, 1, 0L, 0L, RWF_NOWAIT));
	R("pwritev2.append", FILLED, syscall(SYS_pwritev2, fd, &vector, 1, 0L, 0L, RWF_APPEND));
	R("splice.from", FILLED, syscall(SYS_splice, fd, NULL, a_pipe(1, 0), NULL, PAGE, 0));
	R("splice.to", FILLED, syscall(SYS_splice, a_pipe(0, 1), NULL, fd, NULL, PAGE, 0));
	R("sendfile.from", FILLED, syscall(SYS_sendfile, a_pipe(1, 0), fd, NULL, PAGE));
	R("sendfile.from-offset", FILLED, syscall(SYS_sendfile, a_pipe(1, 0), fd, &at, PAGE));
	R("sendfile.to", FILLED, syscall(SYS_sendfile, fd, another(), NULL, PAGE));
	R("copy_file_range.from", FILLED,
	  syscall(SYS_copy_file_range, fd, &at, another(), NULL, PAGE, 0));
	R("copy_file_range.to", FILLED,
	  syscall(SYS_copy_file_range, another(), NULL, fd, &at, PAGE, 0));
	R("readahead", FILLED, syscall(SYS_readahead, fd, 0L, PAGE));
	R("fadvise.dontneed", FILLED, syscall(SYS_fadvise64, fd, 0L, PAGE, POSIX_FADV_DONTNEED));
	R("fadvise.unknown", FILLED, syscall(SYS_fadvise64, fd, 0L, PAGE, 99));
	R("sync_file_range", FILLED, syscall(SYS_sync_file_range, fd, 0L, PAGE, 7));
}

static void maps(void)
{
	M("shared.none", PROT_NONE, MAP_SHARED, SIZE, 0);
	M("shared.r", PROT_READ, MAP_SHARED, SIZE, 0);
	M("shared.rw", PROT_READ | PROT_WRITE, MAP_SHARED, SIZE, 0);
	M("shared.rx", PROT_READ | PROT_EXEC, MAP_SHARED, SIZE, 0);
	M("private.r", PROT_READ, MAP_PRIVATE, SIZE, 0);
	M("private.rw", PROT_READ | PROT_WRITE, MAP_PRIVATE, SIZE, 0);
	M("private.x", PROT_EXEC, MAP_PRIVATE, SIZE, 0);
	M("validate.rw", PROT_READ | PROT_WRITE, MAP_SHARED_VALIDATE, SIZE, 0);
	M("shared.populate", PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, SIZE, 0);
	M("sync", PROT_READ, MAP_SHARED_VALIDATE | MAP_SYNC, SIZE, 0);
	M("no-kind", PROT_READ, 0, SIZE, 0);
	M("length-zero", PROT_READ, MAP_SHARED, 0, 0);
	M("offset-unaligned", PROT_READ, MAP_SHARED, PAGE, 100);
	M("offset-at-eof", PROT_READ, MAP_SHARED, PAGE, SIZE);
	M("longer-than-file", PROT_READ, MAP_SHARED, 4 * SIZE, 0);
}

static int again(int fd, int flags)
{
	char name[64];

	snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
	return open(name, flags);
}

static void rest(void)
{
	struct epoll_event event = { .events = EPOLLIN };
	struct flock lock = { .l_type = F_WRLCK, .l_len = PAGE };
	struct timespec now[2] = { { 0, UTIME_NOW }, { 0, UTIME_NOW } };
	int value = 1;

	R("fsync", FILLED, syscall(SYS_fsync, fd));
	R("fdatasync", FILLED, syscall(SYS_fdatasync, fd));
	R("syncfs", FILLED, syscall(SYS_syncfs, fd));
	R("fchmod", FILLED, syscall(SYS_fchmod, fd, 0644));
	R("fchown.nobody", FILLED, syscall(SYS_fchown, fd, -1, -1));
	R("futimens.now", FILLED, syscall(SYS_utimensat, fd, NULL, now, 0));
	R("futimens.null", FILLED, syscall(SYS_utimensat, fd, NULL, NULL, 0));
	R("fsetxattr.security", FILLED, syscall(SYS_fsetxattr, fd, "security.x", "v", 1L, 0));
	R("fsetxattr.no-name", FILLED, syscall(SYS_fsetxattr, fd, "", "v", 1L, 0));
	R("flistxattr", FILLED, syscall(SYS_flistxattr, fd, data, PAGE));
	R("F_ADD_SEALS.write", FILLED, syscall(SYS_fcntl, fd, F_ADD_SEALS, F_SEAL_WRITE));
	R("F_SETLK.write", FILLED, syscall(SYS_fcntl, fd, F_SETLK, &lock));
	R("F_SETLEASE.read", FILLED, syscall(SYS_fcntl, fd, F_SETLEASE, F_RDLCK));
	R("F_SETLEASE.write", FILLED, syscall(SYS_fcntl, fd, F_SETLEASE, F_WRLCK));
	R("F_SETFL.direct", FILLED, syscall(SYS_fcntl, fd, F_SETFL, O_RDWR | O_DIRECT));
	R("F_SETFL.append", FILLED, syscall(SYS_fcntl, fd, F_SETFL, O_RDWR | O_APPEND));
	R("flock.exclusive", FILLED, syscall(SYS_flock, fd, LOCK_EX | LOCK_NB));
	R("epoll", FILLED, syscall(SYS_epoll_ctl, epoll_create1(0), EPOLL_CTL_ADD, fd, &event));
	R("ioctl.FIONBIO", FILLED, syscall(SYS_ioctl, fd, FIONBIO, &value) ? -1 : value);
	R("ioctl.FIGETBSZ", FILLED, syscall(SYS_ioctl, fd, FIGETBSZ, &value) ? -1 : value);
	R("ioctl.FIONREAD", FILLED, syscall(SYS_ioctl, fd, FIONREAD, &value) ? -1 : value);
	R("ioctl.FS_IOC_GETFLAGS", FILLED, syscall(SYS_ioctl, fd, FS_IOC_GETFLAGS, data));
	R("ioctl.TCGETS", FILLED, syscall(SYS_ioctl, fd, TCGETS, data));
	R("ioctl.FICLONE.from", FILLED, syscall(SYS_ioctl, another(), FICLONE, fd));
	R("ioctl.FICLONE.to", FILLED, syscall(SYS_ioctl, fd, FICLONE, another()));
	R("reopen.directory", FILLED, again(fd, O_DIRECTORY));
	R("reopen.nofollow", FILLED, again(fd, O_NOFOLLOW));
	R("reopened.rdonly-punch", FILLED, (value = again(fd, O_RDONLY)) < 0 ? -1 :
	  allocate(value, PUNCH, 0, PAGE));
	R("reopened.path-punch", FILLED, allocate(again(fd, O_PATH), PUNCH, 0, PAGE));
	R("fchdir", FILLED, syscall(SYS_fchdir, fd));
	R("execveat", FILLED, syscall(SYS_execveat, fd, "", (char *[]){ NULL },
				      (char *[]){ NULL }, AT_EMPTY_PATH));
}

static const char *magic(int fd)
{
	static char name[64];

	snprintf(name, sizeof(name), "/proc/self/fd/%d", fd);
	return name;
}

static long resolved(int fd, unsigned long how)
{
	struct open_how ask = { .flags = O_PATH, .resolve = how };

	return syscall(SYS_openat2, AT_FDCWD, magic(fd), &ask, sizeof(ask)) < 0 ? -1 : 0;
}

static long at_socket(int fd, int connects)
{
	struct sockaddr_un name = { .sun_family = AF_UNIX };
	int end = socket(AF_UNIX, SOCK_STREAM, 0);

	strcpy(name.sun_path, magic(fd));
	return syscall(connects ? SYS_connect : SYS_bind, end, &name, sizeof(name));
}

static long beside(int fd)
{
	char name[sizeof(path) + 8];
	long result;
	int code;

	snprintf(name, sizeof(name), "%s-link", *path ? path : "/dev/shm/matrix");
	result = syscall(SYS_linkat, fd, "", AT_FDCWD, name, AT_EMPTY_PATH);
	code = errno;
	unlink(name);
	errno = code;
	return result;
}

static long handle(int fd, int opens)
{
	struct { struct file_handle head; char room[128]; } known = { .head.handle_bytes = 128 };
	int mount;

	if (syscall(SYS_name_to_handle_at, fd, "", &known, &mount,
		    AT_EMPTY_PATH | (opens ? 0 : 0x200 /* AT_HANDLE_FID */)))
		return -1;
	return !opens ? 0 : syscall(SYS_open_by_handle_at, fd, &known, O_RDWR) < 0 ? -1 : 0;
}

static long landlocked(int fd)
{
	unsigned long rights = 1;
	int rules = syscall(444, &rights, sizeof(rights), 0);
	struct { unsigned long rights; int fd; } __attribute__((packed)) rule = { 1, 0 };

	rule.fd = again(fd, O_PATH);
	return syscall(445, rules, 1, &rule, 0);
}

static long watched(int fd, int punches)
{
	int watcher = syscall(300, 2 /* FAN_NONBLOCK */, O_RDONLY);

	if (watcher < 0 || syscall(301, watcher, 1, 2L /* FAN_MODIFY */, AT_FDCWD, magic(fd)))
		return -1;
	return punches ? allocate(fd, PUNCH, 0, PAGE) : 0;
}

static long locked(int fd, int type, long start, long length)
{
	struct flock lock = { .l_type = type, .l_start = start, .l_len = length };

	return syscall(SYS_fcntl, fd, F_SETLK, &lock);
}

static long hinted(int fd, unsigned long hint)
{
	return syscall(SYS_fcntl, fd, 1036 /* F_SET_RW_HINT */, &hint);
}

static long statted(int fd, int flags, unsigned int mask)
{
	struct statx found;

	return syscall(SYS_statx, fd, "", AT_EMPTY_PATH | flags, mask, &found);
}

#define FLAGGED(name, flag)								\
	R("preadv2.position-" name, FILLED, syscall(SYS_preadv2, fd, &vector, 1, -1L, -1L, flag)); \
	R("pwritev2.position-" name, FILLED, syscall(SYS_pwritev2, fd, &vector, 1, -1L, -1L, flag)); \
	R("pwritev2." name, FILLED, syscall(SYS_pwritev2, fd, &vector, 1, 0L, 0L, flag))

static void places(void)
{
	long at = 0, past = 2 * SIZE, before = -1;
	char value[256];

	R("openat2.no-xdev", FILLED, resolved(fd, RESOLVE_NO_XDEV));
	R("openat2.no-magiclinks", FILLED, resolved(fd, RESOLVE_NO_MAGICLINKS));
	R("openat2.no-symlinks", FILLED, resolved(fd, RESOLVE_NO_SYMLINKS));
	R("openat2.beneath", FILLED, resolved(fd, RESOLVE_BENEATH));
	R("openat2.in-root", FILLED, resolved(fd, RESOLVE_IN_ROOT));
	R("openat2.no-restriction", FILLED, resolved(fd, 0));
	R("unlink.magic-link", FILLED, syscall(SYS_unlink, magic(fd)));
	R("bind.magic-link", FILLED, at_socket(fd, 0));
	R("connect.magic-link", FILLED, at_socket(fd, 1));
	R("truncate.path-same", FILLED, syscall(SYS_truncate, magic(again(fd, O_PATH)), SIZE));
	R("fchownat.path", FILLED, syscall(SYS_fchownat, again(fd, O_PATH), "", geteuid(), getegid(),
					   AT_EMPTY_PATH));
	R("linkat.beside", FILLED, beside(fd));
	R("open_tree", FILLED, syscall(428, fd, "", AT_EMPTY_PATH) < 0 ? -1 : 0);
	R("open_tree.clone", FILLED, syscall(428, fd, "", AT_EMPTY_PATH | 1) < 0 ? -1 : 0);
	R("landlock.rule", FILLED, landlocked(fd));
	R("name_to_handle_at.fid", FILLED, handle(fd, 0));
	R("open_by_handle_at", FILLED, handle(fd, 1));
	R("fanotify.mark", FILLED, watched(fd, 0));
	FLAGGED("nowait", 0x8);
	FLAGGED("noappend", 0x20);
	FLAGGED("atomic", 0x40);
	FLAGGED("dontcache", 0x80);
	R("sendfile.from-zero-bytes", FILLED, syscall(SYS_sendfile, another(), fd, NULL, 0L));
	R("sendfile.from-negative", FILLED, syscall(SYS_sendfile, a_pipe(1, 0), fd, &before, PAGE));
	R("vmsplice.to", FILLED, syscall(SYS_vmsplice, fd, &vector, 1, 0));
	R("tee.to", FILLED, syscall(SYS_tee, a_pipe(0, 1), fd, PAGE, 0));
	R("copy_file_range.self-past-eof", FILLED,
	  syscall(SYS_copy_file_range, fd, &past, fd, &at, PAGE, 0));
	R("copy_file_range.self-negative", FILLED,
	  syscall(SYS_copy_file_range, fd, &before, fd, &at, PAGE, 0));
	R("F_SETLK.negative", FILLED, locked(fd, F_WRLCK, -1, 1));
	R("F_SETLK.overflow", FILLED, locked(fd, F_WRLCK, LONG_MAX, 2));
	R("F_SETLK.unknown", FILLED, locked(fd, 77, 0, PAGE));
	R("F_SET_RW_HINT.extreme", FILLED, hinted(fd, 5));
	R("F_SET_RW_HINT.unknown", FILLED, hinted(fd, 6));
	R("F_CREATED_QUERY", FILLED, syscall(SYS_fcntl, fd, 1028, 0));
	R("F_DUPFD_QUERY", FILLED, syscall(SYS_fcntl, fd, 1027, dup(fd)));
	R("F_SETPIPE_SZ", FILLED, syscall(SYS_fcntl, fd, F_SETPIPE_SZ, PAGE));
	R("statx.both-syncs", FILLED, statted(fd, AT_STATX_FORCE_SYNC | AT_STATX_DONT_SYNC, 0x7ff));
	R("statx.reserved", FILLED, statted(fd, 0, 1u << 31));
	R("ioctl.FIOQSIZE", FILLED, syscall(SYS_ioctl, fd, FIOQSIZE, value));
	R("ioctl.NS_GET_NSTYPE", FILLED, syscall(SYS_ioctl, fd, 0xb703, 0));
	R("ioctl.BLKGETSIZE64", FILLED, syscall(SYS_ioctl, fd, BLKGETSIZE64, value));
	R("sync_file_range.past-eof", FILLED, syscall(SYS_sync_file_range, fd, 2 * SIZE, PAGE, 2));
	R("sync_file_range.overflow", FILLED, syscall(SYS_sync_file_range, fd, LONG_MAX, 2L, 2));
}

int main(int argc, char **argv)
{
	if (argc < 2)
		return 2;
	kind = argv[1];
	place = argc > 2 ? argv[2] : "";
	if (!strcmp(kind, "gmem")) {
		gmem_flags = strtoul(place, NULL, 0);
		vm = ioctl(open("/dev/kvm", O_RDWR | O_CLOEXEC), 0xAE01, 0L);
		if (vm < 0)
			die("/dev/kvm");
	} else if (strcmp(kind, "memfd") && strcmp(kind, "dir")) {
		return 2;
	}
	memory();
	bytes();
	maps();
	rest();
	places();
	return 0;
}
