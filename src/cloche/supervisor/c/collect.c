/* Artifacts: the regular files that the script left. Every process of the script is dead by now, so nothing moves; still
 * nothing is followed, and nothing is opened before it is known to be a regular file with one name. */
#include "cloche.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define DEPTH_MAX 32
#define PATH_BYTES 1024
#define VISIT_MAX 65536
#define KEEP_MAX 4096

static struct {
	char *paths[KEEP_MAX];
	size_t kept, most;
	uint64_t visited, skipped;
} found;

static void walk(int dir_fd, char *path, size_t len, int depth)
{
	DIR *dir = fdopendir(dir_fd);

	if (!dir) {
		close(dir_fd);
		found.skipped++;
		return;
	}
	for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
		size_t n = strlen(entry->d_name);
		struct stat st;

		if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
			continue;
		if (++found.visited > VISIT_MAX) {
			found.skipped++;
			break;
		}
		if (len + n + 2 > PATH_BYTES || fstatat(dir_fd, entry->d_name, &st, AT_SYMLINK_NOFOLLOW) != 0) {
			found.skipped++;
			continue;
		}
		if (S_ISDIR(st.st_mode) && depth < DEPTH_MAX) {
			const int flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
			bool locked = (st.st_mode & 0500) != 0500; /* by the script, whose own it is */
			int sub = -1;

			if (!locked || fchmodat(dir_fd, entry->d_name, 0700, 0) == 0)
				sub = openat(dir_fd, entry->d_name, flags);

			memcpy(path + len, entry->d_name, n);
			path[len + n] = '/';
			if (sub >= 0)
				walk(sub, path, len + n + 1, depth + 1);
			else
				found.skipped++;
		} else if (S_ISREG(st.st_mode) && st.st_nlink == 1 && found.kept < found.most) {
			char *kept = malloc(len + n + 1);

			if (!kept) {
				found.skipped++;
				continue;
			}
			memcpy(kept, path, len);
			memcpy(kept + len, entry->d_name, n + 1);
			found.paths[found.kept++] = kept;
		} else {
			found.skipped++;
		}
	}
	closedir(dir);
}

static int by_name(const void *a, const void *b)
{
	return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Opens a file below the folder, no part of the path being followed if it is a link. */
static int open_below(int root, char *path)
{
	int dir = fcntl(root, F_DUPFD_CLOEXEC, 3);

	for (char *slash; dir >= 0 && (slash = strchr(path, '/')) != NULL; path = slash + 1) {
		*slash = 0;
		int next = openat(dir, path, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);

		*slash = '/';
		close(dir);
		dir = next;
	}
	if (dir < 0)
		return -1;
	const int flags = O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC;
	int fd = openat(dir, path, flags);

	if (fd < 0 && errno == EACCES && fchmodat(dir, path, 0400, 0) == 0)
		fd = openat(dir, path, flags);
	close(dir);
	return fd;
}

static void send_file(int fd, uint64_t size, uint64_t bound, const char *path)
{
	uint8_t chunk[PAYLOAD_MAX];
	uint64_t left = size < bound ? size : bound;

	frame_file(size, left < size, path);
	while (left > 0) {
		ssize_t n = read(fd, chunk, left < sizeof chunk ? (size_t)left : sizeof chunk);

		if (n <= 0)
			return;
		frame_data(chunk, (size_t)n);
		left -= (uint64_t)n;
	}
}

/* Gives how many entries it skipped; a folder that cannot be read counts as one. */
uint64_t collect(const char *folder, uint64_t max_bytes, uint64_t max_count)
{
	static char path[PATH_BYTES];
	struct stat top;

	if (lstat(folder, &top) != 0 || !S_ISDIR(top.st_mode))
		return 1;
	if ((top.st_mode & 0500) != 0500 && chmod(folder, 0700) != 0) /* locked, as folders in it may be */
		return 1;
	int root = open(folder, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);

	if (root < 0)
		return 1;
	found.most = max_count < KEEP_MAX ? (size_t)max_count : KEEP_MAX;
	walk(fcntl(root, F_DUPFD_CLOEXEC, 3), path, 0, 0);
	qsort(found.paths, found.kept, sizeof *found.paths, by_name);
	for (size_t i = 0; i < found.kept; i++) {
		int fd = open_below(root, found.paths[i]);
		struct stat st;

		if (fd < 0 || fstat(fd, &st) != 0 || !S_ISREG(st.st_mode) || st.st_nlink != 1) {
			found.skipped++;
		} else {
			uint64_t size = (uint64_t)st.st_size;

			send_file(fd, size, max_bytes, found.paths[i]);
			max_bytes -= size < max_bytes ? size : max_bytes;
		}
		if (fd >= 0)
			close(fd);
		free(found.paths[i]);
	}
	close(root);
	return found.skipped;
}
