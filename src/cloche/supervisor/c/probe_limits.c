/* Bounds are proved by reaching them: so many processes, so much memory, CPU time, bytes and files. The prober's own bounds
 * keep it harmless where the box has none. */
#include "cloche.h"
#include "probe.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define MIB ((uint64_t)1 << 20)
#define PROCESSES_MAX 2000u
#define MEMORY_MAX (1024 * MIB)
#define FILES_MAX 70000u
#define CPU_MS_MAX 5000u
#define CPU_PROCESSES_MAX 64u
#define STALL_US 50000u /* longer than a busy machine lets one of a few processes wait at a time; a small quota makes it wait longer */
#define PAUSE_US 1000u /* longer than it takes to read the clock */
#define MEMORY_LINES 64u

static uint64_t least(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* A child that ends with its parent, however that ends; and in the end by itself. */
static pid_t child(void)
{
	pid_t parent = getpid(), pid = fork();

	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		alarm(30);
		if (getppid() != parent)
			_exit(0);
	}
	return pid;
}

void reach_processes(uint64_t count)
{
	static pid_t pids[PROCESSES_MAX];
	size_t n = 0;
	int error = 0;

	while (n < least(count, PROCESSES_MAX)) {
		pid_t pid = child();

		if (pid == 0)
			for (;;)
				pause();
		if (pid < 0) {
			error = errno;
			break;
		}
		pids[n++] = pid;
	}
	for (size_t i = 0; i < n; i++)
		kill(pids[i], SIGKILL);
	for (size_t i = 0; i < n; i++)
		waitpid(pids[i], NULL, 0);
	see("reach-processes");
	see_number("asked", (int64_t)least(count, PROCESSES_MAX));
	see_number("got", (int64_t)n);
	see_number("errno", error);
	see_end();
}

void reach_memory(uint64_t bytes)
{
	bytes = least(bytes, MEMORY_MAX);

	uint64_t step = bytes / MEMORY_LINES / MIB * MIB, got = 0;
	int error = 0;

	step = step > 0 ? step : MIB;
	while (got < bytes && error == 0) {
		unsigned char *more = mmap(NULL, step, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (more == MAP_FAILED) {
			error = errno;
			break;
		}
		for (uint64_t i = 0; i < step; i += 4096)
			more[i] = (unsigned char)(i >> 12 | 1);
		got += step;
		see("memory");
		see_number("bytes", (int64_t)got);
		see_end();
		/* Where memory is watched and not bounded, the watch comes by every 20 ms. */
		usleep(2000);
	}
	see("reach-memory");
	see_number("asked", (int64_t)bytes);
	see_number("got", (int64_t)got);
	see_number("errno", error);
	see_end();
}

/* What a process had that always wants to run. */
struct spun {
	uint64_t ran_us; /* by the clock that it saw going on: some kernels count time in which nothing ran as CPU time */
	uint64_t stalls;
};

static struct spun spin(uint64_t until_us)
{
	struct spun spun = {0, 0};
	uint64_t now = now_us();

	while (now < until_us) {
		uint64_t then = now_us();

		spun.ran_us += then - now < PAUSE_US ? then - now : 0;
		spun.stalls += then - now > STALL_US;
		now = then;
	}
	return spun;
}

/* How often the box's cgroup was made to wait. */
static int64_t throttled(void)
{
	static const char *const files[] = {"/sys/fs/cgroup/cpu.stat", "/sys/fs/cgroup/cpu/cpu.stat"};
	char text[1024];

	for (size_t i = 0; i < sizeof files / sizeof *files; i++)
		if (read_text(files[i], text, sizeof text) > 0) {
			const char *at = strstr(text, "nr_throttled ");

			if (at)
				return strtoll(at + strlen("nr_throttled "), NULL, 10);
		}
	return -1;
}

static int64_t cpu_ms_of_children(void)
{
	struct rusage used;

	if (getrusage(RUSAGE_CHILDREN, &used) != 0)
		return -1;
	return (used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1000 + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1000;
}

void reach_cpu(uint64_t ms, uint64_t processes)
{
	int64_t before = cpu_ms_of_children(), waits = throttled();
	uint64_t begun = now_us(), until = begun + least(ms, CPU_MS_MAX) * 1000;
	size_t n = 0, many = (size_t)least(processes, CPU_PROCESSES_MAX);
	struct spun all = {0, 0}, one;
	int results[2];

	if (pipe(results) != 0)
		return;
	for (; n < many; n++) {
		pid_t pid = child();

		if (pid == 0) {
			one = spin(until);
			_exit(write(results[1], &one, sizeof one) == (ssize_t)sizeof one ? 0 : 1);
		}
		if (pid < 0)
			break;
	}
	close(results[1]);
	while (read(results[0], &one, sizeof one) == (ssize_t)sizeof one) {
		all.ran_us += one.ran_us;
		all.stalls += one.stalls;
	}
	close(results[0]);
	for (size_t i = 0; i < n; i++)
		wait(NULL);
	see("reach-cpu");
	see_number("ms", (int64_t)(now_us() - begun) / 1000);
	see_number("processes", (int64_t)n);
	see_number("cpu_ms", cpu_ms_of_children() - before);
	see_number("ran_ms", (int64_t)(all.ran_us / 1000));
	see_number("stalls", (int64_t)all.stalls);
	if (waits >= 0)
		see_number("throttled", throttled() - waits);
	see_end();
}

void reach_size(const char *folder, uint64_t bytes)
{
	static char block[1 << 18];
	char name[512];
	uint64_t got = 0;
	int fd, error = 0;

	bytes = least(bytes, MEMORY_MAX);
	snprintf(name, sizeof name, "%.400s/.cloche-probe-size", folder);
	fd = open(name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd < 0)
		error = errno;
	while (error == 0 && got < bytes) {
		ssize_t n = write(fd, block, (size_t)least(sizeof block, bytes - got));

		if (n <= 0)
			error = n < 0 ? errno : EIO;
		else
			got += (uint64_t)n;
	}
	if (fd >= 0) {
		close(fd);
		unlink(name);
	}
	see("reach-size");
	see_text("path", folder);
	see_number("asked", (int64_t)bytes);
	see_number("got", (int64_t)got);
	see_number("errno", error);
	see_end();
}

void reach_files(const char *folder, uint64_t count)
{
	char path[512], name[32];
	uint64_t got = 0;
	int fd, at, error = 0;

	count = least(count, FILES_MAX);
	/* All in one folder, which goes with them. */
	snprintf(path, sizeof path, "%.400s/.cloche-probe-files", folder);
	at = mkdir(path, 0700) == 0 ? open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
	if (at < 0)
		error = errno;
	for (; error == 0 && got < count; got++) {
		snprintf(name, sizeof name, "%llu", (unsigned long long)got);
		fd = openat(at, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
		if (fd < 0) {
			error = errno;
			break;
		}
		close(fd);
	}
	for (uint64_t i = 0; i < got; i++) {
		snprintf(name, sizeof name, "%llu", (unsigned long long)i);
		unlinkat(at, name, 0);
	}
	if (at >= 0) {
		close(at);
		rmdir(path);
	}
	see("reach-files");
	see_text("path", folder);
	see_number("asked", (int64_t)count);
	see_number("got", (int64_t)got);
	see_number("errno", error);
	see_end();
}
