/* The script's seccomp filter: a list of what is refused, over whatever filter the engine has set. Refused calls fail with
 * EPERM; a program that can do without them goes on. Arguments are compared in their lower 32 bits where the kernel takes
 * an int: the upper ones are ignored there too, and a filter that looked at them could be passed with a high bit. */
#include "cloche.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#if defined __x86_64__
#define NATIVE_ARCH AUDIT_ARCH_X86_64
#elif defined __aarch64__
#define NATIVE_ARCH AUDIT_ARCH_AARCH64
#else
#error "no seccomp filter for this architecture"
#endif

#define X32_BIT 0x40000000u
#define DENY (SECCOMP_RET_ERRNO | EPERM)
#define ABSENT (SECCOMP_RET_ERRNO | ENOSYS)
#define UNSUPPORTED (SECCOMP_RET_ERRNO | EOPNOTSUPP)
#define NEWEST 470u /* first number this list knows nothing of (Linux 6.18); what comes later does not exist for scripts */
#define NAMESPACES 0x7e020000u /* CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET} */
#define NEWTIME 0x80u          /* an unshare flag; in clone these bits are the exit signal */

/* Numbers that are the same on every architecture since 5.0, for C libraries whose headers are older. */
enum {
	SYS_PIDFD_SEND_SIGNAL = 424,
	SYS_IO_URING_SETUP = 425,
	SYS_IO_URING_ENTER = 426,
	SYS_IO_URING_REGISTER = 427,
	SYS_OPEN_TREE = 428,
	SYS_MOVE_MOUNT = 429,
	SYS_FSOPEN = 430,
	SYS_FSCONFIG = 431,
	SYS_FSMOUNT = 432,
	SYS_FSPICK = 433,
	SYS_PIDFD_OPEN = 434,
	SYS_CLONE3 = 435,
	SYS_PIDFD_GETFD = 438,
	SYS_PROCESS_MADVISE = 440,
	SYS_MOUNT_SETATTR = 442,
	SYS_QUOTACTL_FD = 443,
	SYS_MEMFD_SECRET = 447,
	SYS_PROCESS_MRELEASE = 448,
	SYS_SETXATTRAT = 463,
	SYS_REMOVEXATTRAT = 466,
	SYS_OPEN_TREE_ATTR = 467,
};

static struct sock_filter program[640];
static unsigned short length;

static void put(uint16_t code, uint32_t k, uint8_t jt, uint8_t jf)
{
	if (length < sizeof program / sizeof *program)
		program[length] = (struct sock_filter){code, jt, jf, k};
	length++;
}

static void load(size_t offset)
{
	put(BPF_LD | BPF_W | BPF_ABS, (uint32_t)offset, 0, 0);
}

/* The lower half of an argument; both architectures are little endian. */
static void load_arg(unsigned i)
{
	load(offsetof(struct seccomp_data, args) + i * sizeof(uint64_t));
}

static void refuse(uint32_t nr)
{
	put(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1);
	put(BPF_RET | BPF_K, DENY, 0, 0);
}

/* A block that only one number enters: begin_block, conditions that return, end_block allows the rest. */
static unsigned short block;

static void begin_block(uint32_t nr)
{
	block = length;
	put(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 0);
}

static void end_block(uint32_t otherwise)
{
	put(BPF_RET | BPF_K, otherwise, 0, 0);
	if (length <= sizeof program / sizeof *program)
		program[block].jf = (uint8_t)(length - block - 1);
}

static void deny_if_equal(uint32_t value)
{
	put(BPF_JMP | BPF_JEQ | BPF_K, value, 0, 1);
	put(BPF_RET | BPF_K, DENY, 0, 0);
}

static void deny_if_any_bit(uint32_t bits)
{
	put(BPF_JMP | BPF_JSET | BPF_K, bits, 0, 1);
	put(BPF_RET | BPF_K, DENY, 0, 0);
}

static void deny_unless_equal(uint32_t value)
{
	put(BPF_JMP | BPF_JEQ | BPF_K, value, 1, 0);
	put(BPF_RET | BPF_K, DENY, 0, 0);
}

/* Only "the caller": 0 in that argument. */
static void only_self(uint32_t nr, unsigned arg)
{
	begin_block(nr);
	load_arg(arg);
	deny_unless_equal(0);
	end_block(SECCOMP_RET_ALLOW);
}

/* Only a process of a kind (PRIO_PROCESS and its like), and only the caller. */
static void only_own_process(uint32_t nr, uint32_t process_kind)
{
	begin_block(nr);
	load_arg(0);
	deny_unless_equal(process_kind);
	load_arg(1);
	deny_unless_equal(0);
	end_block(SECCOMP_RET_ALLOW);
}

/* Signals: not at the supervisor, not at its process group, not at everybody. */
static void not_the_supervisor(uint32_t nr, unsigned args, pid_t supervisor)
{
	begin_block(nr);
	for (unsigned i = 0; i < args; i++) {
		load_arg(i);
		deny_if_equal((uint32_t)supervisor);
		deny_if_equal((uint32_t)-supervisor);
		deny_if_equal((uint32_t)-1);
	}
	end_block(SECCOMP_RET_ALLOW);
}

static void devices(uint32_t nr, unsigned arg)
{
	begin_block(nr);
	load_arg(arg);
	put(BPF_ALU | BPF_AND | BPF_K, S_IFMT, 0, 0);
	deny_if_equal(S_IFCHR);
	deny_if_equal(S_IFBLK);
	end_block(SECCOMP_RET_ALLOW);
}

static const uint16_t refused[] = {
	/* other processes' memory and state */
	SYS_ptrace, SYS_process_vm_readv, SYS_process_vm_writev, SYS_kcmp, SYS_PIDFD_GETFD, SYS_PIDFD_SEND_SIGNAL,
	SYS_PROCESS_MADVISE, SYS_PROCESS_MRELEASE, SYS_migrate_pages,
	/* namespaces and mounts */
	SYS_setns, SYS_mount, SYS_umount2, SYS_pivot_root, SYS_chroot, SYS_OPEN_TREE, SYS_OPEN_TREE_ATTR, SYS_MOVE_MOUNT,
	SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT, SYS_FSPICK, SYS_MOUNT_SETATTR, SYS_quotactl, SYS_QUOTACTL_FD, SYS_swapon,
	SYS_swapoff, SYS_open_by_handle_at, SYS_fanotify_init, SYS_acct, SYS_nfsservctl,
	/* large attack surface that no script needs */
	SYS_keyctl, SYS_add_key, SYS_request_key, SYS_bpf, SYS_perf_event_open, SYS_userfaultfd, SYS_IO_URING_SETUP,
	SYS_IO_URING_ENTER, SYS_IO_URING_REGISTER, SYS_MEMFD_SECRET,
	/* the kernel and the machine */
	SYS_kexec_load, SYS_kexec_file_load, SYS_init_module, SYS_finit_module, SYS_delete_module, SYS_reboot, SYS_syslog,
	SYS_sethostname, SYS_setdomainname, SYS_settimeofday, SYS_clock_settime, SYS_clock_adjtime, SYS_adjtimex, SYS_vhangup,
	SYS_lookup_dcookie,
#ifdef SYS_iopl
	SYS_iopl, SYS_ioperm, SYS_uselib, SYS_ustat, SYS_sysfs, SYS_modify_ldt,
#endif
};

/* What programs call most, and no rule is about. First, for kernels that go through the filter at each call: Linux keeps what
 * is always allowed in a table, gVisor does not, and there the whole list takes longer than the call. */
static const uint16_t frequent[] = {
	SYS_read, SYS_write, SYS_openat, SYS_close, SYS_newfstatat, SYS_fstat, SYS_lseek, SYS_futex, SYS_munmap, SYS_mprotect,
	SYS_brk, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_getdents64, SYS_pread64, SYS_readlinkat, SYS_writev, SYS_ppoll,
	SYS_epoll_pwait, SYS_clock_gettime, SYS_getpid, SYS_gettid, SYS_getrandom, SYS_sched_yield,
#ifdef SYS_access
	SYS_access, SYS_stat, SYS_lstat, SYS_readlink, SYS_poll, SYS_epoll_wait, SYS_open,
#endif
};

/* Extended attributes: writes beside a file's contents, for which Landlock has no rule, and which no bound of sizes counts. A
 * pod's /dev/termination-log, which all may write to, is a file on the node's disk. Programs that copy files take this answer
 * for that of a file system without attributes, and go on. */
static const uint16_t attributes[] = {
	SYS_setxattr,	 SYS_lsetxattr,	   SYS_fsetxattr,     SYS_SETXATTRAT,
	SYS_removexattr, SYS_lremovexattr, SYS_fremovexattr, SYS_REMOVEXATTRAT,
};

static void answer(uint32_t nr, uint32_t what)
{
	put(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1);
	put(BPF_RET | BPF_K, what, 0, 0);
}

static void allow(uint32_t nr)
{
	put(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1);
	put(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
}

static void argument_rules(const struct seccomp_rules *r)
{
	begin_block(SYS_clone);
	load_arg(0);
	deny_if_any_bit(NAMESPACES);
	end_block(SECCOMP_RET_ALLOW);
	begin_block(SYS_unshare);
	load_arg(0);
	deny_if_any_bit(NAMESPACES | NEWTIME);
	end_block(SECCOMP_RET_ALLOW);
	begin_block(SYS_CLONE3); /* its flags are in memory, which a filter cannot read; libc falls back to clone */
	end_block(ABSENT);

	not_the_supervisor(SYS_kill, 1, r->supervisor);
	not_the_supervisor(SYS_tkill, 1, r->supervisor);
	not_the_supervisor(SYS_tgkill, 2, r->supervisor);
	not_the_supervisor(SYS_rt_sigqueueinfo, 1, r->supervisor);
	not_the_supervisor(SYS_rt_tgsigqueueinfo, 2, r->supervisor);
	not_the_supervisor(SYS_PIDFD_OPEN, 1, r->supervisor);
	only_self(SYS_prlimit64, 0);
	only_self(SYS_sched_setparam, 0);
	only_self(SYS_sched_setscheduler, 0);
	only_self(SYS_sched_setattr, 0);
	only_self(SYS_sched_setaffinity, 0);
	only_self(SYS_move_pages, 0);
	only_own_process(SYS_setpriority, 0 /* PRIO_PROCESS */);
	only_own_process(SYS_ioprio_set, 1 /* IOPRIO_WHO_PROCESS */);

	begin_block(SYS_prctl);
	load_arg(0);
	deny_if_equal(62); /* PR_SCHED_CORE names another process */
	end_block(SECCOMP_RET_ALLOW);
	/* The owner of a descriptor gets signals from the kernel, of the number that F_SETSIG chooses. */
	begin_block(SYS_fcntl);
	load_arg(1);
	deny_if_equal(F_SETSIG);
	deny_if_equal(15 /* F_SETOWN_EX */);
	put(BPF_JMP | BPF_JEQ | BPF_K, F_SETOWN, 0, 7);
	load_arg(2);
	deny_if_equal((uint32_t)r->supervisor);
	deny_if_equal((uint32_t)-r->supervisor);
	deny_if_equal((uint32_t)-1);
	end_block(SECCOMP_RET_ALLOW);
	begin_block(SYS_ioctl);
	load_arg(1);
	deny_if_equal(0x5412); /* TIOCSTI: types into the terminal */
	deny_if_equal(0x541c); /* TIOCLINUX: pastes into it */
	deny_if_equal(0x5423); /* TIOCSETD: loads line disciplines */
	deny_if_equal(0x8901); /* FIOSETOWN */
	deny_if_equal(0x8902); /* SIOCSPGRP */
	end_block(SECCOMP_RET_ALLOW);

	devices(SYS_mknodat, 2);
#ifdef SYS_mknod
	devices(SYS_mknod, 1);
#endif
	begin_block(SYS_personality);
	load_arg(0);
	put(BPF_JMP | BPF_JEQ | BPF_K, 0, 2, 0);
	put(BPF_JMP | BPF_JEQ | BPF_K, 0xffffffffu, 1, 0);
	put(BPF_RET | BPF_K, DENY, 0, 0);
	end_block(SECCOMP_RET_ALLOW);

	/* Families by an allow-list: an empty network namespace does not hold vsock back, and the rest is attack surface. */
	begin_block(SYS_socket);
	load_arg(0);
	put(BPF_JMP | BPF_JEQ | BPF_K, AF_UNIX, r->sockets_unix_only ? 1 : 4, 0);
	if (!r->sockets_unix_only) {
		put(BPF_JMP | BPF_JEQ | BPF_K, AF_INET, 3, 0);
		put(BPF_JMP | BPF_JEQ | BPF_K, AF_INET6, 2, 0);
		put(BPF_JMP | BPF_JEQ | BPF_K, AF_NETLINK, 1, 0);
	}
	put(BPF_RET | BPF_K, DENY, 0, 0);
	end_block(SECCOMP_RET_ALLOW);

	begin_block(SYS_socketpair); /* the same for those that make pairs: TIPC can */
	load_arg(0);
	deny_unless_equal(AF_UNIX);
	end_block(SECCOMP_RET_ALLOW);

	if (r->no_hidden_memory) {
		refuse(SYS_memfd_create);
		refuse(SYS_shmget);
		/* Shared pages stay when no process maps them any more, and so does what was sent to swap. */
		begin_block(SYS_mmap);
		load_arg(3);
		put(BPF_ALU | BPF_AND | BPF_K, MAP_TYPE | MAP_ANONYMOUS, 0, 0);
		deny_if_equal(MAP_SHARED | MAP_ANONYMOUS);
		end_block(SECCOMP_RET_ALLOW);
		begin_block(SYS_madvise);
		load_arg(2);
		deny_if_equal(21 /* MADV_PAGEOUT */);
		end_block(SECCOMP_RET_ALLOW);
	}
}

bool seccomp_apply(const struct seccomp_rules *r)
{
	length = 0;
	load(offsetof(struct seccomp_data, arch));
	put(BPF_JMP | BPF_JEQ | BPF_K, NATIVE_ARCH, 1, 0);
	put(BPF_RET | BPF_K, DENY, 0, 0);
	load(offsetof(struct seccomp_data, nr));
#ifdef __x86_64__
	put(BPF_JMP | BPF_JGE | BPF_K, X32_BIT, 0, 1);
	put(BPF_RET | BPF_K, DENY, 0, 0);
#endif
	put(BPF_JMP | BPF_JGE | BPF_K, NEWEST, 0, 1);
	put(BPF_RET | BPF_K, ABSENT, 0, 0);
	for (size_t i = 0; i < sizeof frequent / sizeof *frequent; i++)
		allow(frequent[i]);
	if (!r->no_hidden_memory)
		allow(SYS_mmap);
	argument_rules(r);
	for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++)
		answer(attributes[i], UNSUPPORTED);
	answer(SYS_io_setup, ABSENT); /* the kernel has one number of its events for the whole machine (fs.aio-max-nr) */
	for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
		refuse(refused[i]);
	put(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
	if (length > sizeof program / sizeof *program) {
		errno = E2BIG;
		return false;
	}
	struct sock_fprog whole = {.len = length, .filter = program};

	return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &whole, 0, 0) == 0;
}
