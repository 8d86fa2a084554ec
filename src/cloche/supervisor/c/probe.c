/* The supervisor's file in a third role: a script that looks at its own box and says what it finds. It is delivered like any
 * other script, so what it meets is what any script meets, in any image, also one without shell or Python.
 *
 *   probe [--no-look] [--tcp NAME=ADDRESS:PORT]… [--udp NAME=ADDRESS:PORT]… [--files PATH,N]… [--size PATH,BYTES]…
 *         [--listen PORT,MS] [--cpu MS,PROCESSES] [--processes N] [--memory BYTES]
 *
 * One JSON object per line, {"see": KIND, …}: raw observations, of which nothing is judged here. Nothing that it does changes
 * anything outside of its own processes and of files that it makes and removes again; what would do harm if it were allowed
 * is asked in a way that must fail then too, with another error. Whatever the box is like, it ends: each wait is bounded, and
 * so is what it prints. The last line is {"see": "end"}, without which it did not come to its end. */
#include "cloche.h"
#include "probe.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

#define OUTPUT_MAX (192u * 1024) /* of all lines; what comes after is left out, and the last line says so */
#define LINE_ROOM 6144u          /* of one line; the longest is a list of names */
#define LIFE_S 30u               /* nothing here takes so long; a kernel that does not answer would */
#define LISTEN_MAX_MS 120000u    /* but to listen for another box, which has to be made first */
#define NAMES_MAX 256u
#define PROCESSES_MAX 20u
#define TARGETS_MAX 16u

extern char **environ;

static char line[LINE_ROOM];
static size_t line_len, written;
static bool line_cut, output_cut, first_item;

static void put(const char *text, size_t n)
{
	if (line_len + n > sizeof line - 32) { /* room to close what is open */
		line_cut = true;
		return;
	}
	memcpy(line + line_len, text, n);
	line_len += n;
}

/* Bytes that are not printable ASCII stand as code points of their own: always valid JSON, whatever a name holds. */
static void put_string(const char *text)
{
	char all[1024];
	size_t n = 0;

	all[n++] = '"';
	for (const unsigned char *c = (const unsigned char *)text; *c && n < sizeof all - 8; c++) {
		if (*c == '"' || *c == '\\') {
			all[n++] = '\\';
			all[n++] = (char)*c;
		} else if (*c < 0x20 || *c > 0x7e) {
			n += (size_t)snprintf(all + n, 7, "\\u%04x", *c);
		} else {
			all[n++] = (char)*c;
		}
	}
	all[n++] = '"';
	put(all, n); /* whole or not at all */
}

static void put_name(const char *name)
{
	put(", ", 2);
	put_string(name);
	put(": ", 2);
}

void see(const char *what)
{
	line_len = 0;
	line_cut = false;
	put("{\"see\": ", 8);
	put_string(what);
}

void see_text(const char *name, const char *value)
{
	put_name(name);
	put_string(value);
}

void see_number(const char *name, int64_t value)
{
	char text[24];

	put_name(name);
	put(text, (size_t)snprintf(text, sizeof text, "%lld", (long long)value));
}

void see_list(const char *name)
{
	put_name(name);
	put("[", 1);
	first_item = true;
}

void see_item(const char *text)
{
	size_t before = line_len;

	if (!first_item)
		put(", ", 2);
	put_string(text);
	if (line_cut && line_len > before)
		line_len = before; /* a separator alone would be no JSON */
	first_item = first_item && line_cut;
}

void see_list_end(void)
{
	line[line_len++] = ']';
}

void see_end(void)
{
	static const char cut[] = ", \"cut\": 1";

	if (line_cut) {
		memcpy(line + line_len, cut, sizeof cut - 1);
		line_len += sizeof cut - 1;
	}
	line[line_len++] = '}';
	line[line_len++] = '\n';
	if (written + line_len > OUTPUT_MAX) {
		output_cut = true;
		return;
	}
	written += line_len;
	fwrite(line, 1, line_len, stdout);
	fflush(stdout); /* children must not inherit it, and what is seen before the box dies must be out */
}

size_t read_text(const char *path, char *to, size_t room)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = -1;

	if (fd >= 0) {
		n = read(fd, to, room - 1);
		close(fd);
	}
	if (n > 0 && to[n - 1] == '\n')
		n--;
	to[n > 0 ? n : 0] = 0;
	return n > 0 ? (size_t)n : 0;
}

const char *next_line(const char *at)
{
	const char *end = strchr(at, '\n');

	return end ? end + 1 : NULL;
}

/* The rest of the line that begins with a word, in a text of lines. */
static bool field_of(const char *text, const char *word, char *to, size_t room)
{
	size_t n = strlen(word);

	for (const char *at = text; at && *at; at = next_line(at))
		if (strncmp(at, word, n) == 0 && at[n] == ':') {
			at += n + 1;
			at += strspn(at, " \t");
			snprintf(to, room, "%.*s", (int)strcspn(at, "\n"), at);
			return true;
		}
	return false;
}

static void look_at_identity(pid_t guard)
{
	static const char *const fields[] = {"Uid",	   "Gid",	 "Groups",  "NSpid",   "CapInh",
					     "CapPrm",	   "CapEff",	 "CapBnd",  "CapAmb",  "NoNewPrivs",
					     "Seccomp",	   "Seccomp_filters"};
	char status[4096], value[256];

	see("identity");
	see_number("pid", getpid());
	see_number("guard", guard);
	if (read_text("/proc/self/status", status, sizeof status) > 0)
		for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
			if (field_of(status, fields[i], value, sizeof value))
				see_text(fields[i], value);
	if (read_text("/proc/self/uid_map", value, sizeof value) > 0)
		see_text("uid_map", value);
	if (read_text("/proc/self/attr/current", value, sizeof value) > 0)
		see_text("label", value);
	if (read_text("/proc/self/oom_score_adj", value, sizeof value) > 0)
		see_text("oom_score_adj", value);
	see_end();
}

static void look_at_namespaces(void)
{
	static const char *const names[] = {"user", "pid", "mnt", "net", "ipc", "uts", "cgroup", "time"};
	char path[32];
	struct stat st;

	see("namespaces");
	for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
		snprintf(path, sizeof path, "/proc/self/ns/%s", names[i]);
		if (stat(path, &st) == 0)
			see_number(names[i], (int64_t)st.st_ino);
	}
	see_end();
}

static void look_at_kernel(void)
{
	struct utsname names;
	char text[512];

	see("kernel");
	if (uname(&names) == 0) {
		see_text("system", names.sysname);
		see_text("release", names.release);
		see_text("version", names.version);
		see_text("machine", names.machine);
		see_text("host", names.nodename);
	}
	if (read_text("/proc/version", text, sizeof text) > 0)
		see_text("proc_version", text);
	if (read_text("/proc/sys/kernel/random/boot_id", text, sizeof text) > 0)
		see_text("boot_id", text);
	see_end();
}

/* Why something of a process cannot be opened; 0: it can. */
static int closed(const char *pid, const char *what)
{
	char path[64], byte;
	int fd, error = 0;

	snprintf(path, sizeof path, "/proc/%.20s/%s", pid, what);
	if ((fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)) < 0)
		return errno;
	/* Some are checked only then. Nothing lies at the address 0 of a process's memory: EIO is what can be read. */
	if (read(fd, &byte, 1) < 0 && errno != EIO)
		error = errno;
	close(fd);
	return error;
}

static void look_at_processes(void)
{
	DIR *proc = opendir("/proc");
	int64_t count = 0;
	char name[64], path[64];

	for (struct dirent *entry; proc && (entry = readdir(proc)) != NULL;) {
		if (entry->d_name[0] < '1' || entry->d_name[0] > '9')
			continue;
		count++;
		if (strtol(entry->d_name, NULL, 10) == getpid() || count > (int64_t)PROCESSES_MAX)
			continue;
		snprintf(path, sizeof path, "/proc/%.20s/comm", entry->d_name);
		read_text(path, name, sizeof name);
		see("process");
		see_number("pid", strtol(entry->d_name, NULL, 10));
		see_text("name", name);
		see_number("environ", closed(entry->d_name, "environ"));
		see_number("memory", closed(entry->d_name, "mem"));
		see_end();
	}
	if (proc)
		closedir(proc);
	see("processes");
	see_number("count", count);
	see_end();
}

/* Names alone: a value may be a secret. */
static void look_at_environment(void)
{
	char name[128];
	unsigned n = 0;

	see("environment");
	see_list("names");
	for (char **e = environ; *e && n < NAMES_MAX; e++, n++) {
		snprintf(name, sizeof name, "%.*s", (int)strcspn(*e, "="), *e);
		see_item(name);
	}
	see_list_end();
	see_end();
}

static void look_at_limits(void)
{
	static const struct {
		const char *name;
		int resource;
	} limits[] = {{"core", RLIMIT_CORE},   {"files", RLIMIT_NOFILE}, {"file_size", RLIMIT_FSIZE},
		      {"processes", RLIMIT_NPROC}, {"memory", RLIMIT_AS}};
	static const struct {
		const char *name, *path;
	} counters[] = {
		/* As containers see their own cgroup: version 2, then version 1. */
		{"memory", "/sys/fs/cgroup/memory.max"},
		{"memory", "/sys/fs/cgroup/memory/memory.limit_in_bytes"},
		{"swap", "/sys/fs/cgroup/memory.swap.max"},
		{"processes", "/sys/fs/cgroup/pids.max"},
		{"processes", "/sys/fs/cgroup/pids/pids.max"},
		{"cpu", "/sys/fs/cgroup/cpu.max"},
		{"cpu", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"},
	};
	char value[64];
	struct rlimit limit;

	see("limits");
	for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
		if (getrlimit(limits[i].resource, &limit) == 0)
			see_number(limits[i].name, limit.rlim_cur == RLIM_INFINITY ? -1 : (int64_t)limit.rlim_cur);
	see_end();
	see("cgroup");
	for (size_t i = 0; i < sizeof counters / sizeof *counters; i++)
		if (read_text(counters[i].path, value, sizeof value) > 0)
			see_text(counters[i].name, value);
	see_end();
}

struct plan_of_probe {
	bool look;
	struct target targets[TARGETS_MAX];
	size_t n_targets;
	uint64_t processes, memory, cpu_ms, cpu_processes, listen_port, listen_ms;
};

/* NAME=ADDRESS:PORT; cuts the argument in two. */
static bool add_target(struct plan_of_probe *p, char *text, bool datagrams)
{
	char *equals = strchr(text, '=');

	if (!equals || p->n_targets == TARGETS_MAX)
		return false;
	*equals = 0;
	p->targets[p->n_targets++] = (struct target){text, equals + 1, datagrams};
	return true;
}

/* PATH,N or N,N; cuts the argument in two. */
static bool split(char *text, uint64_t *number)
{
	char *comma = strrchr(text, ',');

	if (!comma || !parse_u64(comma + 1, number))
		return false;
	*comma = 0;
	return true;
}

static bool parse_probe(int argc, char **argv, struct plan_of_probe *p)
{
	for (int i = 2; i < argc; i++) {
		const char *name = argv[i];
		uint64_t n;
		bool ok;

		if (strcmp(name, "--no-look") == 0) {
			p->look = false;
			continue;
		}
		if (++i == argc)
			return false;
		if (strcmp(name, "--tcp") == 0 || strcmp(name, "--udp") == 0)
			ok = add_target(p, argv[i], name[2] == 'u');
		else if (strcmp(name, "--processes") == 0)
			ok = parse_u64(argv[i], &p->processes);
		else if (strcmp(name, "--memory") == 0)
			ok = parse_u64(argv[i], &p->memory);
		else if (strcmp(name, "--listen") == 0)
			ok = split(argv[i], &p->listen_ms) && p->listen_ms <= LISTEN_MAX_MS &&
			     parse_u64(argv[i], &p->listen_port) && p->listen_port > 0 && p->listen_port < 65536;
		else if (strcmp(name, "--cpu") == 0)
			ok = split(argv[i], &p->cpu_processes) && parse_u64(argv[i], &p->cpu_ms);
		else
			ok = (strcmp(name, "--size") == 0 || strcmp(name, "--files") == 0) && split(argv[i], &n) &&
			     argv[i][0] == '/';
		if (!ok)
			return false;
	}
	return true;
}

/* What was cut in two when the options were checked. */
static void reach_bounds(int argc, char **argv)
{
	for (int i = 2; i + 1 < argc; i++) {
		char *value = argv[i + 1];
		uint64_t n = 0;

		if (strcmp(argv[i], "--size") == 0 && parse_u64(value + strlen(value) + 1, &n))
			reach_size(value, n);
		else if (strcmp(argv[i], "--files") == 0 && parse_u64(value + strlen(value) + 1, &n))
			reach_files(value, n);
		i += strcmp(argv[i], "--no-look") != 0;
	}
}

int probe_main(int argc, char **argv)
{
	static struct plan_of_probe plan = {.look = true};
	uint64_t begun = now_ms();
	pid_t guard = getppid();

	if (!parse_probe(argc, argv, &plan)) {
		fprintf(stderr, "usage: cloche-supervisor probe [--no-look] [--tcp|--udp NAME=ADDRESS:PORT]…"
				" [--files|--size PATH,N]… [--listen PORT,MS] [--cpu MS,PROCESSES] [--processes N]"
				" [--memory BYTES]\n");
		return 2;
	}
	alarm(LIFE_S + (unsigned)(plan.listen_ms / 1000));
	signal(SIGPIPE, SIG_IGN);
	signal(SIGXFSZ, SIG_IGN); /* a file that reaches its bound is an error to be told */
	if (plan.look) {
		look_at_identity(guard);
		look_at_namespaces();
		look_at_kernel();
		look_at_processes();
		look_at_environment();
		look_at_limits();
		look_at_calls(guard);
		look_at_credentials();
		look_at_places();
		look_at_devices();
		look_at_network(plan.targets, plan.n_targets);
	}
	if (plan.listen_ms > 0)
		listen_on(plan.listen_port, plan.listen_ms);
	reach_bounds(argc, argv);
	if (plan.cpu_ms > 0)
		reach_cpu(plan.cpu_ms, plan.cpu_processes);
	if (plan.processes > 0)
		reach_processes(plan.processes);
	if (plan.memory > 0)
		reach_memory(plan.memory);
	written = 0; /* the last line always goes out */
	see("end");
	see_number("ms", (int64_t)(now_ms() - begun));
	see_number("cut", output_cut);
	see_end();
	return 0;
}
