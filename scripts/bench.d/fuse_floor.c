// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The least that a FUSE server in C can do for files in memory: one flat directory, a memfd for each
 * file, direct I/O, no attribute cache, one thread. The rival of privfs in the benchmarks.
 *
 *   fuse_floor [--user-socket PATH] MOUNTPOINT    in the foreground, until SIGTERM or SIGINT
 *
 * With a socket, a punch first sends one record to the user connected there (echo_floor user PATH)
 * and waits for its answer, as an owner of private memory must. A connection is accepted by the
 * first punch that finds one.
 */
#define FUSE_USE_VERSION 35
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <getopt.h>
#include <limits.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include "record.h"

#define MAX_FILES 4096 /* ever: a number is not used twice */
#define FIRST_INO (FUSE_ROOT_ID + 1)
#define FLAGS_OF_A_PUNCH (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)

struct file {
	char name[NAME_MAX + 1]; /* empty: unlinked */
	int fd;                  /* -1: unlinked and closed by all */
	unsigned opens;
	mode_t mode;
};

static struct file files[MAX_FILES];
static size_t file_count;
static int listener = -1;
static int user = -1;

static struct file *file_of(fuse_ino_t ino)
{
	return &files[ino - FIRST_INO];
}

static fuse_ino_t ino_of(const struct file *file)
{
	return FIRST_INO + (fuse_ino_t)(file - files);
}

static struct file *find(const char *name)
{
	for (size_t i = 0; i < file_count; i++)
		if (!strcmp(files[i].name, name))
			return &files[i];
	return NULL;
}

static int attributes(fuse_ino_t ino, struct stat *st)
{
	memset(st, 0, sizeof(*st));
	if (ino != FUSE_ROOT_ID) {
		struct file *file = file_of(ino);

		if (fstat(file->fd, st))
			return errno;
		st->st_mode = S_IFREG | file->mode;
		st->st_nlink = file->name[0] != 0;
	} else {
		st->st_mode = S_IFDIR | 0755;
		st->st_nlink = 2;
		st->st_uid = getuid();
		st->st_gid = getgid();
	}
	st->st_ino = ino;
	return 0;
}

static int entry(struct file *file, struct fuse_entry_param *param)
{
	memset(param, 0, sizeof(*param));
	param->ino = ino_of(file);
	return attributes(param->ino, &param->attr);
}

static void floor_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct file *file = find(name);
	struct fuse_entry_param param;
	int error = file ? entry(file, &param) : ENOENT;

	(void)parent;
	if (error)
		fuse_reply_err(req, error);
	else
		fuse_reply_entry(req, &param);
}

static void floor_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *info)
{
	struct stat st;
	int error = attributes(ino, &st);

	(void)info;
	if (error)
		fuse_reply_err(req, error);
	else
		fuse_reply_attr(req, &st, 0);
}

static void floor_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *st, int what,
			  struct fuse_file_info *info)
{
	if (ino == FUSE_ROOT_ID)
		fuse_reply_err(req, EPERM);
	else if (what & FUSE_SET_ATTR_SIZE && ftruncate(file_of(ino)->fd, st->st_size))
		fuse_reply_err(req, errno);
	else
		floor_getattr(req, ino, info);
}

static void opened(struct file *file, struct fuse_file_info *info)
{
	file->opens++;
	info->direct_io = 1;
}

static void floor_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode,
			 struct fuse_file_info *info)
{
	struct file *file = &files[file_count];
	struct fuse_entry_param param;
	int error;

	(void)parent;
	if (strlen(name) > NAME_MAX || file_count == MAX_FILES) {
		fuse_reply_err(req, file_count == MAX_FILES ? ENOSPC : ENAMETOOLONG);
		return;
	}
	file->fd = memfd_create(name, MFD_CLOEXEC);
	if (file->fd < 0) {
		fuse_reply_err(req, errno);
		return;
	}
	strcpy(file->name, name);
	file->mode = mode & 07777;
	file_count++;
	opened(file, info);
	error = entry(file, &param);
	if (error)
		fuse_reply_err(req, error);
	else
		fuse_reply_create(req, &param, info);
}

static void floor_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *info)
{
	if (info->flags & O_TRUNC && ftruncate(file_of(ino)->fd, 0)) {
		fuse_reply_err(req, errno);
		return;
	}
	opened(file_of(ino), info);
	fuse_reply_open(req, info);
}

static void close_if_gone(struct file *file)
{
	if (!file->name[0] && !file->opens && file->fd >= 0) {
		close(file->fd);
		file->fd = -1;
	}
}

static void floor_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *info)
{
	(void)info;
	file_of(ino)->opens--;
	close_if_gone(file_of(ino));
	fuse_reply_err(req, 0);
}

static void floor_unlink(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct file *file = find(name);

	(void)parent;
	if (file) {
		file->name[0] = 0;
		close_if_gone(file);
	}
	fuse_reply_err(req, file ? 0 : ENOENT);
}

/* One record to the user and its answer. A user that is gone is forgotten. */
static void ask_user(void)
{
	unsigned char record[RECORD_SIZE] = { 1 };

	if (user < 0 && listener >= 0)
		user = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	if (user >= 0 && (!send_record(user, record) || !receive_record(user, record))) {
		close(user);
		user = -1;
	}
}

static void floor_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length,
			    struct fuse_file_info *info)
{
	(void)info;
	if (mode == FLAGS_OF_A_PUNCH)
		ask_user();
	else if (mode & ~FALLOC_FL_KEEP_SIZE) {
		fuse_reply_err(req, EOPNOTSUPP);
		return;
	}
	fuse_reply_err(req, fallocate(file_of(ino)->fd, mode, offset, length) ? errno : 0);
}

static void floor_statfs(fuse_req_t req, fuse_ino_t ino)
{
	struct statvfs st = { .f_bsize = 4096, .f_frsize = 4096, .f_namemax = NAME_MAX };

	(void)ino;
	st.f_files = MAX_FILES;
	st.f_ffree = st.f_favail = MAX_FILES - file_count;
	fuse_reply_statfs(req, &st);
}

static const struct fuse_lowlevel_ops operations = {
	.lookup = floor_lookup,
	.getattr = floor_getattr,
	.setattr = floor_setattr,
	.create = floor_create,
	.open = floor_open,
	.release = floor_release,
	.unlink = floor_unlink,
	.fallocate = floor_fallocate,
	.statfs = floor_statfs,
};

int main(int argc, char **argv)
{
	static const struct option options[] = { { "user-socket", required_argument, NULL, 's' }, { 0 } };
	char *mount_options[] = { argv[0], "-o", "fsname=fuse_floor,noexec,nosuid,nodev" };
	struct fuse_args args = FUSE_ARGS_INIT(3, mount_options);
	const char *socket_path = NULL;
	struct fuse_session *session;
	int status = 1, option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) == 's')
		socket_path = optarg;
	if (option != -1 || optind != argc - 1) {
		fprintf(stderr, "usage: fuse_floor [--user-socket PATH] MOUNTPOINT\n");
		return 2;
	}
	if (socket_path) {
		listener = listen_at(socket_path);
		if (fcntl(listener, F_SETFL, O_NONBLOCK))
			give_up(socket_path);
	}
	session = fuse_session_new(&args, &operations, sizeof(operations), NULL);
	if (session && !fuse_set_signal_handlers(session)) {
		if (!fuse_session_mount(session, argv[optind])) {
			status = fuse_session_loop(session) < 0; /* > 0: a signal */
			fuse_session_unmount(session);
		}
		fuse_remove_signal_handlers(session);
	}
	if (session)
		fuse_session_destroy(session);
	if (socket_path)
		unlink(socket_path);
	return status;
}
