/* "launch": what the local backend starts instead of bubblewrap itself. It leaves root for a uid of the run's own, ties its
 * life to cloche's, and becomes bubblewrap. In C because it must happen between fork and exec, where a threaded Python
 * cannot do it safely.
 *
 *   launch --parent PID [--shelf DIR [--show SRC]…] [--uid N --gid N] -- PROGRAM ARG…
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

int launch_main(int argc, char **argv)
{
	const char *shelf = NULL, *sources[64];
	unsigned shown = 0;
	uint64_t uid = 0, gid = 0, parent = 0;
	int i = 2;

	for (; i + 1 < argc && strcmp(argv[i], "--") != 0; i += 2) {
		const char *name = argv[i], *value = argv[i + 1];

		if (strcmp(name, "--shelf") == 0) {
			shelf = value;
		} else if (strcmp(name, "--show") == 0 && shown < sizeof sources / sizeof *sources) {
			sources[shown++] = value;
		} else if ((strcmp(name, "--uid") == 0 && parse_u64(value, &uid)) ||
			   (strcmp(name, "--gid") == 0 && parse_u64(value, &gid)) ||
			   (strcmp(name, "--parent") == 0 && parse_u64(value, &parent))) {
			continue;
		} else {
			errno = EINVAL;
			return die("option", name);
		}
	}
	if (i + 1 >= argc || parent == 0) {
		errno = EINVAL;
		return die("usage", "");
	}
	if (shelf) {
		if (!lay_shelf(shelf))
			return die("a mount namespace for", shelf);
		for (unsigned n = 0; n < shown; n++)
			if (!show(shelf, n, sources[n]))
				return die("showing", sources[n]);
	}
	if (uid != 0 && (setgroups(0, NULL) != 0 || setresgid((gid_t)gid, (gid_t)gid, (gid_t)gid) != 0 ||
			 setresuid((uid_t)uid, (uid_t)uid, (uid_t)uid) != 0))
		return die("becoming uid", "of the run");
	/* After the change of uid, which clears it. */
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || (uint64_t)getppid() != parent)
		return die("the parent is gone:", "");
	execv(argv[i + 1], argv + i + 1);
	return die("starting", argv[i + 1]);
}
