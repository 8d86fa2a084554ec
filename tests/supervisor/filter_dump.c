/* Prints the system call filter as it is for the architecture that this is compiled for, and the numbers that go with it. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>

/* The filter is wanted on paper here, not in force. */
#define prctl(option, mode, filter, ...) ((void)(filter), 0)
#include "seccomp.c"

#define NAMED(call) {#call, SYS_##call}

static const struct {
	const char *name;
	long number;
} calls[] = {
	NAMED(read), NAMED(write), NAMED(openat), NAMED(close), NAMED(mmap), NAMED(mprotect), NAMED(munmap), NAMED(brk),
	NAMED(futex), NAMED(execve), NAMED(exit_group), NAMED(wait4), NAMED(getrandom), NAMED(memfd_create), NAMED(prlimit64),
	NAMED(sched_getaffinity), NAMED(rt_sigaction), NAMED(rt_sigprocmask), NAMED(sigaltstack), NAMED(set_robust_list),
	NAMED(epoll_pwait), NAMED(eventfd2), NAMED(pipe2), NAMED(clock_nanosleep), NAMED(getpid), NAMED(setsid), NAMED(madvise),
	NAMED(statx), NAMED(getcwd), NAMED(connect), NAMED(bind), NAMED(sendmsg), NAMED(seccomp), NAMED(capset),
	NAMED(clone), NAMED(unshare), NAMED(kill), NAMED(tkill), NAMED(tgkill), NAMED(rt_sigqueueinfo), NAMED(rt_tgsigqueueinfo),
	NAMED(sched_setparam), NAMED(sched_setscheduler), NAMED(sched_setattr), NAMED(sched_setaffinity), NAMED(move_pages),
	NAMED(setpriority), NAMED(getpriority), NAMED(ioprio_set), NAMED(prctl), NAMED(fcntl), NAMED(ioctl), NAMED(mknodat),
	NAMED(personality), NAMED(socket), NAMED(socketpair), NAMED(shmget), NAMED(shmat), NAMED(ptrace), NAMED(process_vm_readv),
	NAMED(process_vm_writev), NAMED(kcmp), NAMED(migrate_pages), NAMED(setns), NAMED(mount), NAMED(umount2),
	NAMED(pivot_root), NAMED(chroot), NAMED(quotactl), NAMED(swapon), NAMED(swapoff), NAMED(open_by_handle_at),
	NAMED(fanotify_init), NAMED(acct), NAMED(nfsservctl), NAMED(keyctl), NAMED(add_key), NAMED(request_key), NAMED(bpf),
	NAMED(perf_event_open), NAMED(userfaultfd), NAMED(kexec_load), NAMED(kexec_file_load), NAMED(init_module),
	NAMED(finit_module), NAMED(delete_module), NAMED(reboot), NAMED(syslog), NAMED(sethostname), NAMED(setdomainname),
	NAMED(settimeofday), NAMED(clock_settime), NAMED(clock_adjtime), NAMED(adjtimex), NAMED(vhangup), NAMED(lookup_dcookie),
	NAMED(setxattr), NAMED(lsetxattr), NAMED(fsetxattr), NAMED(removexattr), NAMED(lremovexattr), NAMED(fremovexattr),
	NAMED(getxattr), NAMED(listxattr), NAMED(io_setup),
#ifdef SYS_fork
	NAMED(fork), NAMED(vfork), NAMED(open), NAMED(poll), NAMED(arch_prctl), NAMED(mknod), NAMED(iopl), NAMED(ioperm),
	NAMED(uselib), NAMED(ustat), NAMED(sysfs), NAMED(modify_ldt),
#endif
	/* Newer than some headers, and the same everywhere. */
	{"pidfd_send_signal", 424}, {"io_uring_setup", 425}, {"io_uring_enter", 426}, {"io_uring_register", 427},
	{"open_tree", 428}, {"move_mount", 429}, {"fsopen", 430}, {"fsconfig", 431}, {"fsmount", 432}, {"fspick", 433},
	{"pidfd_open", 434}, {"clone3", 435}, {"close_range", 436}, {"openat2", 437}, {"pidfd_getfd", 438}, {"faccessat2", 439},
	{"process_madvise", 440}, {"epoll_pwait2", 441}, {"mount_setattr", 442}, {"quotactl_fd", 443},
	{"landlock_create_ruleset", 444}, {"memfd_secret", 447}, {"process_mrelease", 448}, {"futex_waitv", 449},
	{"fchmodat2", 452}, {"setxattrat", 463}, {"removexattrat", 466}, {"open_tree_attr", 467}, {"newest", NEWEST},
};

/* Arguments: the supervisor's pid, whether sockets are AF_UNIX only, whether hidden memory is refused. */
int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	struct seccomp_rules rules = {
		.supervisor = (pid_t)atol(argv[1]),
		.sockets_unix_only = argv[2][0] == '1',
		.no_hidden_memory = argv[3][0] == '1',
	};

	if (!seccomp_apply(&rules))
		return 1;
	printf("{\"arch\": %u, \"calls\": {", NATIVE_ARCH);
	for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
		printf("%s\"%s\": %ld", i ? ", " : "", calls[i].name, calls[i].number);
	printf("}, \"program\": [");
	for (unsigned i = 0; i < length; i++)
		printf("%s[%u, %u, %u, %u]", i ? ", " : "", program[i].code, program[i].jt, program[i].jf, program[i].k);
	printf("]}\n");
	return 0;
}
