/* What can be written, what lies in reach that should not, and which devices there are. What is made is removed again; what
 * belongs to others is opened and closed, never written. */
#include "probe.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <unistd.h>

#define MOUNTS_MAX 200u
#define DEVICES_MAX 64u
#define NAME ".cloche-probe"

static const char *const folders[] = {
	"/",	    "/etc",   "/usr",	     "/usr/bin", "/usr/local/bin", "/bin", "/lib",  "/var",	 "/var/tmp", "/run",
	"/home",    "/opt",   "/root",	     "/srv",	 "/mnt",	   "/dev", "/proc", "/proc/sys", "/sys",     "/sys/fs/cgroup",
	"/workspace", "/output", "/tmp", "/dev/shm", "/dev/mqueue", "/run/cloche",
};

static void try_folder(const char *path)
{
	char name[512];
	struct statvfs fs;
	int fd, error;

	snprintf(name, sizeof name, "%.400s/%s", strcmp(path, "/") == 0 ? "" : path, NAME);
	fd = open(name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
	error = fd < 0 ? errno : 0;
	see("create");
	see_text("path", path);
	see_number("errno", error);
	if (fd >= 0) {
		close(fd);
		unlink(name);
		if (statvfs(path, &fs) == 0) {
			see_number("bytes", (int64_t)(fs.f_blocks * fs.f_frsize));
			see_number("files", (int64_t)fs.f_files);
			see_number("device", (int64_t)fs.f_fsid);
		}
	}
	see_end();
}

/* Opened and closed: what a write would do is not for us to find out. */
static void try_file(const char *path, const char *how, int flags)
{
	struct stat st;
	const char *kind = "none";
	int fd;

	if (stat(path, &st) == 0)
		kind = S_ISREG(st.st_mode)   ? "file"
		       : S_ISDIR(st.st_mode) ? "folder"
		       : S_ISCHR(st.st_mode) ? "device"
					     : "other";
	fd = open(path, flags | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
	see("open");
	see_text("path", path);
	see_text("for", how);
	see_text("kind", kind);
	see_number("errno", fd < 0 ? errno : 0);
	see_end();
	if (fd >= 0)
		close(fd);
}

static bool is_listed(const char *path)
{
	for (size_t i = 0; i < sizeof folders / sizeof *folders; i++)
		if (strcmp(folders[i], path) == 0)
			return true;
	return false;
}

/* A space in a path is \040 there; such paths are left as they are. */
static void look_at_mounts(void)
{
	FILE *file = fopen("/proc/self/mountinfo", "re");
	char text[4096], path[512], options[256], type[64], source[512];
	struct stat st;
	int64_t count = 0;

	while (file && fgets(text, sizeof text, file)) {
		const char *rest = strstr(text, " - ");

		if (!rest || sscanf(text, "%*s %*s %*s %*s %511s %255s", path, options) != 2 ||
		    sscanf(rest, " - %63s %511s", type, source) != 2 || ++count > (int64_t)MOUNTS_MAX)
			continue;
		see("mount");
		see_text("path", path);
		see_text("type", type);
		see_text("source", source);
		see_text("options", options);
		see_end();
		if (strncmp(options, "rw", 2) != 0 || is_listed(path) || stat(path, &st) != 0)
			continue;
		if (S_ISDIR(st.st_mode))
			try_folder(path);
		else if (S_ISREG(st.st_mode))
			try_file(path, "write", O_WRONLY);
	}
	if (file)
		fclose(file);
	see("mounts");
	see_number("count", count);
	see_end();
}

void look_at_places(void)
{
	static const struct {
		const char *path, *how;
		int flags;
	} files[] = {
		/* Own, but below /proc: only Landlock keeps a script from it. */
		{"/proc/self/oom_score_adj", "write", O_WRONLY},
		{"/proc/sysrq-trigger", "write", O_WRONLY},
		{"/proc/sys/kernel/core_pattern", "write", O_WRONLY},
		{"/proc/sys/kernel/modprobe", "write", O_WRONLY},
		{"/proc/sys/vm/overcommit_memory", "write", O_WRONLY},
		{"/proc/irq/default_smp_affinity", "write", O_WRONLY},
		{"/sys/kernel/uevent_helper", "write", O_WRONLY},
		{"/sys/fs/cgroup/cgroup.procs", "write", O_WRONLY},
		{"/sys/fs/cgroup/memory/cgroup.procs", "write", O_WRONLY},
		{"/sys/fs/cgroup/devices/devices.allow", "write", O_WRONLY},
		{"/dev/termination-log", "write", O_WRONLY},
		{"/etc/passwd", "write", O_WRONLY},
		{"/proc/kcore", "read", O_RDONLY},
		{"/proc/keys", "read", O_RDONLY},
		{"/proc/kallsyms", "read", O_RDONLY},
		{"/proc/timer_list", "read", O_RDONLY},
		{"/proc/sched_debug", "read", O_RDONLY},
		{"/proc/latency_stats", "read", O_RDONLY},
		{"/proc/scsi", "read", O_RDONLY},
		{"/proc/acpi", "read", O_RDONLY},
		{"/sys/firmware", "read", O_RDONLY},
		{"/sys/kernel/debug", "read", O_RDONLY},
		{"/sys/kernel/security", "read", O_RDONLY},
	};

	for (size_t i = 0; i < sizeof folders / sizeof *folders; i++)
		try_folder(folders[i]);
	for (size_t i = 0; i < sizeof files / sizeof *files; i++)
		try_file(files[i].path, files[i].how, files[i].flags);
	look_at_mounts();
}

static int64_t entries(const char *path)
{
	DIR *folder = opendir(path);
	int64_t n = -2; /* itself and the one above */

	if (!folder)
		return 0;
	while (readdir(folder))
		n++;
	closedir(folder);
	return n > 0 ? n : 0;
}

static int try_socket(const char *path)
{
	struct sockaddr_un to = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), error = 0;

	if (fd < 0)
		return errno;
	snprintf(to.sun_path, sizeof to.sun_path, "%s", path);
	if (connect(fd, (const struct sockaddr *)&to, sizeof to) != 0)
		error = errno;
	close(fd);
	return error;
}

void look_at_credentials(void)
{
	static const char *const paths[] = {
		"/var/run/secrets/kubernetes.io/serviceaccount/token",
		"/run/secrets/kubernetes.io/serviceaccount/token",
		"/var/run/secrets/eks.amazonaws.com/serviceaccount/token",
		"/var/run/secrets/azure/tokens/azure-identity-token",
		"/run/secrets",
		"/root/.ssh",
		"/root/.aws/credentials",
		"/root/.azure",
		"/root/.config/gcloud",
		"/root/.docker/config.json",
		"/root/.kube/config",
		"/root/.netrc",
		"/root/.git-credentials",
		"/tmp/.aws/credentials",
		"/tmp/.docker/config.json",
		"/tmp/.kube/config",
		"/etc/kubernetes/admin.conf",
		"/etc/kubernetes/kubelet.conf",
		"/etc/rancher/k3s/k3s.yaml",
		"/var/lib/kubelet",
		"/var/run/docker.sock",
		"/run/docker.sock",
		"/run/podman/podman.sock",
		"/run/containerd/containerd.sock",
		"/run/k3s/containerd/containerd.sock",
		"/run/crio/crio.sock",
		"/run/dbus/system_bus_socket",
		"/run/systemd/private",
	};
	struct stat st;

	for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
		const char *kind = "none";
		int64_t size = 0;
		int error = 0;

		if (stat(paths[i], &st) != 0) {
			error = errno;
		} else if (S_ISSOCK(st.st_mode)) {
			kind = "socket";
			error = try_socket(paths[i]);
			size = 1;
		} else {
			bool folder = S_ISDIR(st.st_mode);
			int fd = open(paths[i], O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);

			kind = folder ? "folder" : "file";
			error = fd < 0 ? errno : 0;
			size = folder ? entries(paths[i]) : S_ISREG(st.st_mode) ? (int64_t)st.st_size : 0;
			if (fd >= 0)
				close(fd);
		}
		see("credential");
		see_text("path", paths[i]);
		see_text("kind", kind);
		see_number("errno", error);
		see_number("size", size);
		see_end();
	}
}

static unsigned n_devices;

static bool is_usual(const char *path)
{
	static const char *const usual[] = {"/dev/null",    "/dev/zero", "/dev/full",	 "/dev/random", "/dev/urandom",
					    "/dev/tty",	    "/dev/ptmx", "/dev/console", "/dev/pts/ptmx"};

	for (size_t i = 0; i < sizeof usual / sizeof *usual; i++)
		if (strcmp(usual[i], path) == 0)
			return true;
	/* The consoles, of which there are dozens where there are any; the first stands for all of them. */
	return (strncmp(path, "/dev/tty", 8) == 0 && path[8] >= '1' && path[8] <= '9') || strncmp(path, "/dev/vcs", 8) == 0 ||
	       strncmp(path, "/dev/pts/", 9) == 0;
}

/* access(2) asks the device cgroup as well. Opened none: some devices act when they are (a watchdog begins to count). */
static void devices_in(const char *folder, int depth)
{
	DIR *dir = opendir(folder);
	char path[512];
	struct stat st;

	for (struct dirent *entry; dir && n_devices < DEVICES_MAX && (entry = readdir(dir)) != NULL;) {
		if (entry->d_name[0] == '.')
			continue;
		snprintf(path, sizeof path, "%.200s/%.255s", folder, entry->d_name);
		if (lstat(path, &st) != 0)
			continue;
		if (S_ISDIR(st.st_mode) && depth > 0) {
			devices_in(path, depth - 1);
		} else if ((S_ISCHR(st.st_mode) || S_ISBLK(st.st_mode)) && !is_usual(path)) {
			n_devices++;
			see("device");
			see_text("path", path);
			see_text("kind", S_ISBLK(st.st_mode) ? "block" : "character");
			see_number("major", (int64_t)major(st.st_rdev));
			see_number("minor", (int64_t)minor(st.st_rdev));
			see_number("read", access(path, R_OK) == 0 ? 0 : errno);
			see_number("write", access(path, W_OK) == 0 ? 0 : errno);
			see_end();
		}
	}
	if (dir)
		closedir(dir);
}

void look_at_devices(void)
{
	devices_in("/dev", 1);
	see("devices");
	see_number("count", n_devices);
	see_end();
}
