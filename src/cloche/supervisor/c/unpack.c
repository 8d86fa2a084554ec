/* The bundle's sink: the workspace's folders, files and links, and the script's stdin.
 * Nothing exists in the workspace before, links come last, and every component is opened without following links. */
#include "cloche.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Opens the folder that holds path's last part, which *name then points to. The caller closes it. */
static int parent(int root, const char *path, const char **name)
{
	char part[256];
	int dir = fcntl(root, F_DUPFD_CLOEXEC, 3);

	for (const char *slash; dir >= 0 && (slash = strchr(path, '/')) != NULL; path = slash + 1) {
		size_t len = (size_t)(slash - path);

		memcpy(part, path, len); /* the reader bounds a part to 255 bytes */
		part[len] = 0;
		int next = openat(dir, part, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);

		close(dir);
		dir = next;
	}
	*name = path;
	return dir;
}

static int folder(void *self, const char *path)
{
	const char *name;
	int dir = parent(((struct unpacker *)self)->root, path, &name), error = 0;

	if (dir < 0)
		return errno;
	if (mkdirat(dir, name, 0755) != 0)
		error = errno;
	close(dir);
	return error;
}

static int file(void *self, const char *path, bool executable)
{
	struct unpacker *u = self;
	const char *name;
	int dir = parent(u->root, path, &name), error = 0;

	if (dir < 0)
		return errno;
	u->to_input = false;
	u->fd = openat(dir, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, executable ? 0755 : 0644);
	if (u->fd < 0)
		error = errno;
	close(dir);
	return error;
}

static int symbolic_link(void *self, const char *target, const char *path)
{
	const char *name;
	int dir = parent(((struct unpacker *)self)->root, path, &name), error = 0;

	if (dir < 0)
		return errno;
	if (symlinkat(target, dir, name) != 0)
		error = errno;
	close(dir);
	return error;
}

static int input(void *self)
{
	struct unpacker *u = self;

	if (u->input >= 0)
		return EEXIST;
	u->to_input = true;
	u->fd = memfd_create("stdin", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	return u->fd < 0 ? errno : 0;
}

static int bytes(void *self, const uint8_t *data, size_t n)
{
	const struct unpacker *u = self;

	while (n > 0) {
		ssize_t wrote = write(u->fd, data, n);

		if (wrote < 0 && errno != EINTR)
			return errno;
		if (wrote > 0) {
			data += wrote;
			n -= (size_t)wrote;
		}
	}
	return 0;
}

static int close_file(void *self)
{
	struct unpacker *u = self;
	int fd = u->fd;

	u->fd = -1;
	if (!u->to_input)
		return close(fd) == 0 ? 0 : errno;
	/* Sealed, so that a script cannot grow its stdin into memory that nothing bounds. */
	if (fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE) != 0)
		return errno;
	u->input = fd;
	return lseek(fd, 0, SEEK_SET) == 0 ? 0 : errno;
}

const struct bundle_sink unpack_sink = {
	.folder = folder,
	.file = file,
	.link = symbolic_link,
	.input = input,
	.bytes = bytes,
	.close = close_file,
};
