/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * privfs.fuse._lowlevel - what pyfuse3 cannot say to the kernel.
 *
 * This module stands between pyfuse3 and its libfuse. It defines five of
 * libfuse's functions under their own names and joins the global symbol scope
 * before pyfuse3 is loaded, so pyfuse3's references bind to the definitions
 * here; the real ones are found with dlsym() through pyfuse3's own object, so
 * it is always the libfuse that pyfuse3 was built against. No libfuse header
 * and no link to it: everything else is the kernel's ABI (linux/fuse.h), read
 * and written in the message itself:
 *
 *  - FALLOCATE and LSEEK are rewritten, in place, into SETXATTR and GETXATTR
 *    requests with an empty name, for which pyfuse3 has handlers and whose
 *    replies have the same shape (an errno; 8 bytes = struct fuse_lseek_out).
 *  - real xattr requests never come so far: they are answered here, so the
 *    empty name cannot be mistaken (the kernel refuses it with ERANGE anyway).
 *  - INTERRUPT finds the request that it means and cancels its scopes.
 *  - the INIT reply gets FUSE_PASSTHROUGH, OPEN and CREATE replies get
 *    FOPEN_PASSTHROUGH and a backing id (fs/fuse/passthrough.c, Linux 6.9).
 *  - /dev/fuse is read without blocking: a request that is withdrawn between
 *    epoll and read must not stop the process, which holds the GIL there.
 *  - libfuse looks at no length: a message is followed by zeros, so that one
 *    which is cut short names nothing and means 0, and counts are bounded.
 *
 * All of it runs under the GIL, on the thread of pyfuse3's main loop. pyfuse3
 * has one session per process, hence the one static state.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <linux/mqueue.h>
#include <poll.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

/* Newer than some installed linux/fuse.h; the values are ABI. */
#define INIT_EXT (1u << 30)		/* FUSE_INIT_EXT: flags2 is valid */
#define INIT2_PASSTHROUGH (1u << 5)	/* FUSE_PASSTHROUGH >> 32 */
#define OPEN_DIRECT_IO (1u << 0)
#define OPEN_NONSEEKABLE (1u << 2)
#define OPEN_STREAM (1u << 4)
#define OPEN_NOFLUSH (1u << 5)
#define OPEN_PASSTHROUGH (1u << 7)

struct init_in {
	uint32_t major, minor, max_readahead, flags, flags2, unused[11];
};

struct init_out {
	uint32_t major, minor, max_readahead, flags;
	uint16_t max_background, congestion_threshold;
	uint32_t max_write, time_gran;
	uint16_t max_pages, map_alignment;
	uint32_t flags2, max_stack_depth, unused[6];
};

struct open_out {
	uint64_t fh;
	uint32_t open_flags;
	int32_t backing_id;
};

struct create_out {
	struct fuse_entry_out entry;
	struct open_out open;
};

struct backing_map {			/* struct fuse_backing_map */
	int32_t fd;
	uint32_t flags;
	uint64_t padding;
};

#define DEV_IOC_BACKING_OPEN _IOW(229, 1, struct backing_map)
#define DEV_IOC_BACKING_CLOSE _IOW(229, 2, uint32_t)

_Static_assert(sizeof(struct init_out) == 64, "struct fuse_init_out is 64 bytes");
_Static_assert(sizeof(struct open_out) == 16, "struct fuse_open_out is 16 bytes");
_Static_assert(sizeof(struct backing_map) == 16, "struct fuse_backing_map is 16 bytes");

/* The part of libfuse's ABI that its 3.x releases share. */
struct fuse_session;
struct fuse_file_info;
typedef struct fuse_req *fuse_req_t;

struct fuse_buf {
	size_t size;
	int flags;
	void *mem;
	int fd;
	off_t pos;
	char newer_members[64];		/* room for what later releases append */
};

struct fuse_entry_param {
	uint64_t ino, generation;
	struct stat attr;
	double attr_timeout, entry_timeout;
};

static struct {
	int (*session_fd)(struct fuse_session *);
	void (*session_exit)(struct fuse_session *);
	int (*receive_buf)(struct fuse_session *, struct fuse_buf *);
	void (*process_buf)(struct fuse_session *, const struct fuse_buf *);
	int (*reply_open)(fuse_req_t, const struct fuse_file_info *);
	int (*reply_create)(fuse_req_t, const struct fuse_entry_param *,
			    const struct fuse_file_info *);
	int (*reply_buf)(fuse_req_t, const char *, size_t);
	const char *(*pkgversion)(void);
} libfuse;

#define RECEIVE_INIT 8192		/* FUSE_MIN_READ_BUFFER, enough until INIT is done */
#define SLACK 256			/* zeros behind a message: more than any fuse_*_in */

static struct {
	struct fuse_session *session;	/* NULL: no session is ours */
	int fd;
	int armed;			/* the next session_fd() names our session */
	int want_passthrough, want_direct_io;
	int passthrough_errno;		/* 0: active */
	int32_t backing_id;
	uint32_t open_flags;		/* of private files */
	uint32_t major, minor;		/* negotiated */
	uint32_t kernel_major, kernel_minor;
	size_t receive_size;
} tap = { .fd = -1 };

/* ---- Request: one FUSE request that a handler is working on ------------- */

typedef struct Request {
	PyObject_HEAD
	struct Request *next, **link;
	unsigned long long unique;
	unsigned long long nodeid;
	unsigned int opcode, uid, gid, pid;
	char interrupted;
	char is_private;
	int private_backing;		/* 0: that of all private files */
	unsigned long long private_fh;
	PyObject *args;			/* of fallocate and lseek, else None */
	PyObject *scopes;		/* to cancel on INTERRUPT, else None */
} Request;

static PyObject *current;		/* ContextVar: the Request of this task */
static Request *requests;

static void request_dealloc(Request *self)
{
	PyTypeObject *type = Py_TYPE(self);

	if (self->link) {
		*self->link = self->next;
		if (self->next)
			self->next->link = self->link;
	}
	Py_CLEAR(self->args);
	Py_CLEAR(self->scopes);
	type->tp_free(self);
	Py_DECREF(type);
}

static PyObject *request_mark_private(Request *self, PyObject *args)
{
	unsigned long long fh;
	int backing_id = 0;

	if (!PyArg_ParseTuple(args, "K|i:mark_private", &fh, &backing_id))
		return NULL;
	self->private_fh = fh;
	self->private_backing = backing_id;
	self->is_private = 1;
	Py_RETURN_NONE;
}

static PyMemberDef request_members[] = {
	{"unique", T_ULONGLONG, offsetof(Request, unique), READONLY, "FUSE's number of the request"},
	{"nodeid", T_ULONGLONG, offsetof(Request, nodeid), READONLY, "inode that is meant"},
	{"opcode", T_UINT, offsetof(Request, opcode), READONLY, "enum fuse_opcode"},
	{"uid", T_UINT, offsetof(Request, uid), READONLY, "fsuid of the caller"},
	{"gid", T_UINT, offsetof(Request, gid), READONLY, "fsgid of the caller"},
	{"pid", T_UINT, offsetof(Request, pid), READONLY,
	 "thread id of the caller; 0 from outside our pid namespace"},
	{"interrupted", T_BOOL, offsetof(Request, interrupted), READONLY,
	 "whether INTERRUPT came for it"},
	{"args", T_OBJECT, offsetof(Request, args), READONLY,
	 "(fh, mode, offset, length) of FALLOCATE, (fh, offset, whence) of LSEEK"},
	{"scopes", T_OBJECT, offsetof(Request, scopes), 0,
	 "iterable of objects with cancel(), called when INTERRUPT comes"},
	{0},
};

static PyMethodDef request_methods[] = {
	{"mark_private", (PyCFunction)request_mark_private, METH_VARARGS,
	 "mark_private(fh, backing=0): the open or create under way yields a private file; mmap is "
	 "that of the file of backing_open(), if one is given"},
	{0},
};

static PyType_Slot request_slots[] = {
	{Py_tp_dealloc, request_dealloc},
	{Py_tp_members, request_members},
	{Py_tp_methods, request_methods},
	{Py_tp_doc, "One FUSE request that a handler is working on."},
	{0, NULL},
};

static PyType_Spec request_spec = {
	.name = "privfs.fuse._lowlevel.Request",
	.basicsize = sizeof(Request),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
	.slots = request_slots,
};

static PyTypeObject *request_type;

/* Borrowed from the task's context, or NULL. */
static Request *request_current(void)
{
	PyObject *value = NULL;

	if (!current || PyContextVar_Get(current, NULL, &value) < 0 || !value) {
		PyErr_Clear();
		return NULL;
	}
	Py_DECREF(value);		/* the context keeps it */
	return Py_IS_TYPE(value, request_type) ? (Request *)value : NULL;
}

/* Make the request the current one of the task that is about to handle it. */
static int request_begin(const struct fuse_in_header *in)
{
	const void *body = in + 1;
	Request *self = (Request *)request_type->tp_alloc(request_type, 0);
	PyObject *token;

	if (!self)
		return -1;
	self->unique = in->unique;
	self->nodeid = in->nodeid;
	self->opcode = in->opcode;
	self->uid = in->uid;
	self->gid = in->gid;
	self->pid = in->pid;
	if (in->opcode == FUSE_FALLOCATE) {
		const struct fuse_fallocate_in *a = body;

		self->args = Py_BuildValue("KIKK", (unsigned long long)a->fh, a->mode,
					   (unsigned long long)a->offset,
					   (unsigned long long)a->length);
	} else if (in->opcode == FUSE_LSEEK) {
		const struct fuse_lseek_in *a = body;

		self->args = Py_BuildValue("KLI", (unsigned long long)a->fh,
					   (long long)a->offset, a->whence);
	} else {
		self->args = Py_NewRef(Py_None);
	}
	self->scopes = Py_NewRef(Py_None);
	token = self->args ? PyContextVar_Set(current, (PyObject *)self) : NULL;
	if (token) {
		self->next = requests;
		self->link = &requests;
		if (requests)
			requests->link = &self->next;
		requests = self;
	}
	Py_DECREF(self);		/* the context holds it until the next one */
	Py_XDECREF(token);
	return token ? 0 : -1;
}

static void request_interrupt(Request *self)
{
	PyObject *scopes, *done;

	self->interrupted = 1;
	if (self->scopes == Py_None)
		return;
	scopes = PySequence_List(self->scopes);
	for (Py_ssize_t i = 0; scopes && i < PyList_GET_SIZE(scopes); i++) {
		done = PyObject_CallMethod(PyList_GET_ITEM(scopes, i), "cancel", NULL);
		if (!done)
			PyErr_WriteUnraisable(PyList_GET_ITEM(scopes, i));
		Py_XDECREF(done);
	}
	if (!scopes)
		PyErr_WriteUnraisable(NULL);
	Py_XDECREF(scopes);
}

/*
 * The kernel queues INTERRUPT only for a request that was read (FR_SENT in
 * fs/fuse/dev.c), so its Request exists unless the reply is already written.
 */
static Request *request_find(uint64_t unique)
{
	Request *self = requests;

	while (self && self->unique != unique)
		self = self->next;
	return self;
}

/* ---- messages ----------------------------------------------------------- */

/* An answer of our own. ENOENT: the caller has gone, nobody waits for it. */
static void answer(uint64_t unique, int error, const void *body, size_t size)
{
	struct fuse_out_header out = {
		.len = sizeof(out) + size, .error = error, .unique = unique,
	};
	struct iovec iov[2] = {
		{ &out, sizeof(out) }, { (void *)body, size },
	};

	while (writev(tap.fd, iov, size ? 2 : 1) < 0 && errno == EINTR)
		;
}

static int backing_register(int fd)
{
	struct backing_map map = { .fd = fd };
	int id = ioctl(tap.fd, DEV_IOC_BACKING_OPEN, &map);

	return id < 0 ? -errno : id;
}

/*
 * One POSIX message queue, unlinked at once, backs every private file: its
 * file_operations have no mmap, read_iter or write_iter, so fs/backing-file.c
 * answers ENODEV to mmap and EINVAL to read and write without waking us.
 */
static int queue_open(void)
{
	struct mq_attr attr = { .mq_maxmsg = 1, .mq_msgsize = 1 };
	struct timespec now;
	char name[64];
	int fd, id;

	clock_gettime(CLOCK_MONOTONIC, &now);
	snprintf(name, sizeof(name), "privfs-%d-%lld-%ld", (int)getpid(),
		 (long long)now.tv_sec, now.tv_nsec);
	fd = syscall(SYS_mq_open, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600, &attr);
	if (fd < 0)
		return -errno;
	syscall(SYS_mq_unlink, name);
	id = backing_register(fd);
	close(fd);			/* the connection holds its own reference */
	return id;
}

/* Add what libfuse before 3.17 cannot ask for to its INIT reply. */
static void init_patch(struct init_out *out, int offered)
{
	tap.major = out->major;
	tap.minor = out->minor;
	/* fuse_dev_do_read() wants room for the largest WRITE and its headers */
	tap.receive_size = (out->max_write < 4096 ? 4096 : (size_t)out->max_write) + 4096;
	if (!tap.want_passthrough || !offered || (out->flags & FUSE_WRITEBACK_CACHE))
		return;
	out->flags |= INIT_EXT;
	out->flags2 |= INIT2_PASSTHROUGH;
	out->max_stack_depth = 1;
}

/*
 * libfuse writes its INIT reply with writev(), which cannot be intercepted;
 * so for this one call, before any other request or thread, the session's
 * descriptor is a pipe.
 */
static int init_process(struct fuse_session *se, const struct fuse_buf *buf)
{
	const struct fuse_in_header *in = buf->mem;
	const struct init_in *arg = (const void *)(in + 1);
	int extended = in->len >= sizeof(*in) + sizeof(*arg) && (arg->flags & INIT_EXT);
	int offered = extended && (arg->flags2 & INIT2_PASSTHROUGH);
	struct { struct fuse_out_header header; struct init_out init; } out;
	int ends[2], saved, id;
	ssize_t n;

	tap.kernel_major = arg->major;
	tap.kernel_minor = arg->minor;
	if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0)
		return -errno;
	saved = fcntl(tap.fd, F_DUPFD_CLOEXEC, 3);
	if (saved < 0 || dup3(ends[1], tap.fd, O_CLOEXEC) < 0) {
		int error = -errno;

		if (saved >= 0)
			close(saved);
		close(ends[0]);
		close(ends[1]);
		return error;
	}
	libfuse.process_buf(se, buf);
	n = read(ends[0], &out, sizeof(out));
	dup3(saved, tap.fd, O_CLOEXEC);
	close(saved);
	close(ends[0]);
	close(ends[1]);
	if (n < (ssize_t)sizeof(out.header) || out.header.error)
		return n > 0 && out.header.error ? out.header.error : -EPROTO;
	if (n == sizeof(out))
		init_patch(&out.init, offered);
	if (write(tap.fd, &out, n) != n)
		return -errno;
	if (!tap.want_passthrough)
		return 0;
	id = n == sizeof(out) && offered ? queue_open() : -EOPNOTSUPP;
	tap.passthrough_errno = id < 0 ? -id : 0;
	if (id >= 0) {
		tap.backing_id = id;
		tap.open_flags = OPEN_PASSTHROUGH | OPEN_NOFLUSH;
		if (tap.want_direct_io)
			tap.open_flags |= OPEN_DIRECT_IO;
	}
	return 0;
}

static void timeout_fill(double t, uint64_t *seconds, uint32_t *nanoseconds)
{
	if (!(t > 0))
		t = 0;
	if (t > 1e12)
		t = 1e12;
	*seconds = (uint64_t)t;
	*nanoseconds = (uint32_t)((t - (double)*seconds) * 1e9);
}

static void entry_fill(struct fuse_entry_out *out, const struct fuse_entry_param *e)
{
	const struct stat *st = &e->attr;

	*out = (struct fuse_entry_out){
		.nodeid = e->ino,
		.generation = e->generation,
		.attr = {
			.ino = st->st_ino,
			.size = st->st_size,
			.blocks = st->st_blocks,
			.atime = st->st_atim.tv_sec,
			.mtime = st->st_mtim.tv_sec,
			.ctime = st->st_ctim.tv_sec,
			.atimensec = st->st_atim.tv_nsec,
			.mtimensec = st->st_mtim.tv_nsec,
			.ctimensec = st->st_ctim.tv_nsec,
			.mode = st->st_mode,
			.nlink = st->st_nlink,
			.uid = st->st_uid,
			.gid = st->st_gid,
			.rdev = st->st_rdev,
			.blksize = st->st_blksize,
		},
	};
	timeout_fill(e->entry_timeout, &out->entry_valid, &out->entry_valid_nsec);
	timeout_fill(e->attr_timeout, &out->attr_valid, &out->attr_valid_nsec);
}

/* ---- libfuse's functions, as pyfuse3 sees them -------------------------- */

EXPORT int fuse_session_fd(struct fuse_session *se)
{
	int fd = libfuse.session_fd(se), flags;

	if (tap.armed && fd >= 0) {
		tap.armed = 0;
		flags = fcntl(fd, F_GETFL);
		if (flags >= 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0) {
			tap.session = se;
			tap.fd = fd;
		}
	}
	return fd;
}

/* pyfuse3 retries on EINTR and gives up on EAGAIN, which only means: withdrawn. */
EXPORT int fuse_session_receive_buf(struct fuse_session *se, struct fuse_buf *buf)
{
	ssize_t n;

	if (se != tap.session)
		return libfuse.receive_buf(se, buf);
	if (!buf->mem) {
		buf->mem = malloc(tap.receive_size + SLACK);	/* pyfuse3 frees it */
		if (!buf->mem)
			return -ENOMEM;
	}
	n = read(tap.fd, buf->mem, tap.receive_size);
	if (n < 0) {
		switch (errno) {
		case EAGAIN:
		case EINTR:
		case ENOENT:		/* withdrawn while it was copied */
			return -EINTR;
		case ENODEV:		/* unmounted */
		case ECONNABORTED:
		case ECONNRESET:	/* a relay has hung up on our answers */
			libfuse.session_exit(se);
			return 0;
		default:
			return -errno;
		}
	}
	if (n == 0) {			/* a relay has hung up */
		libfuse.session_exit(se);
		return 0;
	}
	if ((size_t)n < sizeof(struct fuse_in_header))
		return -EINTR;		/* nobody to answer */
	memset((char *)buf->mem + n, 0, SLACK);
	buf->size = n;
	buf->flags = 0;
	return n;
}

/* libfuse takes the count as it is and reads that many. */
static void forgets_bound(struct fuse_batch_forget_in *batch, size_t size)
{
	size_t room = size > sizeof(*batch) ?
		(size - sizeof(*batch)) / sizeof(struct fuse_forget_one) : 0;

	if (batch->count > room)
		batch->count = room;
}

EXPORT void fuse_session_process_buf(struct fuse_session *se, const struct fuse_buf *buf)
{
	static const struct fuse_getxattr_out no_names;
	struct fuse_in_header *in = buf->mem;
	void *body = in + 1;
	size_t size = buf->size - sizeof(*in);
	Request *meant;

	if (se != tap.session) {
		libfuse.process_buf(se, buf);
		return;
	}
	switch (in->opcode) {
	case FUSE_INTERRUPT:
		meant = request_find(((struct fuse_interrupt_in *)body)->unique);
		if (meant) {
			Py_INCREF(meant);
			request_interrupt(meant);
			Py_DECREF(meant);
		}
		return;
	case FUSE_GETXATTR:		/* sticky: no security.capability before each write */
	case FUSE_SETXATTR:		/* ENOSYS becomes EOPNOTSUPP for the caller */
	case FUSE_REMOVEXATTR:
		answer(in->unique, -ENOSYS, NULL, 0);
		return;
	case FUSE_LISTXATTR:
		answer(in->unique, 0, &no_names,
		       ((struct fuse_getxattr_in *)body)->size ? 0 : sizeof(no_names));
		return;
	case FUSE_BATCH_FORGET:
		forgets_bound(body, size);
		break;
	case FUSE_FORGET:
		break;
	case FUSE_WRITE:		/* libfuse subtracts its header from a smaller size */
		if (size < sizeof(struct fuse_write_in)) {
			answer(in->unique, -EIO, NULL, 0);
			return;
		}
		/* fall through */
	default:
		if (request_begin(in) < 0) {
			PyErr_WriteUnraisable(NULL);
			answer(in->unique, -ENOMEM, NULL, 0);
			return;
		}
	}
	if (in->opcode == FUSE_FALLOCATE) {
		/* fuse_setxattr_in, name "", value "": all of it is zero */
		memset(body, 0, sizeof(struct fuse_fallocate_in));
		in->opcode = FUSE_SETXATTR;
	} else if (in->opcode == FUSE_LSEEK) {
		/* fuse_getxattr_in with room for struct fuse_lseek_out, name "" */
		memset(body, 0, sizeof(struct fuse_lseek_in));
		((struct fuse_getxattr_in *)body)->size = sizeof(struct fuse_lseek_out);
		in->opcode = FUSE_GETXATTR;
	}
	libfuse.process_buf(se, buf);
}

static struct open_out private_open(const Request *self)
{
	if (self->private_backing > 0)	/* reads and writes still come to us: only mmap is its */
		return (struct open_out){
			.fh = self->private_fh,
			.open_flags = OPEN_PASSTHROUGH | OPEN_DIRECT_IO | OPEN_NOFLUSH,
			.backing_id = self->private_backing,
		};
	return (struct open_out){
		.fh = self->private_fh,
		.open_flags = tap.open_flags,
		.backing_id = tap.backing_id,
	};
}

EXPORT int fuse_reply_open(fuse_req_t req, const struct fuse_file_info *fi)
{
	const Request *self = request_current();
	struct open_out out;

	if (!self || !self->is_private)
		return libfuse.reply_open(req, fi);
	out = private_open(self);
	return libfuse.reply_buf(req, (const char *)&out, sizeof(out));
}

EXPORT int fuse_reply_create(fuse_req_t req, const struct fuse_entry_param *e,
			     const struct fuse_file_info *fi)
{
	const Request *self = request_current();
	struct create_out out;

	if (!self || !self->is_private)
		return libfuse.reply_create(req, e, fi);
	entry_fill(&out.entry, e);
	out.open = private_open(self);
	return libfuse.reply_buf(req, (const char *)&out, sizeof(out));
}

/* ---- the module --------------------------------------------------------- */

static const struct {
	const char *name;
	void **real;
	void *tapped;			/* ours, or NULL when only called */
} symbols[] = {
	{"fuse_session_fd", (void **)&libfuse.session_fd, fuse_session_fd},
	{"fuse_session_receive_buf", (void **)&libfuse.receive_buf, fuse_session_receive_buf},
	{"fuse_session_process_buf", (void **)&libfuse.process_buf, fuse_session_process_buf},
	{"fuse_reply_open", (void **)&libfuse.reply_open, fuse_reply_open},
	{"fuse_reply_create", (void **)&libfuse.reply_create, fuse_reply_create},
	{"fuse_session_exit", (void **)&libfuse.session_exit, NULL},
	{"fuse_reply_buf", (void **)&libfuse.reply_buf, NULL},
	{"fuse_pkgversion", (void **)&libfuse.pkgversion, NULL},
};

#define SYMBOLS (sizeof(symbols) / sizeof(symbols[0]))

static PyObject *join_global_scope(PyObject *module, PyObject *unused)
{
	Dl_info self;

	(void)module;
	(void)unused;
	if (!dladdr((void *)join_global_scope, &self) ||
	    !dlopen(self.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD))
		return PyErr_Format(PyExc_ImportError, "cannot join the global symbol scope: %s",
				    dlerror());
	for (size_t i = 0; i < SYMBOLS; i++)
		if (symbols[i].tapped && dlsym(RTLD_DEFAULT, symbols[i].name) != symbols[i].tapped)
			return PyErr_Format(PyExc_ImportError,
					    "another definition of %s comes first in the global "
					    "symbol scope (LD_PRELOAD?)", symbols[i].name);
	Py_RETURN_NONE;
}

static PyObject *bind_libfuse(PyObject *module, PyObject *path)
{
	const char *file = PyUnicode_AsUTF8(path);
	void *object;

	(void)module;
	if (!file)
		return NULL;
	object = dlopen(file, RTLD_NOW | RTLD_NOLOAD);
	if (!object)
		return PyErr_Format(PyExc_ImportError, "%s is not loaded: %s", file, dlerror());
	for (size_t i = 0; i < SYMBOLS; i++) {
		*symbols[i].real = dlsym(object, symbols[i].name);
		if (!*symbols[i].real || *symbols[i].real == symbols[i].tapped)
			return PyErr_Format(PyExc_ImportError, "no libfuse with %s behind %s",
					    symbols[i].name, file);
	}
	return PyUnicode_FromString(libfuse.pkgversion());
}

static PyObject *arm(PyObject *module, PyObject *args)
{
	int passthrough, direct_io, seekable;

	(void)module;
	if (!PyArg_ParseTuple(args, "ppp:arm", &passthrough, &direct_io, &seekable))
		return NULL;
	if (tap.session) {
		PyErr_SetString(PyExc_RuntimeError, "a session is active: close it first");
		return NULL;
	}
	tap.armed = 1;
	tap.want_passthrough = passthrough;
	tap.want_direct_io = direct_io;
	tap.passthrough_errno = 0;
	tap.backing_id = 0;
	tap.open_flags = OPEN_DIRECT_IO | OPEN_NOFLUSH;
	if (!seekable)			/* as a file without ->llseek, and without f_pos to lock */
		tap.open_flags |= OPEN_NONSEEKABLE | OPEN_STREAM;
	tap.receive_size = RECEIVE_INIT;
	Py_RETURN_NONE;
}

static PyObject *disarm(PyObject *module, PyObject *unused)
{
	(void)module;
	(void)unused;
	tap.armed = 0;
	if (tap.session && tap.backing_id > 0)
		ioctl(tap.fd, DEV_IOC_BACKING_CLOSE, &tap.backing_id);
	tap.session = NULL;
	tap.fd = -1;
	tap.backing_id = 0;
	Py_RETURN_NONE;
}

static PyObject *backing_open(PyObject *module, PyObject *fd)
{
	long number = PyLong_AsLong(fd);
	int id;

	(void)module;
	if (number == -1 && PyErr_Occurred())
		return NULL;
	id = tap.session && tap.backing_id > 0 ? backing_register((int)number) : -EOPNOTSUPP;
	if (id < 0) {
		errno = -id;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	return PyLong_FromLong(id);
}

static PyObject *backing_close(PyObject *module, PyObject *backing)
{
	long number = PyLong_AsLong(backing);
	uint32_t id = (uint32_t)number;

	(void)module;
	if (number == -1 && PyErr_Occurred())
		return NULL;
	if (tap.session)		/* else the connection is gone, and with it all of them */
		ioctl(tap.fd, DEV_IOC_BACKING_CLOSE, &id);
	Py_RETURN_NONE;
}

static PyObject *attached(PyObject *module, PyObject *unused)
{
	(void)module;
	(void)unused;
	return PyBool_FromLong(tap.session != NULL);
}

static PyObject *serve_init(PyObject *module, PyObject *args)
{
	struct fuse_buf buf = { 0 };
	int timeout_ms, n, error;
	struct pollfd wait;

	(void)module;
	if (!PyArg_ParseTuple(args, "i:serve_init", &timeout_ms))
		return NULL;
	if (!tap.session) {
		PyErr_SetString(PyExc_RuntimeError, "no session is attached");
		return NULL;
	}
	wait = (struct pollfd){ .fd = tap.fd, .events = POLLIN };
	do {
		Py_BEGIN_ALLOW_THREADS
		n = poll(&wait, 1, timeout_ms);
		Py_END_ALLOW_THREADS
		if (n < 0 && PyErr_CheckSignals() < 0)
			return NULL;
	} while (n < 0);
	if (n == 0) {
		errno = ETIMEDOUT;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	n = fuse_session_receive_buf(tap.session, &buf);
	if (n <= 0)
		error = n ? n : -ENODEV;
	else if (((struct fuse_in_header *)buf.mem)->opcode != FUSE_INIT)
		error = -EPROTO;
	else
		error = init_process(tap.session, &buf);
	free(buf.mem);
	if (error) {
		errno = -error;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	return Py_BuildValue("i(II)(II)", tap.passthrough_errno, tap.major, tap.minor,
			     tap.kernel_major, tap.kernel_minor);
}

/* Once the session exits, no INTERRUPT is read any more: this stands for them. */
static PyObject *interrupt_all(PyObject *module, PyObject *unused)
{
	PyObject *all = PyList_New(0);

	(void)module;
	(void)unused;
	for (Request *r = requests; all && r; r = r->next)
		if (PyList_Append(all, (PyObject *)r) < 0)
			Py_CLEAR(all);
	if (!all)
		return NULL;
	for (Py_ssize_t i = 0; i < PyList_GET_SIZE(all); i++)
		request_interrupt((Request *)PyList_GET_ITEM(all, i));
	Py_DECREF(all);
	Py_RETURN_NONE;
}

#define GLANCE_MAX 16

static int readable(void)
{
	struct pollfd wait = { .fd = tap.fd, .events = POLLIN };

	return poll(&wait, 1, 0) != 0;
}

static PyObject *spin_readable(PyObject *module, PyObject *args)
{
	struct timespec now, end;
	int microseconds, ready;

	(void)module;
	if (!PyArg_ParseTuple(args, "i:spin_readable", &microseconds))
		return NULL;
	ready = readable();
	if (ready || microseconds <= 0)
		return PyBool_FromLong(ready);
	Py_BEGIN_ALLOW_THREADS
	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_nsec += microseconds * 1000L;
	do {
		ready = readable();
		clock_gettime(CLOCK_MONOTONIC, &now);
	} while (!ready && (now.tv_sec - end.tv_sec) * 1000000000L + now.tv_nsec < end.tv_nsec);
	Py_END_ALLOW_THREADS
	return PyBool_FromLong(ready);
}

/* Waits for the first of some descriptors, or for a request: it is not to wait for them. */
static PyObject *glance(PyObject *module, PyObject *args)
{
	struct pollfd wait[GLANCE_MAX + 1] = { { .fd = tap.fd, .events = POLLIN } };
	struct timespec pause = { 0 };
	PyObject *fds;
	Py_ssize_t i, count;
	int found;

	(void)module;
	if (!PyArg_ParseTuple(args, "O!l:glance", &PyTuple_Type, &fds, &pause.tv_nsec))
		return NULL;
	count = PyTuple_GET_SIZE(fds);
	if (count > GLANCE_MAX || pause.tv_nsec < 0 || pause.tv_nsec > 999) {
		PyErr_Format(PyExc_ValueError, "glance: at most %d descriptors and less than 1 ms",
			     GLANCE_MAX);
		return NULL;
	}
	pause.tv_nsec *= 1000;
	for (i = 0; i < count; i++) {
		wait[i + 1].fd = (int)PyLong_AsLong(PyTuple_GET_ITEM(fds, i));
		wait[i + 1].events = POLLIN;
	}
	if (PyErr_Occurred())
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	found = ppoll(wait, (nfds_t)count + 1, &pause, NULL);
	Py_END_ALLOW_THREADS
	return PyLong_FromLong(found > 0 ? (wait[0].revents ? -1 : found) : 0);
}

static PyMethodDef methods[] = {
	{"join_global_scope", join_global_scope, METH_NOARGS,
	 "Make the interposed functions visible to objects loaded from now on."},
	{"bind_libfuse", bind_libfuse, METH_O,
	 "bind_libfuse(path) -> version: find the libfuse behind pyfuse3's object file."},
	{"arm", arm, METH_VARARGS,
	 "arm(passthrough, direct_io, seekable): the next session that pyfuse3 opens is ours."},
	{"backing_open", backing_open, METH_O,
	 "backing_open(fd) -> backing id, for mark_private(); OSError"},
	{"backing_close", backing_close, METH_O,
	 "backing_close(id): no open uses it any more from now on; what is open keeps it"},
	{"attached", attached, METH_NOARGS, "Whether a session went through this module."},
	{"serve_init", serve_init, METH_VARARGS,
	 "serve_init(timeout_ms) -> (passthrough errno, protocol, kernel's protocol)"},
	{"interrupt_all", interrupt_all, METH_NOARGS, "Interrupt every request under way."},
	{"disarm", disarm, METH_NOARGS, "Forget the session. Call before pyfuse3 closes it."},
	{"spin_readable", spin_readable, METH_VARARGS,
	 "spin_readable(us) -> whether a request waits, after looking for that long."},
	{"glance", glance, METH_VARARGS,
	 "glance(fds, us) -> how many can be read within that time; -1: a request came first."},
	{0},
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "privfs.fuse._lowlevel",
	.m_doc = "Between pyfuse3 and libfuse. Use privfs.fuse.lowlevel.",
	.m_size = -1,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit__lowlevel(void)
{
	PyObject *module = PyModule_Create(&definition);

	if (!module)
		return NULL;
	request_type = (PyTypeObject *)PyType_FromSpec(&request_spec);
	current = PyContextVar_New("fuse_request", NULL);
	if (!request_type || !current ||
	    PyModule_AddObjectRef(module, "Request", (PyObject *)request_type) < 0 ||
	    PyModule_AddObjectRef(module, "current", current) < 0) {
		Py_DECREF(module);
		return NULL;
	}
	return module;
}
