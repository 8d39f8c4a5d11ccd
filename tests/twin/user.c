// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A user of private files, written from docs/protocol.md alone: it shares no code and no language
 * with the users in Python, so that what both get right is in the text.
 *
 *   user FILE MODE LABEL SLOT
 *
 * registers FILE and prints "ready INODE PAGES WRITABLE".  It maps what it is granted, writes a
 * value of its own into word SLOT of each page that it touches, and knows what it must read
 * there: the last value, or that or 0 after an invalidation.  MODE says what it does with those:
 *
 *   good       unmaps, then acknowledges         slow=MS   the same, MS milliseconds later
 *   hung       nothing any more                  liar      acknowledges without unmapping
 *   early      acknowledges, then unmaps         close     closes its socket and lives on
 *   crash      dies of SIGSEGV                   noring    ignores invalidations when it installs
 *   reader     good, with a read-only file
 *
 * "fenced-" before a MODE puts what it maps behind a userfaultfd, and hands that over; "movable-"
 * before it leaves the owner to move the file's memory, which may change no byte of it.
 *
 * Commands are lines on stdin, each answered by a line:
 *
 *   touch P, read P     value P WAS             write and read, or only read, word SLOT
 *   words P             words P COUNT           words of the page that are not 0
 *   map P START END     granted START END       GET with a window; what is mapped now
 *   again P             extent START END        have the descriptor of the extent sent again
 *   work SEED FIRST END working                 touch random pages for ever, in a thread
 *   rest                resting                 until here
 *   stats               stats NAME COUNT ...
 *   pages               pages START END ...     runs of pages that are mapped now
 *   alloc S E, punch S E          reply ERRNO   through the owner, in a thread
 *   call S E            calling, called ERRNO   fallocate(2) on the mount, in a thread
 *   fork                child PID               a child that keeps the socket and nothing else
 *   starve, feed        starving, fed           no descriptor is free until `feed`
 *   drop                dropped                 close the socket and live on
 *   leave               left                    in order; ends the process
 *
 * "error P ERRNO" answers what the owner refuses.  "zap START END REASON" is printed by modes
 * that do not do as they should, at the first invalidation of a page that they map.  Exit status 3: the owner is gone.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { PAGE_SIZE = 4096, MAX_RECORDS = 1024, MAX_FDS = 8, WINDOW = 16 };
enum { PAGES = 1 << 20 };	/* of a file that can be mapped: 4 GiB */
enum { RING = 256, EXTENTS = 256, REQUESTS = 64, SPARE_FDS = 4096 };

enum op {
	HELLO = 1, WELCOME, REGISTER, REGISTERED, UNREGISTER, GET, PAGE, INVALIDATE, ACK, ALLOCATE,
	PUNCH, REPLY, EXTENT, BYE,
};
enum { FLAG_FD = 1, FLAG_WRITE = 2, FLAG_EXTENT = 4 };
/* What a file is for, as the other users of privfs say it: no access by user space, no migration,
 * no reclaim. */
enum { ALL_PURPOSES = 7, UNMOVABLE = 2 };
enum { FENCE_UFFD = 2 };
enum { REASON_PUNCH = 1, REASON_TRUNCATE, REASON_MOVE, REASON_REVOKE };

struct record {
	uint8_t op, flags;
	uint16_t status;
	uint32_t req;
	uint64_t obj, start, end, seq;
};
_Static_assert(sizeof(struct record) == 40, "a record is 40 bytes");

struct extent {
	uint64_t instance, start, end;
	int fd;
};

struct invalidation {
	uint64_t seq, start, end;
};

struct request {
	bool busy, answered;
	struct record answer;
};

static enum { GOOD, HUNG, LIAR, EARLY, CLOSE, CRASH, NORING, READER } mode;
static long slow_ms;
static int sock, slot, file_fd;
static int uffd = -1;	/* the fence, if there is one */
static uint64_t purpose = ALL_PURPOSES;
static const char *path;
static bool writable;
static uint64_t inode;

/*
 * `table` is to this process what mmu_lock is to KVM: those who touch pages hold it for reading, a
 * change of what is mapped holds it for writing.  So having it for writing means that no access is
 * under way.
 */
static pthread_rwlock_t table;
static char *base;	/* page p of the file is seen at base + p * PAGE_SIZE */
static uint8_t mapped[PAGES];
static struct extent extents[EXTENTS];
static struct invalidation ring[RING];
static uint64_t ring_count, floor_seq;

/* What was last written to a page, under `values`. */
static pthread_mutex_t values = PTHREAD_MUTEX_INITIALIZER;
static uint64_t expected[PAGES];
static uint8_t known[PAGES];	/* UNKNOWN: another one's; MAYBE: invalidated since */
enum { UNKNOWN, CERTAIN, MAYBE };
static uint64_t counter;
static struct {
	uint64_t touches, faults, retries, refused, zaps, zeroes, stale, lost;
} counts;

static pthread_mutex_t requests_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t requests_changed = PTHREAD_COND_INITIALIZER;
static struct request requests[REQUESTS];

static volatile bool working, leaving;
static volatile bool silent;	/* the lane has ended, and we live on: nothing is answered any more */
static pthread_t worker;
static bool worker_started;
static struct { unsigned int seed; uint64_t first, end; } job;
static int spare[SPARE_FDS], spares;

static void say(const char *format, ...)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	va_list arguments;

	va_start(arguments, format);
	pthread_mutex_lock(&lock);
	vprintf(format, arguments);
	putchar('\n');
	fflush(stdout);
	pthread_mutex_unlock(&lock);
	va_end(arguments);
}

static void die(const char *what)
{
	say("died: %s: %s", what, strerror(errno));
	_exit(1);
}

static void owner_gone(void)
{
	/* No invalidation can come any more, and none is needed: whoever stays mapped reaches
	 * memory that nobody hands out again. */
	if (leaving)
		return;
	say("eof");
	_exit(3);
}

/* ---- records ---- */

static void transmit(const struct record *records, size_t count, int fd)
{
	union { struct cmsghdr header; char room[CMSG_SPACE(sizeof(int))]; } control;
	struct iovec data = { (void *)records, count * sizeof(*records) };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1 };

	if (fd >= 0) {
		message.msg_control = control.room;
		message.msg_controllen = sizeof(control.room);
		struct cmsghdr *header = CMSG_FIRSTHDR(&message);
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(header), &fd, sizeof(fd));
	}
	while (sendmsg(sock, &message, MSG_NOSIGNAL) < 0) {
		if (errno == EINTR)
			continue;
		if (silent)
			return;
		if (errno == EPIPE || errno == ECONNRESET)
			return owner_gone();	/* returns when we are leaving */
		die("sendmsg");
	}
}

static struct record ask(struct record record, int fd)
{
	uint32_t i = 0;

	pthread_mutex_lock(&requests_lock);
	while (requests[i].busy)
		if (++i == REQUESTS)
			die("more requests than there are threads");
	requests[i] = (struct request){ .busy = true };
	pthread_mutex_unlock(&requests_lock);

	record.req = i + 1;
	transmit(&record, 1, fd);

	pthread_mutex_lock(&requests_lock);
	while (!requests[i].answered && !silent)
		pthread_cond_wait(&requests_changed, &requests_lock);
	struct record answer = requests[i].answer;
	if (!requests[i].answered)
		answer.status = ENOTCONN;
	requests[i].busy = false;
	pthread_mutex_unlock(&requests_lock);
	return answer;
}

static void answered(const struct record *record)
{
	if (record->req < 1 || record->req > REQUESTS || !requests[record->req - 1].busy)
		die("an answer to nothing");
	pthread_mutex_lock(&requests_lock);
	requests[record->req - 1].answer = *record;
	requests[record->req - 1].answered = true;
	pthread_cond_broadcast(&requests_changed);
	pthread_mutex_unlock(&requests_lock);
}

/* ---- the table; all of these with `table` held for writing ---- */

static struct extent *extent_of(uint64_t instance)
{
	for (int i = 0; i < EXTENTS; i++)
		if (extents[i].instance == instance && extents[i].end)
			return &extents[i];
	return NULL;
}

static void unmap(uint64_t start, uint64_t end)
{
	void *done;

	if (start >= PAGES)
		return;
	if (end > PAGES)
		end = PAGES;
	done = mmap(base + start * PAGE_SIZE, (end - start) * PAGE_SIZE, PROT_NONE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
	if (done == MAP_FAILED)
		die("unmap");
	memset(mapped + start, 0, end - start);
}

static void note(const struct record *record)
{
	struct invalidation *entry = &ring[ring_count % RING];

	if (ring_count >= RING)
		floor_seq = entry->seq;
	*entry = (struct invalidation){ record->seq, record->start, record->end };
	ring_count++;
	if (record->status == REASON_MOVE)
		return;	/* what moves keeps its contents */
	for (uint64_t page = record->start; page < record->end && page < PAGES; page++)
		if (known[page] == CERTAIN)
			known[page] = MAYBE;
}

static void zap(const struct record *record)
{
	pthread_rwlock_wrlock(&table);
	note(record);
	if (mode != LIAR) {
		unmap(record->start, record->end);
		if (record->flags & FLAG_EXTENT || record->status == REASON_TRUNCATE ||
		    record->status == REASON_REVOKE)
			for (int i = 0; i < EXTENTS; i++)
				if (extents[i].end && extents[i].start >= record->start &&
				    extents[i].end <= record->end) {
					close(extents[i].fd);
					extents[i].end = 0;
				}
	}
	counts.zaps++;
	pthread_rwlock_unlock(&table);
}

static bool invalidated_since(uint64_t seq, uint64_t page)
{
	if (mode == NORING)
		return false;
	if (seq < floor_seq)
		return true;
	uint64_t first = ring_count > RING ? ring_count - RING : 0;
	for (uint64_t i = first; i < ring_count; i++) {
		struct invalidation *entry = &ring[i % RING];
		if (entry->seq > seq && entry->start <= page && page < entry->end)
			return true;
	}
	return false;
}

static void open_fence(void)
{
	struct uffdio_api api = { .api = UFFD_API,
		.features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM };

	uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
		die("userfaultfd");
}

/* Put a fresh mapping of a page behind the fence, and the page into the mapping. */
static int let_in(void *at)
{
	struct uffdio_register all = { .range = { (uintptr_t)at, PAGE_SIZE },
		.mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR };
	struct uffdio_continue page = { .range = all.range };

	if (uffd < 0 || !writable)
		return 0;
	if (ioctl(uffd, UFFDIO_REGISTER, &all))
		die("UFFDIO_REGISTER");
	return ioctl(uffd, UFFDIO_CONTINUE, &page) ? errno : 0;
}

static int install(const struct record *grant, uint64_t page)
{
	struct extent *extent = extent_of(grant->obj);
	int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;

	if (!extent || invalidated_since(grant->seq, page))
		return extent ? EAGAIN : EBADF;
	for (uint64_t p = grant->start; p < grant->end && p < PAGES; p++) {
		if (mapped[p] || invalidated_since(grant->seq, p))
			continue;
		void *at = base + p * PAGE_SIZE;
		if (mmap(at, PAGE_SIZE, protection, MAP_SHARED | MAP_FIXED, extent->fd,
			 (p - extent->start) * PAGE_SIZE) == MAP_FAILED)
			die("map");
		if (madvise(at, PAGE_SIZE, MADV_DONTFORK))
			die("MADV_DONTFORK");
		int failed = let_in(at);
		if (failed && failed != EFAULT)
			die("UFFDIO_CONTINUE");
		if (failed)	/* punched meanwhile */
			unmap(p, p + 1);
		else
			mapped[p] = 1;
	}
	return mapped[page] ? 0 : EAGAIN;
}

/* ---- the lane: the thread that receives; it makes no system call on the mount ---- */

/* Answer no more, but go on touching what is mapped. */
static void fall_silent(bool close)
{
	pthread_mutex_lock(&requests_lock);
	silent = true;
	pthread_cond_broadcast(&requests_changed);
	pthread_mutex_unlock(&requests_lock);
	if (close)
		shutdown(sock, SHUT_RDWR);
}

static bool any_mapped(const struct record *record)
{
	for (uint64_t page = record->start; page < record->end && page < PAGES; page++)
		if (mapped[page])
			return true;
	return false;
}

static void misbehave(const struct record *record)
{
	static bool said;

	if (!any_mapped(record))
		return;
	if (!said && mode != GOOD && mode != READER)
		say("zap %llu %llu %u", (unsigned long long)record->start,
		    (unsigned long long)record->end, record->status);
	said = true;
	switch (mode) {
	case HUNG:
	case CLOSE:
		fall_silent(mode == CLOSE);
		for (;;)
			pause();
	case CRASH:
		signal(SIGSEGV, SIG_DFL);
		raise(SIGSEGV);
	default:
		break;
	}
}

static void receive_extent(const struct record *record, int fd)
{
	int free = -1;

	if (fd < 0)
		return;	/* cut off: no descriptor was free; GET with EXTENT asks again */
	pthread_rwlock_wrlock(&table);
	for (int i = 0; i < EXTENTS; i++) {
		if (extents[i].end && extents[i].instance == record->seq) {
			close(extents[i].fd);
			free = i;
			break;
		}
		if (!extents[i].end)
			free = i;
	}
	if (free < 0)
		die("too many extents");
	extents[free] = (struct extent){ record->seq, record->start, record->end, fd };
	pthread_rwlock_unlock(&table);
}

static void acknowledge(const struct record *acks, size_t count)
{
	if (count)
		transmit(acks, count, -1);
}

static void *lane(void *unused)
{
	static struct record records[MAX_RECORDS], acks[MAX_RECORDS];
	union { struct cmsghdr header; char room[CMSG_SPACE(MAX_FDS * sizeof(int))]; } control;

	for (;;) {
		struct iovec data = { records, sizeof(records) };
		struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1,
			.msg_control = control.room, .msg_controllen = sizeof(control.room) };
		int fds[MAX_FDS], fd_count = 0, fd_next = 0;
		size_t ack_count = 0;
		ssize_t length = recvmsg(sock, &message, MSG_CMSG_CLOEXEC);

		if (length < 0 && errno == EINTR)
			continue;
		if (silent)
			for (;;)
				pause();
		if (length <= 0 && leaving)
			return NULL;
		if (length <= 0)
			owner_gone();
		for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header;
		     header = CMSG_NXTHDR(&message, header))
			if (header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS) {
				fd_count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
				memcpy(fds, CMSG_DATA(header), fd_count * sizeof(int));
			}
		if (length % sizeof(struct record))
			die("a frame that is not made of records");
		for (size_t i = 0; i < length / sizeof(struct record); i++) {
			const struct record *record = &records[i];
			int fd = -1;

			if (record->flags & FLAG_FD && fd_next < fd_count)
				fd = fds[fd_next++];
			switch (record->op) {
			case EXTENT:
				receive_extent(record, fd);
				break;
			case INVALIDATE:
				misbehave(record);
				acks[ack_count++] = (struct record){ .op = ACK, .seq = record->seq };
				if (slow_ms)
					usleep(slow_ms * 1000);
				if (mode == EARLY) {
					acknowledge(acks, ack_count);
					ack_count = 0;
					usleep(20000);
				}
				zap(record);
				break;
			case REGISTERED:
				if (!record->status) {
					pthread_rwlock_wrlock(&table);
					floor_seq = record->seq;
					ring_count = 0;
					pthread_rwlock_unlock(&table);
				}
				answered(record);
				break;
			case WELCOME:
			case PAGE:
			case REPLY:
				answered(record);
				break;
			case BYE:
				owner_gone();
				return NULL;
			default:
				die("a record that is not for a user");
			}
		}
		acknowledge(acks, ack_count);
	}
	return unused;
}

/* ---- pages ---- */

/* Have a page mapped; returns with `table` held for reading, or an errno and not held. */
static int fault(uint64_t page, uint64_t start, uint64_t end, bool store)
{
	int flags = 0;

	if (page >= PAGES)
		return EFBIG;
	for (;;) {
		pthread_rwlock_rdlock(&table);
		if (mapped[page] && (writable || !store))
			return 0;
		pthread_rwlock_unlock(&table);
		counts.faults++;
		struct record grant = ask((struct record){
			.op = GET, .flags = flags | (store ? FLAG_WRITE : 0), .obj = inode,
			.start = start, .end = end, .seq = page }, -1);
		if (grant.status) {
			counts.refused++;
			return grant.status;
		}
		if (mode == NORING)
			usleep(1000);	/* what it does not look for is rare otherwise */
		pthread_rwlock_wrlock(&table);
		int failed = install(&grant, page);
		pthread_rwlock_unlock(&table);
		counts.retries += failed != 0;
		flags = failed == EBADF ? FLAG_EXTENT : 0;
		if (failed == EBADF && spares)
			return EMFILE;
	}
}

static uint64_t window(uint64_t page)
{
	return page / WINDOW * WINDOW;
}

/* Read the word of a page, judge it, and if `store` write the next value. */
static int access_page(uint64_t page, bool store, uint64_t *was)
{
	int failed = fault(page, window(page), window(page) + WINDOW, store);

	if (failed)
		return failed;
	pthread_mutex_lock(&values);
	volatile uint64_t *word = (volatile uint64_t *)(base + page * PAGE_SIZE) + slot;
	*was = *word;
	if (known[page] == CERTAIN && *was != expected[page])
		*was ? counts.stale++ : counts.lost++;
	if (known[page] == MAYBE && *was && *was != expected[page])
		counts.stale++;
	counts.zeroes += known[page] == MAYBE && !*was;
	counts.touches++;
	if (store) {
		expected[page] = *was = (uint64_t)getpid() << 40 | ++counter;
		*word = expected[page];
		known[page] = CERTAIN;
	} else {
		expected[page] = *was;
		known[page] = CERTAIN;
	}
	pthread_mutex_unlock(&values);
	pthread_rwlock_unlock(&table);
	return 0;
}

static void *work(void *unused)
{
	const struct timespec moment = { 0, 200000 };

	while (working) {
		uint64_t was, page = job.first + rand_r(&job.seed) % (job.end - job.first);
		access_page(page, true, &was);
		nanosleep(&moment, NULL);
	}
	return unused;
}

/* ---- commands ---- */

static void *call(void *range)
{
	uint64_t *pages = range;
	int fd = open(path, O_RDWR | O_CLOEXEC);
	int failed = fd < 0 ? errno : 0;

	if (!failed && fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, pages[0] * PAGE_SIZE,
				 (pages[1] - pages[0]) * PAGE_SIZE))
		failed = errno;
	if (fd >= 0)
		close(fd);
	say("called %d", failed);
	free(pages);
	return NULL;
}

static void *ask_aside(void *record)
{
	say("reply %u", ask(*(struct record *)record, -1).status);
	free(record);
	return NULL;
}

static void rest(void)
{
	working = false;
	if (worker_started)
		pthread_join(worker, NULL);
	worker_started = false;
}

static void stop_work_and_leave(void)
{
	rest();
	pthread_rwlock_wrlock(&table);
	unmap(0, PAGES);
	for (int i = 0; i < EXTENTS; i++)
		if (extents[i].end) {
			close(extents[i].fd);
			extents[i].end = 0;
		}
	pthread_rwlock_unlock(&table);
	struct record reply = ask((struct record){ .op = UNREGISTER, .obj = inode }, -1);
	leaving = true;
	transmit(&(struct record){ .op = BYE }, 1, -1);
	say("left %u", reply.status);
	exit(reply.status != 0);
}

static void starve(void)
{
	struct rlimit limit = { 256, 256 };
	int fd;

	setrlimit(RLIMIT_NOFILE, &limit);
	while (spares < SPARE_FDS && (fd = fcntl(0, F_DUPFD_CLOEXEC, 3)) >= 0)
		spare[spares++] = fd;
	say("starving");
}

static void fork_child(void)
{
	pid_t child = fork();

	if (child < 0)
		die("fork");
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, 0);
		close(0);
		close(1);
		close(2);
		for (;;)
			pause();
	}
	say("child %d", child);
}

static void answer(uint64_t page, int failed, uint64_t was)
{
	if (failed)
		say("error %llu %d", (unsigned long long)page, failed);
	else
		say("value %llu %llu", (unsigned long long)page, (unsigned long long)was);
}

static void show_words(uint64_t page)
{
	int failed = fault(page, page, page + 1, false), count = 0;

	if (failed)
		return answer(page, failed, 0);
	for (int i = 0; i < PAGE_SIZE / 8; i++)
		count += ((volatile uint64_t *)(base + page * PAGE_SIZE))[i] != 0;
	pthread_rwlock_unlock(&table);
	say("words %llu %d", (unsigned long long)page, count);
}

static void show_granted(uint64_t page, uint64_t start, uint64_t end)
{
	int failed = fault(page, start, end, false);

	if (failed)
		return answer(page, failed, 0);
	for (start = page; start && mapped[start - 1];)
		start--;
	for (end = page; end < PAGES && mapped[end];)
		end++;
	pthread_rwlock_unlock(&table);
	say("granted %llu %llu", (unsigned long long)start, (unsigned long long)end);
}

static void ask_again(uint64_t page)
{
	struct record grant = ask((struct record){ .op = GET, .flags = FLAG_EXTENT, .obj = inode,
						   .start = page, .end = page + 1, .seq = page }, -1);
	pthread_rwlock_rdlock(&table);
	struct extent *extent = grant.status ? NULL : extent_of(grant.obj);
	if (extent)
		say("extent %llu %llu", (unsigned long long)extent->start,
		    (unsigned long long)extent->end);
	else
		answer(page, grant.status ? grant.status : EBADF, 0);
	pthread_rwlock_unlock(&table);
}

static void show_mapped(void)
{
	char text[1 << 16] = "pages";
	size_t length = strlen(text);

	pthread_rwlock_rdlock(&table);
	for (uint64_t page = 0, start = 0; page <= PAGES; page++) {
		bool here = page < PAGES && mapped[page], before = page && mapped[page - 1];

		if (here && !before)
			start = page;
		else if (!here && before && length < sizeof(text) - 64)
			length += sprintf(text + length, " %llu %llu", (unsigned long long)start,
					  (unsigned long long)page);
	}
	pthread_rwlock_unlock(&table);
	say("%s", text);
}

static void obey(char *line)
{
	char word[16] = "";
	unsigned long long a = 0, b = 0, c = 0;
	uint64_t was = 0;

	sscanf(line, "%15s %llu %llu %llu", word, &a, &b, &c);
	if (!strcmp(word, "touch") || !strcmp(word, "read")) {
		int failed = access_page(a, word[0] == 't', &was);
		answer(a, failed, was);
	} else if (!strcmp(word, "words")) {
		show_words(a);
	} else if (!strcmp(word, "map")) {
		show_granted(a, b, c);
	} else if (!strcmp(word, "again")) {
		ask_again(a);
	} else if (!strcmp(word, "work") && !worker_started) {
		job.seed = a;
		job.first = b;
		job.end = c;
		working = worker_started = true;
		pthread_create(&worker, NULL, work, NULL);
		say("working");
	} else if (!strcmp(word, "rest")) {
		rest();
		say("resting");
	} else if (!strcmp(word, "pages")) {
		show_mapped();
	} else if (!strcmp(word, "stats")) {
		say("stats touches %llu faults %llu retries %llu refused %llu zaps %llu zeroes %llu "
		    "stale %llu lost %llu", (unsigned long long)counts.touches,
		    (unsigned long long)counts.faults, (unsigned long long)counts.retries,
		    (unsigned long long)counts.refused, (unsigned long long)counts.zaps,
		    (unsigned long long)counts.zeroes, (unsigned long long)counts.stale,
		    (unsigned long long)counts.lost);
	} else if (!strcmp(word, "alloc") || !strcmp(word, "punch")) {
		pthread_t thread;
		struct record *record = malloc(sizeof(*record));
		*record = (struct record){ .op = word[0] == 'a' ? ALLOCATE : PUNCH,
			.obj = inode, .start = a, .end = b };
		pthread_create(&thread, NULL, ask_aside, record);
		pthread_detach(thread);
	} else if (!strcmp(word, "call")) {
		pthread_t thread;
		uint64_t *range = malloc(2 * sizeof(*range));
		range[0] = a;
		range[1] = b;
		pthread_create(&thread, NULL, call, range);
		pthread_detach(thread);
		say("calling");
	} else if (!strcmp(word, "fork")) {
		fork_child();
	} else if (!strcmp(word, "starve")) {
		starve();
	} else if (!strcmp(word, "feed")) {
		while (spares)
			close(spare[--spares]);
		say("fed");
	} else if (!strcmp(word, "drop")) {
		fall_silent(true);
		say("dropped");
	} else if (!strcmp(word, "leave")) {
		stop_work_and_leave();
	} else {
		say("what? %s", word);
	}
}

/* ---- the beginning ---- */

static void find_mode(const char *name)
{
	static const char *const names[] = { "good", "hung", "liar", "early", "close", "crash",
					     "noring", "reader" };

	if (!strncmp(name, "movable-", 8)) {
		purpose &= ~UNMOVABLE;
		name += 8;
	}
	if (!strncmp(name, "fenced-", 7)) {
		open_fence();
		name += 7;
	}
	if (sscanf(name, "slow=%ld", &slow_ms) == 1)
		return;
	for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++)
		if (!strcmp(name, names[i])) {
			mode = i;
			return;
		}
	fprintf(stderr, "no mode %s\n", name);
	exit(2);
}

/* The socket lies at the root of the mount that holds the file: try the file's ancestors. */
static void connect_to_owner(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	char *directory = realpath(path, NULL), *slash;

	if (!directory)
		die(path);
	sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (sock < 0)
		die("socket");
	while ((slash = strrchr(directory, '/'))) {
		*slash = 0;
		int parent = open(*directory ? directory : "/", O_PATH | O_DIRECTORY | O_CLOEXEC);
		if (parent < 0)
			die(directory);
		/* sun_path is too short for some places */
		snprintf(address.sun_path, sizeof(address.sun_path),
			 "/proc/self/fd/%d/.privfs/socket", parent);
		int failed = connect(sock, (struct sockaddr *)&address, sizeof(address));
		close(parent);
		if (!failed) {
			free(directory);
			return;
		}
	}
	die("no .privfs/socket above the file");
}

int main(int argc, char **argv)
{
	struct record hello = { .op = HELLO, .start = 1 }, answer;
	pthread_rwlockattr_t fair;
	pthread_t thread;
	char line[128], label[16] = "";

	if (argc != 5) {
		fprintf(stderr, "usage: user FILE MODE LABEL SLOT\n");
		return 2;
	}
	path = argv[1];
	find_mode(argv[2]);
	slot = atoi(argv[4]) % 512;
	signal(SIGPIPE, SIG_IGN);
	pthread_rwlockattr_init(&fair);
	pthread_rwlockattr_setkind_np(&fair, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&table, &fair);
	base = mmap(NULL, (size_t)PAGES * PAGE_SIZE, PROT_NONE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (base == MAP_FAILED)
		die("reserve");
	file_fd = open(path, (mode == READER ? O_RDONLY : O_RDWR) | O_CLOEXEC);
	if (file_fd < 0)
		die(path);
	connect_to_owner();
	pthread_create(&thread, NULL, lane, NULL);

	memcpy(label, argv[3], strnlen(argv[3], sizeof(label)));
	memcpy(&hello.obj, label, 8);
	memcpy(&hello.seq, label + 8, 8);
	if (uffd >= 0) {
		hello.status = FENCE_UFFD;
		hello.flags = FLAG_FD;
	}
	answer = ask(hello, uffd);
	if (answer.status) {
		errno = answer.status;
		die("HELLO");
	}
	answer = ask((struct record){ .op = REGISTER, .flags = FLAG_FD, .start = purpose }, file_fd);
	if (answer.status) {
		errno = answer.status;
		die("REGISTER");
	}
	inode = answer.obj;
	writable = answer.start;
	say("ready %llu %llu %d", (unsigned long long)inode, (unsigned long long)answer.end, writable);
	close(file_fd);
	while (fgets(line, sizeof(line), stdin))
		obey(line);
	return 0;
}
