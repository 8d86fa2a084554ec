/* The script's process: how it starts, exec-form, and how everything that it started ends. */
#include "cloche.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

bool script_same_uid(const struct options *o)
{
	return o->script_uid < 0 || (uid_t)o->script_uid == getuid();
}

bool become_script(const struct options *o)
{
	if (script_same_uid(o) || getuid() != 0)
		return true;
	return setresgid((gid_t)-1, (gid_t)o->script_gid, (gid_t)-1) == 0 &&
	       setresuid((uid_t)-1, (uid_t)o->script_uid, (uid_t)-1) == 0;
}

bool become_supervisor(void)
{
	/* The uid first: without it there is no right to change the gid. */
	bool ok = setresuid((uid_t)-1, getuid(), (uid_t)-1) == 0 && setresgid((gid_t)-1, getgid(), (gid_t)-1) == 0;

	/* A change of identity resets it to what fs.suid_dumpable says. */
	return prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0 && ok;
}

/* What the child tells through a pipe that its exec closes. */
struct report {
	int error;
	char what[128];
	unsigned hardening;
};

/* execvp with the script's own PATH, leaving no other way than the kernel's: a file that is no program is an error. */
static void exec_on_path(const struct options *o, char **argv, char **envp)
{
	const char *path = "/usr/local/bin:/usr/bin:/bin";
	int error = ENOENT;
	char full[4096];

	if (o->program && strcmp(argv[0], o->program) == 0)
		argv[0] = strdup(o->program_path); /* a virtual environment is found through the name it is called by */
	if (!argv[0])
		return;
	if (strchr(argv[0], '/')) {
		execve(argv[0], argv, envp);
		return;
	}
	size_t n = strlen(argv[0]);

	for (char **e = envp; *e; e++)
		if (strncmp(*e, "PATH=", 5) == 0)
			path = *e + 5;
	for (const char *p = path; *p;) {
		size_t len = strcspn(p, ":");

		if (len > 0 && p[0] == '/' && len + n + 2 <= sizeof full) {
			memcpy(full, p, len);
			full[len] = '/';
			memcpy(full + len + 1, argv[0], n + 1);
			execve(full, argv, envp);
			if (errno != ENOENT && errno != ENOTDIR)
				error = errno;
			if (error == E2BIG)
				break;
		}
		p += len + (p[len] == ':');
	}
	errno = error;
}

static void child(const struct options *o, const struct plan *p, const int fds[3], int tell) __attribute__((noreturn));
static void child(const struct options *o, const struct plan *p, const int fds[3], int tell)
{
	struct report report = {0};
	const char *problem = NULL;
	pid_t supervisor = getppid();
	sigset_t none;

	/* Past the C library, which keeps 32 and 33 for itself: what started cloche may ignore them (make does). */
	static const unsigned long default_action[8]; /* the kernel's struct sigaction, all zero */

	for (int sig = 1; sig <= 64; sig++)
		syscall(SYS_rt_sigaction, sig, default_action, NULL, 8);
	if (setsid() < 0 || dup2(fds[0], 0) < 0 || dup2(fds[1], 1) < 0 || dup2(fds[2], 2) < 0)
		problem = "its file descriptors";
	else if (chdir(o->workspace) != 0)
		problem = "chdir";
	else
		problem = harden_script(o, supervisor, &report.hardening);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	if (!problem) {
		/* Only what was applied is told before the exec; after it the pipe is closed, and that means started. */
		if (write(tell, &report, sizeof report) != (ssize_t)sizeof report)
			_exit(127);
		exec_on_path(o, p->argv, p->envp);
		problem = "exec";
	}
	report.error = errno;
	snprintf(report.what, sizeof report.what, "%s", problem);
	if (write(tell, &report, sizeof report) != (ssize_t)sizeof report)
		_exit(126);
	_exit(127);
}

static void tell_failure(const struct report *r, const char *program)
{
	if (strcmp(r->what, "exec") != 0)
		frame_fail("isolation-unavailable", "The script was not started: %s: %s.", r->what, strerror(r->error));
	else if (r->error == E2BIG)
		frame_fail("invalid-spec", "Arguments and environment together are larger than the kernel takes.");
	else if (r->error == ENOENT)
		frame_fail("interpreter-missing", "%s is not on the box's PATH.", program);
	else
		frame_fail("interpreter-missing", "%s cannot be started in the box: %s.", program, strerror(r->error));
}

bool script_start(struct script *s, const struct options *o, const struct plan *p, int input, unsigned *hardening)
{
	int out[2] = {-1, -1}, err[2] = {-1, -1}, tell[2] = {-1, -1};
	struct report report = {0};

	/* As the script, whose own its stdout and stderr are: it may open /dev/stdout again. */
	bool made = become_script(o) && pipe2(out, O_CLOEXEC) == 0 && pipe2(err, O_CLOEXEC) == 0;
	int error = errno;

	if (!become_supervisor() || !made || pipe2(tell, O_CLOEXEC) != 0) {
		errno = made ? errno : error;
		frame_fail("backend-unavailable", "No pipes for the script: %s.", strerror(errno));
		return false;
	}
	s->pid = fork();
	if (s->pid < 0) {
		frame_fail("backend-unavailable", "No process for the script: %s.", strerror(errno));
		return false;
	}
	if (s->pid == 0)
		child(o, p, (int[3]){input, out[1], err[1]}, tell[1]);
	close(out[1]);
	close(err[1]);
	close(tell[1]);
	if (input > 2)
		close(input);
	bool failed = true;

	/* What holds if it tells nothing. */
	snprintf(report.what, sizeof report.what, "its process died");
	report.error = ECHILD;
	/* The first report comes with no error; a second one, or a child that died before, means that nothing was started. */
	if (read(tell[0], &report, sizeof report) == (ssize_t)sizeof report && report.error == 0) {
		struct report second;

		*hardening |= report.hardening;
		failed = read(tell[0], &second, sizeof second) == (ssize_t)sizeof second;
		if (failed)
			report = second;
	}
	close(tell[0]);
	if (failed) {
		waitpid(s->pid, NULL, 0);
		tell_failure(&report, p->argv[0]);
		return false;
	}
	s->pipes[0] = out[0];
	s->pipes[1] = err[0];
	for (int i = 0; i < 2; i++)
		fcntl(s->pipes[i], F_SETFL, O_NONBLOCK);
	return true;
}

/* Signals what has the script's uid, one process after the other: only for want of something better, since a script that
 * forks can be quicker. */
static void kill_one_by_one(const struct options *o, int sig)
{
	DIR *proc = opendir("/proc");

	if (!proc)
		return;
	for (struct dirent *entry; (entry = readdir(proc)) != NULL;) {
		struct stat st;

		if (entry->d_name[0] < '1' || entry->d_name[0] > '9')
			continue;
		/* The open folder stands for this process and no other that gets its number later (Linux 5.1). */
		int process = openat(dirfd(proc), entry->d_name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

		if (process < 0)
			continue;
		if (fstat(process, &st) == 0 && st.st_uid == (uid_t)o->script_uid)
			syscall(SYS_pidfd_send_signal, process, sig, NULL, 0);
		close(process);
	}
	closedir(proc);
}

/* Where this is not PID 1, kill(-1) would reach more than the box: a helper with the script's uid does it, and the kernel
 * lets it reach only what has that uid. To fork and to be killed by one kill(-1) exclude each other in the kernel, so once is
 * enough. The script may stop or kill the helper before; then there is another one. */
static void kill_by_helper(const struct options *o, int sig)
{
	for (int tries = 0; tries < 100; tries++) {
		pid_t pid = fork();
		int status = 0;

		if (pid == 0) {
			/* The saved uid is kept: so the supervisor may kill a stopped helper without any capability. */
			if (setresgid((gid_t)o->script_gid, (gid_t)o->script_gid, (gid_t)o->script_gid) != 0 ||
			    setresuid((uid_t)o->script_uid, (uid_t)o->script_uid, (uid_t)-1) != 0)
				_exit(1);
			_exit(kill(-1, sig) == 0 || errno == ESRCH ? 0 : 1);
		}
		if (pid < 0) {
			kill_one_by_one(o, sig); /* the script may hold every pid that the box has */
		} else if (waitpid(pid, &status, WUNTRACED) == pid) {
			if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
				return;
			if (WIFSTOPPED(status)) {
				kill(pid, SIGKILL);
				waitpid(pid, NULL, 0);
			}
		}
	}
}

void kill_all(const struct options *o, int sig)
{
	bool helper = !script_same_uid(o);

	/* As PID 1 it reaches all there is; ESRCH says that there is nothing. Where the helper comes too, only what cannot be
	 * caught is sent: a script that catches SIGTERM would be told twice. */
	if (getpid() == 1 && (!helper || sig == SIGKILL) && kill(-1, sig) != 0 && errno == ESRCH)
		return;
	/* Also as PID 1: its engine may have left it no CAP_KILL, and the kernel does not say that it reached nobody. */
	if (helper)
		kill_by_helper(o, sig);
}
