/* "launch": what the local backend starts instead of bubblewrap itself. It enters the box's cgroups, leaves root for a uid
 * of the run's own, ties its life to cloche's, and becomes bubblewrap. In C because it must happen between fork and exec,
 * where a threaded Python cannot do it safely.
 *
 *   launch --parent PID [--procs FILE]… [--shelf DIR [--show SRC]…] [--uid N --gid N] -- PROGRAM ARG…
 *
 * Without "--" it stands by: it enters the cgroups at once, for which the kernel may take some milliseconds (a write to
 * cgroup.procs waits for an RCU grace period), and reads the rest of its arguments from stdin when there is a run: four
 * bytes of length, little endian, then the arguments, a NUL behind each. The bundle follows on the same pipe.
 *
 * Two processes: a guardian, which cloche knows, and its child, which becomes bubblewrap. bubblewrap's own promise to die
 * with its parent does not hold in its first moments (its child waits on an eventfd before it makes that promise; killed in
 * between, the outer one leaves it behind for ever). The guardian adopts whatever is orphaned and kills it: when cloche
 * dies, when cloche asks (SIGTERM), and when bubblewrap is gone.
 *
 * --shelf: an existing folder on which, in a mount namespace of its own, a tmpfs is laid; every SRC is bound there as
 * DIR/0, DIR/1, … So a uid that may not enter /root can still be shown the interpreter that lives in it. */
#include "cloche.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int die(const char *what, const char *which)
{
	fprintf(stderr, "launch: %s %s: %s\n", what, which, strerror(errno));
	return 125;
}

static bool lay_shelf(const char *dir)
{
	return unshare(CLONE_NEWNS) == 0 && mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0 &&
	       mount("cloche", dir, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=64k") == 0;
}

static bool show(const char *dir, unsigned number, const char *source)
{
	char from[64], to[512];
	struct stat st;
	int fd = open(source, O_PATH | O_CLOEXEC), made;

	if (fd < 0 || fstat(fd, &st) != 0)
		return false;
	snprintf(from, sizeof from, "/proc/self/fd/%d", fd);
	if (snprintf(to, sizeof to, "%s/%u", dir, number) >= (int)sizeof to) {
		errno = ENAMETOOLONG;
		return false;
	}
	if (S_ISDIR(st.st_mode)) {
		if (mkdir(to, 0755) != 0)
			return false;
	} else {
		made = open(to, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
		if (made < 0)
			return false;
		close(made);
	}
	bool ok = mount(from, to, NULL, MS_BIND | MS_REC, NULL) == 0;

	close(fd);
	return ok;
}

static bool enter_cgroup(const char *procs)
{
	int fd = open(procs, O_WRONLY | O_CLOEXEC);
	bool ok = fd >= 0 && write(fd, "0", 1) == 1;

	if (fd >= 0)
		close(fd);
	return ok;
}

/* Exactly n bytes: what follows is the bundle. */
static bool read_all(uint8_t *to, size_t n)
{
	while (n > 0) {
		ssize_t got = read(0, to, n);

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return false;
		to += got;
		n -= (size_t)got;
	}
	return true;
}

#define VECTOR_BYTES (256u * 1024)
#define VECTOR_WORDS 2048

/* The rest of the arguments, from stdin. Gives their number, 0 if they did not come. */
static int stand_by(char **words)
{
	static uint8_t text[VECTOR_BYTES];
	uint8_t head[4];
	size_t length;
	int n = 0;

	prctl(PR_SET_NAME, "cloche-standby");
	if (!read_all(head, sizeof head))
		return 0;
	length = (size_t)head[0] | (size_t)head[1] << 8 | (size_t)head[2] << 16 | (size_t)head[3] << 24;
	if (length == 0 || length > sizeof text || !read_all(text, length) || text[length - 1] != 0)
		return 0;
	for (size_t at = 0; at < length && n < VECTOR_WORDS; at += strlen((char *)text + at) + 1)
		words[n++] = (char *)text + at;
	words[n] = NULL;
	return n;
}

/* What ends the guardian's wait; all but the first mean: end the box. */
static const int guarded[] = {SIGCHLD, SIGTERM, SIGINT, SIGHUP};

struct launch {
	const char *shelf, *sources[64];
	unsigned shown;
	uint64_t uid, gid, parent;
};

/* Takes options until "--" or the end. Gives the index behind them, -1 after a message. */
static int take(struct launch *l, int i, int argc, char **argv)
{
	for (; i + 1 < argc && strcmp(argv[i], "--") != 0; i += 2) {
		const char *name = argv[i], *value = argv[i + 1];

		if (strcmp(name, "--procs") == 0) {
			if (!enter_cgroup(value)) {
				die("entering the cgroup", value);
				return -1;
			}
		} else if (strcmp(name, "--shelf") == 0) {
			l->shelf = value;
		} else if (strcmp(name, "--show") == 0 && l->shown < sizeof l->sources / sizeof *l->sources) {
			l->sources[l->shown++] = value;
		} else if (!(strcmp(name, "--uid") == 0 && parse_u64(value, &l->uid)) &&
			   !(strcmp(name, "--gid") == 0 && parse_u64(value, &l->gid)) &&
			   !(strcmp(name, "--parent") == 0 && parse_u64(value, &l->parent))) {
			errno = EINVAL;
			die("option", name);
			return -1;
		}
	}
	return i;
}

static bool tie_to(uint64_t parent, int death_signal)
{
	return prctl(PR_SET_PDEATHSIG, death_signal) == 0 && (uint64_t)getppid() == parent;
}

/* Waits for the child, or for the order to end it; then nothing that it started is left. Gives its exit status. */
static int guard(pid_t child, const sigset_t *awaited)
{
	int status = 0, other = 0, sig;
	bool ended = false;

	prctl(PR_SET_NAME, "cloche-guard");
	syscall(SYS_close_range, 0, ~0u, 0); /* the box's pipes are the box's alone */
	while (!ended && (sigwait(awaited, &sig) != 0 || sig == SIGCHLD)) {
		siginfo_t info = {0};

		/* Left unreaped: until then its number, and that of its session, belong to nobody else. */
		ended = waitid(P_PID, (id_t)child, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == child;
	}
	/* The child, which may not have its session yet, and all that has not left its session; the rest has by then promised
	 * to die with its parent. What is orphaned comes to us. */
	kill(child, SIGKILL);
	kill(-child, SIGKILL);
	for (pid_t pid; (pid = waitpid(-1, &other, 0)) > 0 || errno == EINTR;)
		if (pid == child)
			status = other;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* Becomes bubblewrap. */
static int child_main(int argc, char **argv)
{
	static char *words[VECTOR_WORDS + 1];
	struct launch l = {.parent = (uint64_t)getppid()};
	uint64_t guardian = l.parent;
	int i = take(&l, 2, argc, argv);

	if (i < 0)
		return 125;
	if (i >= argc) {
		argc = stand_by(words);
		argv = words;
		if (argc == 0)
			return 0; /* no run came */
		i = take(&l, 0, argc, argv);
		if (i < 0)
			return 125;
	}
	if (i + 1 >= argc) {
		errno = EINVAL;
		return die("usage", "");
	}
	if (l.shelf) {
		if (!lay_shelf(l.shelf))
			return die("a mount namespace for", l.shelf);
		for (unsigned n = 0; n < l.shown; n++)
			if (!show(l.shelf, n, l.sources[n]))
				return die("showing", l.sources[n]);
	}
	if (l.uid != 0 && (setgroups(0, NULL) != 0 || setresgid((gid_t)l.gid, (gid_t)l.gid, (gid_t)l.gid) != 0 ||
			   setresuid((uid_t)l.uid, (uid_t)l.uid, (uid_t)l.uid) != 0))
		return die("becoming uid", "of the run");
	if (!tie_to(guardian, SIGKILL)) /* again: the change of uid has cleared it */
		return die("the guardian is gone:", "");
	execv(argv[i + 1], argv + i + 1);
	return die("starting", argv[i + 1]);
}

int launch_main(int argc, char **argv)
{
	uint64_t parent = 0, guardian = (uint64_t)getpid();
	sigset_t awaited;
	pid_t child;

	if (argc < 4 || strcmp(argv[2], "--parent") != 0 || !parse_u64(argv[3], &parent)) {
		errno = EINVAL;
		return die("usage", "");
	}
	/* What started cloche may ignore SIGCHLD, and then nobody here would ever learn of a child's end. */
	for (int sig = 1; sig <= 31; sig++)
		signal(sig, SIG_DFL);
	sigemptyset(&awaited);
	for (size_t i = 0; i < sizeof guarded / sizeof *guarded; i++)
		sigaddset(&awaited, guarded[i]);
	sigprocmask(SIG_BLOCK, &awaited, NULL);
	if (prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0 || !tie_to(parent, SIGTERM))
		return die("the parent is gone:", "");
	child = fork();
	if (child < 0)
		return die("fork", "");
	if (child > 0)
		return guard(child, &awaited);
	sigprocmask(SIG_UNBLOCK, &awaited, NULL);
	if (setsid() < 0 || !tie_to(guardian, SIGKILL))
		return die("the guardian is gone:", "");
	return child_main(argc, argv);
}
