/* What is taken from the script before it starts. Runs in the child, between fork and exec; the supervisor itself only gives
 * up its capabilities. */
#include "cloche.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/landlock.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

bool seal_workspace(const char *path)
{
	return mount(NULL, path, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, NULL) == 0;
}

bool bound_inodes(const char *path, uint64_t inodes)
{
	char options[64];

	snprintf(options, sizeof options, "nr_inodes=%llu", (unsigned long long)inodes);
	return mount(NULL, path, NULL, MS_REMOUNT | MS_NOSUID | MS_NODEV, options) == 0;
}

bool drop_own_capabilities(bool bounding)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct none[2] = {{0}, {0}};

	if (bounding)
		for (unsigned long cap = 0; prctl(PR_CAPBSET_READ, cap) >= 0; cap++)
			prctl(PR_CAPBSET_DROP, cap); /* without CAP_SETPCAP it fails; the check below tells */
	prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
	return syscall(SYS_capset, &header, none) == 0;
}

static bool no_capabilities(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct have[2];

	if (syscall(SYS_capget, &header, have) != 0)
		return false;
	for (int i = 0; i < 2; i++)
		if (have[i].effective || have[i].permitted || have[i].inheritable)
			return false;
	return true;
}

/* Lowers a limit to the value, or to what the engine allows if that is less. */
static bool limit(int what, uint64_t value)
{
	struct rlimit have;

	if (getrlimit((int)what, &have) != 0)
		return false;
	if (have.rlim_max != RLIM_INFINITY && value > have.rlim_max)
		value = have.rlim_max;
	have.rlim_cur = have.rlim_max = value;
	return setrlimit((int)what, &have) == 0;
}

/* Writes only where the box's design has them, and no signals out of the script's own domain. The mounts already forbid
 * most of it; Landlock holds where a mount cannot be made read-only. */
static unsigned landlock(const struct options *o)
{
	/* From linux/landlock.h of 6.12: rights that later headers know, so that older ones compile this. */
	const uint64_t read_rights = LANDLOCK_ACCESS_FS_EXECUTE | LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR;
	const uint64_t refer = 1u << 13, truncate = 1u << 14;
	struct {
		uint64_t fs, net, scoped;
	} rules = {0};
	/* Not /dev/ptmx: the machine has one number of pseudo-terminals for all. Not /proc: there a process could make itself less
	 * likely to be killed for want of memory than its supervisor (oom_score_adj). */
	const char *writable[] = {o->output, WRITABLE_TMP, WRITABLE_SHM, "/dev/null", "/dev/full", "/dev/tty",
				  /* A shared map of it is memory that the watch does not see; see seccomp.c. */
				  o->memory_watch > 0 ? "/dev/null" : "/dev/zero"};
	long abi = syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);
	unsigned done = 0;

	/* ABI 1 cannot allow a rename between two folders; before 3 nothing forbids to truncate a file. */
	if (abi < (o->need_landlock ? 3 : 2))
		return 0;
	rules.fs = (1u << 13) - 1; /* all of ABI 1 */
	rules.fs = (rules.fs & ~read_rights) | refer | (abi >= 3 ? truncate : 0);
	rules.scoped = abi >= 6 ? 1 | 2 : 0; /* LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET, LANDLOCK_SCOPE_SIGNAL */
	int set = (int)syscall(SYS_landlock_create_ruleset, &rules, abi >= 6 ? 24 : 8, 0);

	if (set < 0)
		return 0;
	for (size_t i = 0; i < sizeof writable / sizeof *writable; i++) {
		struct landlock_path_beneath_attr rule = {.allowed_access = rules.fs};

		rule.parent_fd = open(writable[i], O_PATH | O_CLOEXEC);
		if (rule.parent_fd < 0)
			continue;
		if (syscall(SYS_landlock_add_rule, set, LANDLOCK_RULE_PATH_BENEATH, &rule, 0) != 0 && errno == EINVAL) {
			rule.allowed_access = LANDLOCK_ACCESS_FS_WRITE_FILE | (rules.fs & truncate); /* a file */
			syscall(SYS_landlock_add_rule, set, LANDLOCK_RULE_PATH_BENEATH, &rule, 0);
		}
		close(rule.parent_fd);
	}
	if (syscall(SYS_landlock_restrict_self, set, 0) == 0)
		done = HARD_LANDLOCK_WRITES | (rules.scoped ? HARD_LANDLOCK_SIGNALS : 0u);
	close(set);
	return done;
}

static const char *change_identity(const struct options *o)
{
	gid_t gid = o->script_gid >= 0 ? (gid_t)o->script_gid : getgid();
	uid_t uid = o->script_uid >= 0 ? (uid_t)o->script_uid : getuid();

	/* EPERM: a user namespace that forbids it has no groups to give up. */
	if (setgroups(0, NULL) != 0 && errno != EPERM)
		return "setgroups";
	if (setresgid(gid, gid, gid) != 0)
		return "setresgid";
	if (setresuid(uid, uid, uid) != 0)
		return "setresuid";
	if (getuid() == 0 || geteuid() == 0) {
		errno = EPERM;
		return "the script would run as uid 0";
	}
	return NULL;
}

const char *harden_script(const struct options *o, pid_t supervisor, unsigned *done)
{
	const char *problem;
	int fd;

	/* The supervisor's own setting was inherited, and with it the files of /proc/self belong to root. */
	prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
	fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (fd >= 0) { /* without it the kernel may choose the supervisor, and the end is the engine's word */
		if (write(fd, "1000", 4) != 4)
			errno = 0;
		close(fd);
	}
	/* Beside other processes of its box, which carry what it says: it must not starve them. No way leads back. */
	if (supervisor != 1)
		setpriority(PRIO_PROCESS, 0, 19);
	/* One byte and not none: none keeps a core from a file, and hands it to a program that core_pattern names all the same;
	 * one is how the kernel is told not to (Linux, fs/coredump.c). */
	if (!limit(RLIMIT_CORE, 1) || !limit(RLIMIT_NOFILE, o->nofile) || !limit(RLIMIT_FSIZE, o->fsize))
		return "setrlimit";
	if (o->nproc > 0) {
		if (!limit(RLIMIT_NPROC, o->nproc))
			return "setrlimit";
		*done |= HARD_NPROC;
	}
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
		return "no_new_privs";
	*done |= HARD_NO_NEW_PRIVS;
	for (unsigned long cap = 0; prctl(PR_CAPBSET_READ, cap) >= 0; cap++)
		prctl(PR_CAPBSET_DROP, cap);
	if ((problem = change_identity(o)) != NULL)
		return problem;
	/* After the change of uid, which clears it. With PID 1 the kernel ends everything; elsewhere at least the main process
	 * must not outlive a supervisor that was killed. */
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || getppid() != supervisor)
		return "the supervisor is gone";
	if (!drop_own_capabilities(false) || !no_capabilities())
		return "capset";
	*done |= HARD_NO_CAPABILITIES;
	*done |= landlock(o);
	if (o->need_landlock && !(*done & HARD_LANDLOCK_WRITES)) {
		errno = EPERM;
		return "the workspace can be made read-only neither as a mount nor by Landlock";
	}

	struct seccomp_rules rules = {
		.supervisor = supervisor,
		.sockets_unix_only = o->sockets_unix_only,
		.no_hidden_memory = o->memory_watch > 0,
	};
	if (!seccomp_apply(&rules))
		return "seccomp";
	*done |= HARD_SECCOMP | (o->sockets_unix_only ? HARD_SOCKETS_UNIX_ONLY : 0u);
	return NULL;
}
