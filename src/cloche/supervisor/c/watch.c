/* What the box uses: the sum of its processes where no cgroup bounds it, and its cgroup's own counters where one does. */
#include "cloche.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define PROPORTIONAL_MS 100u

/* Reads a small file whole; gives its length, 0 if it cannot be read. */
static size_t slurp(const char *path, char *to, size_t room)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = 0;

	if (fd >= 0) {
		n = read(fd, to, room - 1);
		close(fd);
	}
	to[n > 0 ? n : 0] = 0;
	return n > 0 ? (size_t)n : 0;
}

/* The number behind a word at the start of a line. */
static bool number_after(const char *text, const char *word, uint64_t *value)
{
	size_t n = strlen(word);

	for (const char *line = text; line; line = strchr(line, '\n'), line += line != NULL)
		if (strncmp(line, word, n) == 0 && (line[n] == ' ' || line[n] == ':')) {
			*value = strtoull(line + n + 1, NULL, 10);
			return true;
		}
	return false;
}

static uint64_t resident(const char *pid)
{
	char path[64], text[256];
	unsigned long pages = 0;

	snprintf(path, sizeof path, "/proc/%.20s/statm", pid);
	if (slurp(path, text, sizeof text) == 0 || sscanf(text, "%*u %lu", &pages) != 1)
		return 0;
	return (uint64_t)pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

static uint64_t proportional_until_ms;

/* Like resident(), with memory that processes share counted once in all. Dear: only asked when the sum looks too large, and
 * for a bounded time, since a script can make it as dear as it likes and the run's clock waits meanwhile. */
static uint64_t proportional(const char *pid)
{
	char path[64], text[2048];
	uint64_t kib;

	snprintf(path, sizeof path, "/proc/%.20s/smaps_rollup", pid);
	if (now_ms() >= proportional_until_ms || slurp(path, text, sizeof text) == 0 || !number_after(text, "Pss", &kib))
		return resident(pid);
	return kib * 1024;
}

static uint64_t sum(int64_t uid, uint64_t (*of)(const char *pid))
{
	DIR *proc = opendir("/proc");
	uint64_t total = 0;
	long self = (long)getpid();

	if (!proc)
		return 0;
	for (struct dirent *entry; (entry = readdir(proc)) != NULL;) {
		struct stat st;

		if (entry->d_name[0] < '1' || entry->d_name[0] > '9' || strtol(entry->d_name, NULL, 10) == self)
			continue;
		if (uid >= 0 && (fstatat(dirfd(proc), entry->d_name, &st, 0) != 0 || st.st_uid != (uid_t)uid))
			continue;
		total += of(entry->d_name);
	}
	closedir(proc);
	return total;
}

uint64_t tree_bytes(int64_t uid, uint64_t enough)
{
	uint64_t total = sum(uid, resident);

	proportional_until_ms = now_ms() + PROPORTIONAL_MS;
	return total > enough ? sum(uid, proportional) : total;
}

bool oom_kills(uint64_t *count)
{
	/* cgroup v2 (Documentation/admin-guide/cgroup-v2.rst), then v1 (cgroup-v1/memory.rst), where containers see them. */
	static const char *const files[] = {
		"/sys/fs/cgroup/memory.events",
		"/sys/fs/cgroup/memory/memory.oom_control",
	};
	char text[1024];

	for (size_t i = 0; i < sizeof files / sizeof *files; i++)
		if (slurp(files[i], text, sizeof text) > 0 && number_after(text, "oom_kill", count))
			return true;
	return false;
}

uint64_t cgroup_peak_bytes(void)
{
	static const char *const files[] = {
		"/sys/fs/cgroup/memory.peak",
		"/sys/fs/cgroup/memory/memory.max_usage_in_bytes",
	};
	char text[64];

	for (size_t i = 0; i < sizeof files / sizeof *files; i++)
		if (slurp(files[i], text, sizeof text) > 0)
			return strtoull(text, NULL, 10);
	return 0;
}
