/* System calls that no script needs, each tried in a process of its own: what it answers, or which signal ended the process.
 * With every right in the world none of them would do anything, and the error then is another one than the refusal's. */
#include "probe.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/keyctl.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define NOWHERE "/cloche-none"
#define DEVICE "/tmp/cloche-probe-device"

/* Numbers that are the same on every architecture since 5.0; see seccomp.c. */
enum {
	SYS_IO_URING_SETUP = 425,
	SYS_OPEN_TREE = 428,
	SYS_FSOPEN = 430,
	SYS_PIDFD_OPEN = 434,
	SYS_CLONE3 = 435,
};

static pid_t guard;
static char own[1];

/* Each gives 0 where the kernel did it, else errno. */
#define ATTEMPT(name, call)                                                                                            \
	static int name(void)                                                                                          \
	{                                                                                                              \
		return (call) < 0 ? errno : 0;                                                                         \
	}

ATTEMPT(unshare_user, unshare(CLONE_NEWUSER))
ATTEMPT(unshare_net, unshare(CLONE_NEWNET))
ATTEMPT(unshare_mount, unshare(CLONE_NEWNS))
ATTEMPT(clone3, syscall(SYS_CLONE3, NULL, 0))
ATTEMPT(set_namespace, syscall(SYS_setns, -1, 0))
/* On a folder that is no mount, of a file system that does not exist. */
ATTEMPT(mount_call, syscall(SYS_mount, NULL, "/proc/self", "cloche-none", 0, NULL))
ATTEMPT(umount_call, syscall(SYS_umount2, "/proc/self", 0))
ATTEMPT(pivot_root, syscall(SYS_pivot_root, NOWHERE, NOWHERE))
ATTEMPT(chroot_call, syscall(SYS_chroot, "/"))
ATTEMPT(open_tree, syscall(SYS_OPEN_TREE, -1, NULL, 0))
ATTEMPT(fsopen, syscall(SYS_FSOPEN, "cloche-none", 0))
ATTEMPT(ptrace_call, syscall(SYS_ptrace, PTRACE_TRACEME, 0, NULL, NULL))
ATTEMPT(add_key, syscall(SYS_add_key, "user", "cloche", own, 1, KEY_SPEC_PROCESS_KEYRING))
ATTEMPT(keyctl, syscall(SYS_keyctl, KEYCTL_GET_KEYRING_ID, KEY_SPEC_PROCESS_KEYRING, 0))
ATTEMPT(bpf, syscall(SYS_bpf, 9999, NULL, 0))
ATTEMPT(perf_event_open, syscall(SYS_perf_event_open, NULL, 0, -1, -1, 0))
ATTEMPT(io_uring_setup, syscall(SYS_IO_URING_SETUP, 0, NULL))
ATTEMPT(userfaultfd, syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK))
ATTEMPT(init_module, syscall(SYS_init_module, NULL, 0, ""))
ATTEMPT(finit_module, syscall(SYS_finit_module, -1, "", 0))
ATTEMPT(delete_module, syscall(SYS_delete_module, "cloche-none", O_NONBLOCK))
/* More segments than there may be: with fewer, none would mean to forget a kernel that is loaded. */
ATTEMPT(kexec_load, syscall(SYS_kexec_load, 0, 1000, NULL, 0))
/* Without the numbers that make it mean anything. */
ATTEMPT(reboot_call, syscall(SYS_reboot, 0, 0, 0, NULL))
ATTEMPT(syslog_call, syscall(SYS_syslog, 10 /* the size of the buffer */, NULL, 0))
ATTEMPT(sethostname_call, syscall(SYS_sethostname, "", -1))
ATTEMPT(open_by_handle_at_call, syscall(SYS_open_by_handle_at, -1, NULL, O_RDONLY))
ATTEMPT(personality_call, syscall(SYS_personality, 0x0040000 /* ADDR_NO_RANDOMIZE */))
ATTEMPT(type_into_terminal, ioctl(0, TIOCSTI, NULL))
ATTEMPT(kill_all, kill(-1, 0))
ATTEMPT(kill_first, kill(1, 0))

ATTEMPT(set_uid, syscall(SYS_setuid, 0))
ATTEMPT(set_gid, syscall(SYS_setgid, 0))
ATTEMPT(set_groups, syscall(SYS_setgroups, 0, NULL))

/* Signal 0 asks whether one could be sent. */
ATTEMPT(guard_kill, kill(guard, 0))
ATTEMPT(guard_prlimit, syscall(SYS_prlimit64, guard, RLIMIT_CPU, NULL, NULL))
/* An empty set: refused after the right to set one. */
ATTEMPT(guard_affinity, syscall(SYS_sched_setaffinity, guard, 0, NULL))
/* Stops nobody, unlike PTRACE_ATTACH, and ends with this process. */
ATTEMPT(guard_ptrace, syscall(SYS_ptrace, PTRACE_SEIZE, guard, NULL, NULL))
ATTEMPT(guard_pidfd, syscall(SYS_PIDFD_OPEN, guard, 0))

static int clone_user(void)
{
	long pid = syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, NULL, NULL, NULL, NULL);

	if (pid == 0)
		_exit(0);
	return pid < 0 ? errno : 0;
}

static int process_vm_readv_call(void)
{
	char byte;
	struct iovec to = {&byte, 1}, from = {own, 1};

	return syscall(SYS_process_vm_readv, getpid(), &to, 1, &from, 1, 0) < 0 ? errno : 0;
}

static int make_device(void)
{
	if (mknodat(AT_FDCWD, DEVICE, S_IFCHR | 0600, makedev(1, 3)) != 0)
		return errno;
	unlink(DEVICE);
	return 0;
}

#ifdef __x86_64__
/* getpid, by the door that programs of 32 bits use, and by that of x32. */
static int call_i386(void)
{
	long result;

	__asm__ volatile("int $0x80" : "=a"(result) : "a"(20L) : "memory", "r8", "r9", "r10", "r11");
	return (int32_t)result < 0 ? -(int32_t)result : 0;
}

static int call_x32(void)
{
	return syscall(0x40000000L | SYS_getpid) < 0 ? errno : 0;
}
#endif

static const struct {
	const char *group, *name;
	int (*attempt)(void);
} attempts[] = {
	{"filter", "unshare-user", unshare_user},
	{"filter", "unshare-net", unshare_net},
	{"filter", "unshare-mount", unshare_mount},
	{"filter", "clone-user", clone_user},
	{"filter", "clone3", clone3},
	{"filter", "setns", set_namespace},
	{"filter", "mount", mount_call},
	{"filter", "umount2", umount_call},
	{"filter", "pivot_root", pivot_root},
	{"filter", "chroot", chroot_call},
	{"filter", "open_tree", open_tree},
	{"filter", "fsopen", fsopen},
	{"filter", "ptrace", ptrace_call},
	{"filter", "process_vm_readv", process_vm_readv_call},
	{"filter", "add_key", add_key},
	{"filter", "keyctl", keyctl},
	{"filter", "bpf", bpf},
	{"filter", "perf_event_open", perf_event_open},
	{"filter", "io_uring_setup", io_uring_setup},
	{"filter", "userfaultfd", userfaultfd},
	{"filter", "init_module", init_module},
	{"filter", "finit_module", finit_module},
	{"filter", "delete_module", delete_module},
	{"filter", "kexec_load", kexec_load},
	{"filter", "reboot", reboot_call},
	{"filter", "syslog", syslog_call},
	{"filter", "sethostname", sethostname_call},
	{"filter", "open_by_handle_at", open_by_handle_at_call},
	{"filter", "personality", personality_call},
	{"filter", "mknod-device", make_device},
	{"filter", "ioctl-tiocsti", type_into_terminal},
#ifdef __x86_64__
	{"filter", "i386", call_i386},
	{"filter", "x32", call_x32},
#endif
	{"filter", "kill-all", kill_all},
	{"identity", "setuid-0", set_uid},
	{"identity", "setgid-0", set_gid},
	{"identity", "setgroups", set_groups},
	{"guard", "kill", guard_kill},
	{"guard", "prlimit", guard_prlimit},
	{"guard", "sched_setaffinity", guard_affinity},
	{"guard", "ptrace", guard_ptrace},
	{"guard", "pidfd_open", guard_pidfd},
	{"first", "kill", kill_first},
};

static void tell(const char *group, const char *name, int (*attempt)(void))
{
	int status = 0;
	pid_t pid = fork();

	if (pid == 0) {
		alarm(2); /* no alarm is inherited */
		_exit(attempt());
	}
	see("call");
	see_text("group", group);
	see_text("name", name);
	if (pid < 0 || waitpid(pid, &status, 0) != pid)
		see_text("untried", "no process could be started for it");
	else if (WIFSIGNALED(status))
		see_number("signal", WTERMSIG(status));
	else
		see_number("errno", WEXITSTATUS(status)); /* all errors have numbers below 256 */
	see_end();
}

void look_at_calls(pid_t whose)
{
	guard = whose;
	for (size_t i = 0; i < sizeof attempts / sizeof *attempts; i++)
		tell(attempts[i].group, attempts[i].name, attempts[i].attempt);
}
