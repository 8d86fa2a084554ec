/* The supervisor: takes one bundle, runs one script, gives out frames. See ../__init__.py for its place and docs/decisions
 * for why it exists.
 *
 *   run [--bundle PATH|-]… [--script-uid N --script-gid N] [--nproc N] [--nofile N] [--fsize BYTES] [--memory-watch BYTES]
 *       [--sockets unix] [--seal] [--inodes N] [--program NAME --program-path PATH] [--lifeline] [--need-landlock]
 *
 * --seal: /workspace is a mount that this process may make read-only. --inodes: likewise bound the writable ones, whose
 * empty files would be memory that nobody counts. Where a security module takes the capability for both away (Ubuntu's
 * AppArmor profile for bubblewrap does), Landlock must keep the workspace read-only, else the run is refused.
 * --program: where in the box the plan's argv[0] is, if not on PATH.
 * --lifeline: the end of stdin means that whoever wanted the run is gone, and ends it. An engine that outlives its client
 * closes it then (Docker does, with StdinOnce).
 * --need-landlock: the workspace is neither a mount that could be made read-only nor another user's (a pod without any
 * capability), so that only Landlock keeps the script from writing there. Without it the run is refused.
 *
 * Its own life is one thread and one poll loop. Exit status 0: the last frame was delivered. */
#include "cloche.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define REAP_MS 5000u    /* how long killed processes may take to go; a process in the kernel's hands can take long */
#define FLUSH_MS 60000u  /* how long a reader may take for what is left at the end */
#define WATCH_MS 20u     /* how often the tree's memory is summed where no cgroup bounds it */

uint64_t now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

uint64_t now_ms(void)
{
	return now_us() / 1000u;
}

bool parse_u64(const char *text, uint64_t *value)
{
	char *end;

	if (text[0] < '0' || text[0] > '9')
		return false;
	errno = 0;
	*value = strtoull(text, &end, 10);
	return *end == 0 && errno == 0;
}

/* One run's state. */
static struct {
	struct options o;
	struct script script;
	int signals;
	int lifeline; /* -1: there is none */
	unsigned hardening;
	bool main_ended, killing;
	int status;
	const char *cause;
	uint64_t start_us, end_us; /* of the script */
	uint64_t limit_ms;         /* when its time is up */
	uint64_t kill_ms;          /* when SIGTERM becomes SIGKILL; 0: not asked to end */
	uint64_t watch_ms;
	uint64_t oom_before;
} run = {.cause = "none", .lifeline = -1};

static bool parse_options(int argc, char **argv, struct options *o)
{
	*o = (struct options){
		.workspace = "/workspace",
		.output = "/output",
		.script_uid = -1,
		.script_gid = -1,
		.nofile = 4096,
		.fsize = (uint64_t)64 << 20,
	};
	for (int i = 2; i < argc; i++) {
		const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
		uint64_t n = 0;
		bool number = parse_u64(value, &n) && n < (uint64_t)1 << 62;
		bool id = number && n < UINT32_MAX; /* the greatest means "keep" to the kernel */

		if (strcmp(name, "--seal") == 0) {
			o->seal_workspace = true;
			continue;
		}
		if (strcmp(name, "--need-landlock") == 0) {
			o->need_landlock = true;
			continue;
		}
		if (strcmp(name, "--lifeline") == 0) {
			o->lifeline = true;
			continue;
		}
		i++;
		if (strcmp(name, "--bundle") == 0 && o->n_bundles < sizeof o->bundles / sizeof *o->bundles)
			o->bundles[o->n_bundles++] = value;
		else if (strcmp(name, "--sockets") == 0 && strcmp(value, "unix") == 0)
			o->sockets_unix_only = true;
		else if (strcmp(name, "--script-uid") == 0 && id)
			o->script_uid = (int64_t)n;
		else if (strcmp(name, "--script-gid") == 0 && id)
			o->script_gid = (int64_t)n;
		else if (strcmp(name, "--nproc") == 0 && number)
			o->nproc = n;
		else if (strcmp(name, "--nofile") == 0 && number)
			o->nofile = n;
		else if (strcmp(name, "--fsize") == 0 && number)
			o->fsize = n;
		else if (strcmp(name, "--memory-watch") == 0 && number)
			o->memory_watch = n;
		else if (strcmp(name, "--inodes") == 0 && number)
			o->inodes = n;
		else if (strcmp(name, "--program") == 0)
			o->program = value;
		else if (strcmp(name, "--program-path") == 0)
			o->program_path = value;
		else
			return false;
	}
	if (o->n_bundles == 0)
		o->bundles[o->n_bundles++] = "-";
	return (o->script_uid < 0) == (o->script_gid < 0) && !o->program == !o->program_path;
}

/* Keeps stdin (which may bring the bundle) and a private copy of stdout; all else is closed, 1 and 2 lead nowhere. */
static bool own_descriptors(void)
{
	int out, null;

	/* A closed stdin would give its number to the next file that is opened. */
	if (fcntl(0, F_GETFD) < 0 && open("/dev/null", O_RDONLY) != 0)
		return false;
	if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0)
		return false;
	if (getpid() != 1 && prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0) /* orphans come to PID 1 anyway */
		return false;
	if (syscall(SYS_close_range, 3, ~0u, 0) != 0)
		for (int fd = 3; fd < 4096; fd++)
			close(fd);
	out = fcntl(1, F_DUPFD_CLOEXEC, 3);
	null = open("/dev/null", O_RDWR | O_CLOEXEC);
	if (out < 0 || null < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0)
		return false;
	close(null);
	frames_init(out);
	/* Where an engine keeps the output in a file (OpenSandbox), that is not the script's to read. */
	struct stat st;

	if (fstat(out, &st) == 0 && S_ISREG(st.st_mode) && st.st_uid == geteuid())
		fchmod(out, 0600);
	return fcntl(out, F_SETFL, O_WRONLY | O_NONBLOCK) == 0;
}

static bool block_signals(void)
{
	sigset_t all;

	sigfillset(&all);
	if (sigprocmask(SIG_SETMASK, &all, NULL) != 0)
		return false;
	run.signals = signalfd(-1, &all, SFD_CLOEXEC | SFD_NONBLOCK);
	return run.signals >= 0;
}

static const char *refusal(void)
{
	const struct options *o = &run.o;

	if (getpid() == 1)
		run.hardening |= HARD_PID_1;
	if (!script_same_uid(o))
		run.hardening |= HARD_OWN_UID;
	if ((o->script_uid < 0 ? (int64_t)getuid() : o->script_uid) == 0)
		return "the script would run as uid 0";
	if ((o->script_gid < 0 ? (int64_t)getgid() : o->script_gid) == 0)
		return "the script would run with gid 0";
	if (!script_same_uid(o) && geteuid() != 0)
		return "the supervisor may not give the script a uid of its own";
	if (getpid() != 1 && script_same_uid(o))
		return "the supervisor is neither PID 1 nor of another uid than the script";
	return NULL;
}

static bool read_bundles(struct bundle *b)
{
	static uint8_t chunk[64 * 1024];

	for (size_t i = 0; i < run.o.n_bundles; i++) {
		bool standard = strcmp(run.o.bundles[i], "-") == 0;
		int fd = standard ? 0 : open(run.o.bundles[i], O_RDONLY | O_CLOEXEC);

		if (fd < 0) {
			b->error = "it cannot be opened";
			return false;
		}
		while (!b->done) {
			ssize_t n = read(fd, chunk, sizeof chunk);

			if (n < 0 && errno == EINTR)
				continue;
			if (n <= 0)
				break;
			if (!bundle_feed(b, chunk, (size_t)n))
				return false;
		}
		if (!standard)
			close(fd);
	}
	return bundle_finish(b);
}

/* What an image brings under the workspace's name is not the script's to write, and its /tmp has to be one that several users
 * share: where an engine cannot mount (OpenSandbox), others than the script keep files there. */
static bool guarded_folders(const struct options *o)
{
	struct stat st;

	if (lstat(o->workspace, &st) != 0)
		return false;
	if (st.st_uid != geteuid() && lchown(o->workspace, geteuid(), getegid()) != 0)
		return false;
	if (!S_ISLNK(st.st_mode) && (st.st_mode & 07777) != 0755 && chmod(o->workspace, 0755) != 0)
		return false;
	if (mkdir(WRITABLE_TMP, 01777) != 0 && errno != EEXIST)
		return false;
	if (stat(WRITABLE_TMP, &st) != 0)
		return false;
	return st.st_uid == (uid_t)o->script_uid || (st.st_mode & 07777) == 01777 || chmod(WRITABLE_TMP, 01777) == 0;
}

/* Folders that the engine could not mount are made here, the script's own ones given to it. */
static bool folders(void)
{
	const struct options *o = &run.o;
	bool other = !script_same_uid(o);

	if (mkdir(o->workspace, 0755) != 0 && errno != EEXIST)
		return false;
	if (mkdir(o->output, 0755) != 0 && errno != EEXIST)
		return false;
	if (!other)
		return true;
	if (!guarded_folders(o))
		return false;
	struct stat st;

	/* Where the engine has mounted it as the script's, the supervisor may lack the capability to say so again. */
	if (stat(o->output, &st) == 0 && st.st_uid == (uid_t)o->script_uid && st.st_gid == (gid_t)o->script_gid)
		return true;
	return chown(o->output, (uid_t)o->script_uid, (gid_t)o->script_gid) == 0;
}

static bool take_bundle(struct bundle *b, int *input)
{
	struct unpacker u = {.root = -1, .fd = -1, .input = -1};

	if (!folders() || (u.root = open(run.o.workspace, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)) < 0) {
		frame_fail("backend-unavailable", "The box has no usable %s or %s: %s.", run.o.workspace, run.o.output,
			   strerror(errno));
		return false;
	}
	bundle_init(b, &unpack_sink, &u);
	bool ok = read_bundles(b);

	close(u.root);
	if (!ok && b->sink_errno == ENOSPC)
		frame_fail("workspace-too-large", "The workspace does not fit into the box.");
	else if (!ok)
		frame_fail("protocol-error", "The bundle cannot be read: %s%s%s.", b->error, b->sink_errno ? ": " : "",
			   b->sink_errno ? strerror(b->sink_errno) : "");
	if (run.o.lifeline && (run.lifeline = fcntl(0, F_DUPFD_CLOEXEC, 3)) < 0) {
		frame_fail("backend-unavailable", "The box cannot tell when its client is gone: %s.", strerror(errno));
		return false;
	}
	/* What brought the bundle is not the script's to read. */
	int null = open("/dev/null", O_RDONLY | O_CLOEXEC);

	if (ok && (null < 0 || dup2(null, 0) < 0)) {
		frame_fail("backend-unavailable", "The box has no usable /dev/null: %s.", strerror(errno));
		ok = false;
	}
	if (null >= 0)
		close(null);
	*input = u.input >= 0 ? u.input : 0;
	return ok;
}

static void seal_mounts(void)
{
	const char *writable[] = {run.o.output, WRITABLE_TMP, WRITABLE_SHM};
	bool bounded = run.o.inodes > 0;

	if (run.o.seal_workspace) {
		bool sealed = seal_workspace(run.o.workspace);

		run.o.need_landlock = run.o.need_landlock || !sealed;
		run.hardening |= sealed ? HARD_WORKSPACE_SEALED : 0u;
	}
	for (size_t i = 0; bounded && i < sizeof writable / sizeof *writable; i++)
		bounded = bound_inodes(writable[i], run.o.inodes);
	run.hardening |= bounded ? HARD_INODES : 0u;
}

/* False: there is no process left. */
static bool reap(void)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG | __WALL)) > 0)
		if (pid == run.script.pid && !run.main_ended) {
			run.main_ended = true;
			run.status = status;
			run.end_us = now_us();
		}
	return pid == 0 || errno != ECHILD;
}

/* Ends the run: SIGTERM now, SIGKILL after the grace. The first cause is the one that is told. */
static void end_run(const char *cause, uint64_t grace_ms)
{
	if (run.kill_ms != 0)
		return;
	run.cause = cause;
	run.kill_ms = now_ms() + grace_ms;
	if (grace_ms > 0) {
		kill_all(&run.o, SIGTERM);
		kill_all(&run.o, SIGCONT);
	}
}

static void read_signals(uint64_t grace_ms)
{
	struct signalfd_siginfo info;
	bool asked = false;

	while (read(run.signals, &info, sizeof info) == (ssize_t)sizeof info)
		/* As PID 1: only from outside the box (no pid here), whatever got past the script's filter. */
		if ((info.ssi_signo == SIGTERM || info.ssi_signo == SIGINT) &&
		    (getpid() != 1 || (info.ssi_pid == 0 && info.ssi_code <= 0)))
			asked = true;
	reap();
	if (asked && !run.main_ended)
		end_run("cancel", grace_ms);
}

/* Whether whoever wanted the run is gone. */
static bool lifeline_cut(void)
{
	uint8_t more[512];
	ssize_t n = read(run.lifeline, more, sizeof more);

	return n == 0 || (n < 0 && errno != EINTR && errno != EAGAIN);
}

static int wait_ms(uint64_t now)
{
	uint64_t next = run.kill_ms ? run.kill_ms : run.limit_ms;

	if (run.o.memory_watch && run.watch_ms < next)
		next = run.watch_ms;
	/* Without room nothing can be sent that is due: then it is the reader that is waited for. */
	for (unsigned i = 0; i < 2 && frames_room(); i++) {
		uint64_t due = pump_due_ms(i, now, run.limit_ms);

		if (due < next)
			next = due;
	}
	return next <= now ? 0 : next - now > 60000 ? 60000 : (int)(next - now);
}

static void watch_memory(uint64_t now)
{
	if (run.main_ended || run.o.memory_watch == 0 || now < run.watch_ms)
		return;
	bool too_much = tree_bytes(script_same_uid(&run.o) ? -1 : run.o.script_uid, run.o.memory_watch) > run.o.memory_watch;

	run.watch_ms = now_ms() + WATCH_MS;
	if (too_much) {
		run.kill_ms = 0; /* also when it is already being asked to end: there is no time for a grace */
		end_run(strcmp(run.cause, "none") == 0 ? "memory" : run.cause, 0);
	}
}

/* Until the script's main process has ended, or must not go on. */
static void supervise(const struct plan *p)
{
	while (!run.main_ended && !frames_gone()) {
		struct pollfd fds[5] = {
			{.fd = run.signals, .events = POLLIN},
			{.fd = frames_fd(), .events = frames_pending() ? POLLOUT : 0},
			{.fd = frames_room() ? run.script.pipes[0] : -1, .events = POLLIN},
			{.fd = frames_room() ? run.script.pipes[1] : -1, .events = POLLIN},
			{.fd = run.lifeline, .events = POLLIN},
		};

		poll(fds, 5, wait_ms(now_ms()));
		uint64_t now = now_ms();

		if (fds[1].revents & (POLLERR | POLLHUP | POLLNVAL))
			return; /* nobody reads any more: cloche is gone */
		if (fds[4].revents && lifeline_cut())
			end_run("cancel", 0);
		if (fds[1].revents & POLLOUT)
			frames_push();
		for (unsigned i = 0; i < 2; i++)
			if (fds[2 + i].revents && !pump_read(i, run.script.pipes[i], now, run.limit_ms)) {
				close(run.script.pipes[i]);
				run.script.pipes[i] = -1;
			}
		pump_tick(now, run.limit_ms);
		frames_push();
		if (fds[0].revents)
			read_signals(p->grace_ms);
		watch_memory(now);
		if (!run.main_ended && now >= run.limit_ms)
			end_run("timeout", p->grace_ms);
		if (run.kill_ms && now >= run.kill_ms)
			return;
	}
}

/* Whatever the script started, wherever it went. */
static void kill_tree(void)
{
	for (uint64_t end = now_ms() + REAP_MS; now_ms() < end;) {
		struct pollfd p = {.fd = run.signals, .events = POLLIN};
		struct signalfd_siginfo info;

		kill_all(&run.o, SIGKILL);
		if (!reap())
			return;
		poll(&p, 1, 10);
		while (read(run.signals, &info, sizeof info) > 0)
			;
	}
}

static void drain(void)
{
	for (unsigned i = 0; i < 2; i++) {
		uint64_t now = now_ms(), end = now + FLUSH_MS;

		while (run.script.pipes[i] >= 0 && now < end && !frames_gone()) {
			struct pollfd p = {.fd = run.script.pipes[i], .events = POLLIN};

			if (!frames_room())
				frames_flush(1000);
			/* All writers are dead: what is there is all there is. */
			if (poll(&p, 1, 0) <= 0 || !pump_read(i, run.script.pipes[i], now, end))
				break;
			now = now_ms();
		}
		pump_finish(i);
	}
}

/* Shared memory outlives whoever made it, and counts against the box while its artifacts are read. It is removed by its owner,
 * and is known by him: where an engine gave the box no namespace of its own for it, others' is left alone. */
static void forget_shared_memory(const struct options *o)
{
	struct shm_info info;
	uid_t owner = o->script_uid < 0 ? getuid() : (uid_t)o->script_uid;
	int last = shmctl(0, SHM_INFO, (struct shmid_ds *)(void *)&info);

	if (!become_script(o))
		last = -1;
	for (int i = 0; i <= last; i++) {
		struct shmid_ds segment;
		int id = shmctl(i, SHM_STAT, &segment);

		if (id >= 0 && segment.shm_perm.uid == owner)
			shmctl(id, IPC_RMID, NULL);
	}
	become_supervisor();
}

static int finish(const struct plan *p)
{
	struct ending e = {.status = run.status, .cause = run.cause};
	struct rusage used;
	uint64_t kills = 0;

	if (!run.main_ended) { /* it could not be killed in time; the engine will */
		e.status = SIGKILL;
		run.end_us = now_us();
	}
	forget_shared_memory(&run.o);
	drain();
	/* By the script's own rights: the supervisor may lack the capability to read everything, and should not need it. */
	e.skipped = become_script(&run.o) ? collect(run.o.output, p->artifact_bytes, p->artifact_count) : 1;
	become_supervisor();
	if (oom_kills(&kills))
		e.oom_kills = kills > run.oom_before ? kills - run.oom_before : 0;
	if (strcmp(run.cause, "none") == 0 && WIFSIGNALED(e.status) && WTERMSIG(e.status) == SIGKILL && e.oom_kills > 0)
		e.cause = "memory";
	if (strcmp(run.cause, "memory") == 0 && e.oom_kills == 0)
		e.oom_kills = 1;
	getrusage(RUSAGE_CHILDREN, &used);
	e.cpu_us = (uint64_t)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1000000u +
		   (uint64_t)(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
	e.peak_bytes = cgroup_peak_bytes();
	if (e.peak_bytes == 0)
		e.peak_bytes = (uint64_t)used.ru_maxrss * 1024u;
	e.run_us = run.end_us - run.start_us;
	for (unsigned i = 0; i < 2; i++) {
		e.bytes[i] = pump_total(i);
		e.truncated[i] = pump_truncated(i);
	}
	e.hardening = run.hardening;
	frame_end(&e);
	return frames_flush(FLUSH_MS) ? 0 : 1;
}

static int run_main(void)
{
	static struct bundle bundle;
	const char *why;
	int input = -1;

	frame_hello();
	frames_push();
	if ((why = refusal()) != NULL) {
		frame_fail("isolation-unavailable", "The box is not safe: %s.", why);
		return 1;
	}
	if (!take_bundle(&bundle, &input))
		return 1;
	seal_mounts();
	if (script_same_uid(&run.o) && !drop_own_capabilities(true)) {
		frame_fail("isolation-unavailable", "Capabilities cannot be dropped: %s.", strerror(errno));
		return 1;
	}
	if (!pump_init(bundle.plan.output_bytes)) {
		frame_fail("backend-unavailable", "The box has no memory for the output's tail.");
		return 1;
	}
	if (run.o.memory_watch)
		run.hardening |= HARD_MEMORY_WATCH;
	if (oom_kills(&run.oom_before))
		run.hardening |= HARD_OOM_COUNTER;
	if (!script_start(&run.script, &run.o, &bundle.plan, input, &run.hardening))
		return 1;
	run.start_us = now_us();
	run.limit_ms = now_ms() + bundle.plan.timeout_ms;
	frame_start();
	frames_push();
	supervise(&bundle.plan);
	kill_tree();
	return finish(&bundle.plan);
}

/* With the kernel that is seen here: where an engine promises one of its own, this shows it. */
static int print_version(void)
{
	struct utsname kernel;

	if (uname(&kernel) != 0)
		return 1;
	return printf("cloche-supervisor, frames %d, kernel %s\n", FRAME_VERSION, kernel.release) > 0 ? 0 : 1;
}

int main(int argc, char **argv)
{
	if (argc >= 2 && strcmp(argv[1], "launch") == 0)
		return launch_main(argc, argv);
	if (argc >= 2 && strcmp(argv[1], "probe") == 0)
		return probe_main(argc, argv);
	if (argc == 2 && strcmp(argv[1], "version") == 0)
		return print_version();
	if (argc < 2 || strcmp(argv[1], "run") != 0 || !parse_options(argc, argv, &run.o)) {
		fprintf(stderr, "usage: cloche-supervisor run|launch|probe|version …\n");
		return 2;
	}
	umask(022);
	if (!own_descriptors() || !block_signals())
		return 125;
	return run_main();
}
